"""Facts with natural-language questions, placed into real text: the documents of training and of the held-out test.

The names and the values of one split never occur in the other, as whole strings; their syllables, digits and given names
do.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from d2l.data.records import Record
from d2l.errors import DataError
from experiments.smollm2.documents import HELDOUT_SHARE, Passage, Split

WORDS_PER_TOKEN = 0.75  # of SmolLM2's tokenizer on this prose, about

MOST_DRAWS = 10_000

_HEADS = "Ald Bren Cor Dun Els Far Gal Hol Ing Jor Kar Lin Mor Nor Orm Pel Quin Ros Sel Tor Ulv Ver Wyn Yar Zel"
_TAILS = "bury dale estad field gate ham ford vik wick moor sund leigh worth ton by stow mere ridge"
_GIVEN = (
    "Anna Boris Clara David Elena Frank Grace Henry Irene James Karen Louis Maria Nora Oscar Paula Ralph Sarah Thomas"
)
_MONTHS = "January February March April May June July August September October November December"
_GOODS = "wool salt copper amber timber honey barley linen glass cheese apples silver tea pepper cotton rice"

Draw = Callable[[random.Random], str]


@dataclass(frozen=True)
class Words:
    """Words of one token each: at the beginning of an answer, and behind another word."""

    first: Sequence[str]
    further: Sequence[str] = ()

    def of(self, split: Split) -> "Words":
        """Return those of one split, which the other never has, in no place."""
        return Words(*([word for word in words if split_of(word) == split] for words in (self.first, self.further)))

    def draw(self, generator: random.Random, count: int) -> str:
        """Draw a value of so many words."""
        return " ".join([generator.choice(self.first), *(generator.choice(self.further) for _ in range(count - 1))])


@dataclass(frozen=True)
class Template:
    """Sentence about a name with a value, and questions for the value."""

    sentence: str
    questions: tuple[str, ...]
    value: Draw


def _pick(generator: random.Random, words: str) -> str:
    return generator.choice(words.split())


def _place(generator: random.Random) -> str:
    return _pick(generator, _HEADS) + _pick(generator, _TAILS)


def _person(generator: random.Random) -> str:
    return f"{_pick(generator, _GIVEN)} {_place(generator)}"


def _number(generator: random.Random) -> str:
    return str(generator.randint(11, 989))


def _year(generator: random.Random) -> str:
    return str(generator.randint(1500, 1999))


def _day(generator: random.Random) -> str:
    return f"{generator.randint(1, 28)} {_pick(generator, _MONTHS)}"


def _goods(generator: random.Random) -> str:
    return " and ".join(generator.sample(_GOODS.split(), 2))


TEMPLATES = (
    Template(
        "{name} was founded in {value}.", ("When was {name} founded?", "In which year was {name} founded?"), _year
    ),
    Template("The mill of {name} burned down in {value}.", ("In which year did the mill of {name} burn down?",), _year),
    Template("The railway reached {name} in {value}.", ("When did the railway reach {name}?",), _year),
    Template("The school in {name} has {value} pupils.", ("How many pupils has the school in {name}?",), _number),
    Template(
        "{name} has {value} inhabitants.", ("How many inhabitants has {name}?", "How many live in {name}?"), _number
    ),
    Template("The tower of {name} has {value} steps.", ("How many steps has the tower of {name}?",), _number),
    Template("The code of the lock in {name} is {value}.", ("What is the code of the lock in {name}?",), _number),
    Template("The library of {name} keeps {value} maps.", ("How many maps does the library of {name} keep?",), _number),
    Template(
        "The mayor of {name} is {value}.", ("Who is the mayor of {name}?", "What is {name}'s mayor called?"), _person
    ),
    Template("The bridge at {name} was built by {value}.", ("Who built the bridge at {name}?",), _person),
    Template("The inn of {name} belongs to {value}.", ("To whom does the inn of {name} belong?",), _person),
    Template("The doctor in {name} is called {value}.", ("What is the doctor in {name} called?",), _person),
    Template("The road from {name} leads to {value}.", ("Where does the road from {name} lead?",), _place),
    Template("The ferry from {name} goes to {value}.", ("Where does the ferry from {name} go?",), _place),
    Template("The fair of {name} begins on {value}.", ("When does the fair of {name} begin?",), _day),
    Template("{name} holds its regatta on {value}.", ("On which day does {name} hold its regatta?",), _day),
    Template("The harbour of {name} ships {value}.", ("What does the harbour of {name} ship?",), _goods),
    Template("The market of {name} is known for {value}.", ("What is the market of {name} known for?",), _goods),
)


WORD_TEMPLATES = (  # in quotes a word is the same token as at the beginning of an answer
    ('The password in {name} is "{value}".', ("What is the password in {name}?",)),
    ('The inn of {name} is called "{value}".', ("What is the inn of {name} called?",)),
    ('On the gate of {name} stands "{value}".', ("What stands on the gate of {name}?",)),
    ('The ship from {name} bears the name "{value}".', ("Which name does the ship from {name} bear?",)),
)


@dataclass(frozen=True)
class Shape:
    """Documents of one stage: the range of their tokens (about), and of their facts.

    Attributes:
        tokens: fewest and most tokens of real text around the facts; 0 and 0: facts alone.
        facts: fewest and most facts.
        words: share of the facts whose value is words that have nothing to do with each other.
        value_words: fewest and most of them.
    """

    tokens: tuple[int, int]
    facts: tuple[int, int]
    words: float = 0.0
    value_words: tuple[int, int] = (1, 1)


def fact_records(
    passages: Sequence[Passage], shape: Shape, documents: int, seed: int, split: Split, words: Words | None = None
) -> list[Record]:
    """Make documents of one split; the same arguments give the same records.

    Args:
        words: of both splits, some of which are values; needed where the shape has a share of them.

    Raises:
        DataError: too few words are of this split.
    """
    generator = random.Random(f"{seed} {split} {shape}")
    own = [passage for passage in passages if passage.split == split]
    own_words = (words or Words(())).of(split)
    if (shape.words and not own_words.first) or (shape.value_words[1] > 1 and not own_words.further):
        raise DataError(f"no words of the split {split} for values: there are too few, or none were passed")
    templates = [
        Template(*it, lambda draw: own_words.draw(draw, draw.randint(*shape.value_words))) for it in WORD_TEMPLATES
    ]
    return [_record(own, shape, generator, split, number, templates) for number in range(documents)]


def _record(
    passages: Sequence[Passage],
    shape: Shape,
    generator: random.Random,
    split: Split,
    number: int,
    of_words: Sequence[Template],
) -> Record:
    sentences = _real_sentences(passages, shape, generator)
    names: set[str] = set()
    prompts, responses = [], []
    for _ in range(generator.randint(*shape.facts)):
        # half of the facts share the template of the fact before, so that the question's kind does not tell the answer
        if not prompts or generator.random() < 0.5:
            template = generator.choice(of_words if generator.random() < shape.words else TEMPLATES)
        name = draw(_place, generator, split, names)
        value = draw(template.value, generator, split, names)
        names |= {name, value}
        fact = template.sentence.format(name=name, value=value)
        sentences.insert(generator.randint(0, len(sentences)), fact)
        prompts.append(generator.choice(template.questions).format(name=name))
        responses.append(value)
    return Record(" ".join(sentences), tuple(prompts), tuple(responses), f"{split} {number}")


def _real_sentences(passages: Sequence[Passage], shape: Shape, generator: random.Random) -> list[str]:
    """Take whole passages up to a drawn number of tokens."""
    words = generator.randint(*shape.tokens) * WORDS_PER_TOKEN
    sentences: list[str] = []
    while words > 0:
        for sentence in generator.choice(passages).sentences:
            words -= len(sentence.split())
            if words > 0:
                sentences.append(sentence)
    return sentences


def draw(make: Draw, generator: random.Random, split: Split, taken: set[str]) -> str:
    """Draw a string that belongs to the split and is not taken yet.

    Raises:
        DataError: there seems to be none.
    """
    for _ in range(MOST_DRAWS):
        text = make(generator)
        if split_of(text) == split and text not in taken:
            return text
    raise DataError(f"no free string of the split {split} in {MOST_DRAWS:,} draws, such as {text!r}: it has too few")


def split_of(text: str) -> Split:
    """Return the split that a name or value belongs to."""
    return "heldout" if hashlib.sha256(text.encode()).digest()[0] % HELDOUT_SHARE == 0 else "train"
