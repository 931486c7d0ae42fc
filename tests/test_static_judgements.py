"""Warnings on a run's size: document tokens of a step, chunks at its start, a GPU that loops over experts; labels by channel."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from checks.data.channels import labels_by_channel
from checks.production import make_subject
from checks.result import Fail, Pass
from checks.rules import few_context_tokens, many_chunks_at_start
from checks.subject import Subject, changed
from d2l.config.load import load_config
from d2l.config.schema import CurriculumStage


@pytest.fixture(scope="module")
def subject() -> Subject:
    return make_subject(load_config())


@pytest.mark.parametrize(
    ("row", "micro_batches", "processes", "tokens"),
    [
        (3072, 11, 1, None),
        (10_000, 4, 1, 40_000),
        (9_999, 4, 1, None),
        (10_000, 1, 4, 40_000),
        (200_000, 1, 1, 200_000),
    ],
)
def test_document_tokens_of_a_step_are_rows_times_micro_batches_times_processes(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, row: int, micro_batches: int, processes: int, tokens: int | None
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    values = {"max_packed_ctx_len": row, "gradient_accumulation_steps": micro_batches}
    config = changed(subject.config, train_ds_names=("documents.jsonl",), **values)
    result = few_context_tokens.check(replace(subject, config=config))
    assert isinstance(result, Fail if tokens is None else Pass)
    assert result.evidence["context_tokens_per_step"] == row * micro_batches * processes
    if isinstance(result, Fail):  # the remedy reaches the paper's number
        steps = int(result.remedy.split("up to ")[1].split(",")[0])
        assert row * steps * processes >= 200_000 > row * (steps - micro_batches) * processes


def started_on(subject: Subject, chunks: list[int], **values: Any) -> Subject:
    """A subject whose records have so many chunks each."""
    made = replace(subject, config=changed(subject.config, **values))
    rows = [SimpleNamespace(record=index, chunks=((0,),) * count) for index, count in enumerate(chunks)]
    made.__dict__["rows"] = SimpleNamespace(rows=rows)
    return made


@pytest.mark.parametrize(("chunks", "kind"), [([1, 1, 2, 3], Pass), ([1, 2, 2], Fail), ([1] * 5, Pass), ([2], Fail)])
def test_at_most_half_of_the_documents_begin_in_several_chunks(subject: Subject, chunks: list[int], kind: type) -> None:
    assert isinstance(many_chunks_at_start.check(started_on(subject, chunks)), kind)


def test_later_stages_of_a_curriculum_may_have_many_chunks(subject: Subject) -> None:
    stages = tuple(CurriculumStage(pairs=2, digits=1, documents=count) for count in (2, 3))
    assert isinstance(many_chunks_at_start.check(started_on(subject, [1, 1, 2, 2, 2], curriculum=stages)), Pass)
    assert isinstance(many_chunks_at_start.check(started_on(subject, [2, 2, 1, 1, 1], curriculum=stages)), Fail)


class Letters:
    """A tokenizer whose tokens are words of a list."""

    WORDS = ("<|channel|>", "<|message|>", "analysis", "final", "word")

    def __init__(self, *words: str) -> None:
        self.words = words or self.WORDS

    def get_vocab(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words)}

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[index] for index in ids)


def test_labels_are_counted_by_the_channel_before_them() -> None:
    ids = (4, 0, 2, 1, 4, 4, 0, 3, 1, 4)
    labels = (4, -100, -100, -100, 4, 4, -100, -100, -100, 4)
    row: Any = SimpleNamespace(queries=(SimpleNamespace(input_ids=ids, labels=labels),))
    tokenizer: Any = Letters()
    assert labels_by_channel(tokenizer, [row, row]) == {"analysis": 4, "final": 2, "none": 2}
    plain: Any = Letters("a", "b", "c", "d", "e")
    assert labels_by_channel(plain, [row]) == {}
