"""One table of ratios, ours beside a named rule in one run, and `benchmarks/RESULTS.md` with device, versions and spread.

python -m benchmarks.bench            # some minutes on a CPU; on CUDA where there is one
"""

import argparse
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.comparisons import DEVICE, DTYPE, comparisons
from benchmarks.packing import count_batches, count_greedy_batches, draw_sizes
from benchmarks.timing import ratio

RESULTS = Path("benchmarks/RESULTS.md")
BEGIN, END = "<!-- make bench -->\n", "<!-- end of make bench -->\n"
TINY, REAL = "configs/tiny_gpt_oss.yaml", "configs/gpt_oss_20b.yaml"
PREFLIGHTS = {  # the shipped configuration of gpt-oss-20b names no data
    "tiny": (TINY,),
    "tiny, stage data": (TINY, "--stage", "data"),
    "20B": (REAL,),
    "20B, stage static": (REAL, "--stage", "static"),
    "20B, stage twin": (REAL, "--stage", "twin"),
}
HEADER = ("what", "case", "rule", "ours / rule", "spread", "bound")


@dataclass(frozen=True)
class Line:
    """A line of the table: the median of ours / rule, its spread, and the bound where there is one."""

    what: str
    case: str
    rule: str
    median: float
    spread: str
    bound: float | None = None

    def cells(self) -> tuple[str, ...]:
        bound = "" if self.bound is None else f"{self.bound:.2f}" + ("" if self.median <= self.bound else " missed")
        return self.what, self.case, self.rule, f"{self.median:.2f}", self.spread, bound


def lines(repeats: int, preflights: bool, failed: Callable[[str], None]) -> Iterator[Line]:
    """Measure all lines; what cannot be measured is told, and ends none of the others."""
    for make in comparisons():
        try:
            it = make()
            found = ratio(it.ours, it.other, repeats)
        except Exception as error:
            failed(f"{make}: {type(error).__name__}: {error}")
            continue
        yield Line(it.what, it.case, it.rule, found.median, found.spread, it.bound)
    sizes, budgets = draw_sizes(100_000, 4096, 8192), (4096, 8192)
    batches = count_batches(sizes, budgets) / count_greedy_batches(sizes, budgets)
    yield Line("packing, batches", "100,000 rows, 4,096 / 8,192", "greedy", batches, "exact")
    for case, arguments in PREFLIGHTS.items() if preflights else ():
        found = ratio(partial(_preflight, *arguments), _imports, repeats=3)
        yield Line(
            "preflight", f"{case}, whole process", "importing torch and transformers", found.median, found.spread
        )


def _preflight(*arguments: str) -> None:
    command = [sys.executable, "cli.py", "preflight", *arguments, "--format", "json"]
    code = subprocess.run(command, check=False, capture_output=True).returncode
    if code not in (0, 4):  # 4: without data or a tokenizer, what is asked for explicitly does not run
        raise SystemExit(f"{' '.join(command)} ended with {code}")


def _imports() -> None:
    command = [sys.executable, "-c", "import torch; from transformers import AutoModelForCausalLM"]
    subprocess.run(command, check=True, capture_output=True)


def machine() -> str:
    """Name the device and the versions of what computes."""
    device = (
        torch.cuda.get_device_name()
        if DEVICE == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    )
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    return (
        f"{date.today()}, {device}, {str(DTYPE).removeprefix('torch.')}, Python {platform.python_version()}, {versions}"
    )


def write(found: list[Line], where: str) -> None:
    """Put the table into the results page, in the place of the one before."""
    rows = [f"| {' | '.join(cells)} |" for cells in (HEADER, ("---",) * len(HEADER), *(line.cells() for line in found))]
    before, _, rest = RESULTS.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    RESULTS.write_text(f"{before}{BEGIN}{where}\n\n" + "\n".join(rows) + f"\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="turns of each comparison")
    parser.add_argument("--no-preflights", action="store_true", help="leave out whole processes, which take minutes")
    options = parser.parse_args()
    found: list[Line] = []
    failures: list[str] = []
    for line in lines(options.repeats, not options.no_preflights, failures.append):
        found.append(line)
        sys.stderr.write(f"{line.what}, {line.case}: {line.median:.2f}\n")
        write(found, machine())  # each time: what was measured outlives what comes
    table = Table(*HEADER, title=machine())
    for line in found:
        table.add_row(*line.cells())
    Console().print(table)
    if failures:
        raise SystemExit("not measured:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
