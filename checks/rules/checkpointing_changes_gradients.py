"""Gradients of the task loss are the same with gradient checkpointing and without.

What it does
------------
Takes the gradient of the task loss alone, without the L1 term, on a twin of two layers: two packed rows with LoRAs of their
own, two forwards, then one backward; with the run's checkpointing switched on, and without it.

Why it matters
--------------
Recomputation runs the base's layers a second time, in the backward pass, with whatever LoRA is bound then: another
document's, or none. With `use_reentrant: true`, or a dict of arguments without the key, torch's old implementation sees
that no input of a frozen layer needs a gradient, and the task loss gives none: no error, `grad_norm` stays above zero
through the L1 term, and nothing is learned.

How it is detected
------------------
The two gradients must agree to 1e-4 of the largest entry, and must not be zero. A module of the base's first layer must
have run more often with checkpointing on than without: where nothing is recomputed, nothing is judged here.

How to fix
----------
`gradient_checkpointing_kwargs: {use_reentrant: false}`, and re-enter in the recomputation the binding that was active in
the forward pass (`context_fn=checkpoint_contexts`).
"""

import warnings
from typing import TYPE_CHECKING, Any

import torch

from checks.faults import configure, override
from checks.implementation import Implementation, Model
from checks.probes import TOLERANCE, alone, difference, flat, gradients, norm, probe_rows
from checks.result import Fail, Inapplicable, Pass, Result, Skip
from checks.rule import Fault, Rule
from checks.training.steps import light_config, light_model
from d2l.hypernet.model import checkpoint_layers

if TYPE_CHECKING:
    from checks.subject import Subject

LOSS = ("loss", "use_per_ctx_average_loss")  # the run's own
REMEDY = "set gradient_checkpointing_kwargs: {use_reentrant: false} and pass context_fn=checkpoint_contexts"


def check(subject: "Subject") -> Result:
    """Compare the task gradients of one joint backward, checkpointing off and on."""
    if not subject.config.gradient_checkpointing:
        return Inapplicable("gradient_checkpointing is off in the configuration")
    expected, plain_calls = _task_gradients(subject, checkpointing=False)
    try:
        with warnings.catch_warnings():  # what libraries warn of is measured here
            warnings.simplefilter("ignore")
            actual, calls = _task_gradients(subject, checkpointing=True)
    except (RuntimeError, ValueError, TypeError) as error:
        return Fail(
            message="the backward pass fails with gradient checkpointing on",
            expected="the gradients of the run without it",
            actual=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            remedy=REMEDY,
            settings=_settings(subject),
        )
    error_of_largest = difference(flat(actual), flat(expected))
    evidence = {
        "relative_error": error_of_largest,
        "norm_off": norm(expected),
        "norm_on": norm(actual),
        "kwargs": dict(subject.config.gradient_checkpointing_kwargs),
    }
    if not error_of_largest <= TOLERANCE or norm(expected) == 0:
        what = "do not arrive" if norm(actual) == 0 else "are others"
        return Fail(
            message=f"gradients of the task loss {what} with gradient checkpointing on",
            expected=f"norm {norm(expected):.4g}, entries within {TOLERANCE:g} of the largest",
            actual=f"norm {norm(actual):.4g}, error {error_of_largest:.2g}",
            remedy=REMEDY,
            evidence=evidence,
            settings=_settings(subject),
        )
    if calls == plain_calls:
        return Skip("no layer of the base is recomputed with gradient checkpointing on, which GRD202 reports")
    return Pass(f"task gradients agree to {error_of_largest:.1g} of the largest (norm {norm(expected):.3g})", evidence)


def _settings(subject: "Subject") -> dict[str, Any]:
    """Return what remedies the finding, if it is the configuration's."""
    reentrant = subject.config.gradient_checkpointing_kwargs.get("use_reentrant", True)
    return {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if reentrant else {}


def _task_gradients(subject: "Subject", *, checkpointing: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Return the gradients, and how often a module of the base's first layer has run for them."""
    config = light_config(subject, **{name: getattr(subject.config, name) for name in LOSS})
    model: Any = light_model(subject, config, dtype=torch.float32)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(subject.config.gradient_checkpointing_kwargs)
    batches = alone(probe_rows(subject, documents=(4, 4), questions=(6, 6)))  # of one shape: torch notices no mix-up
    first_layer = model.base.get_decoder().layers[0]
    calls: list[None] = []
    leaf = next(module for module in first_layer.modules() if not any(module.children()))
    leaf.register_forward_pre_hook(lambda module, inputs: calls.append(None))
    task, _ = subject.implementation.loss(model, batches, config)
    return gradients(model, task), len(calls)


def _unbound_recompute(healthy: Implementation, base: Any, config: Any) -> Model:
    """Hand checkpointing to the base as it is: recomputation runs with no LoRA bound."""
    model: Any = healthy.build(base, config)
    model.gradient_checkpointing_enable = lambda kwargs: checkpoint_layers(model.base, kwargs)
    return model


def _latest_binding(healthy: Implementation, base: Any, config: Any) -> Model:
    """Keep the LoRA as state of patched layers: recomputation sees the one of the latest forward."""
    model: Any = healthy.build(base, config)
    logits = model.logits
    current: dict[str, Any] = {"lora": None}

    def hook_for(name: str, layer: int) -> Any:
        def add(module: Any, inputs: Any, output: Any) -> Any:
            if current["lora"] is None:
                return None
            a = current["lora"].A[name][current["owner"], layer]  # [T, R, d_in]
            b = current["lora"].B[name][current["owner"], layer]  # [T, R, d_out]
            ranks = torch.einsum("bti,tri->btr", inputs[0], a)
            delta = current["lora"].scale * torch.einsum("btr,tro->bto", ranks, b)
            return (output[0] + delta, *output[1:]) if isinstance(output, tuple) else output + delta

        return add

    for name, linears in healthy.targets(model.base, config.target_modules).items():
        for layer, linear in enumerate(linears):
            linear.register_forward_hook(hook_for(name, layer))

    def patched(batch: Any, lora: Any, positions: Any = None) -> Any:
        current["lora"] = lora
        lengths = torch.tensor(batch.contexts.lengths)
        current["owner"] = torch.arange(len(lengths)).repeat_interleave(lengths)
        return logits(batch, None, positions)

    def unpatched(batch: Any) -> Any:
        current["lora"] = None
        return generate(batch)

    generate = model.lora
    model.logits, model.lora = patched, unpatched
    model.gradient_checkpointing_enable = lambda kwargs: checkpoint_layers(model.base, kwargs)
    return model


RULE = Rule(
    code="GRD201",
    name="checkpointing-changes-gradients",
    stage="twin",
    severity="error",
    sources=(
        "fix 7",
        "failure mode F7",
        "failure mode 12",
        "failure mode 13",
        "failure mode 25",
        "huggingface/peft#2826",
    ),
    requires=("LOR202",),
    check=check,
    faults=(
        Fault(
            "reentrant",
            "torch's reentrant checkpointing: a frozen layer's output carries no gradient",
            configure(gradient_checkpointing_kwargs={"use_reentrant": True}, gen_lora_l1_reg_coef=0.1),
        ),
        Fault("unbound-recompute", "recomputation runs with no LoRA bound", override(build=_unbound_recompute)),
        Fault("latest-binding", "recomputation uses the LoRA of the latest forward", override(build=_latest_binding)),
    ),
)
