"""Chunks: equal ones as the reference cuts them, those where sentences end, and overlaps, against slow oracles."""

import math
import random
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.families import FAMILIES
from support.tiny_run import tiny_config

from checks.oracles.chunks import equal_pieces, joined, sentence_pieces
from d2l.build import Components
from d2l.data.chat.format import ChatFormat, chat_format
from d2l.data.chat.tokenizer import load_tokenizer
from d2l.data.chunks import chunk_document, split_context
from d2l.data.division import PlacedDivision, fill_gaps
from d2l.data.limits import DoesNotFitError, Limits
from d2l.data.sentences import find_places
from d2l.errors import ConfigError

PREFIX, SUFFIX = (-1, -2, -3), (-4,)
AFFIXES = len(PREFIX) + len(SUFFIX)
quick = settings(derandomize=True, deadline=None, max_examples=120)


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return chat_format(load_tokenizer("configs/models/tiny_gpt_oss"))


def cut(length: int, places: Sequence[Sequence[int]] = (), seed: int | None = None, **limits: Any) -> list[range]:
    """Cut a document whose tokens are 0, 1, 2, …; return each chunk without its affixes."""
    generator = None if seed is None else random.Random(seed)
    chunks = split_context(range(length), PREFIX, SUFFIX, Limits(**limits), generator, places)
    assert all(chunk[:3] == PREFIX and chunk[-1:] == SUFFIX for chunk in chunks)
    pieces = [range(chunk[3], chunk[-2] + 1) for chunk in chunks]
    assert [tuple(piece) for piece in pieces] == [chunk[3:-1] for chunk in chunks]
    return pieces


# Equal chunks


