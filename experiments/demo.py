"""The demonstration that is shipped: a hypernetwork for needles, of one pair a chunk, with a document and questions.

Trained by the commands of d2l on the shipped tiny base; weights are stored in float16. Nothing is written over: remove
configs/demo to make it anew. Takes eight and a half minutes on one core.

    python experiments/demo.py
"""

import argparse
import sys
from itertools import count
from pathlib import Path

from prove import d2l
from reach import FIRST_STAGES, write_config

from d2l.checkpoint import Checkpoint, find_checkpoint, load_checkpoint, save_checkpoint
from d2l.data.needles import needle_records
from d2l.io.run_folder import step_folder

FOLDER = Path("configs/demo")
SEED = 1
PAIRS, DIGITS = 4, 2  # of the shipped document, which is of the held-out split
# Chunks of one pair each: whatever number of pairs a document has, no boundary cuts one, and a document of two documents
# has the chunks of both. Filler of up to three chunks lets the number of chunks vary in training.
CHANGES = {
    "curriculum": (
        *FIRST_STAGES,
        {"pairs": 4, "digits": 2, "min_filler_words": 0, "filler_words": 9, "documents": 40000},
    ),
    "max_ctx_chunk_len": 7,  # four tokens of the chat template around a pair
    "max_packed_ctx_len": 640,
    "max_packed_inp_len": 900,
    "seed": SEED,
}


def pack(run: Path, folder: Path) -> None:
    """Write a run's newest checkpoint as one that is only to be used: float16, without optimizer and places."""
    checkpoint = load_checkpoint(find_checkpoint(run).folder)
    state = {name: checkpoint.state[name] for name in ("step", "config", "base")}
    state["config"] |= {"output_dir": "runs/demo"}
    hypernet = {name: value.half() for name, value in checkpoint.hypernet.items()}
    save_checkpoint(step_folder(folder, state["step"]), Checkpoint(hypernet, {}, state))


def write_document(folder: Path) -> None:
    """Write a held-out document with a pair a line, and its questions."""
    (record,) = needle_records(1, PAIRS, DIGITS, filler_words=0, seed=SEED, split="heldout", style="pairs")
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("document.md", record.responses), ("questions.txt", record.prompts)):
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def main() -> None:
    """Train, and put the demonstration together."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, help="a run of this recipe that is trained; default: train one")
    options = parser.parse_args()
    if FOLDER.exists():
        raise SystemExit(f"{FOLDER} exists and is never written over: remove it to make it anew")
    run = options.run
    if run is None:
        work = next(path for n in count(1) if not (path := Path(f"runs/demo-{n}")).exists())
        work.mkdir(parents=True)
        run = work / "run"
        d2l("train", write_config(work / "config.yaml", CHANGES), "--output", run, log=work / "train.log")
    pack(run, FOLDER)
    write_document(FOLDER)
    sys.stdout.write(f"wrote {FOLDER}\n")


if __name__ == "__main__":
    main()
