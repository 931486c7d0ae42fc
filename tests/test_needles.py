"""Needle documents: what they hold, and that the splits share nothing."""

import re
from pathlib import Path

import pytest

from d2l.data.needles import KEYS, PAIR_FILLER, PAIR_KEYS, needle_records, split_of
from d2l.data.records import Record, read_records, write_records
from d2l.errors import ConfigError

NEEDLE = re.compile(r"The value of (\w+ \w+) is (\d+)\.")


def needles(records: list[Record]) -> set[tuple[str, str]]:
    return {pair for record in records for pair in NEEDLE.findall(record.context)}


def filler(records: list[Record]) -> set[str]:
    return {
        sentence
        for record in records
        for sentence in re.findall(r"[^.]+\.", NEEDLE.sub("", record.context))
        if sentence
    }


@pytest.mark.parametrize(("pairs", "digits", "words"), [(1, 1, 0), (4, 2, 16), (9, 4, 100), (300, 1, 8)])
def test_a_document_states_the_answers(pairs: int, digits: int, words: int) -> None:
    for record in needle_records(5, pairs, digits, words, seed=3):
        stated = NEEDLE.findall(record.context)
        assert len({key for key, _ in stated}) == len(stated) == pairs
        keys = [prompt.removeprefix("What is the value of ").removesuffix("?") for prompt in record.prompts]
        assert dict(stated) == dict(zip(keys, record.responses, strict=True))
        assert all(len(value) == digits for value in record.responses)
        assert len(NEEDLE.sub("", record.context).split()) == -(-words // 8) * 8


def test_needles_are_at_random_positions() -> None:
    first = [record.context.startswith("The value of") for record in needle_records(100, 1, 2, 24, seed=0)]
    assert 10 < sum(first) < 50  # one of four sentences


def test_splits_share_no_pair_and_no_sentence_whatever_the_seeds() -> None:
    train = needle_records(3000, 4, 1, 64, seed=0) + needle_records(1000, 4, 1, 64, seed=5)
    heldout = needle_records(1000, 4, 1, 64, seed=0, split="heldout") + needle_records(500, 4, 1, 8, 5, "heldout")
    assert needles(train).isdisjoint(needles(heldout))
    assert filler(train).isdisjoint(filler(heldout))
    known = {key for key, _ in needles(train)}
    assert sum(key in known for key, _ in needles(heldout)) > 0.99 * len(needles(heldout))  # new pairs of known keys


def test_a_fifth_of_all_pairs_is_held_out_evenly_over_values() -> None:
    for value in "0123456789":
        share = sum(split_of(f"{key} {value}") == "heldout" for key in KEYS) / len(KEYS)
        assert share == pytest.approx(0.2, abs=0.03)


def test_same_seed_same_records_and_each_seed_its_own() -> None:
    assert needle_records(20, 2, 2, 16, seed=1) == needle_records(20, 2, 2, 16, seed=1)
    assert needle_records(20, 2, 2, 16, seed=1) != needle_records(20, 2, 2, 16, seed=2)
    assert needle_records(20, 2, 2, 16, seed=1)[:5] == needle_records(5, 2, 2, 16, seed=1)


def test_more_needles_than_keys_is_refused() -> None:
    with pytest.raises(ConfigError, match="needle_pairs"):
        needle_records(1, len(KEYS) + 1, 1, 0, seed=0)


def test_records_can_be_written_and_read(tmp_path: Path) -> None:
    records = needle_records(3, 2, 3, 16, seed=0)
    write_records(tmp_path / "needles.jsonl", records)
    read = read_records([tmp_path / "needles.jsonl"])
    assert [(r.context, r.prompts, r.responses) for r in read] == [(r.context, r.prompts, r.responses) for r in records]


def test_pairs_are_keys_digits_and_nothing_else() -> None:
    train, heldout = (
        needle_records(400, 4, 2, 0, seed=1, split=split, style="pairs") for split in ("train", "heldout")
    )
    for record in train:
        assert record.context == " ".join(record.responses)
        assert len(set(record.prompts)) == 4
        for prompt, response in zip(record.prompts, record.responses, strict=True):
            key, *digits = response.split(" ")
            assert key == prompt
            assert key in PAIR_KEYS
            assert len("".join(digits)) == len(digits) == 2
    pairs = [{response for record in records for response in record.responses} for records in (train, heldout)]
    assert not pairs[0] & pairs[1]
    assert len(set(PAIR_KEYS)) == 32


def test_filler_of_pairs_is_whole_sentences_of_their_own_split_among_them() -> None:
    sentences = {}
    for split in ("train", "heldout"):
        sentences[split] = set()
        for record in needle_records(200, 2, 2, 8, seed=1, split=split, style="pairs"):
            text = record.context
            for response in record.responses:
                before, _, behind = text.partition(response)
                text = f"{before.strip()} {behind.strip()}".strip()
            assert len(text.split()) == 9
            assert set(text.split()) <= set(PAIR_FILLER)
            sentences[split] |= {" ".join(text.split()[place : place + 3]) for place in range(0, 9, 3)}
    assert not sentences["train"] & sentences["heldout"]
    assert set(PAIR_FILLER).isdisjoint(PAIR_KEYS)


def test_more_pairs_than_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match="than the 32 keys"):
        needle_records(1, 33, 2, 0, seed=0, style="pairs")


def test_filler_is_drawn_between_its_bounds() -> None:
    records = needle_records(300, 1, 2, 12, seed=0, style="pairs", min_filler_words=0)
    lengths = [len(record.context.split()) for record in records]
    assert set(lengths) == {3, 6, 9, 12, 15}
