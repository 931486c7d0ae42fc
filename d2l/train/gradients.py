"""Gradients of several processes, summed in buckets while the last backward pass of a step is still running."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn

# As in DistributedDataParallel: large enough that a sum is worth its latency, small enough that the first one starts
# early in the backward pass.
BUCKET_BYTES = 25 * 2**20


class SummedGradients:
    """Sums the gradients of parameters over all processes of the group.

    Args:
        parameters: in the order of the forward pass; their gradients come in about the reverse order.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._buckets: list[list[nn.Parameter]] = [[]]
        for parameter in reversed(parameters):
            held = sum(it.numel() * it.element_size() for it in self._buckets[-1])
            if held and held + parameter.numel() * parameter.element_size() > BUCKET_BYTES:
                self._buckets.append([])
            self._buckets[-1].append(parameter)
        self._missing = [{id(it) for it in bucket} for bucket in self._buckets]
        self._sums: list[distributed.Work] = []  # under way, in the order of the buckets

    @contextmanager
    def during(self) -> Iterator[None]:
        """Sum during the backward pass in this context; afterwards every gradient is the sum, one that is missing 0."""
        bucket_of = {id(it): number for number, bucket in enumerate(self._buckets) for it in bucket}

        def arrived(parameter: Tensor) -> None:
            self._missing[bucket_of[id(parameter)]].discard(id(parameter))
            while len(self._sums) < len(self._buckets) and not self._missing[len(self._sums)]:
                self._start()

        parameters = [it for bucket in self._buckets for it in bucket]
        hooks = [it.register_post_accumulate_grad_hook(arrived) for it in parameters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        while len(self._sums) < len(self._buckets):
            self._start()
        for work in self._sums:
            work.wait()

    def _start(self) -> None:
        """Start the sum of the next bucket: in the same order in every process, whatever came first in each.

        The gradients are parts of the bucket from here on: both at once would be all gradients twice.
        """
        bucket = self._buckets[len(self._sums)]
        flat = torch.cat([(torch.zeros_like(it) if it.grad is None else it.grad).flatten() for it in bucket])
        for parameter, part in zip(bucket, flat.split([it.numel() for it in bucket]), strict=True):
            parameter.grad = part.view_as(parameter)
        work = distributed.all_reduce(flat, async_op=True)
        assert work is not None
        self._sums.append(work)
