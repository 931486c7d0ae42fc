"""Where sentences and words of a text end, in any script, as places between its tokens.

A plain rule after Unicode's (UAX #29, sentence boundaries): a terminator with the quotes and brackets that close after
it, then white space, ends a sentence; terminators of scripts that write no spaces need none; so does a line break by
itself. A full stop before a small letter, after a single capital or after a title is part of an abbreviation.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

Span = tuple[int, int]

_FULL_STOPS = ".…"
# Latin, Greek, Arabic, Armenian, Devanagari, Ethiopic, Burmese, Khmer and others, which write spaces after a sentence
_STOPS = _FULL_STOPS + "!?‼‽⁇⁈⁉؟۔։।॥።፧፨၊။។៕᠃᠉"
_CLOSING = "\"'”’»›)]}」』）】》〉"
_WITHOUT_SPACES = re.compile(f"[。．！？｡]+[{re.escape(_CLOSING)}]*")  # Chinese, Japanese
_LINE_BREAK = re.compile("[\n\r\x0b\x0c\x85\u2028\u2029]")
_WORD = re.compile(r"\S+")
_TITLES = frozenset(
    ("Mr", "Mrs", "Ms", "Dr", "Prof", "St", "Mt", "Gen", "Sen", "Rep", "Rev", "Capt", "Col", "Lt", "Jr", "Sr")
)


def find_places(text: str, spans: Sequence[Span]) -> tuple[list[int], list[int]]:
    """Find where sentences end, and where words end (sentences included), as numbers of tokens before each place.

    White space between two sentences belongs to the first. A place inside a token is none.

    Args:
        spans: first and last (exclusive) character of each token.

    Returns:
        both ascending, without 0; the last of each is the number of tokens.
    """
    sentences, words = [], []
    for gap, ends_sentence in _gaps(text):
        words.append(gap)
        if ends_sentence:
            sentences.append(gap)
    stops = [*accumulate((stop for _, stop in spans), max)]
    found = sorted({*_between_tokens(sentences, spans, stops), len(spans)})
    return found, sorted({*found, *_between_tokens(words, spans, stops)})


def _gaps(text: str) -> Iterator[tuple[Span, bool]]:
    """Yield the characters between two words, and whether a sentence ends there; also where it ends without a space."""
    words = _WORD.finditer(text)
    previous = next(words, None)
    for word in words:
        assert previous is not None
        yield from _stops_inside(previous)
        gap = previous.end(), word.start()
        yield gap, bool(_LINE_BREAK.search(text, *gap)) or _ends_sentence(previous.group(), word.group())
        previous = word
    if previous is not None:
        yield from _stops_inside(previous)


def _stops_inside(word: re.Match[str]) -> Iterator[tuple[Span, bool]]:
    """Yield where a sentence ends without a space inside a word."""
    for stop in _WITHOUT_SPACES.finditer(word.group()):
        place = word.start() + stop.end()
        if place < word.end():
            yield (place, place), True


def _ends_sentence(word: str, following: str) -> bool:
    """Tell whether a sentence ends between two words of a line."""
    bare = word.rstrip(_CLOSING)
    if _WITHOUT_SPACES.search(bare[-1:]):
        return True
    if not bare or bare[-1] not in _STOPS:
        return False
    stem = bare.rstrip(_FULL_STOPS).lstrip("([{\"'“‘«")
    abbreviated = stem in _TITLES or (len(stem) == 1 and stem.isupper()) or following[0].islower()
    return not (abbreviated and bare[-1] in _FULL_STOPS)


def _between_tokens(gaps: Iterable[Span], spans: Sequence[Span], stops: Sequence[int]) -> Iterator[int]:
    """Yield the number of tokens before each gap, white space included; none for a gap with a token across its edges.

    Args:
        stops: where the tokens up to each one end at the latest; ascending.
    """
    for start, stop in gaps:
        place = bisect_right(stops, stop)
        if 0 < place < len(spans) and spans[place][0] >= start:
            yield place
