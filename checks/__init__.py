"""Judgements on a Doc-to-LoRA run before it starts; `preflight` makes them from Python."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from checks.implementation import Implementation
    from checks.result import Report
    from d2l.config.schema import RunConfig

__all__ = ["preflight"]


def preflight(
    config: "RunConfig | Path | str | None" = None,
    *,
    stages: Sequence[str] = (),
    select: Sequence[str] = (),
    ignore: Mapping[str, str] | None = None,
    implementation: "Implementation | None" = None,
) -> "Report":
    """Run the checks on a configuration, as `d2l preflight` does.

    Args:
        config: a configuration, or the YAML file of one; None for the embedded tiny GPT-OSS.
        stages: run the checks of these stages only; empty means all.
        select: run these checks only, by code, name or beginning of codes (`ATT`); empty means those of the configuration's
            `select_checks`, else all.
        ignore: code, name or beginning of codes → why its finding is acceptable, `REASON` or `REASON@YYYY-MM-DD`, beside
            those of the configuration's `ignore_checks`; it becomes a warning.
        implementation: what to examine in the place of d2l; see `checks.foreign`.

    Returns:
        The report: iterating gives one outcome for every check, `ok` is the verdict, `failures` what stands against the run.

    Raises:
        D2LError: the configuration, the base model or the data cannot be used, or a check or stage does not exist.
    """
    from checks.choice import chosen_by, reads_data
    from checks.plugins import with_plugins
    from checks.production import make_subject  # here: it imports torch, and `checks` should be light
    from checks.result import UsageError
    from checks.rules import RULES
    from checks.runner import run_checks
    from checks.threads import one_thread
    from d2l.config.load import load_config
    from d2l.config.schema import RunConfig

    if isinstance(stages, str) or isinstance(select, str):
        raise UsageError("stages and select are lists of names: write select=['ATT201']")
    name = "" if isinstance(config, RunConfig) else str(config or "")
    resolved = config if isinstance(config, RunConfig) else load_config(None if config is None else Path(config))
    with one_thread():
        subject = make_subject(resolved, name, implementation=implementation, with_data=reads_data(stages))
        selected, ignored = chosen_by(resolved, select, ignore or {})
        return run_checks(subject, with_plugins(RULES), stages=stages, select=selected, ignore=ignored)
