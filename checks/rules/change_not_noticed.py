"""A run that is resumed with other settings, data or base, or by another number of processes, is refused.

What it does
------------
Asks what would stand against going on from a checkpoint with inputs that differ from its own in one thing each: everything that
shapes rows, settings of optimizer and hypernetwork, the base's size, the number of processes.

Why it matters
--------------
A resumed run goes on with whatever it is given. An answer that was edited meanwhile, a second GPU that doubles the batch, a rate
that was tried elsewhere: the loss goes on without a step, and the run is one that nobody can make again.

How it is detected
------------------
Each difference must be named, by its key where it is a setting; what shapes nothing, such as how often a run saves, may change,
and so may processes and accumulation together. The run's texts, shortened, are the data. Skipped where the implementation
compares nothing.

How to fix
----------
Keep configuration, a hash of all data, the base's config and the number of processes in every checkpoint, and compare them
before the next step.
"""

import tempfile
from collections.abc import Callable, Collection, Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checks.data.variants import Inputs, variants
from checks.faults import Override, override
from checks.implementation import Implementation, RunInputs
from checks.result import Fail, Pass, Result, Skip
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from checks.subject import Subject

# Numbers beside those that shape rows, each of which may be another; and what shapes nothing.
SHAPING = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "warmup_steps"),
    *("gen_lora_l1_reg_coef", "lora_r", "n_latent_queries", "num_blocks"),
)
FREE = ("save_steps", "save_total_limit", "logging_steps")
LARGE = 1e6  # from where on one may add nothing: 1e30 is a limit that clips no gradient
ACCUMULATED = "gradient_accumulation_steps"
DATA, BASE, CHAT = {"data"}, {"base_config"}, {"chat", "tokenizer"}  # what parts of the rest are called

# What differs, then, now, and names of which at least one is expected.
Case = tuple[str, RunInputs, RunInputs, set[str]]


def check(subject: "Subject") -> Result:
    """Compare what is named with what differs."""
    if subject.tokenizer is None or subject.records is None:
        return Skip(subject.tokenizer_absent or subject.records_absent)
    named, wrong = {}, []
    with tempfile.TemporaryDirectory(prefix="d2l-") as folder:
        for what, then, now, expected in _cases(subject, Path(folder)):
            found = named[what] = sorted(subject.implementation.changes(then, now))
            if expected.isdisjoint(found) if expected else found:
                wrong.append(f"{what}: {' and '.join(found) or 'nothing'}, not {' or '.join(expected) or 'nothing'}")
    if wrong:
        return Fail(
            message="a run that is resumed with other inputs is not refused, or one with its own is",
            expected="each difference by its name, and none where a run is the same",
            actual="; ".join(wrong),
            remedy="keep what shapes a run in its checkpoints, and compare it before the next step",
            evidence={"named": named},
        )
    return Pass(f"{len(named)} changes of a resumed run are named, or change nothing", {"named": named})


def _cases(subject: "Subject", folder: Path) -> Iterator[Case]:
    """Yield what differs, the run then and now, and the names of which one is expected."""
    first, *others = variants(subject, folder)
    for earlier, inputs in pairwise((first, *others)):
        before = earlier if inputs.field.startswith("logprobs") else first  # of one record, as those with a teacher are
        yield inputs.field, _inputs(subject, before), _inputs(subject, inputs), _expected(before, inputs)
    then = _inputs(subject, first)
    *others_before, last = then.records
    yield "the last answer", then, replace(then, records=[*others_before, replace(last, responses=("",))]), DATA
    for key in (*SHAPING, *FREE):
        value = getattr(then.config, key)
        other = value + 1 if abs(value) < LARGE else value / 2
        now = replace(then, config=then.config.model_copy(update={key: other}))
        yield key, then, now, {key} if key in SHAPING else set()
    doubled, single = (replace(then, config=then.config.model_copy(update={ACCUMULATED: count})) for count in (2, 1))
    yield "twice the processes", single, replace(single, processes=2), {ACCUMULATED}
    yield "twice the processes, each with half", doubled, replace(single, processes=2), set()
    yield "half the processes", replace(single, processes=2), single, {ACCUMULATED}
    for name, value in subject.base_config.to_dict().items():
        if isinstance(value, int | float) and not isinstance(value, bool) and value:
            base_config = deepcopy(subject.base_config)
            other = value + 1 if isinstance(value, int) else value / 2  # libraries refuse shares above one
            setattr(base_config, name, other)
            yield f"{name} of the base", then, replace(then, base_config=base_config), BASE


def _inputs(subject: "Subject", inputs: Inputs) -> RunInputs:
    return RunInputs(inputs.config, subject.base_config, inputs.chat, inputs.records)


def _expected(first: Inputs, now: Inputs) -> set[str]:
    """Return the names of which one is expected: of settings, else of the part that differs."""
    then, found = vars(first.config), vars(now.config)
    if settings := {key for key, value in found.items() if value != then[key]}:
        return settings
    if now.records != first.records:
        return DATA
    return CHAT if now.chat is not first.chat else set()


def _blind_to(*names: str) -> Override:
    """Make a fault that never names these."""

    def changes(healthy: Implementation, then: RunInputs, now: RunInputs) -> Collection[str]:
        return set(healthy.changes(then, now)) - set(names)

    return override(changes=changes)


def _comparing(change: Callable[[RunInputs], RunInputs]) -> Override:
    """Make a fault that compares something else of a run."""

    def changes(healthy: Implementation, then: RunInputs, now: RunInputs) -> Collection[str]:
        return healthy.changes(change(then), change(now))

    return override(changes=changes)


def _without(**values: Any) -> Callable[[RunInputs], RunInputs]:
    """Leave something of every record out."""
    return lambda inputs: replace(inputs, records=[replace(record, **values) for record in inputs.records])


def _everything_named(healthy: Implementation, then: RunInputs, now: RunInputs) -> Collection[str]:
    """Name whatever differs, also where it shapes nothing."""
    fields = {key for key, value in vars(now.config).items() if value != vars(then.config)[key]}
    return fields | set(healthy.changes(then, now))


RULE = Rule(
    code="SAV204",
    name="change-not-noticed",
    stage="data",
    severity="error",
    sources=("failure mode 27",),
    requires=("LBL101", "DAT301"),
    check=check,
    faults=(
        Fault(
            "processes-unlike",
            "another number of processes is not noticed",
            _comparing(lambda inputs: replace(inputs, processes=1)),
        ),
        Fault("answers-unlike", "other answers are not noticed", _comparing(_without(responses=("",)))),
        Fault(
            "teacher-unlike",
            "another teacher's values are not noticed",
            _comparing(_without(logprobs_vals=None, logprobs_indices=None)),
        ),
        Fault(
            "order-unlike",
            "records in another order are not noticed",
            _comparing(lambda inputs: replace(inputs, records=sorted(inputs.records, key=lambda it: it.context))),
        ),
        Fault("base-unlike", "another base is not noticed", _blind_to("base_config")),
        Fault("template-unlike", "another chat template is not noticed", _blind_to("chat")),
        Fault("tokenizer-unlike", "another tokenizer is not noticed", _blind_to("tokenizer", "chat")),
        Fault("rate-unlike", "another learning rate is not noticed", _blind_to("learning_rate")),
        Fault("nothing-free", "a run that saves more often is refused", override(changes=_everything_named)),
    ),
)
