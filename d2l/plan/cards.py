"""GPUs that a run can be planned for: their memory and rates, by a short name, by a size, or the one that is here.

Memory is what the driver reports; rates are those of the makers' data sheets: dense bfloat16 products with float32 sums,
and memory bandwidth.
"""

from contextlib import suppress
from dataclasses import dataclass

from d2l.config.numbers import read_bytes
from d2l.errors import ConfigError

_MIB, _GIB = 2**20, 2**30
# The CUDA context, libraries' own memory and what an allocator leaves between its blocks.
RESERVED = _GIB


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        memory: bytes in all.
        flops: dense bfloat16 operations a second; None where only a size is known.
        bandwidth: bytes a second; None likewise.
        capability: compute capability, such as (9, 0).
    """

    name: str
    memory: int
    flops: float | None
    bandwidth: float | None
    capability: tuple[int, int]

    @property
    def usable(self) -> int:
        """Bytes that tensors can take."""
        return max(0, self.memory - RESERVED)


def _card(name: str, memory_mib: int, teraflops: float, gigabytes: float, capability: tuple[int, int]) -> Card:
    return Card(name, memory_mib * _MIB, teraflops * 1e12, gigabytes * 1e9, capability)


H100 = _card("H100", 81_559, 989, 3350, (9, 0))  # SXM, 80 GB; NVIDIA H100 data sheet
CARDS = (
    _card("B200", 183_359, 2250, 8000, (10, 0)),  # NVIDIA Blackwell data sheet
    _card("H200", 143_771, 989, 4800, (9, 0)),  # NVIDIA H200 data sheet
    H100,
    _card("A100-80", 81_920, 312, 2039, (8, 0)),  # SXM; NVIDIA A100 data sheet
    _card("A100-40", 40_960, 312, 1555, (8, 0)),
    _card("L40S", 46_068, 362, 864, (8, 9)),  # NVIDIA L40S data sheet
    _card("A10G", 23_028, 70, 600, (8, 6)),
    _card("L4", 23_034, 121, 300, (8, 9)),  # NVIDIA L4 data sheet
    _card("RTX-4090", 24_564, 165, 1008, (8, 9)),  # NVIDIA Ada architecture paper
)


def find_card(name_or_size: str) -> Card:
    """Return the card of this name, or one of this size whose rates are not known.

    Raises:
        ConfigError: it is neither.
    """
    wanted = name_or_size.strip().lower()
    for card in CARDS:
        if card.name.lower() == wanted:
            return card
    with suppress(ValueError):
        if (size := read_bytes(wanted)) >= _GIB:
            return sized_card(size)
    known = ", ".join(card.name for card in CARDS)
    raise ConfigError([f"--gpu: expected one of {known}, or a size such as 24GiB, found {name_or_size!r}"])


def sized_card(memory: int) -> Card:
    """Return a card of this many bytes that computes in bfloat16."""
    return Card(f"{memory / _GIB:.4g} GiB", memory, None, None, H100.capability)


def card_here() -> Card | None:
    """Return the first GPU of this machine, with the rates of the known card whose name its own contains; None without one.

    torch is imported here: the rest of this module is needed before it.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    capability = (properties.major, properties.minor)
    words = properties.name.replace(" ", "-").lower().split("-")
    for card in CARDS:
        if all(part in words or f"{part}gb" in words for part in card.name.lower().split("-")):
            return Card(properties.name, properties.total_memory, card.flops, card.bandwidth, capability)
    return Card(properties.name, properties.total_memory, None, None, capability)
