"""Most documents of the first stage are read in one piece.

What it does
------------
Counts the chunks of the documents that the run starts on.

Why it matters
--------------
A hypernetwork learns to read a chunk before it can learn that several stand side by side along the rank. The paper trains on
documents of one chunk first and on several after; runs that began with several were unstable from the first step. More and
longer chunks than were trained come out as gibberish: `d2l internalize` warns of those.

How it is detected
------------------
At most half of the documents may have more than one chunk. A warning: a run that resumes a trained hypernetwork may well
begin so.

How to fix
----------
Raise `max_ctx_chunk_len`, give 1 the largest share of `num_chunk_probs`, or begin with a stage of shorter documents.
"""

import math
from collections import Counter
from typing import TYPE_CHECKING

from checks.faults import configure
from checks.result import Fail, Pass, Result, Skip
from checks.rule import Fault, Rule

if TYPE_CHECKING:
    from checks.subject import Subject

MOST = 0.5  # of the documents


def check(subject: "Subject") -> Result:
    """Compare the share of documents in several chunks with a half."""
    if subject.tokenizer is None or subject.records is None:
        return Skip(subject.tokenizer_absent or subject.records_absent)
    counts = Counter(len(row.chunks) for row in subject.rows.rows if row.record < _first_stage(subject))
    documents = sum(counts.values())
    several = documents - counts[1]
    evidence = {"documents": documents, "documents by number of chunks": {str(n): counts[n] for n in sorted(counts)}}
    text = f"{several:,} of {documents:,} documents have several chunks, at most {max(counts, default=0)}"
    if several > MOST * documents:
        return Fail(
            message="training begins with documents in several chunks",
            expected=f"at most {MOST:.0%} of the documents, until one chunk is learnt",
            actual=text,
            remedy="raise max_ctx_chunk_len, or give 1 the largest share of num_chunk_probs; a run that goes on from a "
            "trained hypernetwork may ignore this",
            evidence=evidence,
        )
    return Pass(text, evidence)


def _first_stage(subject: "Subject") -> float:
    """Return how many records the run starts on: those of its curriculum's first stage, or all."""
    config = subject.config
    return config.documents_of(config.curriculum[0]) if config.curriculum else math.inf


def _short_chunks(subject: "Subject") -> "Subject":
    """Cut three quarters of the documents."""
    sizes = sorted(row.size[1] for row in subject.rows.rows)
    length = sizes[len(sizes) // 4] - 1
    cut = configure(max_ctx_chunk_len=length, min_ctx_chunk_len=-1, max_ctx_chunk_num=None, num_chunk_probs=None)
    return cut(subject)


RULE = Rule(
    code="CHK301",
    name="many-chunks-at-start",
    stage="data",
    severity="warning",
    sources=("failure mode C18", "SakanaAI/doc-to-lora#4", "https://arxiv.org/abs/2602.15902"),
    requires=("DAT301",),
    check=check,
    faults=(Fault("short-chunks", "chunks shorter than three quarters of the documents", _short_chunks),),
)
