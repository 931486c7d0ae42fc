"""Steps of a configuration on a random checkpoint of its base's real shapes: tokens a second, memory by phase, kernels.

python -m benchmarks.real_shapes                                              # gpt-oss-20b, documented settings
python -m benchmarks.real_shapes configs/gpt_oss_20b_recommended.yaml --inp 8192 --ctx 8192 --documents 8
python -m benchmarks.real_shapes --inp 256 --ctx 256 --steps 1 --kernels 0 --dtype bfloat16   # on a CPU

The checkpoint (12.8 GiB for gpt-oss-20b, in the layout of the official one) is written layer by layer, read by the run's
own loader, and deleted. Its weights are random, so losses mean nothing; shapes, dtypes and routes are those of a run.
"""

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedConfig

from d2l.base.config import quantization_method, read_base_config, skeleton
from d2l.base.experts import empty_packed_experts
from d2l.base.load import load_base
from d2l.base.load_plan import plan_load
from d2l.build import build_model
from d2l.config.load import load_config
from d2l.config.schema import RunConfig
from d2l.data.tokenize import IGNORE_INDEX, Query, Row
from d2l.train.loop import Trainer

GIB = 2**30
QUESTION = 64  # tokens of a question with its answer, the last eighth supervised
SCALE_BYTES = (117, 122)  # MXFP4 scales 2^-10 to 2^-6: weights of about .02, as an initialised model has them


