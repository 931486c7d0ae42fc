"""Deltas beside a bfloat16 base: products in float32 against products in bfloat16, by error, time and kept memory.

python -m benchmarks.deltas
"""

import sys

import torch
from torch import Tensor, nn

from benchmarks.timing import Work, ratio
from d2l.base.segments import Segments
from d2l.hypernet.lora import Lora, bind

D_IN, D_OUT, RANK = 2880, 4096, 16  # q_proj of gpt-oss-20b, one chunk and the bias
SHARES = (0.1, 0.3, 1.0, 3.0)  # norm of the delta / norm of the base's output
TOKENS = ((1, 1), (256, 1), (1024, 1), (1024, 8))  # tokens and contexts of a row


def make_lora(contexts: int, dtype: torch.dtype, factor: float = 1.0) -> Lora:
    """Make random factors, A [n, 1, R, d_in] and B [n, 1, R, d_out]; a LoRA in bfloat16 is multiplied in bfloat16."""
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(contexts, 1, RANK, D_IN, generator=generator)
    B = torch.randn(contexts, 1, RANK, D_OUT, generator=generator)
    return Lora({"q_proj": A.to(dtype)}, {"q_proj": B.to(dtype)}, factor)


def adapted(linear: nn.Linear, lora: Lora, x: Tensor) -> Tensor:
    """Return the Linear's output under a LoRA whose contexts share the row [1, T, d_in] equally."""
    count = x.shape[1] // lora.n_contexts
    with bind({"q_proj": [linear]}, lora, Segments((count,) * lora.n_contexts)):
        return linear(x)


def errors(linear: nn.Linear, x: Tensor, share: float) -> list[float]:
    """Return the error against float64, relative to the output's norm: of float32 products, and of bfloat16 ones."""
    lora = make_lora(1, torch.float32)
    base = x.double() @ linear.weight.double().T
    delta = (x.double() @ lora.A["q_proj"][0, 0].double().T) @ lora.B["q_proj"][0, 0].double()
    factor = float(share * base.norm() / delta.norm())
    exact = base + factor * delta
    ways = [adapted(linear, make_lora(1, dtype, factor), x) for dtype in (torch.float32, torch.bfloat16)]
    return [float((y.double() - exact).norm() / exact.norm()) for y in ways]


def kept(linear: nn.Linear, dtype: torch.dtype, tokens: int) -> float:
    """Return the MiB that a training step keeps for the backward of one adapted Linear with products in this dtype."""
    lora, x = make_lora(1, torch.float32), torch.randn(1, tokens, D_IN, dtype=torch.bfloat16, requires_grad=True)
    A, B = (side["q_proj"][0, 0].requires_grad_() for side in (lora.A, lora.B))
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    alive: list[Tensor] = [linear.weight]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        alive.append(linear(x) + (x.to(dtype) @ A.to(dtype).T) @ B.to(dtype))
    return (sum(sizes.values()) - linear.weight.untyped_storage().nbytes()) / 2**20


@torch.no_grad()
def main() -> None:
    """Print the error, the time of answering and the memory of training, both ways."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    linear = nn.Linear(D_IN, D_OUT, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    sys.stdout.write("delta / base   error float32   error bfloat16\n")
    for share in SHARES:
        float32, bfloat16 = errors(linear, torch.randn(1, 256, D_IN, dtype=torch.bfloat16), share)
        sys.stdout.write(f"{share:12}{float32:16.5f}{bfloat16:17.5f}\n")
    sys.stdout.write("tokens  contexts  float32 / Linear  bfloat16 / Linear (medians, by turns)\n")
    for tokens, contexts in TOKENS:
        x = torch.randn(1, tokens, D_IN, dtype=torch.bfloat16)

        def plain(x: Tensor = x) -> object:
            return linear(x)

        def works(dtype: torch.dtype, x: Tensor = x, contexts: int = contexts) -> Work:
            lora = make_lora(contexts, dtype)
            return lambda: adapted(linear, lora, x)

        repeats = 200 if tokens == 1 else 9
        medians = [ratio(works(dtype), plain, repeats).median for dtype in (torch.float32, torch.bfloat16)]
        sys.stdout.write(f"{tokens:6}{contexts:10}{medians[0]:18.2f}{medians[1]:19.2f}\n")
    with torch.enable_grad():
        both = [kept(linear, dtype, 1024) for dtype in (torch.float32, torch.bfloat16)]
    sys.stdout.write(f"kept for the backward at 1,024 tokens: float32 {both[0]:.1f} MiB, bfloat16 {both[1]:.1f} MiB\n")


if __name__ == "__main__":
    main()
