"""What the experiment trains and measures: stages of documents, the hypernetwork, and the sizes of the evaluation."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from experiments.smollm2.facts import Shape

SEED = 1
MINUTES = 150.0  # of the whole experiment on 2 cores
EVALUATION_SHARE = 0.2  # of those minutes: evaluation, controls and the page


@dataclass(frozen=True)
class Stage:
    """Documents that are trained on for a share of the training's time.

    Attributes:
        documents: distinct ones; a stage that ends before it has read all reads none twice.
        taught: documents of real text mixed in, whose questions the base answers with the text in its prompt.
        slower: what the learning rates are divided by.
        decays: whether the learning rate falls to zero in this stage.
    """

    name: str
    share: float
    shape: Shape
    documents: int
    taught: int = 0
    slower: float = 1.0
    decays: bool = False


_WORD = Shape(tokens=(0, 0), facts=(1, 1), words=1.0)
_WORDS = Shape(tokens=(0, 0), facts=(1, 1), words=1.0, value_words=(1, 2))
_FACTS = replace(_WORDS, facts=(1, 2), words=0.8)
STAGES = (  # each adds one thing
    Stage("word", 0.1, _WORD, 8_000),
    Stage("words", 0.2, _WORDS, 24_000),
    Stage("facts", 0.25, _FACTS, 24_000),
    Stage("text", 0.2, replace(_FACTS, tokens=(0, 60)), 16_000, taught=5_000),
    Stage("longer", 0.25, replace(_FACTS, tokens=(0, 240), facts=(1, 3)), 16_000, taught=5_000, slower=2, decays=True),
)
TEACHER_PASSAGES = 320  # of real text, whose questions and answers the base writes

HELDOUT = (  # documents of the evaluation, by their length; those of `others` are of every kind of value but words
    Stage("heldout-single", 1.0, _WORD, 48),
    Stage("heldout-pairs", 1.0, replace(_WORDS, value_words=(2, 2)), 32),
    Stage("heldout-short", 1.0, replace(_WORD, facts=(2, 3)), 16),
    Stage("heldout-medium", 1.0, replace(_WORD, tokens=(50, 120), facts=(2, 3)), 16),
    Stage("heldout-long", 1.0, replace(_WORD, tokens=(200, 380), facts=(3, 4)), 8),
    Stage("heldout-others", 1.0, Shape(tokens=(0, 0), facts=(1, 1)), 32),
)
WATCHED = Stage("watched", 1.0, _WORDS, 32)  # evaluated while it trains
REAL_DOCUMENTS = 16  # of the real questions
HARM_DOCUMENTS = 8
ANSWER_TOKENS = 24
SHOWN = 10  # questions on the page

# The features of all layers, and Muon: what learnt best in experiments/targets.md. Not its targets: after 40 steps on documents
# of one fact the loss was 2.15 with down_proj, as in the paper, and 2.40 with o_proj; v_proj learns as well in a hypernetwork of
# this width, and did not in a narrower one.
TRAINING: dict[str, Any] = {
    "attn_implementation": "per_document",
    "lora_r": 4,
    "target_modules": ["down_proj"],
    "ctx_encoder_type": "concat_layers",
    "latent_size": 384,
    "n_latent_queries": 32,
    "num_blocks": 2,
    "perceiver_heads": 16,  # 4 key heads: what the latents read of a token are 256 numbers
    "perceiver_head_dim": 64,
    "perceiver_query_scale": 10,
    "per_layer_processing": False,
    "max_ctx_chunk_len": 128,
    "max_packed_inp_len": 800,
    "max_packed_ctx_len": 2400,
    "muon_learning_rate": 1.6e-2,
    "learning_rate": 1.5e-3,
    "use_per_ctx_average_loss": True,
    "weight_decay": 0.1,
    "adam_beta2": 0.98,
    "lr_scheduler_type": "warmup_stable_decay",
    "warmup_steps": 15,
    "max_steps": 100_000,  # until the last stage, which knows what a step takes
    "eval_steps": 50,
    "eval_documents": WATCHED.documents,
    "save_steps": 30,
}


def write_config(file: Path, base: Path, data: Path, watched: Path, run: Path, *, cuda: bool) -> None:
    """Write the configuration of the first stage."""
    places = {
        "model_name_or_path": str(base),
        "dtype": "bfloat16" if cuda or bfloat16_is_faster() else "float32",
        "train_ds_names": [str(data)],
        "val_ds_names": [str(watched)],
        "output_dir": str(run),
        "seed": SEED,
    }
    bigger = {"max_packed_inp_len": 8000, "max_packed_ctx_len": 24_000} if cuda else {}
    file.write_text(yaml.safe_dump(places | TRAINING | bigger, sort_keys=False), encoding="utf-8")


def bfloat16_is_faster() -> bool:
    """Time a product of the base's size: in a processor with tiles for bfloat16 it takes an eighth, emulated 70 times as long."""
    return 2 * seconds_of_product(torch.bfloat16) < seconds_of_product(torch.float32)


def seconds_of_product(dtype: torch.dtype) -> float:
    """Return the least of ten times of a product that is long beside its call, in seconds."""
    tokens, weight = (torch.ones(rows, 576, dtype=dtype) for rows in (1024, 1536))
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        torch.nn.functional.linear(tokens, weight)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def as_json() -> dict[str, Any]:
    """Return everything that shapes the experiment's data and training."""
    stages = [asdict(stage) for stage in (*STAGES, *HELDOUT, WATCHED)]
    return {"seed": SEED, "stages": stages, "training": TRAINING, "passages": TEACHER_PASSAGES}
