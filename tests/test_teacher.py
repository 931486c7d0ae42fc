"""Teacher logprobs against single forward passes of the base, and a KL run on them."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner, Result

import cli
from checks.rule import Rule
from checks.rules import RULES
from d2l.build import Components
from d2l.config.load import load_config
from d2l.config.schema import RunConfig
from d2l.data.chat.format import ChatFormat
from d2l.data.needles import needle_records
from d2l.data.records import Record, read_records, write_records
from d2l.data.tokenize import Query, tokenize_record
from d2l.errors import DataError
from d2l.train import taught
from d2l.train import teacher as teacher_code
from d2l.train.taught import parts_folder
from d2l.train.teacher import add_teacher_logprobs

CONFIG = Path("configs/needle_tiny.yaml")
TOP_K = 5


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config(CONFIG)


@pytest.fixture(scope="module")
def chat(config: RunConfig) -> ChatFormat:
    return Components(config).chat


@pytest.fixture(scope="module")
def base(config: RunConfig) -> PreTrainedModel:
    return Components(config).base


@pytest.fixture(scope="module")
def records() -> list[Record]:
    short, long = needle_records(3, 2, 2, 0, 1, style="pairs"), needle_records(2, 4, 2, 9, 1, style="pairs")
    return [*short, *long]


def distribution(base: PreTrainedModel, chat: ChatFormat, record: Record, position: int) -> torch.Tensor:
    """Compute the log-probabilities of a single question in a row of its own, [supervised token, V]."""
    messages = [
        {"role": "user", "content": f"{record.context}\n\n{record.prompts[position]}"},
        {"role": "assistant", "content": record.responses[position]},
    ]
    encoded = chat.encode(messages)
    places = [place for place, on in enumerate(encoded.supervised) if on]
    with torch.no_grad():
        logits = base(input_ids=torch.tensor([encoded.input_ids]), attention_mask=None, use_cache=False).logits[0]
    return torch.log_softmax(logits[[place - 1 for place in places]], dim=-1)


@pytest.mark.parametrize("packed_tokens", [1, 60, 4096])
def test_logprobs_are_those_of_the_base_with_the_document_in_the_prompt(
    base: PreTrainedModel, chat: ChatFormat, records: list[Record], packed_tokens: int
) -> None:
    distilled = add_teacher_logprobs(records, base, chat, top_k=TOP_K, packed_tokens=packed_tokens)
    for record, result in zip(records, distilled, strict=True):
        assert replace(result, logprobs_vals=None, logprobs_indices=None) == record
        assert result.logprobs_vals is not None
        assert result.logprobs_indices is not None
        for position in range(len(record.prompts)):
            expected = distribution(base, chat, record, position)
            ids = torch.tensor(result.logprobs_indices[position])
            values = torch.tensor(result.logprobs_vals[position])
            assert values.shape == (len(expected), TOP_K)
            torch.testing.assert_close(values, expected.topk(TOP_K).values, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(values, expected.gather(1, ids), rtol=1e-4, atol=1e-4)


def test_the_top_token_is_the_answer_in_the_document(
    base: PreTrainedModel, chat: ChatFormat, records: list[Record]
) -> None:
    for result in add_teacher_logprobs(records, base, chat, top_k=1, packed_tokens=512):
        texts = [chat.decode([row[0] for row in ids]) for ids in result.logprobs_indices or ()]
        right = sum(" ".join(answer.split()) in text for text, answer in zip(texts, result.responses, strict=True))
        assert right >= len(texts) - 1, texts


def test_a_kl_run_tokenizes_the_records(
    base: PreTrainedModel, chat: ChatFormat, records: list[Record], config: RunConfig
) -> None:
    distilled = add_teacher_logprobs(records, base, chat, top_k=TOP_K, packed_tokens=512)
    kl = config.model_copy(update={"loss": "kl", "curriculum": (), "cache": False})
    rows = Components(kl, records=distilled).rows
    values = [row for it in rows for query in it.queries for row in query.logprobs_vals or ()]
    assert len(values) == sum(len(query.labels) - query.labels.count(-100) for it in rows for query in it.queries)
    assert all(sum(map(math.exp, row)) <= 1 + 1e-5 for row in values)


def test_answers_of_other_tokens_behind_a_document_are_refused(
    base: PreTrainedModel, chat: ChatFormat, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as without it: a template that writes an answer in capitals behind a long prompt."""

    def tokenize(index: int, record: Record, *rest: Any) -> Any:
        part = tokenize_record(index, record, *rest)
        if record == records[0]:
            return part
        rows = tuple(replace(row, queries=tuple(map(otherwise, row.queries))) for row in part.rows)
        return replace(part, rows=rows)

    def otherwise(query: Query) -> Query:
        return replace(query, labels=tuple(label + (label >= 0) for label in query.labels))

    monkeypatch.setattr(teacher_code, "tokenize_record", tokenize)
    with pytest.raises(DataError, match=r"prompt 0 .*: the chat template supervises (\d+) tokens .*, and \1 or others"):
        add_teacher_logprobs(records[:1], base, chat, top_k=TOP_K, packed_tokens=512)


def test_earlier_logprobs_are_replaced(base: PreTrainedModel, chat: ChatFormat, records: list[Record]) -> None:
    table = [[((-1.0,),)] * len(record.prompts) for record in records]  # an entry for one token: of another template
    first = [
        replace(it, logprobs_vals=tuple(own), logprobs_indices=tuple(own))
        for it, own in zip(records, table, strict=True)
    ]
    again = add_teacher_logprobs(first, base, chat, top_k=TOP_K, packed_tokens=512)
    assert again == add_teacher_logprobs(records, base, chat, top_k=TOP_K, packed_tokens=512)


