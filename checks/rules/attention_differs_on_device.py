"""Attention on the GPU computes what the model's own eager attention computes for each document alone.

What it does
------------
Runs a small model of the run's kind on the GPU that the run would use, under the planned attention implementation: with
the real head size, sinks, soft caps and windows, on packed rows of several documents and of one, of lengths that are
multiples of a kernel's blocks and that are not. Its logits and the gradients of the embedded tokens are compared with
those of transformers' eager attention, one document at a time.

Why it matters
--------------
Kernels of attention exist on a GPU only, so no twin on a CPU can judge them: `packed_flex`, which `auto` takes for GPT-OSS,
is compiled for the card, and flash kernels ignore sinks, or have no backward for them, without an error.

How it is detected
------------------
In float32 logits and gradients agree to 5e-4 of the largest value; orders of summation differ by 1e-5, a log-sum-exp that
is rounded to bfloat16 before the sinks by 1e-3 and more, sinks, borders or a window's edge that are lost by 0.4 and more.
`flash_attention_4` knows bfloat16 only: there its error is at most 1.5 times that of eager attention in bfloat16, against
float32. What does not run or compile fails as well.

How to fix
----------
Set `attn_implementation: per_document`, which computes with the model's own eager attention, and report the difference.
"""

from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from checks.faults import override
from checks.implementation import Implementation, Model
from checks.probes import difference, probe_rows
from checks.result import Fail, Pass, Result, Skip
from checks.rule import Fault, Rule
from d2l.base.attention import FLASH_4
from d2l.base.config import skeleton
from d2l.base.load_plan import Choice
from d2l.base.masks import attention_layout
from d2l.base.twin import attention_twin_config
from d2l.data.packing import collate

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from checks.subject import Subject

# Tokens of the documents of each row. Kernels compute blocks of 128 tokens, and the window is at most as wide.
ROWS = ((300, 129, 83), (200, 2, 150), (384,), (77,))
IN_FLOAT32 = 5e-4
IN_BFLOAT16 = 1.5  # times the error of eager; formula and eager were within 1.0 of each other, lost terms 2.2 and more
REMEDY = "set attn_implementation: per_document"


def check(subject: "Subject") -> Result:
    """Compare the planned attention on the GPU with eager attention, one document at a time."""
    device = subject.implementation.gpu()
    attention = subject.plan.attention.value
    if device is None:
        return Skip(f"no GPU here, where {attention} would run")
    rounded = attention == FLASH_4
    model, eager, exact = _models(subject, device)
    worst = {"logits": 0.0, "gradients": 0.0}
    for lengths in ROWS:
        batch = collate(probe_rows(subject, documents=[2] * len(lengths), questions=lengths)).to(device)
        try:
            found = _measure(model.base, partial(model.logits, batch, None))
        except Exception as error:  # of a compiler, a kernel or a driver: there is no telling which
            return Fail(
                message=f"{attention} does not run on {device}",
                expected="a forward and a backward pass",
                actual=f"{type(error).__name__}: {error}",
                remedy=REMEDY,
            )
        wanted = [_alone(base, batch.input_ids, lengths) for base in ((eager, exact) if rounded else (exact,))]
        for name, values in zip(worst, zip(found, *wanted, strict=True), strict=True):
            worst[name] = max(worst[name], _times_eagers_error(*values) if rounded else difference(*values))
    bound, unit = (IN_BFLOAT16, "times eager's own error") if rounded else (IN_FLOAT32, "of the largest value")
    evidence = {"attention": attention, "device": device, **worst}
    if max(worst.values()) > bound:
        return Fail(
            message=f"{attention} differs from eager attention on {device}",
            expected=f"differences of at most {bound:g} {unit}",
            actual=f"logits: {worst['logits']:.2g}, gradients: {worst['gradients']:.2g}",
            remedy=REMEDY,
            evidence=evidence,
        )
    return Pass(f"{attention} on {device}: at most {max(worst.values()):.1g} {unit} from eager attention", evidence)


