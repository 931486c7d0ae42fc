"""Witnesses of files: checkpoints, adapters, and the import of the reference's checkpoints."""

import json
import tempfile
from copy import deepcopy
from pathlib import Path

import torch
from safetensors.torch import load_file

from checks.reference_file import reference_state, write_reference_file
from d2l.checkpoint import (
    Checkpoint,
    find_newest_checkpoint,
    load_checkpoint,
    load_hypernet,
    prune_checkpoints,
    save_checkpoint,
)
from d2l.inference.adapter import export_adapter
from d2l.io.run_folder import step_folder
from d2l.reference.load import import_reference
from experiments.mutants.values import Values
from experiments.mutants.witnesses_base import outcome
from experiments.mutants.witnesses_model import build, kinds, one_batch
from experiments.mutants.workbench import llama_config


def checkpoint(values: Values) -> None:
    """Write checkpoints, damage them in every way, find the newest, prune, and load into another hypernetwork."""
    model = build(kinds()["early_exit"])
    whole = Checkpoint(
        dict(model.hypernet.state_dict()), {"rng.torch": torch.get_rng_state()}, {"step": 3, "nested": [1]}
    )
    with tempfile.TemporaryDirectory() as name:
        run = Path(name)
        for step in (2, 10, 9, 100):
            save_checkpoint(step_folder(run, step), whole)
        values["again"] = outcome(lambda: save_checkpoint(step_folder(run, 2), whole))
        values["files"] = sorted(path.name for path in step_folder(run, 2).iterdir())
        values["manifest"] = sorted(json.loads((step_folder(run, 2) / "manifest.json").read_text()))
        read = load_checkpoint(step_folder(run, 100))
        values |= {
            f"read {key}": value.clone() for key, value in read.hypernet.items()
        }  # the file is mapped, and damaged below
        values["state"] = dict(read.state)
        for number, file in enumerate(("hypernet.safetensors", "trainer.safetensors", "state.json")):
            path = step_folder(run, (100, 10, 9)[number]) / file
            data = bytearray(path.read_bytes())
            data[-5] ^= 1
            path.write_bytes(bytes(data))
            values[f"damaged {file}"] = outcome(lambda path=path: load_checkpoint(path.parent).state["step"])
            found, rejected = find_newest_checkpoint(run)
            values[f"newest {number}"] = [found and found.name, len(rejected)]
        (step_folder(run, 100) / "hypernet.safetensors").write_bytes(b"short")
        (step_folder(run, 10) / "manifest.json").unlink()
        values["newest"] = [str(find_newest_checkpoint(run)[0] and find_newest_checkpoint(run)[0].name)]
        prune_checkpoints(run, 2)
        values["kept"] = sorted(path.name for path in (run / "checkpoints").iterdir())
        for bad in (torch.nan, torch.inf, "text"):
            tensors = deepcopy(dict(whole.hypernet))
            key = sorted(tensors)[0]
            tensors[key] = bad if bad == "text" else torch.full_like(tensors[key], bad)
            spoilt = Checkpoint(tensors, whole.trainer, whole.state)
            values[f"spoilt {bad}"] = outcome(lambda spoilt=spoilt: save_checkpoint(run / "spoilt", spoilt))
        values["trainer text"] = outcome(
            lambda: save_checkpoint(run / "text", Checkpoint(whole.hypernet, {"x": "text"}, {}))
        )
    other = build(
        llama_config(latent_size=8, n_latent_queries=4, perceiver_heads=8, perceiver_head_dim=4, num_blocks=3)
    )
    torch.nn.utils.vector_to_parameters(
        0 * torch.nn.utils.parameters_to_vector(other.hypernet.parameters()), other.hypernet.parameters()
    )
    load_hypernet(other.hypernet, whole.hypernet)
    values |= {f"loaded {key}": value for key, value in other.hypernet.state_dict().items()}
    fewer = {key: value for key, value in whole.hypernet.items() if not key.startswith("bias_A")}
    values["fewer"] = outcome(lambda: load_hypernet(other.hypernet, fewer))
    values["more"] = outcome(lambda: load_hypernet(other.hypernet, {**whole.hypernet, "more": torch.zeros(1)}))


def export(values: Values) -> None:
    """Export the LoRA of a document with fewer chunks than its neighbour, and read the adapter's files."""
    for name in ("per_layer_activations", "early_exit"):
        config = kinds()[name]
        model, batch = build(config), one_batch(config)
        made = model.lora(batch)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            for context in (0, 1):
                place = Path(folder) / str(context)
                values[f"{name} {context} rank"] = export_adapter(made[context], model.base, place, "base")
                settings = json.loads((place / "adapter_config.json").read_text())
                chosen = ("r", "lora_alpha", "target_modules", "base_model_name_or_path", "use_rslora", "lora_dropout")
                values[f"{name} {context} config"] = {
                    key: str(settings[key]) for key in chosen if key != "target_modules"
                }
                values[f"{name} {context} targets"] = sorted(settings["target_modules"])
                values |= {
                    f"{name} {context} {key}": it for key, it in load_file(place / "adapter_model.safetensors").items()
                }
    bad = build(llama_config(target_modules=["mlp"]))
    values["mlp"] = outcome(
        lambda: export_adapter(
            bad.lora(one_batch(bad.hypernet.shape.config))[0], bad.base, Path(tempfile.gettempdir()) / "never"
        )
    )


def reference(values: Values) -> None:
    """Write a file of the reference, import it, and import files that differ from what is supported."""
    config = llama_config(
        latent_size=8,
        n_latent_queries=4,
        num_blocks=2,
        num_self_attn_per_block=0,
        perceiver_heads=16,
        perceiver_head_dim=128,
    )
    model = build(config)
    sizes = dict(model.hypernet.shape.modules)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        state = reference_state(dict(model.hypernet.state_dict()), config, model.base.config, sizes)
        write_reference_file(folder / "pytorch_model.bin", state)
        values["imported"] = outcome(lambda: import_reference(folder / "pytorch_model.bin", folder / "new"))
        read = load_checkpoint(folder / "new")
        values |= {f"tensor {key}": value for key, value in read.hypernet.items()}
        values |= {f"config {key}": value for key, value in read.state["config"].items() if "name" not in key}
        values["base"] = read.state["base"]
        for number, (key, value) in enumerate((("lora_alpha", 1.0), ("lora_dropout", 0.1))):
            other = deepcopy(state)
            other["hypernet_config"].fields["lora_config"].fields[key] = value
            write_reference_file(folder / f"{key}.bin", other)
            values[key] = outcome(lambda key=key, n=number: import_reference(folder / f"{key}.bin", folder / f"o{n}"))
