"""The experiment's data files: documents with facts for every stage, and real text that the base itself is asked about."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from d2l.data.chat.format import ChatFormat
from d2l.data.records import Record, write_records
from d2l.errors import DataError
from d2l.evaluation.answers import generate_answers
from d2l.inference.load import TrainedModel
from experiments.smollm2.documents import Passage
from experiments.smollm2.facts import Words
from experiments.smollm2.recipe import ANSWER_TOKENS, TEACHER_PASSAGES

ASK = "{text}\n\nWrite one short question that this text answers."
CONTINUE = "Continue this text.\n\n{begin}"  # text that has nothing to do with the document
ABOUT_IT = ("What is this text about?", "Summarize the text in one sentence.")
# What no text answers, so that a document's LoRA learns to leave other answers alone; none is asked where harm is measured.
GENERAL = (
    ("What is the capital of {}?", ("Spain", "Italy", "Japan", "Egypt", "Canada", "Norway", "Greece", "Cuba", "India")),
    ("What colour is {}?", ("grass", "snow", "coal", "milk", "a lemon", "chocolate", "the sea", "blood")),
    ("Where do {} live?", ("lions", "whales", "penguins", "camels", "owls", "frogs", "bears", "sharks")),
    ("What is {} used for?", ("a hammer", "a needle", "soap", "a map", "salt", "a clock", "glue", "a ladder")),
    ("How many legs has {}?", ("a dog", "a spider", "an ant", "a hen", "a horse", "a crab")),
    ("What is the opposite of {}?", ("hot", "large", "early", "rich", "easy", "loud", "wet", "empty")),
)
PASSAGE_TOKENS = (30, 100)  # of the real text that the base is asked about
WORD = re.compile(r"\b[a-z]{4,10}\b")
FEWEST_WORDS, MOST_WORDS = 100, 2000
CONTINUED_WORDS = 24  # at most, of the sentence that continues a text
TOGETHER = 8  # prompts of one length that are answered in one batch


def single_words(passages: Sequence[Passage], chat: ChatFormat) -> Words:
    """Return words of the text that are one token each, the most frequent first.

    Raises:
        DataError: there are too few of them.
    """
    counts = Counter(word for passage in passages for it in passage.sentences for word in WORD.findall(it))
    by_frequency = [word for word, _ in counts.most_common()]
    first, further = (
        [word for word in by_frequency if len(chat.encode_contents(before + word)) == 1][:MOST_WORDS]
        for before in ("", " ")
    )
    if min(len(first), len(further)) < FEWEST_WORDS:
        raise DataError(
            f"expected at least {FEWEST_WORDS} words of one token in the text, found {len(first)} at the beginning of an "
            f"answer and {len(further)} behind a space; install packages with documentation, or take a base with a larger "
            "vocabulary"
        )
    return Words(first, further)


def write_once(file: Path, make: Callable[[], Sequence[Record]]) -> None:
    """Write a file of records, unless it is there already."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_records(file, make())


def teach(
    base: TrainedModel, passages: Sequence[Passage], seed: int, on_progress: Callable[[str], None]
) -> list[Record]:
    """Let the base write a question about real text, and answer it and another one with the text in its prompt.

    The third request is to continue another text, as that text goes on: there the base itself is to be left as it is.

    Args:
        base: an untrained or trained model; its hypernetwork is not used.
        passages: of the training split.
    """
    texts = draw_texts(base, passages, seed)
    questions = answer(base, [ASK.format(text=text) for text in texts])
    others = draw_questions(base.chat, len(texts), seed)
    asked = [(question.partition("?")[0] + "?", other) for question, other in zip(questions, others, strict=True)]
    on_progress(f"{len(texts)} questions written by the base")
    prompts = [f"{text}\n\n{question}" for text, pair in zip(texts, asked, strict=True) for question in pair]
    answers = iter(answer(base, prompts))
    continued = draw_continuations(passages, len(texts), seed)
    return [
        Record(text, (*pair, begin), (*(next(answers) for _ in pair), rest), f"taught {number}")
        for number, (text, pair, (begin, rest)) in enumerate(zip(texts, asked, continued, strict=True))
    ]


def draw_continuations(passages: Sequence[Passage], count: int, seed: int) -> list[tuple[str, str]]:
    """Draw requests to continue a sentence, and the words that follow it in its text."""
    generator = random.Random(f"{seed} continued")
    pairs = [pair for passage in passages for pair in pairwise(passage.sentences)]
    return [
        (CONTINUE.format(begin=begin), " ".join(rest.split()[:CONTINUED_WORDS]))
        for begin, rest in generator.choices(pairs, k=count)
    ]


def draw_questions(chat: ChatFormat, count: int, seed: int) -> list[str]:
    """Draw a question for each text, a third of them about it; the texts of a batch get some of one length in tokens."""
    generator = random.Random(f"{seed} questions")
    general = [question.format(thing) for question, things in GENERAL for thing in things]
    questions: list[str] = []
    while len(questions) < count:
        kind = ABOUT_IT if generator.random() < 1 / 3 else general
        length = len(chat.encode_contents(generator.choice(kind)))
        alike = [question for question in kind if len(chat.encode_contents(question)) == length]
        questions += generator.choices(alike, k=TOGETHER)
    return questions[:count]


def draw_texts(base: TrainedModel, passages: Sequence[Passage], seed: int) -> list[str]:
    """Draw real text of few different lengths in tokens, so that batches are full."""
    by_length: dict[int, list[str]] = defaultdict(list)
    shuffled = list(passages)
    random.Random(f"{seed} texts").shuffle(shuffled)
    for passage in shuffled:
        text = " ".join(passage.sentences)
        length = len(base.chat.encode_contents(text))
        if PASSAGE_TOKENS[0] <= length <= PASSAGE_TOKENS[1]:
            by_length[length].append(text)
    groups = sorted(by_length.values(), key=len, reverse=True)
    texts = [text for group in groups for text in group[: len(group) // TOGETHER * TOGETHER]]
    return texts[:TEACHER_PASSAGES]


def answer(base: TrainedModel, prompts: Sequence[str]) -> list[str]:
    """Answer prompts by the base alone, those of equal length in batches."""
    return generate_answers(base, None, prompts, ANSWER_TOKENS)
