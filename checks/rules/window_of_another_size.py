"""A token of every layer sees as many tokens before it as the base's config says: its window, or its whole document.

What it does
------------
Runs the tiny twin over a question longer than the sliding window, cuts every decoder layer off from those below, and takes
the gradient of its output at the last token by its inputs: the tokens that have one are those that the layer lets it see.

Why it matters
--------------
A window of 127 or 129 tokens instead of 128 (`<` or `<=`, the token itself counted or not) costs a little quality in every
layer and no error: the loss looks normal, and the adapter is served by somebody whose window is another.

How it is detected
------------------
The tokens seen must be exactly the last `sliding_window` of the question in a sliding layer, itself included, and all of
them in a layer of full attention. Both numbers come from the base's config as it was read, not from the loaded model. ATT201
has shown that a packed question is as it is alone; ENC201 compares the context encoder's pass.

How to fix
----------
A token at place i sees place j where `i - sliding_window < j <= i`. Leave `sliding_window` and `layer_types` of the base's
config, and of its layers, alone.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from checks.faults import override
from checks.implementation import Implementation, Model
from checks.probes import alone, probe_rows
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from checks.subject import Subject
    from d2l.data.packing import PackedBatch


def check(subject: "Subject") -> Result:
    """Compare the number of tokens that every layer sees with that of the config."""
    model, batch = subject.twin(), alone(probe_rows(subject))[1]
    expected = _expected(subject.twin_base_config, batch.n_tokens)
    found = _seen(model, batch)
    evidence = {"seen": found, "expected": expected}
    wrong = [layer for layer, seen in enumerate(found) if seen != expected[layer]]
    if wrong:
        layer = wrong[0]
        return Fail(
            message="a layer's window is not that of the base's config",
            expected=f"layer {layer}: a token sees itself and the {expected[layer] - 1} before it",
            actual=f"{found[layer] - 1} before it" if found[layer] else "tokens that are not those just before it",
            remedy="let place i see place j where i - sliding_window < j <= i, with sliding_window as config.json has it",
            evidence=evidence | {"where": f"layer {layer}"},
        )
    return Pass(
        f"a token sees {', '.join(map(str, dict.fromkeys(found)))} tokens of its question, as the config says", evidence
    )


def _expected(config: "PreTrainedConfig", length: int) -> list[int]:
    """Return how many of a document's tokens its last one sees, itself included, layer by layer."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [min(window, length) if window and kind == "sliding_attention" else length for kind in kinds]


def _seen(model: Model, batch: "PackedBatch") -> list[int]:
    """Return how many tokens the last one sees in every layer; 0 where they are not those just before it."""
    counts = []
    for inputs, output in _layers(model, batch):
        (gradient,) = torch.autograd.grad(output[0, -1].square().sum(), inputs, retain_graph=True)
        (places,) = gradient[0].abs().sum(-1).nonzero(as_tuple=True)
        in_a_row = torch.arange(len(gradient[0]) - len(places), len(gradient[0]), device=places.device)
        counts.append(len(places) if torch.equal(places, in_a_row) else 0)
    return counts


def _layers(model: Model, batch: "PackedBatch") -> list[tuple[Tensor, Tensor]]:
    """Return inputs and outputs of every decoder layer, `[1, T, H]`, each with a graph of its own."""
    seen: list[tuple[Tensor, Tensor]] = []

    def cut_off(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0].detach().requires_grad_(), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"].detach().requires_grad_()}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        inputs = args[0] if args else kwargs["hidden_states"]
        seen.append((inputs, output[0] if isinstance(output, tuple) else output))

    hooks = []
    for layer in model.base.get_decoder().layers:
        hooks.append(layer.register_forward_pre_hook(cut_off, with_kwargs=True))
        hooks.append(layer.register_forward_hook(note, with_kwargs=True))
    try:
        model.logits(batch, None)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _window_of(difference: int) -> Any:
    """Make a fault of bases whose sliding layers see more tokens, or fewer, than their config file says."""

    def build_base(healthy: Implementation, base_config: Any, plan: Any, seed: int) -> Any:
        base = healthy.build_base(base_config, plan, seed)
        parts: list[Any] = [base.config, *base.modules()]
        for part in parts:
            if isinstance(getattr(part, "sliding_window", None), int):
                part.sliding_window += difference
        return base

    return override(build_base=build_base, unless=_no_window)


def _no_window(subject: "Subject") -> str:
    config = subject.twin_base_config
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    has_one = window and (kinds is None or "sliding_attention" in kinds)
    return "" if has_one else "this model has no sliding window"


RULE = Rule(
    code="ATT204",
    name="window-of-another-size",
    stage="twin",
    severity="error",
    sources=("failure mode C1", "failure mode C3", "NVIDIA-NeMo/Megatron-Bridge#2656"),
    requires=("ATT201",),
    check=check,
    faults=(
        Fault("one-more", "sliding layers see one token more than the config says", _window_of(1)),
        Fault("one-fewer", "sliding layers see one token fewer than the config says", _window_of(-1)),
    ),
)
