"""What a smaller rank costs an adapter: chunks x rank x relative error x bytes, as a page.

Independent random factors in the shapes of gpt-oss-20b are the worst case: chunks have nothing in common. The LoRAs of
documents by the shipped demonstration, which is trained, are measured in the same way, each rank by `refactor` itself; so is
a document of one's own by a checkpoint of one's own.

    python experiments/adapter_ranks.py > experiments/adapter_ranks.md
    python experiments/adapter_ranks.py --checkpoint RUN --document FILE
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from d2l.data.needles import needle_records
from d2l.evaluation.scores import exact_match
from d2l.hypernet.targets import target_sizes
from d2l.inference.documents import read_text
from d2l.inference.generate import ask, internalize, tokenize_document
from d2l.inference.load import load_model
from d2l.inference.low_rank import refactor, relative_error
from d2l.inference.servers import VLLM_RANKS

LORA_R, LAYERS = 8, 24
MODULES = {"v_proj": (2880, 512), "o_proj": (4096, 2880)}  # (d_in, d_out) in gpt-oss-20b
CHUNKS = (1, 3, 7, 15, 31, 40, 63, 64)
BYTES = 2  # of a value in bfloat16
DEMO_CHUNKS, DOCUMENTS = (1, 3, 7, 15, 31), 4  # one pair each; documents of each number
DEMO_RANKS = (4, *VLLM_RANKS[1:6])
DIGITS = 2  # of a pair's value
ROUNDING = 1e-6  # below, an error is that of float32

HEAD = """# What a smaller rank costs an adapter

`python experiments/adapter_ranks.py` writes this page. A document of n chunks has rank R = 8 · (n + 1). Servers take ranks of a
list: a larger one of it costs zeros, a smaller one an exact low-rank refactoring, whose relative error (Frobenius norm of
the delta) is given here; `d2l internalize` refuses more than `--max-error 0.01`.

In the first two tables factors are independent and random, which is the worst case: nothing is common to two chunks, and
every direction of the delta counts alike. The last is of a trained hypernetwork. Bytes are those of bfloat16 in all layers.
"""
DEMO = """## The trained demonstration: v_proj, {d_in} → {d_out}, {layers} layers

`configs/demo`, on {documents} held-out documents of each number of chunks, a pair in each: its base has a vocabulary of needles
and reads no other text. It was trained on up to four pairs. An error is the largest over layers, its mean over documents;
behind it stands the share of all questions that are answered right with the LoRA of that rank; below it the error of
independent factors of these sizes. Deltas have no rank above {d_out}, so {d_out} costs nothing. `--checkpoint RUN --document
FILE` measures errors of another document.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a run's folder or a step's")
    parser.add_argument("--document", type=Path, help="a text file")
    options = parser.parse_args()
    if (options.checkpoint is None) != (options.document is None):
        parser.error("--checkpoint and --document go together")
    own = options.checkpoint is not None
    for line in document_table(options.checkpoint, options.document) if own else page():
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


def page() -> Iterator[str]:
    """Write the page."""
    yield HEAD
    yield from random_tables()
    yield from demo_table()


def random_tables() -> Iterator[str]:
    """Write a table for each module."""
    for name, (d_in, d_out) in MODULES.items():
        yield f"## {name}, {d_in} → {d_out}\n"
        yield table_line(["chunks", "R", *(f"rank {rank}" for rank in VLLM_RANKS[2:])])
        yield table_line(["---"] * (len(VLLM_RANKS)))
        for chunks in CHUNKS:
            errors = independent_errors(chunks, d_in, d_out, VLLM_RANKS[2:])
            yield table_line([str(chunks), str(LORA_R * (chunks + 1)), *(f"{error:.2g}" for error in errors)])
        sizes = [f"{BYTES * LAYERS * rank * (d_in + d_out) / 1e6:.1f} MB" for rank in VLLM_RANKS[2:]]
        yield table_line(["", "bytes", *sizes])
        yield ""


def demo_table() -> Iterator[str]:
    """Write the table of the demonstration: errors, and recall with the LoRA of each rank."""
    trained = load_model("demo")
    sizes = target_sizes(trained.model.targets, trained.model.base.config.hidden_size)
    ((d_in, d_out),) = sizes.values()
    layers = trained.model.base.config.num_hidden_layers
    yield DEMO.format(d_in=d_in, d_out=d_out, layers=layers, documents=DOCUMENTS)
    yield table_line(["chunks", "R", *(f"rank {rank}" for rank in DEMO_RANKS)])
    yield table_line(["---"] * (2 + len(DEMO_RANKS)))
    for chunks in DEMO_CHUNKS:
        records = needle_records(DOCUMENTS, chunks, DIGITS, 0, seed=chunks, split="heldout", style="pairs")
        loras = [internalize(trained, record.context) for record in records]
        cells = []
        for rank in DEMO_RANKS:
            smaller = [refactor(lora, rank) if rank < lora.rank else lora for lora in loras]
            error = fmean(relative_error(one, other) for one, other in zip(smaller, loras, strict=True))
            exact = [
                exact_match(ask(trained, lora, prompt, max_new_tokens=2 * (DIGITS + 1)), answer)
                for record, lora in zip(records, smaller, strict=True)
                for prompt, answer in zip(record.prompts, record.responses, strict=True)
            ]
            cells.append(f"{error if error > ROUNDING else 0:.2g}, {fmean(exact):.2f} right")
        yield table_line([str(chunks), str(loras[0].rank), *cells])
        errors = independent_errors(chunks, d_in, d_out, DEMO_RANKS)
        yield table_line(["", "independent", *(f"{error:.2g}" for error in errors)])
    yield table_line(["", "bytes", *(f"{BYTES * layers * rank * (d_in + d_out) / 1e3:.1f} kB" for rank in DEMO_RANKS)])


def document_table(checkpoint: Path, document: Path) -> Iterator[str]:
    """Write a table of the ranks of a document's LoRA."""
    trained, text = load_model(checkpoint), read_text(document)
    lora, chunks = internalize(trained, text), len(tokenize_document(trained, text))
    width = sum(side.shape[1] * side.shape[3] for side in (*lora.A.values(), *lora.B.values()))  # all layers together
    yield table_line(["chunks", "R", "rank", "error", "bytes"])
    yield table_line(["---"] * 5)
    for rank in (rank for rank in VLLM_RANKS if rank < lora.rank):
        error, size = relative_error(refactor(lora, rank), lora), BYTES * rank * width / 1e6
        yield table_line([f"{chunks}", f"{lora.rank}", f"{rank}", f"{error:.2g}", f"{size:.1f} MB"])


def independent_errors(chunks: int, d_in: int, d_out: int, ranks: Sequence[int]) -> list[float]:
    """Return what each rank costs a delta of independent random factors."""
    generator, generated = torch.Generator().manual_seed(chunks), LORA_R * (chunks + 1)
    a, b = (torch.randn(generated, d, generator=generator, dtype=torch.float64) for d in (d_in, d_out))
    values = singular_values(a, b)
    return [0.0 if rank >= min(generated, d_in, d_out) else tail(values, rank) for rank in ranks]


def singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Return the singular values of aᵀ b."""
    left, right = (torch.linalg.qr(side.mT, mode="r").R for side in (a, b))
    return torch.linalg.svdvals(left @ right.mT)


def tail(values: Tensor, rank: int) -> float:
    """Return the relative length of what is beyond a rank."""
    return float(values[rank:].norm() / values.norm())


def table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
