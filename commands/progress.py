"""The progress of checks and of a training: a line or a bar on a terminal, a line every few steps elsewhere."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING

from commands.console import OnProgress, console

if TYPE_CHECKING:
    from rich.console import Console

    from checks.runner import Observer
    from d2l.config.schema import RunConfig

METRICS = ("ce_loss", "kl_loss", "grad_norm", "gen_lora_l1_norm", "tokens")
LINE = (*METRICS[:4], "lr", "tokens", "tokens_per_second", "cuda_peak_gib", "resident_peak_gib")
REFRESHES = 2  # a second: each costs the training a millisecond or two
SPEED_WINDOW = 600.0  # seconds over which the remaining time is estimated: steps may take a minute

ShowStep = Callable[[Mapping[str, float]], None]


@contextmanager
def checks_progress() -> "Iterator[tuple[Observer, OnProgress]]":
    """Yield two functions that show, on a terminal, which check is running and how many records are tokenized.

    A forked process shows nothing: it may have inherited the screen's lock from a thread that held it.
    """
    screen, own = console(stderr=True), os.getpid()
    with redirect_stdout(sys.stderr):
        if not screen.is_terminal:
            yield lambda rule: None, lambda done, records: None
            return
        with screen.status("starting") as status:

            def show(text: str) -> None:
                if os.getpid() == own:
                    status.update(text)

            yield (
                lambda rule: show(f"{rule.code} {rule.name}"),
                lambda done, records: show(f"tokenizing: {done:,} of {records:,} records"),
            )


@contextmanager
def steps_progress(screen: "Console", config: "RunConfig") -> Iterator[tuple[ShowStep, OnProgress]]:
    """Yield two functions that show the metrics of a step, and how many records are tokenized.

    Args:
        config: gives the number of all steps, and between how many a pipe gets a line.
    """
    if screen.is_terminal and not screen.is_dumb_terminal:
        with _bars(screen, config.max_steps) as (show_step, show_tokenized):

            def show(record: Mapping[str, float]) -> None:
                show_step(record)
                print_evaluation(screen, record)

            yield show, show_tokenized
        return

    def print_tokenized(done: int, records: int) -> None:
        if done == records:
            screen.out(f"tokenized {records:,} records", highlight=False)

    def print_step(record: Mapping[str, float]) -> None:
        step = int(record["step"])
        if step % config.logging_steps == 0 or step == config.max_steps:
            screen.out(f"step {step}/{config.max_steps}  {numbers(record, LINE)}", highlight=False)
        print_evaluation(screen, record)

    yield print_step, print_tokenized


@contextmanager
def _bars(screen: "Console", total: int) -> Iterator[tuple[ShowStep, OnProgress]]:
    """Yield what `steps_progress` does, with bars that fit 80 columns."""
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.table import Column
    from rich.text import Text

    class Times(ProgressColumn):
        """Time elapsed, and remaining."""

        def render(self, task: Task) -> Text:
            left = "?" if task.time_remaining is None else clock(task.time_remaining)
            return Text(f"{clock(task.elapsed or 0)}<{left}")

    def text(form: str) -> TextColumn:
        return TextColumn(form, markup=False, table_column=Column(no_wrap=True))

    columns = (
        text("{task.completed:.0f}/{task.total}"),
        BarColumn(None, table_column=Column(ratio=1, min_width=2)),
        text("{task.fields[numbers]}"),
        Times(table_column=Column(no_wrap=True)),
    )
    with Progress(
        *columns,
        console=screen,
        expand=True,
        refresh_per_second=REFRESHES,
        speed_estimate_period=SPEED_WINDOW,
    ) as bar:
        data = bar.add_task("tokenizing", total=None, numbers="records tokenized", visible=False)
        task = bar.add_task("training", total=total, numbers="")
        yield (
            lambda record: bar.update(task, completed=record["step"], numbers=compact(record)),
            lambda done, records: bar.update(data, completed=done, total=records, visible=done < records),
        )


def print_evaluation(screen: "Console", record: Mapping[str, float]) -> None:
    """Print a line about the held-out documents where the step was evaluated."""
    if "eval/lora_distance" in record:
        screen.out(f"step {record['step']:.0f} held-out  {evaluation_numbers(record, 'eval/')}", highlight=False)


def evaluation_numbers(record: Mapping[str, float], before: str = "") -> str:
    """Write loss and exact match under the own LoRA, another document's and none, and how far LoRAs are apart.

    Args:
        before: what stands before the keys of an evaluation.
    """
    parts = []
    for name in ("ce_loss", "kl_loss", "exact_match"):
        values = [record.get(f"{before}{control}_{name}") for control in ("document", "other", "none")]
        if None not in values:
            own, other, none = (f"{value:.4g}" for value in values)
            parts.append(f"{name} {own} (other LoRA {other}, none {none})")
    return "  ".join([*parts, f"lora_distance {record[f'{before}lora_distance']:.3g}"])


def numbers(record: Mapping[str, float], keys: Sequence[str]) -> str:
    """Write the values of the keys that a step has."""
    return "  ".join(f"{key} {record[key]:.4g}" for key in keys if key in record)


def compact(record: Mapping[str, float]) -> str:
    """Write loss, learning rate, speed and peak memory of a step in at most 45 characters."""
    parts = []
    for key, form in (("ce_loss", "loss {:.3g}"), ("kl_loss", "loss {:.3g}"), ("lr", "lr {:.1e}")):
        parts += [form.format(record[key])] if key in record else []
    if "tokens_per_second" in record:
        parts.append(f"{thousands(record['tokens_per_second'])} tok/s")
    parts += [f"{record[key]:.1f} GiB" for key in ("cuda_peak_gib", "resident_peak_gib") if key in record]
    return " ".join(parts)


def thousands(value: float) -> str:
    """Write a count with three digits: 950, 1.23k, 45.6k, 1.2M."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.0f}"


def clock(seconds: float) -> str:
    """Write a time as 2:05, 1:02:05 or 3d4h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours // 24}d{hours % 24}h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
