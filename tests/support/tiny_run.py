"""Small runs from a configuration: one step on the shipped tiny GPT-OSS, and a few over needles on two layers."""

from pathlib import Path
from typing import Any

from d2l.build import Components
from d2l.checkpoint import save_checkpoint
from d2l.config.load import load_config
from d2l.config.schema import RunConfig
from d2l.io.run_folder import step_folder
from d2l.train.loop import Trainer
from support.tiny_model import base_config, run_config

SHALLOW: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}


def tiny_config(**values: Any) -> RunConfig:
    """The shipped tiny config, even smaller."""
    small = {"max_steps": 1, "needle_documents": 2, "latent_size": 8, "n_latent_queries": 4, "num_blocks": 1}
    lengths = {"max_ctx_chunk_len": 120, "max_packed_ctx_len": 600, "max_packed_inp_len": 600}
    large_step = {"learning_rate": 0.1, "warmup_steps": 0}  # so that documents make different answers
    return RunConfig(**{**load_config().model_dump(), **small, **lengths, **large_step, **values})


def needle_config(folder: Path, **values: Any) -> RunConfig:
    """Three steps of packed rows over needles, each saved, on a base of `SHALLOW` that lies in a file of the folder."""
    base = folder / "base.json"
    base.write_text(base_config(vocab_size=1024, **SHALLOW).to_json_string(use_diff=False))
    settings: dict[str, Any] = {
        "model_name_or_path": str(base),
        "tokenizer_name_or_path": "configs/models/tiny_gpt_oss",
        "train_ds_names": ("needle",),
        "needle_documents": 3,
        "needle_pairs": 1,
        "needle_filler_words": 0,
        "max_packed_inp_len": 80,
        "max_packed_ctx_len": 80,
        "save_steps": 1,
        "lr_scheduler_type": "constant_with_warmup",
        "max_steps": 3,
        "output_dir": str(folder / "run"),
    }
    return run_config(**settings | values)


def make_run(folder: Path, **values: Any) -> Path:
    """Train one step, and save what `d2l train` would; returns the run's folder."""
    config = tiny_config(**values)
    components = Components(config)
    trainer = Trainer(components.model, components.rows, config)
    save_checkpoint(step_folder(folder, 0), trainer.checkpoint())
    trainer.step()
    save_checkpoint(step_folder(folder, 1), trainer.checkpoint())
    return folder
