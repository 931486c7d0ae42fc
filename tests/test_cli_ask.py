"""d2l ask: one question, several on a terminal, one a line of a pipe; one document or several. On a run of one step."""

import json
import sys
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

import cli
import commands.ask
from commands.ask import _answer_lines, _converse, _Session, _split
from commands.console import LOADING
from d2l.errors import DataError
from d2l.hypernet.lora import Lora
from d2l.inference.generate import ask, internalize
from d2l.inference.load import TrainedModel
from d2l.inference.merge import merge_documents
from d2l.inference.streaming import AnswerStreamer
from d2l.io.run_folder import step_folder

TEXTS = {"ferry.md": "The ferry to Brennick leaves at nine.", "harbour.md": "The harbour master is called Ilse."}
ASK = "d2l.inference.generate.ask"


@pytest.fixture
def documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return list(TEXTS)


def d2l(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(cli.app, [str(item) for item in arguments], prog_name="d2l", input=stdin)


def echo(trained: object, lora: object, question: str, *rest: object) -> str:
    """An answer in two lines, in place of the model's."""
    return f"{question}!\nReally."


def test_ask_prints_the_answer_and_nothing_else(run_folder: Path, documents: list[str]) -> None:
    answers = [
        d2l("ask", run_folder, source, "When does it leave?", "--max-new-tokens", 6, stdin=TEXTS["ferry.md"].encode())
        for source in (documents[0], "-")
    ]
    assert [answer.exit_code for answer in answers] == [0, 0]
    assert answers[0].stdout == answers[1].stdout
    assert "<|" not in answers[0].stdout
    assert answers[0].stderr == f"{LOADING}\ncheckpoint {step_folder(run_folder, 1)}\n"


def test_the_length_of_the_answer_and_stdout_of_libraries(
    run_folder: Path, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[object, ...]] = []

    def chatty(trained: object, lora: Lora, *rest: object) -> str:
        print("a library has something to say")  # noqa: T201
        calls.append((lora.n_contexts, *rest))
        return "At nine.\nOr so."

    monkeypatch.setattr(ASK, chatty)
    result = d2l("ask", run_folder, documents[0], "When?", "--max-new-tokens", 7)
    assert (result.stdout, result.stderr.splitlines()[-1]) == ("At nine.\nOr so.\n", "a library has something to say")
    d2l("ask", run_folder, documents[0], "When?")
    assert calls == [(1, "When?", 7), (1, "When?", 256)]


def test_several_documents_are_merged(run_folder: Path, trained: TrainedModel, documents: list[str]) -> None:
    loras = [internalize(trained, text) for text in TEXTS.values()]
    expected = ask(trained, merge_documents(loras), "When?", 8)
    assert expected not in [ask(trained, lora, "When?", 8) for lora in loras]
    result = d2l("ask", run_folder, *documents, "When?", "--max-new-tokens", 8)
    assert result.stdout == f"{expected}\n"
    assert result.stderr.splitlines()[-1] == "documents  2, merged to rank 12"


@pytest.mark.parametrize("output_format", ["text", "json"])
def test_a_pipe_gets_a_line_for_each_question(
    run_folder: Path, documents: list[str], monkeypatch: pytest.MonkeyPatch, output_format: str
) -> None:
    monkeypatch.setattr(ASK, echo)
    questions = "\ufeffWhen?\n\n  Wo f\u00e4hrt sie?  \r\n   \nWho?".encode()
    result = d2l("ask", run_folder, *documents, "--format", output_format, stdin=questions)
    asked = ["When?", "Wo f\u00e4hrt sie?", "Who?"]
    if output_format == "text":
        assert result.stdout.splitlines() == [f"{question}! Really." for question in asked]
    else:
        facts = [json.loads(line) for line in result.stdout.splitlines()]
        assert facts == [{"documents": documents, "question": it, "answer": f"{it}!\nReally."} for it in asked]
        assert "Wo f\u00e4hrt sie?" in result.stdout  # for people too: no escapes
    assert result.exit_code == 0
    assert result.stderr.splitlines()[-1] == "reading questions from stdin, one a line"


@pytest.mark.parametrize("stdin_is_terminal", [True, False])
@pytest.mark.parametrize("stdout_is_terminal", [True, False])
def test_questions_are_asked_for_only_where_both_ends_are_a_terminal(
    stdin_is_terminal: bool,
    stdout_is_terminal: bool,
    trained: TrainedModel,
    documents: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A prompt in a file is no answer, and a pipe answers no prompt."""
    ways: list[str] = []
    monkeypatch.setattr(commands.ask, "read_checkpoint", lambda place, model: trained)
    monkeypatch.setattr(commands.ask, "_converse", lambda session: ways.append("converse"))
    monkeypatch.setattr(commands.ask, "_answer_lines", lambda session: ways.append("lines"))
    terminal = StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: stdin_is_terminal, raising=False)
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr(commands.ask, "console", lambda: screen(StringIO(), stdout_is_terminal))
    commands.ask.ask(Path("run"), documents[:1], None, 8, "text")
    assert ways == ["converse" if stdin_is_terminal and stdout_is_terminal else "lines"]


def test_an_answer_on_a_terminal_goes_to_stdout_and_what_libraries_say_meanwhile_does_not(
    run_folder: Path, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def chatty(trained: object, lora: object, question: str, n: int, show: Callable[[str], None]) -> str:
        print("a library has something to say")  # noqa: T201
        show("At")
        print("and goes on")  # noqa: T201
        return "At nine."

    monkeypatch.setattr(ASK, chatty)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes what it writes to for a terminal
    result = d2l("ask", run_folder, documents[0], "When?")
    assert result.stdout == "At nine.\n"
    assert result.stderr.splitlines()[-2:] == ["a library has something to say", "and goes on"]


def test_answers_come_before_the_next_question_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program can ask and read in turns."""
    monkeypatch.setattr(ASK, echo)
    output, answered = StringIO(), []

    def lines() -> Iterator[bytes]:
        for line in (b"one\n", b"two\n"):
            yield line
            answered.append(output.getvalue().splitlines()[-1])

    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr("typer.get_binary_stream", lambda name: lines())
    _answer_lines(session(output, terminal=False))
    assert answered == ["one! Really.", "two! Really."]


def session(output: StringIO, *, terminal: bool = True, trained: Any = None, lora: Any = None) -> _Session:
    return _Session(trained, lora, ("ferry.md",), 8, "text", screen(output, terminal))


def screen(output: StringIO, is_terminal: bool) -> Console:
    return Console(file=output, force_terminal=is_terminal, highlight=False, markup=False, emoji=False, width=20)


def typed(*lines: str | BaseException | type[BaseException]) -> Callable[[str], str]:
    """An `input` that gives these lines, and raises what is no text."""
    rest = iter(lines)

    def read(prompt: str) -> str:
        line = next(rest)
        if isinstance(line, str):
            return line
        raise line

    return read


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_a_terminal_asks_until_it_is_left(
    end: type[BaseException], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ASK, echo)
    unreadable = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    monkeypatch.setattr("builtins.input", typed("When?", "", "   ", "\udcff", unreadable, " Who? ", end))
    output = StringIO()
    _converse(session(output))
    assert output.getvalue() == "When?!\nReally.\nWho?!\nReally.\n"
    captured = capsys.readouterr()
    assert captured.out == "\n"  # the shell's prompt begins a line
    assert captured.err.count("Error: ") == 2
    assert "expected text in UTF-8" in captured.err


def test_an_answer_that_is_interrupted_leaves_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(trained: object, lora: object, question: str, n: int, show: Callable[[str], None]) -> str:
        show("At")
        raise KeyboardInterrupt

    monkeypatch.setattr(ASK, interrupted)
    monkeypatch.setattr("builtins.input", typed("When?", "not asked any more"))
    output = StringIO()
    _converse(session(output))
    assert output.getvalue() == "At\n"


def test_tokens_are_shown_as_they_come(trained: TrainedModel) -> None:
    lora = internalize(trained, TEXTS["ferry.md"])
    texts: list[str] = []
    answer = ask(trained, lora, "When?", 8, texts.append)
    assert answer == ask(trained, lora, "When?", 8) == texts[-1].strip()
    assert len(texts) > 1
    assert all(answer.startswith(text) for text in texts)
    output = StringIO()
    session(output, trained=trained, lora=lora).answer("When?")
    assert output.getvalue() == f"{answer}\n"  # also where it is wider than the terminal


def test_an_answer_that_changes_its_beginning_is_shown_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def second_thoughts(trained: object, lora: object, question: str, n: int, show: Callable[[str], None]) -> str:
        for text in ("At", "At ten", "No: at"):
            show(text)
        return "No: at nine."

    monkeypatch.setattr(ASK, second_thoughts)
    output = StringIO()
    session(output).answer("When?")
    assert output.getvalue() == "At ten\nNo: at nine.\n"


def test_the_prompt_and_halves_of_characters_are_not_streamed() -> None:
    data, texts = "h\u00e9!".encode(), []
    streamer = AnswerStreamer(lambda ids: bytes(ids).decode(errors="replace"), texts.append)
    streamer.put(torch.tensor([[1, 2, 3]]))
    for byte in data:
        streamer.put(torch.tensor([byte]))
    streamer.end()
    assert texts == ["h", "h\u00e9", "h\u00e9!"]


def test_as_many_bytes_as_a_character_has_are_waited_for() -> None:
    """Some decoders write a mark for every byte of a character that is not complete, not one for all."""
    texts: list[str] = []
    owl = "\U0001f989".encode()
    streamer = AnswerStreamer(lambda ids: owl.decode() if len(ids) == len(owl) else "\ufffd" * len(ids), texts.append)
    for token in (0, *owl):  # the first is the prompt
        streamer.put(torch.tensor([token]))
    assert texts == ["\U0001f989"]


# Which argument is what, and what is refused


def test_the_last_argument_is_the_question_unless_a_file_has_that_name(documents: list[str]) -> None:
    one, two = documents
    assert _split([one, "Who?"]) == ([one], "Who?")
    assert _split([one, two, "Who is Ilse"]) == ([one, two], "Who is Ilse")
    assert _split([one, two]) == ([one, two], None)
    assert _split([one]) == ([one], None)
    assert _split([one, "-"]) == ([one, "-"], None)
    Path("notes").symlink_to("absent")
    assert _split([one, "notes"]) == ([one, "notes"], None)  # reading it says that it leads nowhere
    assert _split([]) == ([], None)
    for question in ("owl", "1.5", "Who is in ferry.md", "a/b?", "What does main.py do?", "e.g.", "x" * 5000, "a\0b"):
        assert _split([one, question]) == ([one], question)


@pytest.mark.parametrize("name", ["fery.md", "notes.txt", "reports/2024.jsonl"])
def test_a_question_that_looks_like_a_file(documents: list[str], name: str) -> None:
    with pytest.raises(DataError, match="looks like a file, and there is none of that name; documents come first"):
        _split([documents[0], name])


def refused(result: Result, words: str) -> None:
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.output


def test_documents_and_questions_that_cannot_be_used(run_folder: Path, documents: list[str]) -> None:
    one, two = documents
    Path("copy.md").write_text(TEXTS[one], encoding="utf-8")
    cases: dict[str, tuple[object, ...]] = {
        "no document: pass text files": (),
        "the question is empty": (one, " "),
        "cannot read absent.md: No such file or directory; pass text files": ("absent.md",),
        "cannot read What: No such file": (one, "What", "is", "it?"),
        "; documents come first, the question last": ("Who", one, two),
        "Is a directory": (".", "Who?"),
        "ferry.md and ferry.md are the same document; pass it once": (one, one, "Who?"),
        "ferry.md and copy.md are the same document": (two, one, "copy.md", "Who?"),
        "no question: stdin holds the document": ("-",),
        "stdin holds the document, so pass the question as the last argument, in quotes": (two, "-"),
        "the question: expected text in UTF-8": (one, "\udcff"),
    }
    for words, arguments in cases.items():
        refused(d2l("ask", run_folder, *arguments, stdin=TEXTS[one].encode()), words)


def test_a_document_of_several_that_is_too_long_is_named(run_folder: Path, documents: list[str]) -> None:
    Path("long.md").write_text(" ".join(f"On day {day} the ferry leaves." for day in range(80)), encoding="utf-8")
    refused(d2l("ask", run_folder, documents[0], "long.md", "When?"), "long.md: the document does not fit")


def test_stdin_without_a_question(run_folder: Path, documents: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ASK, echo)
    refused(d2l("ask", run_folder, documents[0], stdin=b" \n\n"), "no question: stdin is empty")
    result = d2l("ask", run_folder, documents[0], stdin=b"When?\n\nWh\xe4t\xff?\nWho?\n")
    assert (result.exit_code, result.stdout) == (2, "When?! Really.\n")
    assert "stdin, line 3: expected text in UTF-8, found byte 0xe4" in result.stderr
    behind_a_mark = d2l("ask", run_folder, documents[0], stdin=b"\xef\xbb\xbfWh\xe4t?")
    assert "stdin, line 1: expected text in UTF-8, found byte 0xe4" in behind_a_mark.stderr
