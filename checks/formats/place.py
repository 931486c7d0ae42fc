"""Where a finding stands: the line of the configuration that sets what it is about."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from checks.result import Outcome
from d2l.config.renamed import OLD_NAMES
from d2l.config.yaml_file import read_yaml
from d2l.errors import ConfigError
from d2l.io.resources import local_or_shipped

# A key as messages write it. Words such as `loss` are keys too: they count where a value follows them (`loss: kl`).
_KEY = re.compile(r"\b([a-z][a-z0-9]*_\w+|[a-z]+(?=[:=]))")


@dataclass(frozen=True)
class ConfigLines:
    """A configuration file, and where its keys stand.

    Args:
        file: its path with forward slashes, from the working directory where it lies below that.
        lines: key → line, from 1; keys under their old names stand here under both.
    """

    file: str
    lines: Mapping[str, int]

    def line(self, outcome: Outcome) -> int:
        """Return the line of the first key that a finding is about and that the file sets; 1 where there is none."""
        return next((self.lines[key] for key in _keys(outcome) if key in self.lines), 1)


def read_lines(config: str) -> ConfigLines:
    """Find the lines of the keys of a configuration, as a report names it; none where it is no file that can be read."""
    path = local_or_shipped(config)
    try:
        _, found, _ = read_yaml(path) if path is not None and path.is_file() else ({}, {}, [])
    except ConfigError:
        found = {}
    lines = {key: int(where.removeprefix("line ")) for key, where in found.items()}
    for old, new in OLD_NAMES.items():
        if old in lines:
            lines.setdefault(new.name, lines[old])
    return ConfigLines(_from_here(config), lines)


def _keys(outcome: Outcome) -> Iterator[str]:
    """Yield the keys that remedy a finding, then what looks like a key in its texts."""
    yield from outcome.settings
    for text in (outcome.message, outcome.actual, outcome.expected, outcome.remedy):
        yield from _KEY.findall(text)


def _from_here(config: str) -> str:
    """Write a path as version control has it, where the working directory is its top."""
    path = Path(config)
    below = path.is_absolute() and path.is_relative_to(Path.cwd())
    return (path.relative_to(Path.cwd()) if below else path).as_posix()
