"""What a smaller rank costs an adapter: chunks x rank x relative error x bytes, as a page.

Independent random factors in the shapes of gpt-oss-20b are the worst case: chunks have nothing in common. With a
checkpoint, the LoRAs of a real document are measured in the same way, each rank by `refactor` itself.

    python experiments/adapter_ranks.py > experiments/adapter_ranks.md
    python experiments/adapter_ranks.py --checkpoint RUN --document FILE
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from d2l.hypernet.lora import Lora
from d2l.inference.low_rank import refactor, relative_error
from d2l.inference.servers import VLLM_RANKS

LORA_R, LAYERS = 8, 24
MODULES = {"v_proj": (2880, 512), "o_proj": (4096, 2880)}  # (d_in, d_out) in gpt-oss-20b
CHUNKS = (1, 3, 7, 15, 31, 40, 63, 64)
BYTES = 2  # of a value in bfloat16

HEAD = """# What a smaller rank costs an adapter

`python experiments/adapter_ranks.py` writes this page. A document of n chunks has rank R = 8 · (n + 1). Servers take ranks of a
list: a larger one of it costs zeros, a smaller one an exact low-rank refactoring, whose relative error (Frobenius norm of
the delta) is given here; `d2l internalize` refuses more than `--max-error 0.01`.

Factors are independent and random, which is the worst case: nothing is common to two chunks, and every direction of the
delta counts alike. How much less a trained hypernetwork's LoRAs lose was not measured here: `--checkpoint` does it. Bytes
are those of bfloat16 in 24 layers.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a run's folder or a step's")
    parser.add_argument("--document", type=Path, help="a text file")
    options = parser.parse_args()
    lines = random_tables() if options.checkpoint is None else document_table(options.checkpoint, options.document)
    for line in lines:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


def random_tables() -> Iterator[str]:
    """Write a table for each module."""
    yield HEAD
    for name, (d_in, d_out) in MODULES.items():
        yield f"## {name}, {d_in} → {d_out}\n"
        yield table_line(["chunks", "R", *(f"rank {rank}" for rank in VLLM_RANKS[2:])])
        yield table_line(["---"] * (len(VLLM_RANKS)))
        for chunks in CHUNKS:
            generated = LORA_R * (chunks + 1)
            generator = torch.Generator().manual_seed(chunks)
            a, b = (torch.randn(generated, d, generator=generator, dtype=torch.float64) for d in (d_in, d_out))
            errors = [0.0 if rank >= generated else tail(singular_values(a, b), rank) for rank in VLLM_RANKS[2:]]
            yield table_line([str(chunks), str(generated), *(f"{error:.2g}" for error in errors)])
        sizes = [f"{BYTES * LAYERS * rank * (d_in + d_out) / 1e6:.1f} MB" for rank in VLLM_RANKS[2:]]
        yield table_line(["", "bytes", *sizes])
        yield ""


def document_table(checkpoint: Path, document: Path) -> Iterator[str]:
    """Write a table of the ranks of a document's LoRA."""
    from d2l.inference.documents import read_text
    from d2l.inference.load import load_model
    from d2l.inference.reading import chunk_hash, cut, join, read_chunks

    trained = load_model(checkpoint)
    chunks = cut(trained, read_text(document))
    found = dict(read_chunks(trained.model, {chunk_hash(chunk): chunk for chunk in chunks}, None))
    lora: Lora = join(trained.model, [found[chunk_hash(chunk)] for chunk in chunks])
    yield table_line(["chunks", "R", "rank", "error"])
    yield table_line(["---"] * 4)
    for rank in (rank for rank in VLLM_RANKS if rank < lora.rank):
        yield table_line(
            [f"{len(chunks)}", f"{lora.rank}", f"{rank}", f"{relative_error(refactor(lora, rank), lora):.2g}"]
        )


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
