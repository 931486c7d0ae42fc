"""Bytes of a packed row in the hypernetwork beside a base, from `d2l.hypernet.memory`, and of the LoRAs that it makes."""

from d2l.hypernet.memory import ActivationBytes, activation_bytes
from d2l.plan.rows import RowShape
from d2l.plan.sizes import Sizes

_FLOAT32 = 4


def hypernet_memory(sizes: Sizes, row: RowShape) -> ActivationBytes:
    """Count the bytes of one packed row; on a GPU beside a bfloat16 base products are in bfloat16, and norms fused."""
    return activation_bytes(
        sizes.shape,
        row.chunk_lengths,
        feature_bytes=sizes.element,
        compute_bytes=2 if sizes.mixed else _FLOAT32,
        fused_norms=sizes.on_gpu,
    )


def lora_bytes(sizes: Sizes, row: RowShape) -> int:
    """Count the merged LoRAs of a row's contexts: rank r for each chunk and for the learned bias."""
    rank = sizes.config.lora_r * (row.chunks_per_context + 1)
    widths = sum(d_in + d_out for d_in, d_out in sizes.shape.modules.values())
    return row.contexts * sizes.shape.n_layers * rank * widths * _FLOAT32
