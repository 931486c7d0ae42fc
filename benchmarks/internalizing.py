"""Documents a second of `d2l internalize`: chunks read in packs against one by one, in one run, and how far results are apart.

python -m benchmarks.internalizing
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.comparisons import DEVICE, small_base
from benchmarks.timing import ratio
from d2l.build import Components, build_model
from d2l.checkpoint import FoundCheckpoint
from d2l.config.load import load_config
from d2l.data.needles import needle_records
from d2l.hypernet.lora import Lora
from d2l.inference.batch import Internalizer
from d2l.inference.documents import Document
from d2l.inference.load import TrainedModel
from d2l.inference.reading import chunk_hash, cut, read_chunks
from d2l.inference.servers import AdapterForm
from d2l.io.run_folder import MANIFEST

DOCUMENTS, PACK = 16, 512


def random_model(folder: Path) -> TrainedModel:
    """Make a model of the shipped tiny tokenizer around a random base whose LoRAs are not zero.

    Eager attention over a packed row costs the square of its tokens: packs of 4,096 took 2.7 times as long as one by one.
    """
    config = load_config(Path("configs/tiny_gpt_oss.yaml")).model_copy(update={"max_packed_ctx_len": PACK, "lora_r": 8})
    model = build_model(config, small_base(attn_implementation="per_document")).to(DEVICE).eval()
    with torch.no_grad():
        for scaler in model.hypernet.scaler_B.values():
            scaler.fill_(1.0)
    (folder / MANIFEST).write_text("{}")  # only its hash is read
    return TrainedModel(model, Components(config).chat, config, FoundCheckpoint(folder))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trained = random_model(folder)
        records = needle_records(DOCUMENTS, 2, 2, 24, seed=1)
        number = 0
        times: dict[int | None, list[float]] = {None: [], PACK: []}

        def internalize(pack: int | None) -> None:
            nonlocal number
            number += 1
            place = folder / str(number)
            documents = (Document(f"d{i}", f"d{i}", "", record.context) for i, record in enumerate(records))
            started = time.perf_counter()
            outcomes = list(Internalizer(trained, AdapterForm(), lambda id_: place / id_, pack).run(documents))
            assert all(outcome.status == "made" for outcome in outcomes)
            times[pack].append(DOCUMENTS / (time.perf_counter() - started))

        whole = ratio(lambda: internalize(PACK), lambda: internalize(None), repeats=3)
        chunks = {chunk_hash(it): it for record in records for it in cut(trained, record.context)}
        reading = ratio(
            lambda: list(read_chunks(trained.model, chunks, PACK)),
            lambda: list(read_chunks(trained.model, chunks, None)),
            3,
        )
        tokens = sum(map(len, chunks.values()))
        sys.stdout.write(
            f"{len(records)} documents, {len(chunks)} chunks of {tokens / len(chunks):.0f} tokens, on {DEVICE}\n"
            f"one by one       {statistics.median(times[None]):.1f} documents/s\n"
            f"packs of {PACK:,}   {statistics.median(times[PACK]):.1f} documents/s, files written: "
            f"{1 / whole.median:.2f} times as many\n"
            f"reading alone    {1 / reading.median:.2f} times as fast in packs\n"
            f"apart            {apart(trained, chunks):.1e} of the largest value\n"
        )


def apart(trained: TrainedModel, chunks: dict[str, tuple[int, ...]]) -> float:
    """Return how far the LoRAs of packed chunks are from those of chunks read alone, relative to the largest value."""
    alone, packed = (dict(read_chunks(trained.model, chunks, pack)) for pack in (None, PACK))

    def furthest(one: Lora, other: Lora) -> float:
        pairs = [(one.A[name], other.A[name]) for name in one.A] + [(one.B[name], other.B[name]) for name in one.B]
        return max(float((x - y).abs().max() / x.abs().max()) for x, y in pairs)

    return max(furthest(alone[key], packed[key]) for key in chunks)


if __name__ == "__main__":
    main()