def _models(subject: "Subject", device: str) -> "tuple[Model, PreTrainedModel, PreTrainedModel]":
    """Make a model with the planned attention, a copy of its base with transformers' eager one, and that in float32."""
    dtype = "bfloat16" if subject.plan.attention.value == FLASH_4 else "float32"
    plan = replace(
        subject.plan,
        experts=Choice("dense", "attention is what is compared"),
        dtype=Choice(dtype, "exact" if dtype == "float32" else f"{FLASH_4} takes no float32"),
        device=Choice(device, "the run's"),
    )
    base = subject.implementation.build_base(attention_twin_config(subject.base_config), plan, seed=0)
    base.eval().to(device=device)
    if getattr(base.config, "num_experts_per_tok", None):
        base.set_experts_implementation("eager")
    eager = deepcopy(base)
    eager.set_attn_implementation("eager")
    return subject.implementation.build(base, subject.twin_config), eager, deepcopy(eager).float()


def _times_eagers_error(found: Tensor, eager: Tensor, exact: Tensor) -> float:
    """Return how many times as far from the exact values something is as eager attention in the same dtype."""
    return float(torch.nan_to_num((found - exact).norm() / (eager - exact).norm(), nan=torch.inf))


def _alone(base: "PreTrainedModel", ids: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Measure the documents of a packed row one at a time, without a mask, and put them together again."""
    documents = [_measure(base, partial(_logits, base, document)) for document in ids.split(list(lengths), dim=1)]
    logits, gradients = zip(*documents, strict=True)
    return torch.cat(logits), torch.cat(gradients)


def _logits(base: "PreTrainedModel", ids: Tensor) -> Tensor:
    logits: Tensor = base(input_ids=ids, use_cache=False).logits[0]
    return logits


def _measure(base: "PreTrainedModel", forward: "Callable[[], Tensor]") -> tuple[Tensor, Tensor]:
    """Return the logits [T, V] of a forward pass, and the gradient [T, H] of their squares by the embedded tokens."""
    embedded: list[Tensor] = []

    def watch(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = base.get_input_embeddings().register_forward_hook(watch)
    try:
        logits = forward()
    finally:
        hook.remove()
    (gradient,) = torch.autograd.grad(logits.float().square().sum(), embedded)
    return logits.detach().float(), gradient[0].float()


def _without_sinks(healthy: Implementation, base: Any, config: Any) -> Model:
    """Take the sinks out of every softmax."""
    for name, sinks in base.named_parameters():
        if name.endswith(".sinks"):
            sinks.data.fill_(-1e4)
    return healthy.build(base, config)


def _with_wider_window(healthy: Implementation, base: Any, config: Any) -> Model:
    """Let sliding layers see one token more, by their masks and by what each layer says itself."""
    base.config.sliding_window += 1
    for module in base.modules():
        if isinstance(getattr(module, "sliding_window", None), int):
            module.sliding_window += 1
    return healthy.build(base, config)


def _as_one_document(healthy: Implementation, base: Any, config: Any) -> Model:
    """Make masks from positions that never restart."""
    model: Any = healthy.build(base, config)
    masks = model.attention_mask
    model.attention_mask = lambda ids: masks(torch.arange(ids.shape[1], device=ids.device)[None])
    return model


def _no_sinks(subject: "Subject") -> str:
    has_some = any(name.endswith(".sinks") for name, _ in skeleton(subject.base_config).named_parameters())
    return "" if has_some else "this model has no sinks"


def _no_window(subject: "Subject") -> str:
    kinds = attention_layout(subject.base_config).kinds
    return "" if "sliding_attention" in kinds else "this model has no sliding window"


def _no_masks(subject: "Subject") -> str:
    without = subject.plan.attention.value in ("sdpa", FLASH_4)
    return "without a mask transformers looks for documents itself" if without else ""


RULE = Rule(
    code="ATT401",
    name="attention-differs-on-device",
    stage="device",
    severity="error",
    sources=("fix 2", "failure mode F2", "failure mode 10", "failure mode C44", "failure mode 24"),
    requires=("ATT101", "TGT101", "HYP201"),
    check=check,
    faults=(
        Fault("no-sinks", "the softmax has no sinks", override(build=_without_sinks, unless=_no_sinks)),
        Fault(
            "wide-window",
            "sliding layers see one token too many",
            override(build=_with_wider_window, unless=_no_window),
        ),
        Fault(
            "one-document",
            "documents of a packed row see each other",
            override(build=_as_one_document, unless=_no_masks),
        ),
    ),
)
