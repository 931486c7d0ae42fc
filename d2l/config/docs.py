"""CONFIG.md, made from the schema, its descriptions and the tables of other names.

`python -m d2l.config.docs` prints CONFIG.md; `make docs` writes it.
"""

import sys
from collections.abc import Iterable
from itertools import groupby

from d2l.config.explain import described
from d2l.config.huggingface import TRANSLATED
from d2l.config.keys import STAGES, Key, all_keys, in_yaml, undescribed
from d2l.config.reference_keys import HAS_NO_EFFECT, UNSUPPORTED
from d2l.config.renamed import OLD_NAMES, OLD_STAGE_NAMES

INTRODUCTION = """\
# Configuration keys

Made by `make docs` from `d2l/config/`; do not edit. `d2l config` prints the same list, `d2l config KEY` everything about
one key, and `d2l config --schema` a JSON Schema for editors. `d2l init` writes a commented file to start from.

A configuration is one flat YAML file of these keys, all of which may be left out. Names are those of the reference
implementation (SakanaAI/doc-to-lora, whose configuration extends the TrainingArguments of transformers), unless its
column says otherwise. Lengths are in tokens. Whole numbers may be written as `1e3`; true, false, infinities and NaN are no
numbers.
"""
_HEADER = ("key", "type", "default", "range", "meaning", "has an effect", "in the reference")
_UNSUPPORTED = """\
## Keys of the reference that d2l does not have

Files that hold them load where the value is one that changes nothing. Another value is refused, with the reason.
"""
_NO_EFFECT = """\
## Keys of the reference without an effect

Any value is accepted, and noted in one line: what they set in the reference's trainer does not exist here, or cannot
change what is trained.
"""
_TRANSLATED = """\
## Keys of the reference that are translated

"""
_RENAMED = """\
## Old names

They are read with a note. A key that stands in a file under both of its names is refused.
"""


def render_markdown() -> str:
    """Return the text of CONFIG.md."""
    lines = [INTRODUCTION]
    for group, keys in groupby(all_keys().values(), key=lambda key: key.group):
        lines += [f"## {group}", "", *_table(_HEADER, map(_row, keys)), ""]
    lines += [_UNSUPPORTED, *_table(("key", "accepted", "otherwise"), _unsupported_rows()), ""]
    lines += [_NO_EFFECT, *_table(("key", "reason"), ((f"`{k}`", HAS_NO_EFFECT[k]) for k in HAS_NO_EFFECT)), ""]
    lines += [_TRANSLATED + "\n".join(f"- `{key}`: {text}" for key, text in TRANSLATED.items()), ""]
    return "\n".join([*lines, _RENAMED, *_table(("old name", "now", "name of"), _renamed_rows()), ""])


def _row(key: Key) -> tuple[str, ...]:
    cells = (_code(key.default), _code(key.range) if key.is_choice else key.range)
    return (f"`{key.name}`", key.type, *cells, key.text, key.effect, key.reference)


def _unsupported_rows() -> Iterable[tuple[str, ...]]:
    for key, (values, reason) in UNSUPPORTED.items():
        yield f"`{key}`", ", ".join(dict.fromkeys(_code(in_yaml(value)) for value in values)), reason


def _renamed_rows() -> Iterable[tuple[str, ...]]:
    for old, new in OLD_NAMES.items():
        yield f"`{old}`", described(new, mark="`"), new.origin
    for old, new in OLD_STAGE_NAMES.items():
        yield f"`{STAGES}.{old}`", f"`{STAGES}.{new.name}`", new.origin


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    cells = [header, tuple("---" for _ in header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def main() -> None:
    """Write CONFIG.md to standard output, or what the descriptions lack to standard error."""
    if found := undescribed():
        sys.exit("\n".join(found))
    sys.stdout.write(render_markdown())


if __name__ == "__main__":
    main()
