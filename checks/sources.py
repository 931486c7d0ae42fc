"""Sources of checks: short keys such as `fix 2`, resolved to a title and a place where it can be read."""

import re
from dataclasses import dataclass

from d2l.io.resources import resource

FIXES, MODES = "docs/nine_fixes.md", "docs/failure_modes.md"
PAGE = re.compile(r"(docs|experiments)/\w+\.md")
THREAD = re.compile(r"[\w-]+/[\w.-]+#[1-9]\d*")  # an issue or a pull request
ADDRESS = re.compile(r"https://(www\.)?[a-z0-9-]+(\.[a-z0-9-]+)*\.[a-z]{2,}(/[^\s()]*)?")
FORMS = (
    "fix N",
    "hardware",
    "sanity run",
    "stale cache",
    "failure mode N",
    "owner/name#N",
    "docs/PAGE.md",
    "experiments/PAGE.md",
    "https://...",
)


@dataclass(frozen=True)
class Source:
    """A documented fix, a failure mode, a page, or a public thread that a check comes from.

    Args:
        link: an address, or a shipped file relative to the top of the repository, with its anchor.
    """

    title: str
    link: str

    @property
    def place(self) -> str:
        """Return the address, or the path of the file here, with its anchor."""
        if self.link.startswith("https://"):
            return self.link
        name, hash_sign, anchor = self.link.partition("#")
        return f"{resource(name)}{hash_sign}{anchor}"


def resolve(key: str) -> Source:
    """Find the title and the link of a source.

    Raises:
        ValueError: the key has none of the known forms, or names no anchor or several of its page.
        FileNotFoundError: the page is not shipped.
    """
    if re.fullmatch(r"fix [1-9]|hardware|sanity run|stale cache", key):
        return _anchored(FIXES, key.replace(" ", "-"))
    if re.fullmatch(r"failure mode (F\d|C?\d+)", key):
        return _anchored(MODES, key.replace(" ", "-").lower())
    if PAGE.fullmatch(key):
        first, *_ = resource(key).read_text(encoding="utf-8").splitlines()
        return Source(first.lstrip("# "), key)
    if THREAD.fullmatch(key):
        repository, _, number = key.partition("#")
        return Source(key, f"https://github.com/{repository}/issues/{number}")
    if ADDRESS.fullmatch(key):
        return Source(key, key)
    raise ValueError(f"there is no source {key!r}: expected one of the forms {', '.join(FORMS)}")


def _anchored(page: str, anchor: str) -> Source:
    """Find an anchor of a page, and the heading or the table row that follows it."""
    _, *after = resource(page).read_text(encoding="utf-8").split(f'<a id="{anchor}"></a>')
    if len(after) != 1:
        raise ValueError(f"{page} must have the anchor {anchor} once. Got {len(after)}")
    line = next(line for line in after[0].splitlines() if line.strip())
    return Source(_title(line), f"{page}#{anchor}")


def _title(line: str) -> str:
    """Return a heading's text, or the first two cells of a table's row: the mode's number and its symptom."""
    if line.startswith("#"):
        return line.lstrip("# ")
    number, symptom, *_ = (cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line))
    return f"Failure mode {number}: {symptom}"