def equal_lengths(length: int, count: int) -> list[int]:
    """Take ⌈length / count⌉ tokens at a time until nothing is left, as the reference does."""
    lengths, left = [], length
    while left:
        lengths.append(min(left, -(-length // count)))
        left -= lengths[-1]
    return lengths


def test_a_case_of_the_reference_that_its_stored_cases_do_not_tell_apart() -> None:
    assert [len(piece) for piece in cut(101, max_ctx_chunk_len=25 + AFFIXES)] == [21, 21, 21, 21, 17]
    assert [len(piece) for piece in cut(101, max_ctx_chunk_len=25)] == [21, 21, 21, 21, 17]  # affixes counted, as here


@quick
@given(st.integers(1, 400), st.integers(1, 60), st.none() | st.integers(1, 12))
def test_equal_chunks_are_those_of_the_formula(length: int, room: int, drawn: int | None) -> None:
    fewest = math.ceil(length / room)
    probs = None if drawn is None else {drawn: 1.0}
    pieces = cut(length, seed=0, max_ctx_chunk_len=room + AFFIXES, num_chunk_probs=probs)
    count = min(max(fewest, drawn or 0), length)
    assert [len(piece) for piece in pieces] == equal_lengths(length, count)
    assert max(map(len, pieces)) <= room
    assert [token for piece in pieces for token in piece] == [*range(length)]


def test_no_drawn_number_of_chunks_makes_one_too_short() -> None:
    limits = {"max_ctx_chunk_len": 40, "min_ctx_chunk_len": 10 + AFFIXES, "num_chunk_probs": {3: 1.0}}
    assert [len(piece) for piece in cut(32, seed=0, **limits)] == [11, 11, 10]
    assert [len(piece) for piece in cut(31, seed=0, **limits)] == [16, 15]  # three would be 11, 11 and 9


# The oracle of DAT309


def test_the_oracle_on_paper() -> None:
    assert lengths(equal_pieces(101, 25, 0)) == [21, 21, 21, 21, 17]
    assert equal_pieces(101, 101, 5) == [(0, 101)]
    assert equal_pieces(10, 6, 2) == [(0, 4), (2, 8), (6, 10)]  # four new tokens of six, so three pieces
    assert equal_pieces(10, 99, 3, count=4) == [(0, 3), (0, 6), (3, 9), (6, 10)]
    sentences, words = [5, 10, 15, 20, 25, 30], [2, 5, 8, 10, 15, 18, 20, 25, 30]
    assert lengths(sentence_pieces(sentences, words, 29, 0)) == [15, 15]
    assert lengths(sentence_pieces(sentences, words, 29, 0, count=3)) == [10, 10, 10]
    assert lengths(sentence_pieces([12, 13, 20, 26, 28, 36], [36], 13, 0)) == [13, 13, 10]
    assert sentence_pieces(sentences, words, 22, 2) == [(0, 15), (13, 30)]  # tokens, as no word ends
    assert sentence_pieces(sentences, words, 22, 3, count=3) == [(0, 10), (8, 20), (18, 30)]  # a word
    assert sentence_pieces(sentences, words, 22, 6, count=3) == [(0, 10), (5, 20), (15, 30)]  # a sentence


def lengths(pieces: Sequence[tuple[int, int]]) -> list[int]:
    return [stop - start for start, stop in pieces]


@quick
@given(st.integers(1, 200), st.integers(1, 60), st.integers(0, 20), st.none() | st.integers(1, 9))
def test_equal_chunks_with_overlaps_are_those_of_the_oracle(
    length: int, room: int, overlap: int, n: int | None
) -> None:
    limit = room + overlap if n is None else length
    probs = None if n is None else {n: 1.0}
    assume(n is None or (n <= length and overlap < length))
    found = cut(length, seed=0, max_ctx_chunk_len=limit + AFFIXES, chunk_overlap=overlap, num_chunk_probs=probs)
    assert [(piece.start, piece.stop) for piece in found] == equal_pieces(length, limit, overlap, n)


@quick
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=8),
    st.sets(st.integers(1, 70)),
    st.integers(9, 40),
    st.integers(0, 9),
)
def test_chunks_of_sentences_are_those_of_the_oracle(steps: list[int], more: set[int], room: int, overlap: int) -> None:
    sentences = [sum(steps[:i]) for i in range(1, len(steps) + 1)]
    words = sorted({*(it for it in more if it < sentences[-1]), *sentences})
    limit = room + overlap
    found = cut(sentences[-1], (sentences, words), max_ctx_chunk_len=limit + AFFIXES, chunk_overlap=overlap)
    assert [(piece.start, piece.stop) for piece in found] == sentence_pieces(sentences, words, limit, overlap)


# Where sentences end


def slow_divisions(places: Sequence[int], count: int, longest: int) -> Iterator[tuple[int, ...]]:
    """Every way to end `count` pieces at places, none of them too long."""
    for ends in combinations(places[:-1], count - 1):
        if all(stop - start <= longest for start, stop in pairwise((0, *ends, places[-1]))):
            yield (*ends, places[-1])


@quick
@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(9, 25))
def test_pieces_end_at_places_as_few_and_as_many_as_every_division_shows(steps: list[int], longest: int) -> None:
    places = [sum(steps[:i]) for i in range(1, len(steps) + 1)]
    division = PlacedDivision(places, longest)
    possible = [count for count in range(1, len(steps) + 1) if any(slow_divisions(places, count, longest))]
    assert possible == [*range(division.fewest, division.most + 1)]
    for count in possible:
        assert tuple(division.ends(count)) in set(slow_divisions(places, count, longest))


def test_pieces_are_as_equal_as_places_allow() -> None:
    assert PlacedDivision([5, 10, 15, 20, 25, 30], 100).ends(3) == [10, 20, 30]
    assert PlacedDivision([12, 13, 20, 26, 28, 36], 13).ends(3) == [13, 26, 36]  # what follows 12 needs three
    assert PlacedDivision([2, 4, 6, 20], 14).ends(2) == [6, 20]


@quick
@given(st.integers(1, 60), st.sets(st.integers(1, 59)), st.sets(st.integers(1, 59)), st.integers(1, 20))
def test_gaps_are_filled_by_finer_places_and_by_tokens_only_where_there_is_none(
    length: int, some: set[int], more: set[int], longest: int
) -> None:
    places = [*sorted(it for it in some if it < length), length]
    finer = sorted({*more, *places})
    filled = fill_gaps(places, finer, longest)
    assert {*places} <= {*filled}
    assert filled == sorted(set(filled))
    for start, stop in pairwise((0, *filled)):
        assert stop - start <= longest
        if stop not in places:  # the last finer place in reach, or none was
            reach = [it for it in finer if start < it <= start + longest]
            assert stop == (max(reach) if reach else start + longest)


limits = st.fixed_dictionaries(
    {
        "max_ctx_chunk_len": st.integers(AFFIXES + 1, 40),
        "min_ctx_chunk_len": st.just(-1) | st.integers(1, 20),
        "max_ctx_chunk_num": st.none() | st.integers(1, 9),
        "num_chunk_probs": st.sampled_from([None, {2: 1.0}, {1: 0.5, 3: 0.25, 7: 0.25}, {30: 1.0}]),
        "max_packed_ctx_len": st.just(-1) | st.integers(20, 200),
        "chunk_overlap": st.integers(0, 8),
    }
)


