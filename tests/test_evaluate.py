"""Evaluation: the LoRA and prompt of each condition, likelihoods, document sizes, and seeds."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.tiny_run import make_run
from torch import Tensor

from d2l.data.needles import needle_records
from d2l.data.packing import collate
from d2l.data.tokenize import Limits, Row, tokenize_record
from d2l.errors import DataError
from d2l.evaluation import answers
from d2l.evaluation.run import (
    Evaluation,
    _draw_other_documents,
    evaluate,
)
from d2l.evaluation.scores import CONDITIONS, Condition, GradedAnswer, compute_scores, group_by_chunks, group_by_length
from d2l.inference.generate import ask, internalize
from d2l.inference.load import TrainedModel, load_model

RECORDS = needle_records(documents=3, pairs=2, digits=2, filler_words=8, seed=5, split="heldout")
NEW_TOKENS = 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    trained = load_model(make_run(tmp_path_factory.mktemp("run")))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trained.model.hypernet.named_parameters():
            if name.startswith("scaler_B"):  # the LoRA of an untrained hypernetwork is zero
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return trained


@pytest.fixture(scope="module")
def evaluation(trained: TrainedModel) -> Evaluation:
    return evaluate(trained, RECORDS, seed=1, max_new_tokens=NEW_TOKENS)


def answers_under(condition: Condition, evaluation: Evaluation) -> list[GradedAnswer]:
    return [answer for answer in evaluation.answers if answer.condition == condition]


def test_every_question_is_answered_under_every_condition(evaluation: Evaluation) -> None:
    assert (evaluation.documents, evaluation.questions) == (3, 6)
    found = [(answer.condition, answer.record, answer.query) for answer in evaluation.answers]
    assert sorted(found) == sorted((c, r, q) for c in CONDITIONS for r in range(3) for q in range(2))


def test_each_condition_uses_its_lora_and_prompt(trained: TrainedModel, evaluation: Evaluation) -> None:
    others = _draw_other_documents(RECORDS, random.Random("1 other"))
    for index, record in enumerate(RECORDS):
        for query, question in enumerate(record.prompts):
            own, other = internalize(trained, record.context), internalize(trained, RECORDS[others[index]].context)
            in_prompt = f"{record.context}\n\n{question}"
            expected = {
                "document": ask(trained, own, question, NEW_TOKENS),
                "other": ask(trained, other, question, NEW_TOKENS),
                "none": ask(trained, None, question, NEW_TOKENS),
                "in_prompt": ask(trained, None, in_prompt, NEW_TOKENS),
            }
            found = {it.condition: it.answer for it in evaluation.answers if (it.record, it.query) == (index, query)}
            assert found == expected


def test_answers_of_many_documents_share_batches_and_are_those_of_each_alone(
    trained: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents of one chunk and of several: LoRAs of two ranks; questions of two lengths; more than a batch may have."""
    monkeypatch.setattr(answers, "ROWS", 4)
    records = [*RECORDS, *needle_records(documents=3, pairs=2, digits=2, filler_words=100, seed=5, split="heldout")]
    loras = [internalize(trained, record.context) for record in records for _ in record.prompts]
    assert len({lora.rank for lora in loras}) > 1
    questions = [f"{'Please: ' * (place % 2)}{it}" for record in records for place, it in enumerate(record.prompts)]
    sizes: list[int] = []
    healthy = answers.generate

    def counted(*given: Any, **options: Any) -> Tensor:
        sizes.append(len(given[2]))
        return healthy(*given, **options)

    monkeypatch.setattr(answers, "generate", counted)
    found = answers.generate_answers(trained, loras, questions, NEW_TOKENS)
    assert found == [ask(trained, *each, NEW_TOKENS) for each in zip(loras, questions, strict=True)]
    assert sorted(sizes) == [2, 2, 4, 4]
    monkeypatch.setattr(answers, "TOKENS", 1)
    assert answers.generate_answers(trained, None, questions[:2], NEW_TOKENS) == [
        ask(trained, None, question, NEW_TOKENS) for question in questions[:2]
    ]
    assert sizes[4:] == [1, 1]


