"""A run of one step on the shipped tiny GPT-OSS, for tests that use a trained checkpoint."""

from pathlib import Path
from typing import Any

from d2l.build import Components
from d2l.checkpoint import save_checkpoint
from d2l.config.load import load_config
from d2l.config.schema import RunConfig
from d2l.io.run_folder import step_folder
from d2l.train.loop import Trainer


def tiny_config(**values: Any) -> RunConfig:
    """The shipped tiny config, even smaller."""
    small = {"max_steps": 1, "needle_documents": 2, "latent_size": 8, "n_latent_queries": 4, "num_blocks": 1}
    lengths = {"max_ctx_chunk_len": 120, "max_packed_ctx_len": 600, "max_packed_inp_len": 600}
    large_step = {"learning_rate": 0.1, "warmup_steps": 0}  # so that documents make different answers
    return RunConfig(**{**load_config().model_dump(), **small, **lengths, **large_step, **values})


def make_run(folder: Path, **values: Any) -> Path:
    """Train one step, and save what `d2l train` would; returns the run's folder."""
    config = tiny_config(**values)
    components = Components(config)
    trainer = Trainer(components.model, components.rows, config)
    save_checkpoint(step_folder(folder, 0), trainer.checkpoint())
    trainer.step()
    save_checkpoint(step_folder(folder, 1), trainer.checkpoint())
    return folder