def write_checkpoint(folder: Path, base_config: PreTrainedConfig, dtype: torch.dtype, device: str) -> None:
    """Write random weights of a base, a file for each decoder layer and one for the rest, with config and index."""
    model = skeleton(base_config)
    if quantization_method(base_config) == "mxfp4":
        empty_packed_experts(model)
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        _, _, behind = name.partition(".layers.")
        groups.setdefault(f"layer-{behind.partition('.')[0]}" if behind else "rest", {})[name] = tensor
    generator = torch.Generator(device).manual_seed(0)
    weight_map = {}
    for group, tensors in groups.items():
        file = f"model-{group}.safetensors"
        values = {name: _random(name, shape, dtype, generator).cpu() for name, shape in tensors.items()}
        save_file(values, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    base_config.save_pretrained(folder)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _random(name: str, like: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Draw the values of one tensor: bytes for blocks and scales, ones for norms, else N(0, 0.02)."""
    device = generator.device
    if like.dtype == torch.uint8:
        low, high = (0, 256) if name.endswith("_blocks") else SCALE_BYTES
        return torch.randint(low, high, like.shape, dtype=torch.uint8, device=device, generator=generator)
    if "norm" in name:
        return torch.ones(like.shape, dtype=dtype, device=device)
    return torch.empty(like.shape, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)


def random_rows(config: RunConfig, vocabulary: int, documents: int, n_rows: int) -> list[Row]:
    """Make rows of which `documents` fill both budgets of a packed row, of unequal lengths."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocabulary, (length,), generator=generator).tolist())

    rows = []
    for index in range(n_rows):
        share = 1 if documents == 1 else 1 - 0.2 * float(torch.rand((), generator=generator))
        chunk = ids(max(1, int(share * config.max_packed_ctx_len / documents)))
        budget = max(2, int(share * config.max_packed_inp_len / documents))
        lengths = [min(QUESTION, budget - start) for start in range(0, budget, QUESTION)]
        questions = tuple(_question(ids(length)) for length in lengths if length > 1)
        rows.append(Row(record=index, chunks=(chunk,), queries=questions))
    return rows


def _question(ids: tuple[int, ...]) -> Query:
    supervised = max(1, len(ids) // 8)
    return Query(input_ids=ids, labels=(*[IGNORE_INDEX] * (len(ids) - supervised), *ids[-supervised:]))


@dataclass(frozen=True)
class Memory:
    """Bytes after a phase and at its peak: allocated on a GPU, resident on a CPU."""

    phase: str
    after: int
    peak: int

    @classmethod
    def of(cls, phase: str) -> "Memory":
        """Read the bytes of the phase that ends now, and begin the next one."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            found = cls(phase, torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
            return found
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return cls(phase, pages * resource.getpagesize(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def measure(config: RunConfig, folder: Path, documents: int, steps: int, kernels: int) -> Iterator[str]:
    """Load the base, take the steps, and yield lines of the report as they come; profile one more where kernels are wanted."""
    base_config = read_base_config(str(folder))
    plan = plan_load(config, base_config)
    yield f"attention {plan.attention.value}, experts {plan.experts.value}, {plan.dtype.value} on {plan.device.value}"
    started = time.perf_counter()
    base = load_base(str(folder), base_config, plan, config.seed)
    yield _line(Memory.of(f"base loaded in {time.perf_counter() - started:.1f} s"))
    rows = random_rows(config, base_config.vocab_size, documents, documents * (steps + 1))
    trainer = Trainer(build_model(config, base), rows, config)
    yield _line(Memory.of("model and optimizer made"))
    for number in range(1, steps + 1):
        started = time.perf_counter()
        tokens = trainer.step().tokens
        memory = Memory.of(f"step {number}: ")
        seconds = time.perf_counter() - started
        yield _line(memory, f"{seconds:.2f} s, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s")
    if kernels:
        yield from kernel_table(trainer, kernels)


def kernel_table(trainer: Trainer, lines: int) -> Iterator[str]:
    """Profile a step: the kernels that take longest, or the operators where there is no GPU."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    started = time.perf_counter()
    with profile(activities=activities) as found:
        trainer.step()
        if on_gpu:
            torch.cuda.synchronize()
    seconds = time.perf_counter() - started

    def taken(entry: Any) -> float:
        return float(entry.self_device_time_total if on_gpu else entry.self_cpu_time_total) / 1e6

    # an operator of the host counts the time of its kernels too: once is enough
    where = DeviceType.CUDA if on_gpu else DeviceType.CPU
    entries: list[Any] = [it for it in found.key_averages() if it.device_type == where and not it.is_user_annotation]
    entries = [it for it in entries if taken(it) > 0]
    total, calls = sum(map(taken, entries)), sum(it.count for it in entries)
    kind = "kernels" if on_gpu else "operators"
    yield f"a profiled step: {seconds:.2f} s, {calls:,} {kind} in {total:.2f} s"
    for entry in sorted(entries, key=taken, reverse=True)[:lines]:
        yield f"{taken(entry):>9.3f} s {entry.count:>8,}  {entry.key[:88]}"


def _line(memory: Memory, more: str = "") -> str:
    return f"{memory.phase}{more:<48} {memory.after / GIB:6.2f} GiB after, {memory.peak / GIB:6.2f} GiB at the peak"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=Path("configs/gpt_oss_20b.yaml"))
    parser.add_argument("--inp", type=int, default=1024, help="question tokens of a packed row")
    parser.add_argument("--ctx", type=int, default=1024, help="document tokens of a packed row")
    parser.add_argument("--documents", type=int, default=4, help="documents that share a packed row")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--kernels", type=int, default=15, help="kernels to list, of one more step; 0: no such step")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings of the configuration")
    parser.add_argument("--folder", type=Path, help="keep the checkpoint there, and use one that is there as it is")
    options = parser.parse_args(arguments)
    own = {"max_packed_inp_len": str(options.inp), "max_packed_ctx_len": str(options.ctx), "dtype": options.dtype}
    config = load_config(options.config, own | dict(setting.split("=", 1) for setting in options.set))
    folder = options.folder or Path(tempfile.mkdtemp(prefix="d2l-real-shapes-"))
    try:
        if not (folder / "config.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            base_config = read_base_config(config.model_name_or_path)
            dtype = plan_load(config, base_config).torch_dtype
            write_checkpoint(folder, base_config, dtype, "cuda" if torch.cuda.is_available() else "cpu")
            written = sum(file.stat().st_size for file in folder.iterdir())
            sys.stdout.write(f"{written / GIB:.2f} GiB written in {time.perf_counter() - started:.1f} s\n")
        for line in measure(config, folder, options.documents, options.steps, options.kernels):
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
    finally:
        if options.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