def test_likelihoods_are_the_same_however_many_questions_share_a_row(
    trained: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = needle_records(documents=1, pairs=4, digits=2, filler_words=8, seed=5)[0]
    lora = internalize(trained, record.context)
    whole = answers.compute_likelihoods(trained, lora, record)
    rows: list[int] = []
    healthy = answers.collate
    monkeypatch.setattr(answers, "collate", lambda given: rows.append(len(given[0].queries)) or healthy(given))
    length = len(tokenize_record(0, record, trained.chat, Limits(), None).rows[0].queries[0].input_ids)
    for most, shared in ((2 * length + 1, [2, 2]), (1, [1] * 4)):
        config = trained.config.model_copy(update={"max_packed_inp_len": most})
        alone = answers.compute_likelihoods(replace(trained, config=config), lora, record)
        assert [nll for nll, _ in alone] == pytest.approx([nll for nll, _ in whole], rel=1e-5)
        assert [count for _, count in alone] == [count for _, count in whole]
        assert rows == shared
        rows.clear()


def test_likelihood_is_that_of_the_training_loss(trained: TrainedModel, evaluation: Evaluation) -> None:
    part = tokenize_record(0, RECORDS[1], trained.chat, Limits(), None)
    lora = internalize(trained, RECORDS[1].context)
    for answer in [it for it in answers_under("document", evaluation) if it.record == 1]:
        batch = collate([Row(0, part.rows[0].chunks, (part.rows[0].queries[answer.query],))])
        labels = batch.labels[0, batch.label_positions]
        with torch.no_grad():
            logits = trained.model.logits(batch, lora, batch.prediction_positions)
        log_probs = logits.log_softmax(-1).gather(-1, labels[:, None])
        assert answer.nll == pytest.approx(-float(log_probs.sum()), rel=1e-4)
        assert answer.tokens == len(labels)


def test_conditions_give_different_likelihoods(evaluation: Evaluation) -> None:
    losses = {c: [answer.nll for answer in answers_under(c, evaluation)] for c in CONDITIONS}
    assert len({tuple(values) for values in losses.values()}) == len(CONDITIONS)


def test_results_depend_on_the_seed_alone(evaluation: Evaluation) -> None:
    assert compute_scores(evaluation.answers, seed=1) == compute_scores(evaluation.answers, seed=1) == evaluation.scores
    others = [_draw_other_documents(RECORDS * 9, random.Random(f"{seed} other")) for seed in (1, 1, 2)]
    assert others[0] == others[1] != others[2]


def test_the_other_document_has_another_text() -> None:
    again = replace(RECORDS[0], prompts=("Another?",))  # a record of its own, as files have several of one document
    several = [*RECORDS, again, again, again]
    for seed in range(5):
        for index, other in enumerate(_draw_other_documents(several, random.Random(seed))):
            assert several[other].context != several[index].context
    with pytest.raises(DataError, match="found 1 in 2 records"):
        _draw_other_documents([RECORDS[0], again], random.Random(0))


def test_sizes_are_tokens_and_chunks_of_the_documents(trained: TrainedModel) -> None:
    records = [*RECORDS[:2], *needle_records(documents=1, pairs=1, digits=2, filler_words=100, seed=5)]
    evaluation = evaluate(trained, records, max_new_tokens=1)
    found = {it.record: (it.document_tokens, it.chunks) for it in evaluation.answers}
    longest = trained.config.max_ctx_chunk_len - sum(map(len, trained.chat.context_affixes()))
    tokens = [len(trained.chat.encode_text(record.context)) for record in records]
    assert found == {index: (count, -(-count // longest)) for index, count in enumerate(tokens)}
    assert found[2][1] > 1
    assert evaluation.by_length == group_by_length(evaluation.answers, seed=0)
    assert evaluation.by_chunks == group_by_chunks(evaluation.answers, seed=0)
    assert [(group.low, group.documents, group.questions) for group in evaluation.by_chunks] == [
        (1, 2, 4),
        (found[2][1], 1, 1),
    ]


def test_a_document_over_the_limits_is_refused_before_any_question(
    trained: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a question was answered")

    monkeypatch.setattr("d2l.evaluation.answers.generate", fail)
    long = needle_records(documents=1, pairs=2, digits=2, filler_words=9000, seed=5)
    with pytest.raises(DataError, match="does not fit the checkpoint"):
        evaluate(trained, [*RECORDS, *long])
