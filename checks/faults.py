"""Planted faults: a changed configuration, or an implementation with methods replaced; and which checks use those."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from checks.implementation import Implementation
from checks.result import NotApplicable
from checks.subject import Subject, changed, fields_set, plan_on_cpu, plans_noted
from checks.training import staged_run
from checks.training.steps import LAYERS, LIGHT_BASE, light_base
from d2l.config.schema import RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def configure(**values: Any) -> Callable[[Subject], Subject]:
    """Make a fault in the configuration: these values instead of the user's."""

    def plant(subject: Subject) -> Subject:
        if all(getattr(subject.config, name) == value for name, value in values.items()):
            raise NotApplicable(f"the configuration has these values already: {values}")
        return replace(subject, config=changed(subject.config, **values))

    return plant


@dataclass(frozen=True, eq=False)
class Override:
    """A fault in the implementation; see `override`."""

    methods: Mapping[str, Callable[..., Any]]
    unless: Callable[[Subject], str]
    configured: Mapping[str, Any] = field(default_factory=dict)
    members: frozenset[str] = frozenset()

    def under(self, **values: Any) -> "Override":
        """Return the same fault in a run with these values of the configuration, where alone it shows."""
        return replace(self, configured=values)

    def in_trainer(self, *members: str) -> "Override":
        """Return the same fault, of which is said that it shows only where these members of a trainer are used."""
        return replace(self, members=frozenset(f"trainer.{member}" for member in members))

    @property
    def replaces(self) -> frozenset[str]:
        """Name the methods that are replaced, or the members of a trainer that are."""
        return self.members or frozenset(self.methods)

    def __call__(self, subject: Subject) -> Subject:
        """Return the subject with the faulty implementation."""
        healthy = subject.implementation
        missing = [f"the implementation has no method {name}" for name in self.methods if not hasattr(healthy, name)]
        if reason := self.unless(subject) or "; ".join(missing):
            raise NotApplicable(reason)
        methods = {name: partial(method, healthy) for name, method in self.methods.items()}
        config = changed(subject.config, **self.configured) if self.configured else subject.config
        return replace(subject, config=config, implementation=_Overlay(healthy, methods))


def override(unless: Callable[[Subject], str] = lambda subject: "", **methods: Callable[..., Any]) -> Override:
    """Make a fault in the implementation: these methods instead of its own.

    Args:
        unless: why the fault cannot be planted into a subject; empty where it can.
        methods: each is called with the healthy implementation first, then with the method's own arguments.
    """
    return Override(methods, unless)


def override_step(around: Callable[[Callable[[], Any], Any], Any]) -> Override:
    """Make a fault in every step of a trainer.

    Args:
        around: called instead of the step, with the step and the trainer; returns what the step returns.
    """

    def trainer(healthy: Implementation, model: Any, rows: Any, config: Any) -> Any:
        made: Any = healthy.trainer(model, rows, config)
        step = made.step
        made.step = lambda: around(step, made)
        return made

    return override(trainer=trainer).in_trainer("step")


def only_records_differ(planted: Subject, subject: Subject) -> bool:
    """Tell whether a fault is in the records alone, which checks of stage `data` alone read."""
    return planted != subject and replace(planted, records=subject.records) == subject


def changed_fields(planted: Subject, subject: Subject) -> set[str]:
    """Return the fields of the configuration that a fault changes; none where it is in anything else too."""
    if replace(planted, config=subject.config) != subject:
        return set()
    values = vars(subject.config)
    return {name for name, value in vars(planted.config).items() if value != values[name]}


# What a subject computes once, and the methods of the implementation that it takes.
_COMPUTED: dict[str, set[str]] = {
    "twin_base_config": set(),
    "twin_config": set(),
    "plan": {"plan"},
    "twin_plan": {"plan"},
    "_twin_base": {"plan", "build_base"},
    "_grouped_twin_base": {"plan", "build_base"},
    "_answering_twin_base": {"plan", "build_base"},
    "chat": {"chat"},
    "rows": {"chat", "rows"},
}


