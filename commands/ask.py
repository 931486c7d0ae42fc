"""The command that answers questions about documents: one, several on a terminal, or one a line. Heavy imports are late."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Annotated

import typer

from commands.console import (
    BaseOption,
    CheckpointArgument,
    Format,
    FormatOption,
    console,
    libraries_to_stderr,
    read_checkpoint,
)
from commands.documents import STDIN, read_document
from d2l.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

    from d2l.hypernet.lora import Lora
    from d2l.inference.load import TrainedModel

PROMPT = "? "
ORDER = "documents come first, the question last, in quotes"
DEMO_TEXT = """\
A tiny model that learnt one thing: a document of animals with two digits each becomes a LoRA; asked for an animal, the
base answers with its digits, without the document in its prompt. These are all animals that it knows:

{animals}

Write some of them into a file, each with two digits, and ask: d2l ask demo FILE ANIMAL
"""


def add_commands(app: typer.Typer) -> None:
    """Register the command with the application."""
    app.command()(ask)


def ask(
    checkpoint: CheckpointArgument,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DOCUMENT... [QUESTION]",
            help="Documents: text files (.txt, .md), or - for stdin; then a question about them.",
            show_default=False,
        ),
    ] = None,
    model: BaseOption = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Generate at most N tokens.")
    ] = 256,
    output_format: FormatOption = "text",
) -> None:
    """Answer questions about a document, or several.

    Documents are turned into one LoRA; they are not in the prompt. Without a QUESTION, questions are asked for on a terminal,
    and read from a pipe, one a line, with an answer a line. `d2l ask demo` shows the shipped checkpoint with a document.
    """
    from d2l.inference.demo import demo_document, is_demo

    names, question = _split(words or [])
    is_shown = not names and is_demo(checkpoint)
    if not names and not is_shown:
        raise DataError("no document: pass text files, or - for stdin; then a question in quotes")
    names = names or [str(demo_document())]
    if question is None and STDIN in names:
        raise DataError("no question: stdin holds the document, so pass the question as the last argument, in quotes")
    texts = _read_different(names)
    with libraries_to_stderr():
        trained = read_checkpoint(checkpoint, model)
        lora = _internalize(trained, names, texts)
    screen = console()
    screen.file = sys.stdout  # for good: what libraries print while an answer is generated goes to stderr
    session = _Session(trained, lora, tuple(names), max_new_tokens, output_format, screen)
    if question is not None:
        session.answer(question)
        return
    if is_shown:
        _show_demo(session, texts[0])
    if sys.stdin.isatty() and screen.is_terminal:
        _converse(session)
    elif not is_shown:
        _answer_lines(session)


def _split(words: Sequence[str]) -> tuple[list[str], str | None]:
    """Split the arguments into documents and the question: the last one, unless a file has that name.

    Raises:
        DataError: the question is empty or not text, or a file that does not exist seems to be meant.
    """
    if not words:
        return [], None
    *names, last = words
    if not last.strip():
        raise DataError("the question is empty")
    if last == STDIN or os.path.lexists(last) or not names:
        return [*names, last], None
    if len(last.split()) == 1 and (suffix := Path(last).suffix[1:]) and suffix.isalnum() and not suffix.isdecimal():
        raise DataError(f"{last} looks like a file, and there is none of that name; {ORDER}")
    return names, last


def _read_different(names: Sequence[str]) -> list[str]:
    """Read documents, each of another text: twice the same LoRA is no LoRA that was trained.

    Raises:
        DataError: a document cannot be read, or two are the same.
    """
    texts: list[str] = []
    for name in names:
        text = read_document(name, f"pass text files, or - for stdin; {ORDER}")
        if text in texts:
            first = names[texts.index(text)]
            raise DataError(f"{first} and {name} are the same document; pass it once")
        texts.append(text)
    return texts


def _internalize(trained: "TrainedModel", names: Sequence[str], texts: Sequence[str]) -> "Lora":
    """Turn documents into one LoRA.

    Raises:
        DataError: a document does not fit; the message names it.
    """
    from d2l.inference.generate import internalize
    from d2l.inference.merge import merge_documents

    loras = []
    for name, text in zip(names, texts, strict=True):
        try:
            loras.append(internalize(trained, text))
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
    merged = merge_documents(loras)
    if len(loras) > 1:
        typer.echo(f"documents  {len(loras)}, merged to rank {merged.rank}", err=True)
    return merged


@dataclass(frozen=True)
class _Session:
    """Documents that are loaded, and where answers go."""

    trained: "TrainedModel"
    lora: "Lora"
    documents: tuple[str, ...]
    max_new_tokens: int
    output_format: Format
    screen: "Console"

    def answer(self, question: str, *, in_a_line: bool = False) -> None:
        """Answer a question: as JSON in a line, token by token on a terminal, else as text.

        Args:
            in_a_line: write an answer of several lines as one.

        Raises:
            DataError: the question cannot be used.
        """
        if any("\ud800" <= letter <= "\udfff" for letter in question):  # what Python makes of bytes that are not UTF-8
            raise DataError("the question: expected text in UTF-8")
        if self.output_format == "json":
            facts = {"documents": self.documents, "question": question, "answer": self._generate(question)}
            typer.echo(json.dumps(facts, ensure_ascii=False))
        elif self.screen.is_terminal:
            self._stream(question)
        else:
            answer = self._generate(question)
            typer.echo(" ".join(answer.splitlines()) if in_a_line else answer)

    def _generate(self, question: str) -> str:
        from d2l.inference.generate import ask as generate_answer

        with redirect_stdout(sys.stderr):
            return generate_answer(self.trained, self.lora, question, self.max_new_tokens)

    def _stream(self, question: str) -> None:
        """Print an answer while it is generated; where its beginning changes, anew on a line of its own."""
        from d2l.inference.generate import ask as generate_answer

        shown = ""

        def show(text: str) -> None:
            nonlocal shown
            goes_on = text.startswith(shown)
            self.screen.out(text[len(shown) :] if goes_on else f"\n{text}", end="", highlight=False)
            shown = text

        try:
            with redirect_stdout(sys.stderr):
                show(generate_answer(self.trained, self.lora, question, self.max_new_tokens, show))
        finally:
            self.screen.out("")


def _show_demo(session: _Session, text: str) -> None:
    """Show the shipped document, and the answers to its questions."""
    from d2l.data.needles import PAIR_KEYS
    from d2l.inference.demo import demo_questions

    as_text = session.output_format == "text"
    if as_text:
        typer.echo(DEMO_TEXT.format(animals=fill(" ".join(PAIR_KEYS), width=100)))
        typer.echo(f"{session.documents[0]}:\n{text}")
    for question in demo_questions():
        if as_text:
            typer.echo(f"{PROMPT}{question}")
        session.answer(question)


def _converse(session: _Session) -> None:
    """Ask for questions on a terminal, and answer them, until Ctrl-D or Ctrl-C."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives `input` its line editing and history

    with suppress(EOFError, KeyboardInterrupt):
        while True:
            try:
                if question := input(PROMPT).strip():
                    session.answer(question)
            except (DataError, UnicodeDecodeError) as error:
                typer.echo(f"Error: {error}", err=True)
    typer.echo()


def _answer_lines(session: _Session) -> None:
    """Answer the questions on stdin, one a line.

    Raises:
        DataError: there is none, or one cannot be used.
    """
    typer.echo("reading questions from stdin, one a line", err=True)
    answered = 0
    for number, question in _read_questions():
        try:
            session.answer(question, in_a_line=True)
        except DataError as error:
            raise DataError(f"stdin, line {number}: {error}") from error
        answered += 1
    if not answered:
        raise DataError(f"no question: stdin is empty; {ORDER}")


def _read_questions() -> Iterator[tuple[int, str]]:
    """Yield the lines of stdin that are not blank, as they come, with their numbers.

    Raises:
        DataError: a line is not text.
    """
    for number, line in enumerate(typer.get_binary_stream("stdin"), start=1):
        try:
            question = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise DataError(
                f"stdin, line {number}: expected text in UTF-8, found byte 0x{error.object[error.start]:02x}"
            ) from None
        if question:
            yield number, question
