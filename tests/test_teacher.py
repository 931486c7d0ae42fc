"""The teacher against the base asked question by question, without packing; and what a KL run makes of its file."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner, Result

import cli
from d2l.build import Components
from d2l.config.load import load_config
from d2l.config.schema import RunConfig
from d2l.data.chat.format import ChatFormat
from d2l.data.needles import needle_records
from d2l.data.records import Record, read_records
from d2l.errors import DataError
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
    """[supervised token, V] log-probabilities of a single question, with nothing else in the row."""
    said = [
        {"role": "user", "content": f"{record.context}\n\n{record.prompts[position]}"},
        {"role": "assistant", "content": record.responses[position]},
    ]
    encoded = chat.encode(said)
    places = [place for place, on in enumerate(encoded.supervised) if on]
    with torch.no_grad():
        logits = base(input_ids=torch.tensor([encoded.input_ids]), attention_mask=None, use_cache=False).logits[0]
    return torch.log_softmax(logits[[place - 1 for place in places]], dim=-1)


@pytest.mark.parametrize("packed_tokens", [1, 60, 4096])
def test_every_token_gets_the_bases_likeliest_with_the_document_in_the_prompt(
    base: PreTrainedModel, chat: ChatFormat, records: list[Record], packed_tokens: int
) -> None:
    taught = add_teacher_logprobs(records, base, chat, top_k=TOP_K, packed_tokens=packed_tokens)
    for record, result in zip(records, taught, strict=True):
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


def test_the_teacher_has_read_the_document(base: PreTrainedModel, chat: ChatFormat, records: list[Record]) -> None:
    for result in add_teacher_logprobs(records, base, chat, top_k=1, packed_tokens=512):
        said = [chat.decode([row[0] for row in ids]) for ids in result.logprobs_indices or ()]
        right = sum(" ".join(answer.split()) in text for text, answer in zip(said, result.responses, strict=True))
        assert right >= len(said) - 1, said


def test_a_kl_run_takes_the_records_as_they_are(
    base: PreTrainedModel, chat: ChatFormat, records: list[Record], config: RunConfig
) -> None:
    taught = add_teacher_logprobs(records, base, chat, top_k=TOP_K, packed_tokens=512)
    kl = config.model_copy(update={"loss": "kl", "curriculum": (), "cache": False})
    rows = Components(kl, records=taught).rows
    values = [row for it in rows for query in it.queries for row in query.logprobs_vals or ()]
    assert len(values) == sum(len(query.labels) - query.labels.count(-100) for it in rows for query in it.queries)
    assert all(sum(map(math.exp, row)) <= 1 + 1e-5 for row in values)


def test_an_earlier_teacher_is_replaced(base: PreTrainedModel, chat: ChatFormat, records: list[Record]) -> None:
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
def test_what_cannot_be_taught_is_refused(
    base: PreTrainedModel, chat: ChatFormat, records: list[Record], top_k: int, words: int, message: str
) -> None:
    record = replace(records[0], context=" ".join(["cat 1 2"] * words))
    with pytest.raises(DataError, match=message):
        add_teacher_logprobs([record], base, chat, top_k=top_k, packed_tokens=512)


def d2l(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [*map(str, arguments)], prog_name="d2l")


def test_the_command_writes_a_file_that_a_run_learns_from(tmp_path: Path) -> None:
    data, taught = tmp_path / "data.jsonl", tmp_path / "taught.jsonl"
    assert d2l("data", "needle", "-o", data, "--documents", 4, "--style", "pairs", "--filler-words", 0).exit_code == 0
    result = d2l("data", "teacher", CONFIG, "-o", taught, "--data", data, "--top-k", 3)
    assert result.exit_code == 2
    assert "curriculum" in result.stderr  # that config's documents are generated
    plain = tmp_path / "plain.yaml"
    kept = [line for line in CONFIG.read_text().splitlines() if not line.startswith(("curriculum", "  - {"))]
    plain.write_text("\n".join(kept))
    result = d2l("data", "teacher", plain, "-o", taught, "--data", data, "--top-k", 3)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == [f"data       {taught}", "documents  4", "questions  8"]
    found = read_records([taught])
    assert [it.context for it in found] == [it.context for it in read_records([data])]
    assert all(len(row) == 3 for it in found for query in it.logprobs_vals or () for row in query)
    again = d2l("data", "teacher", plain, "-o", taught, "--data", data)
    assert (again.exit_code, read_records([taught])) == (2, found)
    assert "never written over" in again.stderr


def test_a_run_with_the_kl_loss_passes_its_preflight_and_trains(tmp_path: Path) -> None:
    data, taught, tiny = tmp_path / "data.jsonl", tmp_path / "taught.jsonl", "configs/tiny_gpt_oss.yaml"
    assert d2l("data", "needle", "-o", data, "--documents", 6).exit_code == 0
    assert d2l("data", "teacher", tiny, "-o", taught, "--data", data, "--top-k", 4).exit_code == 0
    options = ("--data", taught, "--set", "loss=kl", "--max-steps", 2, "--output", tmp_path / "run")
    result = d2l("train", tiny, *options)
    assert result.exit_code == 0, result.output
    assert "kl_loss" in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