@quick
@given(
    st.integers(1, 90), st.sets(st.integers(1, 89)), st.sets(st.integers(1, 89)), limits, st.none() | st.integers(0, 9)
)
def test_every_limit_holds_and_every_token_is_in_a_chunk(
    length: int, sentences: set[int], words: set[int], limits: dict[str, Any], seed: int | None
) -> None:
    ends = [*sorted(it for it in sentences if it < length), length]
    places = (ends, sorted({*(it for it in words if it < length), *ends}))
    found: list[list[range]] = []
    for kinds in ((), places):
        try:
            found.append(cut(length, kinds, seed, **limits))
        except DoesNotFitError:
            assert not found  # a document is never lost to its sentences
        except ConfigError:
            assert limits["chunk_overlap"] >= limits["max_ctx_chunk_len"] - AFFIXES
            return
    overlap = limits["chunk_overlap"]
    for pieces in found:
        assert max(map(len, pieces)) + AFFIXES <= limits["max_ctx_chunk_len"]
        assert len(pieces) <= (limits["max_ctx_chunk_num"] or length)
        packed = sum(map(len, pieces)) + AFFIXES * len(pieces)
        assert packed <= limits["max_packed_ctx_len"] or limits["max_packed_ctx_len"] == -1
        assert (pieces[0].start, pieces[-1].stop) == (0, length)
        for one, other in pairwise(pieces):
            assert other.start <= one.stop < other.stop
            assert one.stop - other.start <= overlap
        document = [*range(length)]
        assert joined([[*piece] for piece in pieces], document, overlap) == document


@quick
@given(st.integers(1, 90), st.sets(st.integers(1, 89)), st.sets(st.integers(1, 89)), st.integers(1, 9))
def test_an_overlap_is_of_whole_sentences_else_of_whole_words(
    length: int, sentences: set[int], words: set[int], overlap: int
) -> None:
    ends = [*sorted(it for it in sentences if it < length), length]
    places = (ends, sorted({*(it for it in words if it < length), *ends}))
    limits = {"max_ctx_chunk_len": 20 + AFFIXES, "chunk_overlap": overlap}
    for one, other in pairwise(cut(length, **limits)):
        assert other.start == max(one.stop - overlap, 0)
    for one, other in pairwise(cut(length, places, **limits)):
        earliest = max(one.stop - overlap, 0)
        inside = [[it for it in kind if earliest <= it < one.stop] for kind in places if earliest]
        assert other.start == next((kind[0] for kind in inside if kind), earliest)


@quick
@given(st.integers(1, 90), st.sets(st.integers(1, 89)), st.integers(1, 30))
def test_no_sentence_is_cut_that_fits_a_chunk(length: int, some: set[int], room: int) -> None:
    sentences = [*sorted(it for it in some if it < length), length]
    for one, _ in pairwise(cut(length, (sentences, sentences), max_ctx_chunk_len=room + AFFIXES)):
        start = max(it for it in (0, *sentences) if it <= one.stop)
        stop = min(it for it in sentences if it >= one.stop)
        assert one.stop in sentences or stop - start > room


def test_a_document_that_equal_chunks_fit_is_never_lost_to_its_sentences() -> None:
    sentences = [6, 12, 18]
    assert [len(piece) for piece in cut(18, (sentences, sentences), max_ctx_chunk_len=9 + AFFIXES)] == [6, 6, 6]
    tight = {"max_ctx_chunk_len": 9 + AFFIXES, "max_ctx_chunk_num": 2}
    assert [len(piece) for piece in cut(18, (sentences, sentences), **tight)] == [9, 9]
    tight = {"max_ctx_chunk_len": 9 + AFFIXES, "max_packed_ctx_len": 18 + 2 * AFFIXES}
    assert [len(piece) for piece in cut(18, (sentences, [3, 6, 10, 12, 18]), **tight)] == [9, 9]
    assert [len(piece) for piece in cut(18, (sentences, [3, 6, 9, 12, 18]), **tight)] == [9, 9]


def test_a_drawn_number_of_chunks_is_kept_though_there_are_fewer_sentences() -> None:
    drawn = {"max_ctx_chunk_len": 40, "num_chunk_probs": {3: 1.0}}
    assert [len(piece) for piece in cut(12, ([6, 12], [2, 6, 9, 12]), 0, **drawn)] == [2, 4, 6]
    assert [len(piece) for piece in cut(12, ([6, 12], [6, 12]), 0, **drawn)] == [4, 4, 4]


