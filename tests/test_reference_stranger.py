"""`d2l import-reference` on files that the reference's trainer writes, made without d2l: older, compiled, published, broken."""

import json
import math
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.reference_writer import Reference
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner, Result

import cli
from d2l.checkpoint import load_checkpoint
from d2l.errors import CheckpointError
from d2l.hypernet.targets import find_targets, target_sizes
from d2l.reference.fields import DATACLASSES, ENUMS
from d2l.reference.inert_pickle import TorchFile
from d2l.reference.load import ReferenceModel, describe_reference

SMALL = Reference(layers=3, hidden=16, modules={"q_proj": (16, 32)}, rank=2, latent=4, queries=2, blocks=1)
TINY_GPT_OSS = "configs/models/tiny_gpt_oss"  # 4 layers, hidden size 64, v_proj 64 → 32
BIASES = ("bias_A.q_proj", "bias_B.q_proj")


def d2l(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(item) for item in arguments], prog_name="d2l")


def imported(folder: Path, tensors: dict[str, Any], reference: Reference = SMALL, **changes: Any) -> Result:
    file = reference.save(folder / "pytorch_model.bin", tensors, **changes)
    return d2l("import-reference", file, "-o", folder / "imported")


def notes(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output
    return [line.removeprefix("note        ") for line in result.stdout.splitlines() if line.startswith("note")]


def assert_holds(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The folder has exactly these tensors; returns its configuration."""
    checkpoint = load_checkpoint(folder / "imported")
    assert checkpoint.hypernet.keys() == tensors.keys()
    assert all(torch.equal(checkpoint.hypernet[name], value) for name, value in tensors.items())
    config: dict[str, Any] = checkpoint.state["config"]
    return config


# What the reference saves


def test_a_file_of_the_trainer(tmp_path: Path) -> None:
    result = imported(tmp_path, SMALL.tensors())
    assert result.stdout == f"checkpoint  {tmp_path / 'imported'}\nbase        some/base\n"
    assert assert_holds(tmp_path, SMALL.tensors())["target_modules"] == ["q_proj"]


def test_biases_that_are_not_used_are_left_out_and_said(tmp_path: Path) -> None:
    tensors = SMALL.tensors()
    (note,) = notes(imported(tmp_path, tensors, use_bias=False))
    assert note == "use_bias is false: bias_A.q_proj, bias_B.q_proj are in the file and not used, as in the reference"
    assert assert_holds(tmp_path, {k: v for k, v in tensors.items() if k not in BIASES})["use_bias"] is False


@pytest.mark.parametrize("name", ["bias_A.k_proj", "bias_C.q_proj", "bias_A", "extra_head.weight"])
def test_any_other_unused_name_is_refused(tmp_path: Path, name: str) -> None:
    result = imported(tmp_path, {**SMALL.tensors(), name: torch.ones(3, 2, 16)}, use_bias=False)
    refused(result, tmp_path, "1 left over", f"'{name}': expected none, found [3, 2, 16]")


def test_an_unused_bias_of_another_shape_is_refused(tmp_path: Path) -> None:
    result = imported(tmp_path, {**SMALL.tensors(), "bias_A.q_proj": torch.ones(3, 2, 15)}, use_bias=False)
    refused(result, tmp_path, "1 left over", "'bias_A.q_proj': expected none, found [3, 2, 15]")


def test_arguments_that_an_older_file_lacks_are_those_of_the_reference(tmp_path: Path) -> None:
    older = Reference(**{**vars(SMALL), "pre_head": 4})
    lacking = ("use_bias", "num_pre_head_layers", "use_per_rank_bias", "dropout_rate", "ctx_encoder_last_layer")
    said = notes(imported(tmp_path, older.tensors(), older, **dict.fromkeys(lacking, ...)))
    assert said == [
        f"{name} has no value in the file: taken as {value}, as the reference does with files older than it"
        for name, value in {
            "hypernet_config.num_pre_head_layers": 4,
            "hypernet_config.use_bias": True,
            "ctx_encoder_args.ctx_encoder_last_layer": None,
        }.items()
    ]
    config = assert_holds(tmp_path, older.tensors())
    assert (config["num_pre_head_layers"], config["use_bias"]) == (4, True)
    assert load_checkpoint(tmp_path / "imported").state["import_notes"] == said


def test_none_counts_as_lacking_where_the_reference_fills_it_in(tmp_path: Path) -> None:
    assert len(notes(imported(tmp_path, SMALL.tensors(), use_bias=None))) == 1


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"_orig_mod._orig_mod.{name}",
        lambda name: name.replace("perceiver.", "perceiver._orig_mod."),
        lambda name: name.replace("layers.0.", "layers.0._orig_mod.").replace("head.", "_orig_mod.head."),
    ],
)
def test_names_of_compiled_models(tmp_path: Path, rename: Callable[[str], str]) -> None:
    tensors = SMALL.tensors()
    renamed = {rename(name): value for name, value in tensors.items()}
    changed = len(renamed.keys() - tensors.keys())
    (note,) = notes(imported(tmp_path, renamed))
    assert note == f"_orig_mod. of a compiled model removed from {changed} of {len(tensors) + 3} names"
    assert_holds(tmp_path, tensors)


@pytest.mark.parametrize("other", ["_orig_mod.head.weight", "head._orig_mod.weight", "_orig_mod._orig_mod.head.weight"])
def test_two_names_for_one_parameter_are_refused(tmp_path: Path, other: str) -> None:
    tensors = SMALL.tensors()
    result = imported(tmp_path, {**tensors, other: tensors["head.weight"] + 1})
    refused(result, tmp_path, f"'head.weight' and '{other}' are one name", "cannot be told")


def test_an_encoder_in_four_bits_is_said(tmp_path: Path) -> None:
    """As the published scripts have it: the base reads as it is loaded here."""
    (note,) = notes(imported(tmp_path, SMALL.tensors(), quantize_ctx_encoder=True))
    assert "in 4 bits" in note
    assert assert_holds(tmp_path, SMALL.tensors())["quantize_ctx_encoder"] is False


# The published checkpoints, without their weights

PUBLISHED = {
    "gemma-2-2b": Reference(26, 2304, {"down_proj": (9216, 2304)}, "google/gemma-2-2b-it", blocks=8),
    "Mistral-7B-v0.3": Reference(32, 4096, {"down_proj": (14336, 4096)}, "mistralai/Mistral-7B-Instruct-v0.2"),
    "Qwen3-4B": Reference(36, 2560, {"down_proj": (9728, 2560)}, "Qwen/Qwen3-4B-Instruct-2507"),
}


def describe(file: Path) -> ReferenceModel:
    with TorchFile(file, DATACLASSES, ENUMS) as source:
        return describe_reference(source)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(tmp_path: Path, name: str) -> None:
    """Names, shapes and sizes of the base are those that d2l makes for it, and no memory grows with the model."""
    reference = PUBLISHED[name]
    file = reference.save(tmp_path / "file.bin", reference.tensors_of_no_size(), quantize_ctx_encoder=True)
    describe(file)  # what is imported late is imported now
    tracemalloc.start()
    model = describe(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20
    assert {key: value.size for key, value in model.parameters.items()} == reference.shapes()
    assert model.shape.config.model_name_or_path == reference.base

    values = json.loads((Path(__file__).parent / "published" / f"{name}.json").read_text())
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**values, "num_hidden_layers": 1}))
    assert target_sizes(find_targets(base, ["down_proj"]), base.config.hidden_size) == model.shape.modules
    assert (values["hidden_size"], values["num_hidden_layers"]) == (model.shape.feature_size, model.shape.n_layers)


def test_the_published_count_of_parameters() -> None:
    """309M beside gemma-2-2b, as the paper has it."""
    assert round(sum(map(math.prod, PUBLISHED["gemma-2-2b"].shapes().values())) / 1e6) == 309


def test_a_file_of_shapes_without_numbers_is_not_imported(tmp_path: Path) -> None:
    refused(imported(tmp_path, SMALL.tensors_of_no_size()), tmp_path, "reaches beyond the 1")


# Memory


def peak_of_reading(path: Path) -> int:
    """Bytes that reading every tensor takes at most."""
    tracemalloc.start()
    with TorchFile(path, ()) as file:
        tensors = [file.read_tensor(it) for it in file.root.values()]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tensors
    return peak


def test_a_storage_named_a_hundred_times_costs_its_size_once(tmp_path: Path) -> None:
    shared, other = torch.zeros(2**20), torch.zeros(2**22)  # 4 and 16 MiB
    peaks = []
    for times in (1, 100):
        torch.save({"other": other, **{f"w{number}": shared for number in range(times)}}, tmp_path / "file.bin")
        peaks.append(peak_of_reading(tmp_path / "file.bin"))
    assert peaks[1] < 1.05 * peaks[0]
    assert peaks[1] < 1.15 * 20 * 2**20  # and no storage is held twice while it is read


def test_a_file_that_names_a_storage_for_parameters_of_no_model_is_refused_unread(tmp_path: Path) -> None:
    tensors = SMALL.tensors()
    tensors |= {f"w{number}": torch.zeros(1).expand(1) for number in range(400)}
    shared = torch.zeros(2**22)
    file = SMALL.save(tmp_path / "file.bin", {**tensors, **{f"w{number}": shared for number in range(400)}})
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="400 left over"):
        describe(file)
    assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    tracemalloc.stop()


# What is refused: one message with file, expected, actual and what to do; exit code 2, no traceback, nothing written


def refused(result: Result, folder: Path, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert str(folder / "pytorch_model.bin") in result.stderr
    flat = " ".join(result.stderr.split())
    assert all(word in flat for word in words), flat
    assert (result.stdout, "Traceback" in result.output) == ("", False)
    assert not (folder / "imported").exists()


@pytest.mark.parametrize("share", [0.02, 0.4, 0.97])
def test_a_file_that_was_cut_off(tmp_path: Path, share: float) -> None:
    file = SMALL.save(tmp_path / "pytorch_model.bin", SMALL.tensors())
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    refused(
        d2l("import-reference", file, "-o", tmp_path / "imported"),
        tmp_path,
        "cut off or damaged",
        "fetch the file again",
    )


def test_bytes_that_changed(tmp_path: Path) -> None:
    file = SMALL.save(tmp_path / "pytorch_model.bin", SMALL.tensors())
    data = bytearray(file.read_bytes())
    data[data.find(SMALL.tensors()["head.weight"].numpy().tobytes()) + 5] ^= 1
    file.write_bytes(data)
    refused(
        d2l("import-reference", file, "-o", tmp_path / "imported"),
        tmp_path,
        "is missing or damaged: Bad CRC-32",
        "fetch",
    )


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {"head.weight": torch.ones(3, 4, 47), "scaler_A.q_proj": torch.ones(3, 2)},
            ("2 of another shape", "head.weight: expected [3, 4, 48], found [3, 4, 47]"),
        ),
        ({"head.weight": 3}, ("'head.weight': expected a tensor, found 3",)),
        ({"bias_A.q_proj": torch.ones(3, 2, 15)}, ("bias_A.q_proj: expected [3, 2, 16], found [3, 2, 15]", "import the file")),
        ({"layers.1.layers.0.weight": torch.ones(4)}, ("1 left over", "'layers.1.layers.0.weight': expected none, found [4]")),
    ],
)  # fmt: skip
def test_wrong_shapes(tmp_path: Path, tensors: dict[str, Any], words: tuple[str, ...]) -> None:
    refused(imported(tmp_path, {**SMALL.tensors(), **tensors}), tmp_path, *words)


def test_another_architecture(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    for state in ({"model.embed_tokens.weight": torch.ones(4, 2)}, torch.nn.Linear(2, 2).state_dict(), {}):
        torch.save(state, file)
        refused(
            d2l("import-reference", file, "-o", tmp_path / "imported"), tmp_path, "no hypernet_config in it; expected"
        )
    torch.save([torch.ones(2)], file)
    refused(
        d2l("import-reference", file, "-o", tmp_path / "imported"), tmp_path, "expected a state dict", "found [Tensor"
    )
    torch.save(torch.nn.Linear(2, 2), file)
    result = d2l("import-reference", file, "-o", tmp_path / "imported")
    refused(result, tmp_path, "asks for torch.nn.modules.linear.Linear", "nothing was run")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"aggregator_type": "pooler"}, "aggregator_config.aggregator_type: expected 'perceiver', found 'pooler'"),
        (
            {"ctx_encoder_model_name_or_path": "google/gemma-3-4b-it"},
            "expected None or 'some/base', found 'google/gemma-3-4b-it'",
        ),
        ({"ctx_encoder_type": "early_exit", "layer_idx": ...}, "layer_idx: expected the layer of the early exit"),
        ({"latent_size": ...}, "has no hypernet_config.latent_size"),
        ({"per_rank_gen": False}, "of another model than its arguments describe"),
    ],
)
def test_arguments_of_models_that_d2l_does_not_have(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    refused(imported(tmp_path, SMALL.tensors(), **changes), tmp_path, words)


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (
            Reference(3, 16, {"v_proj": (16, 32)}, TINY_GPT_OSS, rank=2, latent=4, queries=2, blocks=1),
            ("hidden_size: expected 16, found 64", "num_hidden_layers: expected 3, found 4"),
        ),
        (
            Reference(4, 64, {"v_proj": (64, 48)}, TINY_GPT_OSS, rank=2, latent=4, queries=2, blocks=1),
            ("bias_B.v_proj: expected [4, 2, 32], found [4, 2, 48]",),
        ),
        (
            Reference(4, 64, {"down_proj": (64, 64)}, TINY_GPT_OSS, rank=2, latent=4, queries=2, blocks=1),
            ("down_proj: 0 Linears of that name in every layer", "Choose target_modules"),
        ),
    ],
)
def test_a_base_that_is_not_the_one_of_its_training(
    tmp_path: Path, reference: Reference, words: tuple[str, ...]
) -> None:
    """The file names a base and cannot prove it; the base that is loaded must have its sizes."""
    assert not notes(imported(tmp_path, reference.tensors(), reference))
    (tmp_path / "document.md").write_text("The ferry leaves at nine.")
    result = d2l("ask", tmp_path / "imported", tmp_path / "document.md", "When?")
    assert (result.exit_code, result.stdout, "Traceback" in result.output) == (2, "", False)
    flat = " ".join(result.stderr.split())
    assert all(word in flat for word in words), flat
    assert re.search(rf"{tmp_path / 'imported'} (was trained|cannot be used).*{TINY_GPT_OSS}: .*--model MODEL", flat)
