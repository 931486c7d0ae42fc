"""The configurations of the mutants' preflight, and their documents."""

import atexit
import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from d2l.build import Components
from d2l.config.load import load_config
from d2l.config.schema import RunConfig
from d2l.data.needles import needle_records
from d2l.data.records import Record, read_records, write_records
from d2l.io.resources import resource
from d2l.train.teacher import add_teacher_logprobs

HERE = Path(__file__).parent
DOCUMENTS, LLAMA = HERE / "documents.jsonl", HERE / "llama.json"
TOP_K = 4
EVALUATED = {
    "eval_steps": 5,
    "eval_documents": 4,
    "chunking": "sentences",
    "chunk_overlap": 8,
    "muon_learning_rate": 0.02,
}


@cache
def configurations() -> dict[str, RunConfig]:
    """Return the runs that every mutant is diagnosed on: the shipped tiny GPT-OSS and a Llama.

    The Llama reads documents from a file, several questions to each, long ones in chunks; its loss is KL to a teacher,
    averaged per context, with an L1 term; its encoder exits early; it adapts two modules, one of them oblong. The second
    time its file has needles of unequal length, half of them twice, on some of which it is evaluated as it trains; its loss
    is cross-entropy, its chunks are of whole sentences and overlap, and its matrices have Muon. The last two shard their
    base over processes; there the GPT-OSS has a Perceiver whose blocks share weights, and the Llama a head that is its
    embeddings.
    """
    shipped = load_config(resource("configs/tiny_gpt_oss.yaml"))
    dequantized = shipped.model_copy(update={"attn_implementation": "per_document", "expert_weights": "dequantize"})
    return {
        "tiny_gpt_oss": shipped,
        "dequantized": dequantized,
        "packed_flex": shipped.model_copy(update={"attn_implementation": "packed_flex"}),
        "llama": llama_config((str(_documents_with_teacher()),), loss="kl"),
        "llama_evaluated": llama_config((str(_written(records_with_copies())),), **EVALUATED),
        "sharded": dequantized.model_copy(update={"base_sharding": "full", "shared_weights": True, "num_blocks": 3}),
        "sharded_llama": llama_config(base_sharding="full", model_name_or_path=str(_tied_llama())),
    }


def llama_config(data: tuple[str, ...] = (str(DOCUMENTS),), **changes: object) -> RunConfig:
    """Return the configuration of the Llama with other values; without a teacher, for cross-entropy."""
    values = {
        "model_name_or_path": str(LLAMA),
        "tokenizer_name_or_path": "configs/models/tiny_gpt_oss",
        "supervision": "sampled",
        "attn_implementation": "per_document",
        "ctx_encoder_type": "early_exit",
        "layer_idx": 2,
        "lora_r": 2,
        "target_modules": ["o_proj", "down_proj"],
        "latent_size": 16,
        "n_latent_queries": 6,
        "num_blocks": 2,
        "num_self_attn_per_block": 1,
        "num_pre_head_layers": 2,
        "per_layer_processing": False,
        "train_ds_names": list(data),
        "max_ctx_chunk_len": 140,
        "num_chunk_probs": {1: 0.4, 2: 0.3, 3: 0.3},
        "max_qas_len": 256,
        "max_qas_per_sample": 3,
        "max_packed_inp_len": 600,
        "max_packed_ctx_len": 900,
        "loss": "ce",
        "use_per_ctx_average_loss": True,
        "gen_lora_l1_reg_coef": 0.1,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "learning_rate": 2e-3,
        "weight_decay": 0.05,
        "lr_scheduler_type": "linear",
        "warmup_steps": 3,
        "max_steps": 30,
        "save_steps": 10,
    }
    return RunConfig(**values | changes)


def document_records() -> list[Record]:
    """Return the documents with their questions, without a teacher."""
    return read_records([DOCUMENTS])


def records_with_copies() -> list[Record]:
    """Return needle documents of unequal length, and half of them again."""
    records = needle_records(40, 2, 2, 40, seed=3, min_filler_words=0)
    return [*records, *records[:20]]


def _documents_with_teacher() -> Path:
    """Write the documents with the teacher's logprobs of a random base into a temporary file."""
    components = Components(llama_config())
    records = add_teacher_logprobs(
        components.records, components.base, components.chat, top_k=TOP_K, packed_tokens=2000
    )
    return _written(records)


def _tied_llama() -> Path:
    """Write the config of the Llama whose head is its embeddings into a temporary folder."""
    file = _temporary_folder() / "llama.json"
    file.write_text(json.dumps(json.loads(LLAMA.read_text()) | {"tie_word_embeddings": True}))
    return file


def _written(records: list[Record]) -> Path:
    """Write records into a file of a temporary folder."""
    file = _temporary_folder() / "documents.jsonl"
    write_records(file, records)
    return file


def _temporary_folder() -> Path:
    """Make a folder that lasts as long as the process."""
    folder = Path(mkdtemp(prefix="d2l-mutants-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
