"""A new hypernetwork starts as published: its LoRA is zero, and every weight comes from its distribution.

What it does
------------
Builds a hypernetwork for the tiny twin's base, with the run's switches and enough weights to measure, and compares mean and
spread of every parameter with the reference's initialisation. Builds it as a run does, after other draws and from another seed.

Why it matters
--------------
A LoRA that is not zero at the start is a run that does not begin with the base model. A scaler of A that starts at zero
beside that of B has no gradient at all, for good. A head or a bias that is drawn too widely makes the first useful steps
ten times as large as the learning rate was chosen for: the loss jumps, and settles where it should not. Where the seed decides
nothing, runs of several seeds are one run, and processes that drew otherwise before begin with weights of their own.

How it is detected
------------------
Scalers, norms and zeros must be exact. Other means and standard deviations must be within six standard errors of those of
the formulas, and no value of a uniform draw beyond its bound. The same seed must give the same weights, and another one others.

How to fix
----------
Initialise as the reference does: torch's defaults for Linears, scaler_B and bias_B at zero, scaler_A at one, head N(0,
0.5/√(latent + row · r)), bias_A N(0, 0.2/√(inputs · r)).
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from checks.faults import Override, override
from checks.implementation import Implementation, Model
from checks.oracles.initialisation import Distribution, distribution
from checks.result import Fail, Inapplicable, NotOffered, Pass, Result
from checks.rule import Fault, Rule
from checks.subject import changed

if TYPE_CHECKING:
    from checks.subject import Subject
    from d2l.config.schema import RunConfig

# Thousands of values in most parameters: their spread is measured to a few percent.
SIZES = {"latent_size": 32, "lora_r": 4, "num_blocks": 1, "n_latent_queries": 16, "perceiver_head_dim": 32}
SIZES["perceiver_query_scale"] = 3
ERRORS = 6  # standard errors: no draw of a few hundred parameters in a thousand runs is that far off
REMEDY = "initialise as the reference does: see `d2l explain HYP203`"


@torch.no_grad()
def check(subject: "Subject") -> Result:
    """Compare every parameter of a new hypernetwork with its distribution."""
    config = changed(subject.twin_config, **SIZES)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = subject.implementation.build(subject.twin_base(), config)
    named = dict(model.hypernet.named_parameters())
    if "head.weight" not in named:
        return Inapplicable("no parameter has the name head.weight of the reference: its initialisation is its own")
    measured = 0
    for name, parameter in named.items():
        weight = named.get(f"{name.removesuffix('bias')}weight")
        inputs = weight.shape[1] if name.endswith("bias") and weight is not None and weight.ndim > 1 else 0
        expected = distribution(
            name,
            parameter.shape,
            latent_size=config.latent_size,
            rank=config.lora_r,
            query_scale=config.perceiver_query_scale,
            inputs=inputs,
        )
        if expected is None:
            continue
        measured += 1
        if problem := _problem(parameter, expected):
            return Fail(
                message="a new hypernetwork is initialised otherwise than published",
                expected=f"{name}: mean {expected.mean:g}, standard deviation {expected.deviation:.4g}",
                actual=problem,
                remedy=REMEDY,
                evidence={"parameter": name, "shape": list(parameter.shape)},
            )
    if finding := _unseeded(subject, config):
        return finding
    return Pass(f"{measured} of {len(named)} parameters are drawn as published", {"parameters": measured})


def _unseeded(subject: "Subject", config: "RunConfig") -> Result | None:
    """Find that weights do not follow from the configuration's seed alone; None where a run has no beginning of its own."""

    def head(seed: int, draws: int) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(draws)
            model: Any = subject.implementation.initial(subject.twin_base(), changed(config, seed=seed))
        return dict(model.hypernet.named_parameters())["head.weight"]

    try:
        first, again, other = head(0, draws=1), head(0, draws=2), head(1, draws=2)
    except NotOffered:
        return None
    if torch.equal(first, again) and not torch.equal(first, other):
        return None
    what = "another seed gives the same" if torch.equal(first, again) else "other draws before give other ones"
    return Fail(
        message="initial weights do not follow from the seed",
        expected="the same weights from the same seed, others from another one",
        actual=f"head.weight: {what}",
        remedy="seed the generator that initial weights are drawn from with the configuration's seed, right before",
    )


def _problem(values: Tensor, expected: Distribution) -> str:
    """Describe what is not as expected; empty where all is."""
    values = values.double()
    mean, deviation = float(values.mean()), float(values.std(correction=0))
    if expected.deviation == 0:
        exact = bool((values == expected.mean).all())
        return "" if exact else f"mean {mean:.4g}, standard deviation {deviation:.4g}"
    # of a normal distribution; a uniform one's are smaller
    error = expected.deviation / math.sqrt(values.numel())
    off = abs(mean - expected.mean) > ERRORS * error or abs(deviation - expected.deviation) > ERRORS * error
    beyond = expected.bound is not None and float(values.abs().max()) > expected.bound * (1 + 1e-6)
    if not off and not beyond:
        return ""
    return f"mean {mean:.4g}, standard deviation {deviation:.4g}, largest {float(values.abs().max()):.4g}"


def _initialised(change: Callable[[dict[str, Any]], None]) -> Override:
    """Make a fault of a hypernetwork whose parameters are changed right after they were drawn."""

    def build(healthy: Implementation, base: Any, config: Any) -> Model:
        model = healthy.build(base, config)
        with torch.no_grad():
            change(dict(model.hypernet.named_parameters()))
        return model

    return override(build=build)


def _unmindful(healthy: Implementation, base: Any, config: Any) -> Model:
    """Draw initial weights from wherever the generator is."""
    return healthy.build(base, config)


def _starts_off_zero(named: dict[str, Any]) -> None:
    for name, parameter in named.items():
        if name.startswith("scaler_B"):
            parameter.fill_(1)


def _wide_head(named: dict[str, Any]) -> None:
    if "head.weight" in named:
        named["head.weight"].mul_(3)


RULE = Rule(
    code="HYP203",
    name="initialisation-differs",
    stage="twin",
    severity="error",
    sources=("sanity run", "https://github.com/SakanaAI/doc-to-lora"),
    requires=("HYP201",),
    check=check,
    faults=(
        Fault("starts-off-zero", "scaler_B starts at one: the LoRA is not zero", _initialised(_starts_off_zero)),
        Fault("seed-ignored", "the seed decides no weight", override(initial=_unmindful)),
        Fault("head-too-wide", "the head is drawn three times too widely", _initialised(_wide_head)),
    ),
)