def compute_ahead(subject: Subject) -> None:
    """Compute what `inherit` hands on, for the processes that are forked from this one."""
    bases = (partial(light_base, subject, layers) for layers in (staged_run.LAYERS, LAYERS))
    for compute in (*(partial(getattr, subject, name) for name in _COMPUTED), *bases):
        with suppress(Exception):  # the checks that need it say why there is none
            compute()


def inherit(planted: Subject, subject: Subject, replaced: frozenset[str]) -> None:
    """Give a subject with a fault what the one without has computed, where neither inputs nor methods differ."""
    undeclared = planted.implementation is not subject.implementation and not replaced
    if undeclared or replace(planted, implementation=subject.implementation) != subject:
        return
    computed = vars(subject)
    for name, methods in _COMPUTED.items():
        if name in computed and not methods & replaced:
            vars(planted)[name] = computed[name]
    if not _COMPUTED["_twin_base"] & replaced:
        kept = computed.get("_shared", {})
        vars(planted)["_shared"] = {key: value for key, value in kept.items() if key.startswith(LIGHT_BASE)}


class _Overlay:
    """An implementation with some of its methods replaced."""

    def __init__(self, healthy: Implementation, methods: Mapping[str, Callable[..., Any]]) -> None:
        self._healthy, self._methods = healthy, methods

    def __getattr__(self, name: str) -> Any:
        return self._methods[name] if name in self._methods else getattr(self._healthy, name)


class _Watched:
    """An implementation that notes which of its methods are used, and of trainers which members: `trainer.step`."""

    def __init__(self, watched: Implementation) -> None:
        self._watched, self.used = watched, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        self.used[name] += 1
        method = getattr(self._watched, name)
        return partial(self._made, method) if name == "trainer" else method

    def _made(self, make: Callable[..., Any], *arguments: Any) -> Any:
        made: Any = make(*arguments)
        own, used = type(made), self.used

        class Noting(own):  # type: ignore[misc,valid-type]
            def __getattribute__(self, name: str) -> Any:
                used[f"trainer.{name}"] += 1
                return super().__getattribute__(name)

        try:
            made.__class__ = Noting
        except TypeError:  # of a kind that cannot be watched: all of it may be used
            used.update(f"trainer.{name}" for name in dir(made))
        return made


@dataclass(frozen=True)
class Used:
    """What a check uses of a subject.

    Attributes:
        methods: of the implementation, and members of its trainers, such as `trainer.step`;
            `plan` is left out where it is used for tiny bases on the CPU alone.
        fields: of the configuration.
        plans: configuration and base's config of every plan of a tiny base on the CPU.
    """

    methods: frozenset[str]
    fields: frozenset[str]
    plans: "tuple[tuple[RunConfig, PreTrainedConfig], ...]" = ()


def plans_differ(planted: Subject, subject: Subject, used: Used) -> bool:
    """Tell whether a fault changes any plan of a tiny base that a check uses; most of a card's plan a tiny base has not."""
    implementations = planted.implementation, subject.implementation
    plans = ([plan_on_cpu(it, config, base_config) for it in implementations] for config, base_config in used.plans)
    return any(plan != healthy for plan, healthy in plans)


def use_of(subject: Subject, run: Callable[[Subject], object]) -> Used:
    """Run something on the same subject without anything computed yet, and return what it uses."""
    watch = _Watched(subject.implementation)
    with _reads_noted(subject.config) as fields, plans_noted() as plans:
        run(replace(subject, implementation=watch))
    watch.used["plan"] -= len(plans)
    return Used(frozenset(+watch.used), frozenset(fields), tuple(plans))


@contextmanager
def _reads_noted(config: RunConfig) -> Iterator[set[str]]:
    """Note which fields are read of a configuration, and of any other one that has its value there and was not given it.

    A value that is derived from a run's is read first, so nothing that depends on a field escapes.
    """
    values, read, own = vars(config), set[str](), fields_set(config)
    plain = RunConfig.__getattribute__

    def noting(self: RunConfig, name: str) -> Any:
        value = plain(self, name)
        if name in values and value == values[name] and name not in fields_set(self) - own:
            read.add(name)
        return value

    RunConfig.__getattribute__ = noting  # type: ignore[assignment,method-assign]
    try:
        yield read
    finally:
        del RunConfig.__getattribute__
