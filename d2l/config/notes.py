"""Remarks on the keys of a configuration that loads: gathered by kind, one line a kind, however many keys."""

from dataclasses import dataclass, field

_WHY = "`d2l config KEY` says why"


@dataclass
class Notes:
    """The remarks, as they are found.

    Args:
        renamed: `old → new: value`.
        neutral: `key: value` of the reference, at a value that changes nothing.
        without_effect: keys of the reference that change nothing here.
        others: whole remarks, one for each line.
    """

    renamed: list[str] = field(default_factory=list)
    neutral: list[str] = field(default_factory=list)
    without_effect: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def lines(self) -> tuple[str, ...]:
        """Return one line for each kind that there is."""
        lines = []
        if self.renamed:
            lines.append(f"{_keys(self.renamed, 'has', 'have')} another name now: {', '.join(self.renamed)}")
        if self.neutral:
            start = _keys(self.neutral, "of the reference changes", "of the reference change")
            lines.append(f"{start} nothing at this value: {', '.join(self.neutral)}; {_WHY}")
        if self.without_effect:
            start = _keys(self.without_effect, "of the reference has", "of the reference have")
            lines.append(f"{start} no effect here: {', '.join(self.without_effect)}; {_WHY}")
        return (*lines, *self.others)


def _keys(found: list[str], one: str, many: str) -> str:
    return f"1 key {one}" if len(found) == 1 else f"{len(found)} keys {many}"
