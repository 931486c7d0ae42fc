"""The patch of a configuration that settles what a report found: shown, proven by another preflight, written if asked."""

import sys
import tempfile
from collections.abc import Callable, Mapping
from difflib import unified_diff
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from checks.result import Report, UsageError
from d2l.config.edit import with_values
from d2l.errors import ConfigError
from d2l.io.atomic import replace_file, write_new_file

if TYPE_CHECKING:
    from d2l.config.schema import RunConfig


def fix(
    config: Path,
    report: Report,
    read: Callable[[Path], "RunConfig"],
    judge: Callable[["RunConfig"], Report],
    *,
    write: bool,
) -> Report | None:
    """Print the patch for what a report found as a unified diff on stdout, and what became of each finding on stderr.

    Args:
        config: the file that was judged.
        read: reads a configuration with the command's own options on top.
        judge: runs the checks on another configuration.
        write: put the patched file in the place of the old one, which is copied beside it first.

    Returns:
        The report on the patched configuration; None where no setting is known to settle anything.

    Raises:
        UsageError: the file does not decide about a setting, because an option does.
    """
    settings = {
        key: value
        for outcome in report.outcomes
        if outcome.outcome in ("fail", "warn") and not outcome.ignored
        for key, value in outcome.settings.items()
    }
    if not settings:
        typer.echo("No setting is known that settles a finding.", err=True)
        return None
    before = config.read_bytes().decode("utf-8")  # with its own ends of lines
    after = with_values(before, settings)
    proven = judge(_read_patched(after, settings, read))
    sys.stdout.writelines(
        unified_diff(before.splitlines(keepends=True), after.splitlines(keepends=True), str(config), str(config))
    )
    _say_what_became(report, proven)
    if write:
        kept = _copy_old(config)
        with replace_file(config) as partial:
            partial.write_bytes(after.encode("utf-8"))
        typer.echo(f"Written to {config}; the old one is {kept}", err=True)
    return proven


def _read_patched(text: str, settings: Mapping[str, Any], read: Callable[[Path], "RunConfig"]) -> "RunConfig":
    """Read the patched text as the command read the file, and demand that its settings have come to hold."""
    with tempfile.TemporaryDirectory(prefix="d2l-") as folder:
        path = Path(folder) / "patched.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            patched = read(path)
        except ConfigError as error:
            raise UsageError(f"the file cannot take {_listed(settings)}: {error}") from None
    for key, value in settings.items():
        held = getattr(patched, key)
        if (list(held) if isinstance(held, tuple) else held) != value:
            raise UsageError(
                f"{key} is set to {held!r} by an option of this command, not by the file: give {value!r} there"
            )
    return patched


def _say_what_became(report: Report, proven: Report) -> None:
    """Say for each finding whether the patch settles it, and name findings that were not there before."""
    after = {outcome.code: outcome for outcome in proven.outcomes}
    found = [
        outcome for outcome in report.outcomes if outcome.outcome in ("fail", "warn", "crash") and not outcome.ignored
    ]
    for outcome in found:
        now = after[outcome.code].outcome
        typer.echo(f"{outcome.code} {outcome.name}: {outcome.outcome} → {now}", err=True)
    for outcome in proven.outcomes:
        if outcome.outcome in ("fail", "crash") and outcome.code not in {it.code for it in found}:
            typer.echo(f"{outcome.code} {outcome.name}: found with the patch: {outcome.message}", err=True)


def _copy_old(config: Path) -> Path:
    """Copy the old file to a name of its own beside it: `run.before-fix.yaml`, with a number where that exists."""
    names = (f"{config.stem}.before-fix{f'-{number}' if number > 1 else ''}{config.suffix}" for number in count(1))
    kept = next(path for path in map(config.with_name, names) if not path.exists())
    with write_new_file(kept) as partial:
        partial.write_bytes(config.read_bytes())
    return kept


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {value!r}" for key, value in settings.items())
