"""Commands that compare what a server serves with what PEFT computes. Heavy imports are late."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from checks.json_values import jsonable
from checks.result import UsageError
from commands.console import BaseOption, FormatOption, libraries_to_stderr
from d2l.errors import DataError, ModelError

if TYPE_CHECKING:
    from d2l.inference.expected import Expected
    from d2l.inference.probe import Probe

# What a program needs to know of a verdict without reading it.
EXIT_CODES = {
    "served": 0,
    "served_base": 20,
    "differs_from_peft": 21,
    "tokenization_differs": 22,
    "adapter_not_loaded": 23,
    "other_base": 24,
    "server_failed": 25,
    "cannot_tell": 26,
}

AdapterArgument = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="Adapter: a folder that d2l internalize wrote.")
]
TextOption = Annotated[
    Path | None,
    typer.Option(
        "--text", metavar="FILE", help="Compare on this text, such as the document; default: a short paragraph."
    ),
]


ExpectedOption = Annotated[
    Path | None,
    typer.Option(
        "--expected", metavar="FILE", help="Compare with this file of d2l expect, without the base's weights."
    ),
]
AdapterNameOption = Annotated[
    str | None,
    typer.Option("--adapter-name", metavar="NAME", help="Adapter's name on the server; default: that of its folder."),
]
BaseNameOption = Annotated[
    str | None,
    typer.Option("--base-name", metavar="NAME", help="Base's name on the server; default: its first model."),
]
BoundOption = Annotated[
    float | None,
    typer.Option("--bound", metavar="NATS", min=0, help="Mean difference that counts as equal; default: 0.1."),
]
TimeoutOption = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", min=0.1, help="Wait so long for an answer.")
]
ConnectTimeoutOption = Annotated[
    float, typer.Option("--connect-timeout", metavar="SECONDS", min=0.1, help="Wait so long for a connection.")
]
KeyOption = Annotated[
    str | None,
    typer.Option("--api-key-env", metavar="NAME", help="Send the key in this environment variable."),
]


def add_commands(app: typer.Typer) -> None:
    """Register the commands with the application."""
    commands: tuple[Callable[..., None], ...] = (probe, expect)
    for command in commands:
        app.command()(command)


def probe(
    url: Annotated[str, typer.Argument(metavar="URL", help="Address of the server, such as http://localhost:8000.")],
    adapter: AdapterArgument,
    model: BaseOption = None,
    expected: ExpectedOption = None,
    adapter_name: AdapterNameOption = None,
    base_name: BaseNameOption = None,
    text: TextOption = None,
    bound: BoundOption = None,
    timeout: TimeoutOption = 60,
    connect_timeout: ConnectTimeoutOption = 5,
    api_key_env: KeyOption = None,
    output_format: FormatOption = "text",
) -> None:
    """Ask a server whether it serves an adapter as trained.

    Log-probabilities with and without the adapter are compared with PEFT's; only the given address is talked to.
    """
    from d2l.inference.json_http import JsonServer

    server = JsonServer(url, timeout, connect_timeout, _read_key(api_key_env))
    if expected is not None and (model is not None or text is not None):
        raise UsageError("--expected holds base and text already: leave out --model and --text")
    with libraries_to_stderr():
        from d2l.inference.expected import TEXT
        from d2l.inference.probe import BOUND
        from d2l.inference.probe import probe as ask_server

        words = TEXT if text is None else _read_text(text)
        values = _expected(adapter, expected, model, words)
        outcome = ask_server(
            server,
            adapter_name or adapter.resolve().name,
            values,
            base=base_name,
            text=words,
            bound=BOUND if bound is None else bound,
        )
    if output_format == "json":
        typer.echo(json.dumps(jsonable(_as_json(server.url, outcome)), ensure_ascii=False, indent=1))
    else:
        _show(server.url, outcome)
    raise typer.Exit(EXIT_CODES[outcome.verdict])


def expect(
    adapter: AdapterArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Write to this new file.")],
    model: BaseOption = None,
    text: TextOption = None,
) -> None:
    """Write what a server of an adapter should answer, for d2l probe --expected."""
    from d2l.io.atomic import require_new_file

    require_new_file(output)
    with libraries_to_stderr():
        from d2l.inference.expected import TEXT, compute_expected, write_expected

        values = compute_expected(adapter, model, TEXT if text is None else _read_text(text))
        write_expected(values, output)
    typer.echo(f"expected  {output}\nbase      {values.base}\ntokens    {len(values.ids)}")


def _expected(adapter: Path, file: Path | None, model: str | None, text: str) -> "Expected | None":
    """Read or compute PEFT's values; where the base is not at hand, say so and go on without them."""
    from d2l.inference.expected import adapter_base, adapter_hash, compute_expected, read_expected

    adapter_base(adapter), adapter_hash(adapter)  # refuses what is no adapter
    if file is not None:
        return read_expected(file, adapter)
    try:
        return compute_expected(adapter, model, text)
    except ModelError as error:
        if model is not None:
            raise
        typer.echo(f"Note: not compared with PEFT: {str(error).splitlines()[0]}", err=True)
        return None


def _read_text(file: Path) -> str:
    from d2l.data.document import decode_document

    try:
        return decode_document(file.read_bytes(), str(file))
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None


def _read_key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise UsageError(
            f"--api-key-env {name}: expected a key in this environment variable, found none that can be sent"
        )
    return key


def _as_json(url: str, outcome: "Probe") -> dict[str, Any]:
    return {
        "url": url,
        "verdict": outcome.verdict,
        "exit_code": EXIT_CODES[outcome.verdict],
        "compared_with_peft": outcome.compared is not None,
        **asdict(outcome),
    }


def _show(url: str, outcome: "Probe") -> None:
    lines = [f"server    {url}"]
    if outcome.routes is not None:
        lines.append(f"models    {outcome.routes.adapter.model} on {outcome.routes.base.model}")
    for finding in outcome.findings:
        lines.append(f"verdict   {finding.verdict.replace('_', ' ')}")
        lines += [f"expected  {finding.expected}", f"actual    {finding.actual}", f"remedy    {finding.remedy}"]
    typer.echo("\n".join(lines))
