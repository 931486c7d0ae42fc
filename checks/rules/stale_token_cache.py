"""Cached token rows are those of this run's template, tokenizer, data, limits and seed.

What it does
------------
Tokenizes two short records made of the run's texts through its cache, in a temporary folder; then again with one thing
changed at a time: each limit, the chunk draw and its seed, the base's longest text, template, supervision, date and
tokenizer, documents, questions, answers, their order, and a teacher's logprobs.

Why it matters
--------------
A cache whose key leaves out the template serves old labels after the template was fixed: the mask is fixed on paper and
the loss stays what it was. One that leaves out answers or limits trains on data that is no longer there. People remedy
that by hand (`rm -rf data/processed_datasets`), once they have thought of it.

How it is detected
------------------
Each time, rows and reports of what was dropped must equal those of tokenizing anew, without a cache. Every change is one
that changes the rows, whatever the run's own limits are.

How to fix
----------
Key the cache by everything that shapes rows: template, supervision, date, tokenizer, data, limits and seed.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checks.data.variants import variants
from checks.faults import Override, override
from checks.result import Fail, Pass, Result, Skip
from checks.rule import Fault, Rule
from checks.subject import Implementation
from d2l.errors import DataError

if TYPE_CHECKING:
    from checks.subject import Subject

CHUNK_LIMITS = ("max_ctx_chunk_len", "min_ctx_chunk_len", "max_ctx_chunk_num", "num_chunk_probs")
OTHER_LIMITS = ("max_ctx_len", "max_qas_len", "max_qas_per_sample", "max_packed_inp_len", "max_packed_ctx_len")
REMEDY = "key the cache by everything that shapes rows, or remove its folder and set cache: false"


def check(subject: "Subject") -> Result:
    """Compare rows through one cache with rows without, for inputs that differ in one thing each."""
    if subject.tokenizer is None or subject.records is None:
        return Skip(subject.tokenizer_absent or subject.records_absent)
    implementation = subject.implementation
    results: dict[str, list[Any]] = {}
    stale: list[str] = []
    with tempfile.TemporaryDirectory(prefix="d2l-") as cache, tempfile.TemporaryDirectory(prefix="d2l-") as base:
        for inputs in variants(subject, Path(base)):
            fresh = _outcome(implementation.rows, *inputs.arguments)
            results.setdefault(inputs.field, []).append(fresh)
            if _outcome(implementation.cached_rows, *inputs.arguments, Path(cache)) != fresh:
                stale.append(inputs.field)
    first = results["nothing"][0]
    idle = [field for field, found in results.items() if field != "nothing" and all(it == first for it in found)]
    evidence = {"changed": list(results), "stale": stale, "without_effect": idle}
    if stale:
        return Fail(
            message=f"the cache gives stale rows where these change: {', '.join(dict.fromkeys(stale))}",
            expected="the rows of tokenizing anew",
            actual="other rows, or other reports of what was dropped",
            remedy=REMEDY,
            evidence=evidence,
        )
    without = f" ({', '.join(idle)}: without effect here)" if idle else ""
    return Pass(
        f"rows from the cache are those of tokenizing anew, with {len(results) - 1} things changed{without}", evidence
    )


def _outcome(tokenize: Callable[..., Any], *inputs: Any) -> Any:
    """Return rows and what was dropped, or why there are none."""
    try:
        tokenized = tokenize(*inputs)
    except DataError as error:
        return str(error)
    return tuple(tokenized.rows), tokenized.dropped


def _key_without(*forgotten: str) -> Override:
    """Make a fault of a cache whose key leaves some things out."""
    kept: dict[str, Any] = {}  # by folder too, and every check has a folder of its own

    def cached_rows(healthy: Implementation, config: Any, chat: Any, records: Any, folder: Path) -> Any:
        parts = {name: getattr(config, name) for name in (*CHUNK_LIMITS, *OTHER_LIMITS, "seed")}
        parts |= {name: getattr(chat, name) for name in ("template", "supervision", "current_date")}
        parts |= {"base": config.model_name_or_path, "tokenizer": id(chat.tokenizer)}
        for name in ("context", "prompts", "responses", "logprobs_vals", "logprobs_indices"):
            parts[name] = [getattr(record, name) for record in records]
        key = repr([folder, *(value for name, value in parts.items() if name not in forgotten)])
        if key not in kept:
            kept[key] = healthy.cached_rows(config, chat, records, folder)
        return kept[key]

    return override(cached_rows=cached_rows)


RULE = Rule(
    code="CCH301",
    name="stale-token-cache",
    stage="data",
    severity="error",
    sources=("stale cache", "failure mode 5", "failure mode 36", "failure mode C24"),
    requires=("LBL101", "DAT301", "LBL301", "DAT302", "DAT303", "DAT304", "DAT305"),
    check=check,
    faults=(
        Fault("key-without-template", "another chat template meets the old rows", _key_without("template")),
        Fault("key-without-supervision", "the other supervision meets the old rows", _key_without("supervision")),
        Fault("key-without-date", "another day meets the old rows", _key_without("current_date")),
        Fault("key-without-tokenizer", "another tokenizer meets the old rows", _key_without("tokenizer")),
        Fault("key-without-data", "another document meets the old rows", _key_without("context")),
        Fault("key-without-questions", "other questions meet the old rows", _key_without("prompts")),
        Fault("key-without-answers", "other answers meet the old rows", _key_without("responses")),
        Fault(
            "key-without-teacher",
            "another teacher's logprobs meet the old rows",
            _key_without("logprobs_vals", "logprobs_indices"),
        ),
        Fault("key-without-limits", "another limit meets the old rows", _key_without(*OTHER_LIMITS)),
        Fault("key-without-chunk-limits", "another chunk limit meets the old rows", _key_without(*CHUNK_LIMITS)),
        Fault("key-without-base", "a base for shorter texts meets the old rows", _key_without("base")),
        Fault("key-without-seed", "another draw of chunk counts meets the old rows", _key_without("seed")),
    ),
)
