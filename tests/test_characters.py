"""Texts that cannot fit are refused by their number of characters, at once, and never one that would have fitted."""

import json
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat_formats import PLAIN, tiny
from support.families import FAMILIES
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from checks.production import make_subject
from checks.rules import RULES
from checks.runner import run_checks
from d2l.config.load import load_config
from d2l.data.characters import characters_per_token
from d2l.data.chat.format import ChatFormat, chat_format
from d2l.data.chat.tokenizer import load_tokenizer
from d2l.data.chunks import chunk_document
from d2l.data.limits import DoesNotFitError, Limits
from d2l.data.records import Record
from d2l.data.tokenize import tokenize_records

HUGE = "The red fox sat near the old barn. " * 600_000  # 21 million characters


def with_normalizer(normalizer: Any) -> PreTrainedTokenizerBase:
    backend = Tokenizer.from_str(tiny.backend_tokenizer.to_str())
    backend.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=backend)


BOUNDED: dict[str, PreTrainedTokenizerBase] = {
    "tiny": tiny,
    **{name: family.tokenizer(family.text) for name, family in FAMILIES.items()},
    "nfc": with_normalizer(normalizers.NFC()),
    "nfkc": with_normalizer(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
    "replaced": with_normalizer(normalizers.Replace("aaa", "b")),
}


def words(**options: Any) -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def swallowing() -> PreTrainedTokenizerBase:
    backend = Tokenizer.from_str(tiny.backend_tokenizer.to_str())
    backend.add_tokens([AddedToken("<stop>", rstrip=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def fusing() -> PreTrainedTokenizerBase:
    """Letters that are unknown become one token together."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>", fuse_unk=True))
    )


@pytest.mark.parametrize(
    "tokenizer",
    [
        words(),
        swallowing(),
        fusing(),
        with_normalizer(normalizers.Strip()),
        with_normalizer(normalizers.Replace("a", "")),
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, []))),
    ],
    ids=["words", "swallows", "fuses", "strips", "removes", "drops"],
)
def test_no_bound_is_stated_where_none_holds(tokenizer: PreTrainedTokenizerBase) -> None:
    assert characters_per_token(tokenizer) is None
    chat = chat_format(tokenizer, template=PLAIN)
    assert chat.least_tokens(HUGE) == 0


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    st.sampled_from(sorted(BOUNDED)),
    st.lists(
        st.tuples(
            st.one_of(
                st.sampled_from(
                    [" ", "\n", "a", "The", "e\u0301", "\u0041\u030a", "가", "각", "ﬃ", "İ", "<s>", "<|end|>"]
                ),
                st.sampled_from(["\u03b1\u0313\u0300\u0345", "====", "🙂", "\ufdfa", "\r\n", "value"]),
                st.text(max_size=4),
            ),
            st.integers(1, 60),
        ),
        max_size=6,
    ),
)
def test_no_text_has_fewer_tokens_than_the_bound_says(name: str, parts: list[tuple[str, int]]) -> None:
    text = "".join(part * times for part, times in parts).encode("utf-8", "ignore").decode()
    most = characters_per_token(BOUNDED[name])
    assert most is not None
    for splits in (False, True):
        ids = BOUNDED[name](text, add_special_tokens=False, split_special_tokens=splits)["input_ids"]
        assert len(text) <= most * len(ids)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.integers(1, 400), st.sampled_from(["a", " ", "value ", "🙂", "="]), st.integers(8, 60))
def test_what_fits_is_never_refused(times: int, part: str, limit: int) -> None:
    chat, text = chat_format(tiny), part * times
    whole = chunk_document(text, chat, Limits())
    affixes = sum(map(len, chat.context_affixes()))
    for name in ("max_ctx_len", "max_packed_ctx_len"):
        limits = replace(Limits(), **{name: limit + affixes})
        if len(whole[0]) <= limit + affixes:
            assert chunk_document(text, chat, limits) == whole
        else:
            with pytest.raises(DoesNotFitError, match=name):
                chunk_document(text, chat, limits)


@pytest.mark.parametrize("field", ["context", "prompts", "responses"])
def test_a_line_of_megabytes_is_dropped_at_once(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = chat_format(tiny)
    chat.least_tokens("warm"), chat.context_affixes()
    clean = Record("A page.", ("Which?",), ("This.",), "a.jsonl:1")
    huge = replace(clean, **{field: HUGE if field == "context" else (HUGE,)}, source="a.jsonl:2")
    limits = Limits(max_qas_len=2048, max_packed_inp_len=16384, max_packed_ctx_len=32768)
    started = time.monotonic()
    tracemalloc.start()
    tokenized = tokenize_records([clean, huge], chat, limits)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - started < 5  # 0.1 s; tokenizing takes a minute
    assert peak < 10 * len(HUGE)
    (dropped,) = tokenized.dropped
    limit = "max_packed_ctx_len 32,768" if field == "context" else "max_qas_len 2,048"
    assert dropped.kind == ("document too long" if field == "context" else "question too long")
    assert dropped.reason.startswith("at least 1,")
    assert limit in dropped.reason
    assert "characters)" in dropped.reason
    assert len(tokenized.rows) == 1


def test_preflight_reports_it_where_other_dropped_records_are(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    page = {"context": "A page about nothing.", "prompts": ["Which?"], "responses": ["This."]}
    lines = [page] * 30 + [page | {"context": HUGE}, page | {"prompts": [HUGE]}]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    started = time.monotonic()
    subject = make_subject(load_config(None, {"train_ds_names": f"[{path}]", "cache": "false"}))
    outcomes = run_checks(subject, RULES, select=("DAT301", "DAT308", "LBL301", "DAT302", "DAT303", "DAT304")).outcomes
    found = {it.code: it for it in outcomes}
    assert found["DAT301"].outcome == "warn"
    assert found["DAT301"].evidence["reasons"] == {"document too long": 1, "question too long": 1}
    assert {found[code].outcome for code in found} == {"warn", "pass"}
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_the_bound_of_the_real_tokenizer(shared: Path) -> None:
    tokenizer = load_tokenizer(str(shared / "tokenizers/gpt-oss"))
    assert characters_per_token(tokenizer) == 128
    assert len(ChatFormat.encode_text(chat_format(tokenizer), " " * 128)) == 1
