"""Cached token rows are those of this run's template, data and limits.

What it does
------------
Tokenizes a few of the run's records through its cache, in a temporary folder; then again with one byte more in the chat
template, with the other supervision, with one byte more in a document, and with a lower `max_packed_ctx_len`.

Why it matters
--------------
A cache whose key leaves out the template serves old labels after the template was fixed: the mask is fixed on paper and
the loss stays what it was. People remedy that by hand (`rm -rf data/processed_datasets`), once they have thought of it.

How it is detected
------------------
Each time, rows and reports of what was dropped must equal those of tokenizing anew, without a cache.

How to fix
----------
Key the cache by everything that shapes rows: template, supervision, date, tokenizer, data and limits.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checks.faults import override
from checks.result import Fail, Pass, Result, Skip
from checks.rule import Fault, Rule
from checks.subject import Implementation, changed
from d2l.errors import DataError

if TYPE_CHECKING:
    from checks.subject import Subject
    from d2l.config.schema import RunConfig
    from d2l.data.chat.format import ChatFormat
    from d2l.data.records import Record

    Inputs = tuple[RunConfig, ChatFormat, tuple[Record, ...]]

RECORDS = 2
REMEDY = "key the cache by everything that shapes rows, or remove its folder and set cache: false"


def check(subject: "Subject") -> Result:
    """Compare rows through one cache with rows without, for inputs that differ in one thing each."""
    if subject.tokenizer is None or subject.records is None:
        return Skip(subject.tokenizer_absent or subject.records_absent)
    implementation = subject.implementation
    compared: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="d2l-") as folder:
        for what, inputs in _variants(subject):
            fresh = _outcome(implementation.rows, *inputs)
            if _outcome(implementation.cached_rows, *inputs, Path(folder)) != fresh:
                return Fail(
                    message=f"the cache gives stale rows: {what}",
                    expected="the rows of tokenizing anew",
                    actual="other rows, or other reports of what was dropped",
                    remedy=REMEDY,
                    evidence={"changed": what, "equal": list(compared)},
                )
            compared[what] = fresh
    distinct = len(set(map(repr, compared.values())))
    return Pass(
        f"rows from the cache are always those of tokenizing anew: {len(compared)} inputs with {distinct} results",
        {"compared": list(compared)},
    )


def _variants(subject: "Subject") -> "Iterator[tuple[str, Inputs]]":
    """Yield the run's own inputs on a few records that have rows, then with one change at a time."""
    assert subject.records is not None
    config, chat, rows = subject.config, subject.chat, subject.rows.rows[:RECORDS]
    records = tuple(subject.records[index] for index in dict.fromkeys(row.record for row in rows))
    yield "nothing changed", (config, chat, records)
    yield "nothing changed, the second time", (config, chat, records)
    yield "one byte more in the chat template", (config, replace(chat, template=f".{chat.template}"), records)
    other = changed(config, supervision="sampled" if config.supervision == "content" else "content")
    yield "the other supervision", (other, replace(chat, supervision=other.supervision), records)
    yield (
        "one byte more in a document",
        (config, chat, (replace(records[0], context=f"{records[0].context}."), *records[1:])),
    )
    longest = max(row.size[1] for row in rows)
    yield "a lower max_packed_ctx_len", (changed(config, max_packed_ctx_len=max(longest - 1, 1)), chat, records)


def _outcome(tokenize: Callable[..., Any], *inputs: Any) -> Any:
    """Return rows and what was dropped, or why there are none."""
    try:
        tokenized = tokenize(*inputs)
    except DataError as error:
        return str(error)
    return tuple(tokenized.rows), tokenized.dropped


def _key_without(forgotten: str) -> "Callable[[Subject], Subject]":
    """Make a fault of a cache whose key leaves one thing out."""

    def plant(subject: "Subject") -> "Subject":
        kept: dict[str, Any] = {}

        def cached_rows(healthy: Implementation, config: Any, chat: Any, records: Any, folder: Path) -> Any:
            parts = {"template": chat.template, "supervision": chat.supervision, "data": records, "limits": config}
            key = repr([folder, *(value for name, value in parts.items() if name != forgotten)])
            if key not in kept:
                kept[key] = healthy.cached_rows(config, chat, records, folder)
            return kept[key]

        return override(cached_rows=cached_rows)(subject)

    return plant


RULE = Rule(
    code="CCH301",
    name="stale-token-cache",
    stage="data",
    severity="error",
    sources=("stale cache", "failure mode 5", "failure mode 36"),
    requires=("LBL101", "DAT301", "LBL301", "DAT302", "DAT303", "DAT304", "DAT305"),
    check=check,
    faults=(
        Fault("key-without-template", "another chat template meets the old rows", _key_without("template")),
        Fault("key-without-data", "another document meets the old rows", _key_without("data")),
        Fault("key-without-limits", "another limit meets the old rows", _key_without("limits")),
    ),
)
