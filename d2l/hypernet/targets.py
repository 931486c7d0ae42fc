"""The modules that are adapted: for every requested name one Linear in each decoder layer of the base."""

from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from d2l.errors import ModelError

Targets = Mapping[str, Sequence[nn.Linear]]  # module name → its Linear in every decoder layer, in order


def find_targets(base: PreTrainedModel, target_modules: Sequence[str]) -> dict[str, list[nn.Linear]]:
    """The Linear of each requested name in every decoder layer, in order.

    Args:
        base: a causal LM of transformers.
        target_modules: last parts of module names, such as `q_proj`.

    Raises:
        ModelError: a name does not match exactly one Linear in every layer; says which exist.
    """
    layers = decoder_layers(base)
    linears = [
        [(path.rpartition(".")[2], m) for path, m in layer.named_modules() if isinstance(m, nn.Linear)]
        for layer in layers
    ]
    targets: dict[str, list[nn.Linear]] = {}
    problems = []
    for name in target_modules:
        found = [[m for other, m in layer if other == name] for layer in linears]
        wrong = {i: len(matches) for i, matches in enumerate(found) if len(matches) != 1}
        if not wrong:
            targets[name] = [linear for (linear,) in found]
            continue
        where = "every layer" if len(wrong) == len(layers) else f"layers {', '.join(map(str, wrong))} of {len(layers)}"
        counts = " or ".join(map(str, sorted(set(wrong.values()))))
        problems.append(f"  {name}: {counts} Linears of that name in {where}{_parameter_note(layers, name)}")
    if problems:
        everywhere = sorted(set.intersection(*({name for name, _ in layer} for layer in linears)))
        raise ModelError(
            f"target_modules: each name must be exactly one Linear in every decoder layer of {type(base).__name__}:\n"
            + "\n".join(problems)
            + f"\nLinears in every layer: {', '.join(everywhere) or 'none'}. Choose target_modules from these."
        )
    return targets


def decoder_layers(base: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers: the outermost ModuleList with one entry for each of the config's `num_hidden_layers`."""
    n_layers = base.config.get_text_config(decoder=True).num_hidden_layers
    for module in base.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise ModelError(
        f"{type(base).__name__} has no list of {n_layers} decoder layers (num_hidden_layers of its config)"
    )


def _parameter_note(layers: nn.ModuleList, name: str) -> str:
    """Says so where a name that was asked for is a parameter, as the experts of a Mixture of Experts often are."""
    for path, parameter in layers.named_parameters():
        if path.rpartition(".")[2] == name:
            return f"; it is a parameter {list(parameter.shape)}, which a LoRA of Linears cannot adapt"
    return ""


def target_sizes(targets: Targets) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) of each target module.

    Raises:
        ModelError: the sizes of a module differ between layers; the hypernetwork's head makes one size per module.
    """
    sizes = {}
    for name, linears in targets.items():
        distinct = list(dict.fromkeys((linear.in_features, linear.out_features) for linear in linears))
        if len(distinct) > 1:
            raise ModelError(
                f"target_modules: {name} has (d_in, d_out) of {' and '.join(map(str, distinct))} in different layers; "
                "choose modules of one size"
            )
        sizes[name] = distinct[0]
    return sizes
