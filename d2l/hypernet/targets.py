"""Target modules of the LoRA: for every requested name one in each decoder layer of the base.

A name is that of a Linear, or `mlp`: the layer's whole MLP or Mixture-of-Experts block, with a linear parallel adapter
(He et al. 2022) beside it. Its delta goes from the block's input to its output, past router and experts, so it reaches
what a LoRA of Linears cannot where experts are parameters.
"""

from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from d2l.base.layers import decoder_layers
from d2l.errors import ModelError

Targets = Mapping[str, Sequence[nn.Module]]  # module name → its module in every decoder layer, in order

MLP_BLOCK = "mlp"  # the name that transformers gives to this block in nearly all of its decoder layers


def find_targets(base: PreTrainedModel, target_modules: Sequence[str]) -> dict[str, list[nn.Module]]:
    """Find the module of each requested name in every decoder layer, in order.

    Args:
        base: a causal LM of transformers.
        target_modules: last parts of the names of Linears, such as `q_proj`; or `mlp` for the layers' blocks.

    Raises:
        ModelError: a name does not match exactly one Linear or block in every layer.
    """
    layers = decoder_layers(base)
    adaptable = [_adaptable(layer) for layer in layers]
    targets: dict[str, list[nn.Module]] = {}
    problems = []
    for name in target_modules:
        found = [[m for other, m in layer if other == name] for layer in adaptable]
        wrong = {i: len(matches) for i, matches in enumerate(found) if len(matches) != 1}
        if not wrong:
            targets[name] = [module for (module,) in found]
            continue
        where = "every layer" if len(wrong) == len(layers) else f"layers {', '.join(map(str, wrong))} of {len(layers)}"
        counts = " or ".join(map(str, sorted(set(wrong.values()))))
        kind = "blocks" if name == MLP_BLOCK else "Linears"
        problems.append(f"  {name}: {counts} {kind} of that name in {where}{_parameter_note(layers, name)}")
    if problems:
        everywhere = set.intersection(*({name for name, _ in layer} for layer in adaptable))
        linears = ", ".join(sorted(everywhere - {MLP_BLOCK})) or "none"
        block = f"; beside the whole block: {MLP_BLOCK}" if MLP_BLOCK in everywhere else ""
        raise ModelError(
            f"target_modules: each name must be exactly one Linear in every decoder layer of {type(base).__name__}:\n"
            + "\n".join(problems)
            + f"\nLinears in every layer: {linears}{block}. Choose target_modules from these."
        )
    return targets


def _adaptable(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """List what can be adapted in a decoder layer, with names."""
    found: list[tuple[str, nn.Module]] = [
        (path.rpartition(".")[2], m) for path, m in layer.named_modules() if isinstance(m, nn.Linear)
    ]
    block = getattr(layer, MLP_BLOCK, None)
    return [*found, (MLP_BLOCK, block)] if isinstance(block, nn.Module) else found


def _parameter_note(layers: nn.ModuleList, name: str) -> str:
    """Explain that a requested name is a parameter, as the experts of a Mixture of Experts often are; else empty."""
    for path, parameter in layers.named_parameters():
        if path.rpartition(".")[2] == name:
            return f"; it is a parameter {list(parameter.shape)}, which a LoRA of Linears cannot adapt"
    return ""


def target_sizes(targets: Targets, hidden_size: int) -> dict[str, tuple[int, int]]:
    """Return (d_in, d_out) of each target module.

    Args:
        targets: from `find_targets`.
        hidden_size: of the base's residual stream, which a block reads and writes.

    Raises:
        ModelError: the sizes of a module differ between layers; the hypernetwork's head makes one size per module.
    """
    sizes = {}
    for name, modules in targets.items():
        distinct = list(dict.fromkeys(_size(module, hidden_size) for module in modules))
        if len(distinct) > 1:
            raise ModelError(
                f"target_modules: {name} has (d_in, d_out) of {' and '.join(map(str, distinct))} in different layers; "
                "choose modules of one size"
            )
        sizes[name] = distinct[0]
    return sizes


def _size(module: nn.Module, hidden_size: int) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return hidden_size, hidden_size
