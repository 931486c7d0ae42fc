"""What an evaluation of two documents of a run has to find: likelihoods and first tokens, one conversation at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from checks.data.expected import conversation_format
from checks.oracles import edited_weights
from checks.oracles.answers import squad_words
from checks.oracles.loss import cross_entropy
from checks.training.saved_twin import first_records, reading_twin
from checks.training.steps import TOLERANCE
from d2l.data.packing import collate

if TYPE_CHECKING:
    from checks.oracles.conversations import Expected
    from checks.subject import Subject
    from d2l.data.records import Record
    from d2l.hypernet.lora import Lora

QUESTIONS = (2, 1)  # of two documents, each of which is the other one of its neighbour
AMONG = 16  # of the run's first documents
LETTERS = 200  # of a document: a twin has a vocabulary as large as the base's, and reads the document in a prompt

Key = tuple[str, int, int]  # condition, document, question


@dataclass(frozen=True)
class ExpectedAnswer:
    """What is expected of an answer.

    Attributes:
        nll, tokens: negative log-likelihood of the expected answer in nats, and its supervised tokens.
        texts: that the first token of the twin's own answer may have.
    """

    nll: float
    tokens: int
    texts: frozenset[str]


def asked_records(subject: "Subject") -> "list[Record]":
    """Return two documents of the run with a question or two, cut to a length that a twin reads quickly; less if it has less.

    The first question is longer than the others, which share a batch where questions of one length do.
    """
    found: dict[str, Record] = {}
    for record in first_records(subject, AMONG):
        taken = _conversations(subject, record)
        pairs = [pair for pair, it in zip(zip(record.prompts, record.responses, strict=True), taken, strict=True) if it]
        cut = record.context.strip()[:LETTERS]
        if not pairs or cut in found or len(found) == len(QUESTIONS):
            continue
        count = QUESTIONS[len(found)]
        prompts, responses = map(list, zip(*(pairs * count)[:count], strict=True))
        if not found:
            prompts[0] = f"{prompts[0]} {prompts[0]}"
        found[cut] = replace(record, context=cut, prompts=tuple(prompts), responses=tuple(responses))
    return list(found.values())


def with_one_right(subject: "Subject", records: "Sequence[Record]", rows: Sequence[Any]) -> "list[Record]":
    """Expect of the first question what the twin will answer, where that is a word: means of zeros say little."""
    (first, *others), model = records, reading_twin(subject)
    conversation = next(it for it in _conversations(subject, first) if it is not None)
    prompt = subject.implementation.prompt(subject.chat, first.prompts[0])
    texts = _answer(subject, model, model.lora(collate([rows[0]])), conversation, prompt).texts
    word = next((text for text in texts if squad_words(text) and text.isalnum()), first.responses[0])
    return [replace(first, responses=(word, *first.responses[1:])), *others]


def expected_answers(subject: "Subject", records: "Sequence[Record]", rows: Sequence[Any]) -> dict[Key, ExpectedAnswer]:
    """Return what is expected under each condition, of each record, for each question.

    Args:
        rows: of training, one for each record.
    """
    model: Any = reading_twin(subject)
    loras = [model.lora(collate([row])) for row in rows]
    in_prompts = subject.implementation.document_in_prompts(records)
    found = {}
    for index, record in enumerate(records):
        conditions: Mapping[str, tuple[Lora | None, Record]] = {
            "document": (loras[index], record),
            "other": (loras[1 - index], record),
            "none": (None, record),
            "in_prompt": (None, in_prompts[index]),
        }
        for condition, (lora, asked) in conditions.items():
            for query, conversation in enumerate(_conversations(subject, asked)):
                if conversation is not None:
                    prompt = subject.implementation.prompt(subject.chat, asked.prompts[query])
                    found[condition, index, query] = _answer(subject, model, lora, conversation, prompt)
    return found


def _conversations(subject: "Subject", record: "Record") -> "list[Expected | None]":
    """Return the tokens of a record's questions with their answers; None where the template refuses one."""
    return conversation_format(subject).expected(list(zip(record.prompts, record.responses, strict=True)))


def _answer(
    subject: "Subject", model: Any, lora: "Lora | None", asked: "Expected", prompt: Sequence[int]
) -> ExpectedAnswer:
    """Read a conversation, and the prompt where its tokens are others: they may merge with those of the answer."""
    logits = _logits(model, lora, asked.ids)
    losses = cross_entropy(
        logits, [token if asked.start <= place < asked.stop else -100 for place, token in enumerate(asked.ids)]
    )
    begins_so = asked.ids[: asked.start] == list(prompt)
    first = logits[asked.start - 1] if begins_so else _logits(model, lora, prompt)[-1]
    likeliest = (first >= first.max() - TOLERANCE * first.abs().max()).nonzero().flatten().tolist()
    texts = {subject.implementation.answer(subject.chat, [token]) for token in likeliest}
    if not set(likeliest).isdisjoint(subject.chat.tokenizer.all_special_ids):
        texts.add("")  # one that ends answers by the base's own files, of which the chat template knows nothing
    return ExpectedAnswer(float(losses.sum()), len(losses), frozenset(texts))


def _logits(model: Any, lora: "Lora | None", ids: Sequence[int]) -> Tensor:
    if lora is None:
        return edited_weights.logits(model.base, ids, {}, {}, 1.0)
    a, b = ({name: x[0] for name, x in side.items()} for side in (lora.A, lora.B))
    return edited_weights.logits(model.base, ids, a, b, lora.scale)