@pytest.mark.parametrize(
    ("top_k", "words", "message"),
    [(10_000, 4, "top_k: 10,000 is more"), (2, 9_999, r"prompt 0 .*needle.*tokens of question and answer > 4,096")],
)
def test_documents_and_top_k_beyond_the_base_are_refused(
    base: PreTrainedModel, chat: ChatFormat, records: list[Record], top_k: int, words: int, message: str
) -> None:
    record = replace(records[0], context=" ".join(["cat 1 2"] * words))
    with pytest.raises(DataError, match=message):
        add_teacher_logprobs([record], base, chat, top_k=top_k, packed_tokens=512)


def d2l(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [*map(str, arguments)], prog_name="d2l")


def write_plain(path: Path) -> None:
    """Write the configuration without its curriculum, whose documents are generated."""
    kept = [line for line in CONFIG.read_text().splitlines() if not line.startswith(("curriculum", "  - {"))]
    path.write_text("\n".join(kept))


def test_the_command_writes_a_file_with_logprobs(tmp_path: Path) -> None:
    data, distilled = tmp_path / "data.jsonl", tmp_path / "teacher.jsonl"
    assert d2l("data", "needle", "-o", data, "--documents", 4, "--style", "pairs", "--filler-words", 0).exit_code == 0
    result = d2l("data", "teacher", CONFIG, "-o", distilled, "--data", data, "--top-k", 3)
    assert result.exit_code == 2
    assert "curriculum" in result.stderr  # that config's documents are generated
    plain = tmp_path / "plain.yaml"
    write_plain(plain)
    result = d2l("data", "teacher", plain, "-o", distilled, "--data", data, "--top-k", 3)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == [f"data       {distilled}", "documents  4", "questions  8"]
    found = read_records([distilled])
    assert [it.context for it in found] == [it.context for it in read_records([data])]
    assert all(len(row) == 3 for it in found for query in it.logprobs_vals or () for row in query)
    again = d2l("data", "teacher", plain, "-o", distilled, "--data", data)
    assert (again.exit_code, read_records([distilled])) == (2, found)
    assert "never written over" in again.stderr


def test_an_interrupted_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, alone, output = tmp_path / "data.jsonl", tmp_path / "alone.jsonl", tmp_path / "taught.jsonl"
    plain = tmp_path / "plain.yaml"
    write_plain(plain)
    d2l("data", "needle", "-o", data, "--documents", 4, "--style", "pairs", "--filler-words", 0)
    monkeypatch.setattr(taught, "CHARACTERS", 1)  # a part for every document
    command = ("data", "teacher", plain, "--data", data, "--top-k", 3, "-o")
    assert d2l(*command, alone).exit_code == 0
    asked: list[Record] = []

    def interrupted(records: Sequence[Record], **options: Any) -> list[Record]:
        asked.extend(records)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return add_teacher_logprobs(records, **options)

    with monkeypatch.context() as patch:
        patch.setattr(teacher_code, "add_teacher_logprobs", interrupted)
        result = d2l(*command, output)
    assert (result.exit_code, output.exists()) == (130, False)
    assert result.stderr.endswith(f"Interrupted.\n2 of 4 documents are in {output}.parts: the same command goes on\n")
    assert f"{output}.parts holds parts of a teacher with another top_k" in d2l(*command[:-2], 4, "-o", output).stderr
    other = tmp_path / "other.yaml"
    other.write_text(plain.read_text() + "\nsupervision: sampled\n")
    refused = d2l("data", "teacher", other, "--data", data, "--top-k", 3, "-o", output)
    assert f"{output}.parts holds parts of a teacher with another chat" in refused.stderr
    result = d2l(*command, output)
    assert result.exit_code == 0
    assert result.stderr.endswith("Note: 2 of 4 documents were done by an earlier call\n")
    assert output.read_bytes() == alone.read_bytes()


def test_what_the_teacher_cannot_read_is_refused_before_the_base_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, data = tmp_path / "plain.yaml", tmp_path / "data.jsonl"
    write_plain(plain)
    short, *_, long = needle_records(3, 2, 2, 0, 1, style="pairs")
    write_records(data, [short, replace(long, context=" ".join(["cat 1 2"] * 9_999))])
    monkeypatch.setattr("d2l.build.build_base", lambda *arguments: pytest.fail("loaded"))
    result = d2l("data", "teacher", plain, "--data", data, "-o", tmp_path / "taught.jsonl")
    assert result.exit_code == 2
    assert "record 1, prompt 0" in result.stderr
    assert not parts_folder(tmp_path / "taught.jsonl").exists()


# Those that read the data, of which the teacher is a part, and those of losses; the cache's keys are judged elsewhere
OF_A_TEACHER = tuple(
    rule
    for rule in RULES
    if (rule.stage in ("static", "data") and rule.code != "CCH301") or rule.code in ("LSS201", "LSS204")
)


@pytest.mark.parametrize(
    "rules", [pytest.param(OF_A_TEACHER, id="of a teacher"), pytest.param(RULES, id="all", marks=pytest.mark.slow)]
)
def test_a_run_with_the_kl_loss_passes_its_preflight_and_trains(
    rules: Sequence[Rule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("checks.rules.RULES", rules)
    data, distilled, tiny = tmp_path / "data.jsonl", tmp_path / "teacher.jsonl", "configs/tiny_gpt_oss.yaml"
    assert d2l("data", "needle", "-o", data, "--documents", 6).exit_code == 0
    assert d2l("data", "teacher", tiny, "-o", distilled, "--data", data, "--top-k", 4).exit_code == 0
    options = ("--data", distilled, "--set", "loss=kl", "--max-steps", 2, "--output", tmp_path / "run")
    result = d2l("train", tiny, *options)
    assert result.exit_code == 0, result.output
    assert "kl_loss" in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
