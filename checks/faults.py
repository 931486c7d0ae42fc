"""Planted faults: a changed configuration, or an implementation with methods replaced; and which checks use those."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from checks.result import NotApplicable
from checks.subject import Implementation, Subject, changed


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

    @property
    def replaces(self) -> frozenset[str]:
        """Name the methods that are replaced."""
        return frozenset(self.methods)

    def __call__(self, subject: Subject) -> Subject:
        """Return the subject with the faulty implementation."""
        healthy = subject.implementation
        missing = [f"the implementation has no method {name}" for name in self.methods if not hasattr(healthy, name)]
        if reason := self.unless(subject) or "; ".join(missing):
            raise NotApplicable(reason)
        methods = {name: partial(method, healthy) for name, method in self.methods.items()}
        return replace(subject, implementation=_Overlay(healthy, methods))


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

    return override(trainer=trainer)


class _Overlay:
    """An implementation with some of its methods replaced."""

    def __init__(self, healthy: Implementation, methods: Mapping[str, Callable[..., Any]]) -> None:
        self._healthy, self._methods = healthy, methods

    def __getattr__(self, name: str) -> Any:
        return self._methods[name] if name in self._methods else getattr(self._healthy, name)


class _Watched:
    """An implementation that notes which of its methods are used."""

    def __init__(self, watched: Implementation) -> None:
        self._watched, self.used = watched, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.used.add(name)
        return getattr(self._watched, name)


def watched(subject: Subject) -> tuple[Subject, set[str]]:
    """Return the same subject without anything computed yet, and a set that its use fills with names of methods."""
    watch = _Watched(subject.implementation)
    return replace(subject, implementation=watch), watch.used
