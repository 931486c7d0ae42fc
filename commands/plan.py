"""The command that reckons memory, time and cost of a run before a GPU is rented. Heavy imports come late."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from checks.result import UsageError
from commands.console import (
    DataOption,
    FormatOption,
    GpuOption,
    ModelOption,
    SetOption,
    TokenizerOption,
    console,
    libraries_to_stderr,
    progress,
    read_config,
)

if TYPE_CHECKING:
    from d2l.plan.plan import Plan

MIB, GIB = 2**20, 2**30
BAR = 40  # columns of the longest bar


def add_commands(app: typer.Typer) -> None:
    """Register the command with the application."""
    app.command()(plan)


def plan(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="Configuration (YAML); default: a tiny GPT-OSS.")
    ] = None,
    gpu: GpuOption = None,
    price_per_hour: Annotated[
        float | None, typer.Option("--price-per-hour", metavar="PRICE", help="Price of one card for an hour.")
    ] = None,
    processes: Annotated[
        int, typer.Option("--processes", metavar="N", min=1, help="Cards that share each optimizer step.")
    ] = 1,
    document_tokens: Annotated[
        int | None,
        typer.Option(
            "--document-tokens", metavar="TOKENS", min=1, help="Length of every document, in place of the run's data."
        ),
    ] = None,
    model: ModelOption = None,
    tokenizer: TokenizerOption = None,
    data: DataOption = None,
    settings: SetOption = None,
    output_format: FormatOption = "text",
) -> None:
    """Reckon memory, the largest packing, time and cost of a run before a GPU is rented; reads no weights."""
    if price_per_hour is not None and not 0 <= price_per_hour < float("inf"):
        raise UsageError(f"--price-per-hour: expected a price of 0 or more, found {price_per_hour:g}")
    if data is not None and document_tokens is not None:
        raise UsageError("--document-tokens stands in for the data: leave it or --data out")
    if gpu is not None:
        from d2l.plan.cards import find_card

        find_card(gpu)  # a mistake is reported before seconds of loading
    resolved = read_config(config, settings or (), model=model, tokenizer=tokenizer, data=data)
    with libraries_to_stderr(), progress("records") as on_tokenize:
        from d2l.plan.inputs import plan_inputs
        from d2l.plan.plan import make_plan

        inputs = plan_inputs(resolved, gpu, document_tokens, on_tokenize, processes)
        made = make_plan(inputs.model, resolved, inputs.rows, inputs.card, price_per_hour=price_per_hour)
    for remark in inputs.remarks:
        typer.echo(f"Note: {remark}", err=True)
    if output_format == "json":
        typer.echo(json.dumps(made.to_json(), indent=2, ensure_ascii=False))
    else:
        _show(made)


def _show(made: "Plan") -> None:
    """Print the plan: components with bars on a terminal, the same lines without them elsewhere."""
    _print_memory(made)
    typer.echo()
    for name, text in _facts(made):
        typer.echo(f"{name:<18}{text}")
    if made.savings:
        typer.echo("\nwhat saves most, each by itself")
        for saving in made.savings:
            settings = ", ".join(f"{key}: {_number(value)}" for key, value in saving.settings.items())
            typer.echo(f"  {settings:<42}{_size(saving.saved_bytes):>12} less")
    typer.echo("\nassumed")
    for text in made.assumptions:
        typer.echo(f"  {text}")


def _print_memory(made: "Plan") -> None:
    """Print the bytes of every component while loading, at the peak and between steps."""
    memory = made.memory
    unit, size = ("GiB", GIB) if memory.needed >= GIB else ("MiB", MIB)
    header = (unit, "loading", "peak", "steady")
    rows = [(part.name, part.loading, part.peak, part.steady) for part in memory.components]
    rows = [row for row in rows if any(row[1:])] + [("all", memory.loading, memory.peak, memory.steady)]
    cells = [(name, *(f"{amount / size:.2f}" for amount in amounts)) for name, *amounts in rows]
    screen = console()
    if not screen.is_terminal:
        width = max(len(row[0]) for row in cells)
        for name, *numbers in [header, *cells]:
            typer.echo(name.ljust(width) + "".join(number.rjust(10) for number in numbers))
        return
    from rich import box
    from rich.bar import Bar
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate((*header, f"peak: {memory.phase}")):
        table.add_column(name, justify="right" if 0 < place < len(header) else "left", overflow="fold")
    for (_, _, peak, _), texts in zip(rows, cells, strict=True):
        table.add_row(*texts, Bar(max(memory.peak, 1), 0, peak, width=BAR))
    screen.print(table)


def _facts(made: "Plan") -> list[tuple[str, str]]:
    """Put the plan's other figures into words."""
    card, verdict = made.card, "fits" if made.fits else "does not fit"
    facts = [("card", f"{card.name}: {verdict} into {card.usable / GIB:.1f} of {card.memory / GIB:.1f} GiB")]
    facts.append(("peak", made.memory.phase))
    if made.largest_packing is None:
        facts.append(("largest packing", "none fits"))
    else:
        largest = made.largest_packing
        budgets = f"max_packed_inp_len: {largest.max_packed_inp_len}, max_packed_ctx_len: {largest.max_packed_ctx_len}"
        text = f"{budgets} ({_size(largest.peak_bytes)}{_pace(largest.tokens_per_second)})"
        facts.append(("largest packing", text + ("; no row is longer" if largest.limited_by == "rows" else "")))
    from d2l.plan.plan import PAPER_CONTEXT_TOKENS

    paper = f"{PAPER_CONTEXT_TOKENS:,} in the paper"
    facts.append(("document tokens", f"{made.context_tokens_per_step:,} an optimizer step; {paper}"))
    if made.seconds_per_step is not None and made.hours is not None:
        pace = f"{made.seconds_per_step:.2f} s a step{_pace(made.tokens_per_second)}"
        facts.append(("time", f"{pace}, {made.hours:.1f} h in all"))
    if made.cost is not None:
        facts.append(("cost", f"{made.cost:,.2f} for {made.processes} card{'s' * (made.processes > 1)}"))
    return facts


def _pace(tokens_per_second: float | None) -> str:
    return "" if tokens_per_second is None else f", {tokens_per_second:,.0f} tokens/s"


def _size(amount: int) -> str:
    return f"{amount / GIB:.2f} GiB" if amount >= GIB else f"{amount / MIB:.1f} MiB"


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