# Sentences and words of texts

TEXTS = {
    "It rains. Dr. Smith, e.g. he, pays 3.14. J. S. Bach? Yes! “So.” (No.) end": (
        ["It rains. ", "Dr. Smith, e.g. he, pays 3.14. ", "J. S. Bach? ", "Yes! ", "“So.” ", "(No.) end"]
    ),
    "One\nTwo lines.\r\n\r\n- three": ["One\n", "Two lines.\r\n\r\n", "- three"],
    "今天下雨。他说：「好！」我们走吧": ["今天下雨。", "他说：「好！」", "我们走吧"],
    "मौसम ठीक है। चलो।": ["मौसम ठीक है। ", "चलो।"],
    "هل تمطر؟ نعم.": ["هل تمطر؟ ", "نعم."],
    "no end at all": ["no end at all"],
    "  . ": ["  . "],
    "": [],
}


@pytest.mark.parametrize("text", TEXTS)
def test_sentences_of_a_text_whose_tokens_are_characters(text: str) -> None:
    spans = [(place, place + 1) for place in range(len(text))]
    sentences, words = find_places(text, spans)
    assert [text[start:stop] for start, stop in pairwise((0, *sentences))] == (TEXTS[text] or [""])
    assert {*sentences} <= {*words}
    assert "".join(text[start:stop] for start, stop in pairwise((0, *words))) == text
    assert [text[start:stop].split() for start, stop in pairwise((0, *words))] == [
        [word] for start, stop in pairwise((0, *sentences)) for word in text[start:stop].split()
    ] or not text.split()


def test_a_token_across_the_edge_of_a_sentence_is_not_cut() -> None:
    text = "One. Two. Six."
    assert find_places(text, [(0, 3), (3, 6), (6, 8), (8, 9), (9, 14)]) == ([4, 5], [4, 5])


LETTERS = [*"ab.A! \n\t。？", "é", "日", "👩\u200d🚀", "\u200b", "\u0301", "؟", "ไ", "<|end|>"]
WRITING = st.lists(st.sampled_from(LETTERS), max_size=60).map("".join)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(WRITING | st.text(max_size=30), st.integers(1, 12), st.integers(0, 3))
def test_texts_of_any_script_are_cut_and_read_back(chat: ChatFormat, text: str, room: int, overlap: int) -> None:
    ids, spans = chat.locate_contents(text)
    assert ids == chat.encode_contents(text)
    assert len(spans) == len(ids)
    if not ids:
        return
    prefix, suffix = chat.context_affixes()
    longest = len(prefix) + len(suffix) + room + overlap
    limits = Limits(max_ctx_chunk_len=longest, chunking="sentences", chunk_overlap=overlap)
    chunks = chunk_document(text, chat, limits)
    assert max(map(len, chunks)) <= longest
    pieces = [chunk[len(prefix) : len(chunk) - len(suffix)] for chunk in chunks]
    assert joined(pieces, ids, overlap) == ids
    if not overlap:
        assert chat.decode([token for piece in pieces for token in piece]) == chat.decode(ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tokenizers_of_all_families_tell_where_sentences_end(name: str) -> None:
    chat = chat_format(FAMILIES[name].tokenizer(FAMILIES[name].untagged))
    ids, spans = chat.locate_contents("It rains. Dr. Smith stays.\nHe reads.")
    sentences, words = find_places("It rains. Dr. Smith stays.\nHe reads.", spans)
    texts = [chat.decode(ids[start:stop]).strip() for start, stop in pairwise((0, *sentences))]
    assert texts == ["It rains.", "Dr. Smith stays.", "He reads."]
    assert len(words) == 7


def test_documents_of_a_run_are_cut_where_its_configuration_says() -> None:
    config = tiny_config(max_ctx_chunk_len=80, chunking="sentences")
    components = Components(config)
    prefix, suffix = components.chat.context_affixes()
    cuts = 0
    for row in components.tokenized.rows:
        texts = [components.chat.decode(it[len(prefix) : len(it) - len(suffix)]) for it in row.chunks]
        assert "".join(texts) == components.records[row.record].context
        assert all(text.rstrip()[-1:] in ".!?" for text in texts)
        cuts += len(texts) - 1
    assert cuts
