"""Documents are cut into as many chunks as `num_chunk_probs` asks for: drawn for each document, with these probabilities.

What it does
------------
Tokenizes a hundred copies of one document, the beginning of a text of the run three times or more, with probabilities of its
own, and counts their chunks.

Why it matters
--------------
The reference trains on documents in one to eight chunks, so that a hypernetwork learns to be read in pieces. Where the
probabilities have no effect, or every document gets the same draw, the run learns one number of chunks only, and answers
from longer documents are lost at inference.

How it is detected
------------------
Each count's share must be within five standard deviations of its probability.

How to fix
----------
Draw with the configured weights, from a generator of each record's own.
"""

import math
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from checks.data.sizes import ROOM, unlimited
from checks.faults import override
from checks.implementation import Implementation
from checks.result import Fail, Pass, Result, Skip
from checks.rule import Fault, Rule
from checks.subject import changed

if TYPE_CHECKING:
    from checks.subject import Subject

COPIES = 100
PROBABILITIES = {1: 0.6, 2: 0.1, 3: 0.3}
DEVIATIONS = 5
SHORT, LONG = 100, 300  # characters: of more, three times as many could be more than the base reads in one chunk


def check(subject: "Subject") -> Result:
    """Count the chunks of many copies of one document."""
    if subject.tokenizer is None or subject.records is None:
        return Skip(subject.tokenizer_absent or subject.records_absent)
    by_length = sorted(subject.rows.rows[:COPIES], key=lambda row: row.size[1])
    record = subject.records[by_length[len(by_length) // 2].record]
    # a document of two tokens has no three chunks, and the equal ones of four tokens are two
    repeats = max(PROBABILITIES) if len(record.context) >= SHORT else 2 * max(PROBABILITIES)
    text = " ".join([record.context[:LONG]] * repeats)
    one = replace(record, context=text, prompts=record.prompts[:1], responses=record.responses[:1])
    copies = tuple(replace(one, logprobs_vals=None, logprobs_indices=None) for _ in range(COPIES))
    drawn = {"max_ctx_chunk_len": ROOM, "num_chunk_probs": PROBABILITIES, "chunking": subject.config.chunking}
    config = unlimited(subject.config, **drawn)
    rows = subject.implementation.rows(config, subject.chat, copies).rows
    counts = Counter(len(row.chunks) for row in rows)
    shares = {count: counts[count] / max(len(rows), 1) for count in sorted({*PROBABILITIES, *counts})}
    evidence: dict[str, Any] = {"documents": len(rows), "shares by number of chunks": shares}
    for count, share in shares.items():
        p = PROBABILITIES.get(count, 0.0)
        if abs(share - p) > DEVIATIONS * math.sqrt(p * (1 - p) / COPIES):
            return Fail(
                message="documents are not cut into as many chunks as num_chunk_probs asks for",
                expected=", ".join(f"{number}: {p:.0%}" for number, p in PROBABILITIES.items()),
                actual=", ".join(f"{number}: {share:.0%}" for number, share in shares.items()),
                remedy="draw the number of chunks with the configured weights, anew for every record",
                evidence=evidence,
            )
    found = ", ".join(f"{number}: {share:.0%}" for number, share in shares.items())
    return Pass(f"{len(rows)} copies of a document have the numbers of chunks that are asked for ({found})", evidence)


def _with_probabilities(probabilities: dict[int, float]) -> Any:
    """Make a fault of draws by other probabilities than configured."""

    def rows(healthy: Implementation, config: Any, chat: Any, records: Any) -> Any:
        if config.num_chunk_probs == PROBABILITIES:
            config = changed(config, num_chunk_probs=probabilities)
        return healthy.rows(config, chat, records)

    return override(rows=rows)


RULE = Rule(
    code="DAT306",
    name="chunk-counts-drawn-wrong",
    stage="data",
    severity="error",
    sources=("failure mode C18",),
    requires=("DAT305", "DAT304"),
    check=check,
    faults=(
        Fault("drawn-evenly", "all numbers of chunks are as likely", _with_probabilities({1: 0.34, 2: 0.33, 3: 0.33})),
        Fault("one-chunk-always", "the probabilities have no effect", _with_probabilities({1: 1.0})),
    ),
)
