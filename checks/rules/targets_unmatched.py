"""Every name in `target_modules` is a Linear, or the MLP block, in every layer of the base.

What it does
------------
Builds the real model's skeleton (names and shapes, no memory) and asks the implementation for the modules that it would
adapt.

Why it matters
--------------
The experts of GPT-OSS are parameters of all experts at once, not Linear modules; the only Linears of a layer are q_proj,
k_proj, v_proj and o_proj. Names that match nothing are dropped without a word: `[q_proj, gate_up_proj]` adapts q_proj
alone while the saved config lists both, and a name that exists in some layers only trains those.

How it is detected
------------------
For each name, one distinct Linear of that name in each decoder layer; for `mlp`, one block.

How to fix
----------
Name Linears that every layer has. For GPT-OSS: q_proj, k_proj, v_proj, o_proj. `mlp` adapts what the experts do, by a
parallel adapter beside the whole block; no adapter format holds it (EXP201).
"""

from typing import TYPE_CHECKING, Any

from torch import nn

from checks.faults import configure, override
from checks.implementation import Implementation
from checks.result import Fail, Pass, Result
from checks.rule import Fault, Rule
from d2l.errors import ModelError
from d2l.hypernet.targets import MLP_BLOCK

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from checks.subject import Subject

REMEDY = "name Linears that every layer has, for GPT-OSS among q_proj, k_proj, v_proj, o_proj; or mlp, the whole block"


def check(subject: "Subject") -> Result:
    """Count modules by name and layer, requested and found."""
    from d2l.base.config import skeleton

    base = skeleton(subject.base_config)
    names, layers = subject.config.target_modules, subject.base_config.num_hidden_layers
    expected = f"{', '.join(names)}: a Linear (of {MLP_BLOCK} the block) in each of {layers} layers"
    try:
        found = subject.implementation.targets(base, names)
    except ModelError as error:
        return Fail(
            message="a target module does not exist in every layer",
            expected=expected,
            actual=str(error),
            remedy=REMEDY,
            settings=_matching(subject, base),
        )
    kinds: dict[str, type[nn.Module]] = {name: nn.Module if name == MLP_BLOCK else nn.Linear for name in names}
    modules = {name: [item for item in found.get(name, ()) if isinstance(item, kinds[name])] for name in names}
    counts = {name: len(set(map(id, items))) for name, items in modules.items()}
    short = {name: count for name, count in counts.items() if count != layers}
    if short:
        actual = ", ".join(f"{name} in {count}" for name, count in short.items())
        return Fail(
            message="a target module is left out without a word",
            expected=expected,
            actual=actual,
            remedy=REMEDY,
            evidence={"found": counts},
        )
    return Pass(f"{', '.join(names)}: {sum(counts.values())} modules in {layers} layers", {"found": counts})


def _matching(subject: "Subject", base: "PreTrainedModel") -> dict[str, list[str]]:
    """Choose targets that exist: those of the configured names that do, else one that carries much (TGT102)."""

    def exists(name: str) -> bool:
        try:
            return bool(subject.implementation.targets(base, [name]).get(name))
        except ModelError:
            return False

    found = [name for name in subject.config.target_modules if exists(name)]
    found = found or [name for name in ("v_proj", "o_proj") if exists(name)][:1]
    return {"target_modules": found} if found else {}


def _partial(healthy: Implementation, base: Any, names: Any) -> Any:
    """Drop names that match nothing, as PEFT does."""
    found: dict[str, Any] = {}
    for name in names:
        try:
            found |= dict(healthy.targets(base, [name]))
        except ModelError:
            continue
    return found


def _plant_partial(subject: "Subject") -> "Subject":
    return override(targets=_partial)(configure(target_modules=("q_proj", "gate_up_projection"))(subject))


def _first_layers(healthy: Implementation, base: Any, names: Any) -> Any:
    """Leave out the last layer."""
    return {name: list(linears)[:-1] for name, linears in healthy.targets(base, names).items()}


RULE = Rule(
    code="TGT101",
    name="targets-unmatched",
    stage="static",
    severity="error",
    sources=(
        "fix 9",
        "failure mode F9",
        "failure mode 14",
        "failure mode 16",
        "failure mode C38",
        "unslothai/unsloth#3405",
    ),
    check=check,
    faults=(
        Fault("experts", "the experts' parameters as targets", configure(target_modules=("gate_up_proj",))),
        Fault("partial-match", "a name that matches nothing beside one that does, dropped silently", _plant_partial),
        Fault("missing-layer", "the last layer is not adapted", override(targets=_first_layers)),
    ),
)
