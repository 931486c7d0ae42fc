"""What the packed batches of one epoch hold, and where they differ from the data, by cause."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from checks.data.expected import ExpectedData
    from d2l.config.schema import RunConfig
    from d2l.data.records import Record
    from d2l.data.tokenize import Tokenized

SHOWN = 8  # differences of a kind that are kept in words


@dataclass
class Problems:
    """Differences of one kind: how many there are, and the first ones in words."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Add one."""
        self.count += 1
        if len(self.examples) < SHOWN:
            self.examples.append(text)


@dataclass
class EpochReading:
    """What one epoch holds. `seen[i]`: how often question i of all records is in a batch, int64 [questions]."""

    name: str
    config: "RunConfig"
    records: "Sequence[Record]"
    tokenized: "Tokenized | None"
    batches: int = 0
    questions: int = 0
    tokens: int = 0
    label_tokens: int = 0
    context_tokens: int = 0
    longest: tuple[int, int] = (0, 0)  # tokens of questions and of documents in a batch
    data: "ExpectedData | None" = None
    seen: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    labels: Problems = field(default_factory=Problems)
    texts: Problems = field(default_factory=Problems)
    pairing: Problems = field(default_factory=Problems)
    documents: Problems = field(default_factory=Problems)
    sizes: Problems = field(default_factory=Problems)
    lost: Problems = field(default_factory=Problems)
    datasets: list[dict[str, Any]] = field(default_factory=list)  # counts by data set, of the run's own epoch


def gather(found: "Sequence[EpochReading]", kind: str) -> Problems:
    """Join the problems of one kind, the name of an attribute, over all readings."""
    parts = [getattr(reading, kind) for reading in found]
    examples = [example for part in parts for example in part.examples]
    return Problems(sum(part.count for part in parts), examples[:SHOWN])
