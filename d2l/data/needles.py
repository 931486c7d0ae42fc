"""Needle-in-a-haystack data: synthetic documents that state the values of keys between sentences of filler.

Whether a (key, value) pair or a filler sentence belongs to `train` or to `heldout` is decided by its hash alone, so the
two splits share neither, whatever the seeds and sizes: recall on held-out documents is not memory of the training set.
"""

import random
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from typing import Literal

from d2l.data.records import Record
from d2l.errors import ConfigError

Split = Literal["train", "heldout"]
Style = Literal["sentences", "pairs"]

_COLOURS, _ANIMALS, _MOODS, _PEOPLE, _VERBS, _PREPOSITIONS, _LOOKS, _PLACES = map(
    str.split,
    (
        "amber azure beige black blue bronze brown copper coral crimson cyan golden green grey indigo ivory jade lilac "
        "maroon olive orange pearl pink plum purple red ruby scarlet silver tan teal turquoise violet white yellow",
        "badger bear beaver bison camel cat cobra crane crow deer dingo dog dolphin eagle falcon ferret fox frog gecko "
        "goat goose hare hawk heron horse ibis jackal koala lemur leopard lion lizard llama lynx mole moose mouse newt "
        "otter owl panda parrot pelican pigeon puma rabbit raven robin salmon seal shark sheep snail spider stork swan "
        "tiger toad turtle walrus whale wolf wombat zebra",
        "busy calm careful cheerful clever curious gentle happy honest lonely lucky patient polite proud shy",
        "actor artist baker barber carpenter clerk cook dancer doctor driver farmer guard judge lawyer miner nurse "
        "painter pilot poet sailor singer soldier student tailor teacher waiter writer",
        "danced dreamed laughed paused read rested sang sat slept smiled stood talked waited walked worked",
        "behind beside beyond near outside",
        "ancient broken crowded dusty empty famous hidden large narrow new old quiet small tall wide",
        "barn bridge castle church factory farm forest garden harbour hill hotel house lake library market meadow mill "
        "museum palace park river road school shop square station street theatre tower village",
    ),
)

PAIR_KEYS = tuple(_ANIMALS[:32])  # few, so that a tiny model has a token for each
KEYS = tuple(f"{colour} {animal}" for colour, animal in product(_COLOURS, _ANIMALS))
PAIR_FILLER = tuple(_PEOPLE[:24])  # few, for the same reason
SENTENCE_WORDS = 8
_HELDOUT_SHARE = 5  # one in five


def needle_records(
    documents: int,
    pairs: int,
    digits: int,
    filler_words: int,
    seed: int,
    split: Split = "train",
    style: Style = "sentences",
    min_filler_words: int | None = None,
) -> list[Record]:
    """Make documents with `pairs` needles each, and one question for every needle.

    Args:
        documents: number of records.
        pairs: needles in a document; their keys differ.
        digits: decimal digits of a value, 1 to 4, leading zeros included; chance is 10^-digits.
        filler_words: words of filler in a document, rounded up to whole sentences. A sentence has eight words; with style
            `pairs` as many as a pair has, so that chunks of a multiple of that length split no pair.
        seed: seed of all draws; the same arguments give the same records.
        split: `train` and `heldout` share no (key, value) pair and no filler sentence.
        style: `sentences` of English; or `pairs`, for tiny models: one-word keys, digits separated by spaces, filler of
            nouns, questions that are keys, and answers that repeat the key first, as a sentence would.
        min_filler_words: lower bound of each document's own draw of filler words; default: all have `filler_words`.

    Raises:
        ConfigError: more pairs than keys exist, or than have a value in the split.
    """
    keys = KEYS if style == "sentences" else PAIR_KEYS
    if pairs > len(keys):
        raise ConfigError([f"needle_pairs: {pairs:,} is more than the {len(keys):,} keys that exist; lower it"])
    possible = _count_keys_with_values(keys, digits, split)
    if pairs > possible:
        problem = f"needle_pairs: {pairs:,} is more than the {possible:,} keys with {digits}-digit values in {split}"
        raise ConfigError([f"{problem}; lower it, or raise needle_digits"])
    generator = random.Random(f"{seed} {split}")
    records = []
    for number in range(1, documents + 1):
        values = _draw_values(generator, keys, pairs, digits, split)
        source = f"needle-{split}:{number}"
        write = _write_pairs if style == "pairs" else _write_sentences
        filler = filler_words if min_filler_words is None else generator.randint(min_filler_words, filler_words)
        records.append(write(generator, values, filler, split, source))
    return records


def split_of(text: str) -> Split:
    """Return the split that a filler sentence or a pair, written `key value`, belongs to."""
    return "heldout" if zlib.crc32(text.encode()) % _HELDOUT_SHARE == 0 else "train"


@cache
def _count_keys_with_values(keys: Sequence[str], digits: int, split: Split) -> int:
    """Count the keys that have a value in the split: with one digit not all of them do."""
    return sum(any(split_of(f"{key} {value:0{digits}d}") == split for value in range(10**digits)) for key in keys)


def _draw_values(
    generator: random.Random, keys: Sequence[str], pairs: int, digits: int, split: Split
) -> dict[str, str]:
    """Draw distinct keys with values, each pair from the split."""
    values: dict[str, str] = {}
    while len(values) < pairs:
        key, value = generator.choice(keys), f"{generator.randrange(10**digits):0{digits}d}"
        if split_of(f"{key} {value}") == split:
            values[key] = value
    return values


def _write_sentences(
    generator: random.Random, values: Mapping[str, str], filler_words: int, split: Split, source: str
) -> Record:
    """Write a document of English sentences."""
    sentences = [f"The value of {key} is {value}." for key, value in values.items()]
    sentences += [_draw_sentence(generator, split) for _ in range(-(-filler_words // SENTENCE_WORDS))]
    generator.shuffle(sentences)
    return Record(
        context=" ".join(sentences),
        prompts=tuple(f"What is the value of {key}?" for key in values),
        responses=tuple(values.values()),
        source=source,
    )


def _write_pairs(
    generator: random.Random, values: Mapping[str, str], filler_words: int, split: Split, source: str
) -> Record:
    """Write a document of pairs: `key d d`, between filler of as many words."""
    stated = tuple(" ".join((key, *value)) for key, value in values.items())
    words = len(stated[0].split())
    parts = [*stated, *(_draw_words(generator, words, split) for _ in range(-(-filler_words // words)))]
    if filler_words:
        generator.shuffle(parts)
    return Record(context=" ".join(parts), prompts=tuple(values), responses=stated, source=source)


def _draw_sentence(generator: random.Random, split: Split) -> str:
    """Draw an English sentence of filler from the split."""
    while True:
        words = [generator.choice(kind) for kind in (_MOODS, _PEOPLE, _VERBS, _PREPOSITIONS, _LOOKS, _PLACES)]
        sentence = "The {} {} {} {} the {} {}.".format(*words)
        if split_of(sentence) == split:
            return sentence


def _draw_words(generator: random.Random, words: int, split: Split) -> str:
    """Draw filler of so many nouns from the split."""
    while True:
        sentence = " ".join(generator.choices(PAIR_FILLER, k=words))
        if split_of(sentence) == split:
            return sentence
