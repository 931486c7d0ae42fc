"""The base's files hold every weight of the model that its config.json describes.

What it does
------------
Where the base's weights are on this machine, reads the headers of its safetensors files (names, shapes and dtypes, no value)
and lets the run's own loader put them into an empty model.

Why it matters
--------------
A folder that was copied without its large files, a download that was stopped, or a config.json of another size is found
when the base is loaded, after the data was tokenized; what a lenient loader does not find is random in the model.

How it is detected
------------------
Each file that the index names is there and as long as its header says; the loader misses nothing, finds nothing unknown and
fits every tensor into its place. Apart from the loader, the files must hold as many values as transformers' own model of
this config.json has parameters, two to a byte of MXFP4. Weights that are not on this machine are not judged; values are not
read, so that damage inside a tensor is not seen.

How to fix
----------
Fetch the checkpoint again, whole (`hf download NAME`), with the config.json that belongs to it. For a base with random
weights, name the config file itself.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from checks.faults import override
from checks.hollow import write_hollow
from checks.implementation import Implementation
from checks.result import Fail, Inapplicable, Pass, Result, Skip
from checks.rule import Fault, Rule
from checks.subject import changed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from checks.subject import Subject
    from d2l.base.load_plan import LoadPlan
    from d2l.config.schema import RunConfig

Tensors = dict[str, Tensor]
SINGLE_FILE = "model.safetensors"
LAID_OUT = ("none", "mxfp4")  # quantizations whose files are known


def check(subject: "Subject") -> Result:
    """Let the loader look at the files, and count what they hold."""
    from d2l.base.files import is_config_only
    from d2l.errors import ModelError

    name, method = subject.config.model_name_or_path, subject.plan.quantization.value
    if is_config_only(name):
        return Inapplicable("the base is random, of a config file")
    if method not in LAID_OUT:
        return Skip(f"how weights in {method} lie in files is known to its own library alone")
    try:
        headers = subject.implementation.inspect_base(subject.config, subject.base_config, subject.plan)
    except ModelError as error:
        return _fail("every weight of the model that config.json describes, and no other", str(error))
    if headers is None:
        return Skip(f"the weights of {name} are not on this machine")
    values, parameters = _values(headers), _parameters(subject.base_config)
    evidence = {"tensors": len(headers), "values": values, "parameters": parameters}
    if values < parameters:
        return _fail(f"at least {parameters:,} values, as many as the model has parameters", f"{values:,}", evidence)
    size = sum(tensor.numel() * tensor.element_size() for tensor in headers.values())
    return Pass(f"{len(headers):,} tensors, {size / 1e9:.2f} GB, are all that the model needs", evidence)


def _fail(expected: str, actual: str, evidence: Mapping[str, Any] | None = None) -> Fail:
    return Fail(
        message="the base's files are not a whole checkpoint of the model",
        expected=expected,
        actual=actual,
        remedy="fetch the checkpoint again, whole, with the config.json that belongs to it",
        evidence=dict(evidence or {}),
    )


def _values(headers: Mapping[str, Tensor]) -> int:
    """Count weights in files; MXFP4 has two in a byte, and scales that are none."""
    return sum(
        tensor.numel() * (2 if name.endswith("_blocks") else 1)
        for name, tensor in headers.items()
        if not name.endswith("_scales")
    )


def _parameters(base_config: "PreTrainedConfig") -> int:
    """Count the parameters of the model that transformers builds, those that are tied once."""
    from transformers import AutoModelForCausalLM

    from d2l.base.config import frozen_config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(frozen_config(base_config))
    return sum(parameter.numel() for parameter in model.parameters())


# Faults: folders of files without values, which the healthy loader reads


def _files(write: Callable[[Path, Tensors], None]) -> Any:
    """Make a fault in which the base's folder is another one; `write` gets the folder and the tensors of a whole one."""

    def inspect(healthy: Implementation, config: "RunConfig", base_config: "PreTrainedConfig", plan: "LoadPlan") -> Any:
        with tempfile.TemporaryDirectory(prefix="d2l-") as place:
            folder = Path(place)
            write(folder, _whole(base_config, plan))
            return healthy.inspect_base(changed(config, model_name_or_path=place), base_config, plan)

    return override(_unless, inspect_base=inspect)


def _unless(subject: "Subject") -> str:
    from d2l.base.files import is_config_only

    if is_config_only(subject.config.model_name_or_path):
        return "the base is random, of a config file"
    method = subject.plan.quantization.value
    return "" if method in LAID_OUT else f"the base is quantized with {method}"


def _whole(base_config: "PreTrainedConfig", plan: "LoadPlan") -> Tensors:
    """Return the tensors of a whole checkpoint, on the meta device."""
    from d2l.base.experts import empty_packed_experts
    from d2l.base.load import empty_base

    model = empty_base(base_config, plan)
    if plan.quantization.value == "mxfp4":
        empty_packed_experts(model)
    return dict(model.state_dict())


def _without_weights(folder: Path, tensors: Tensors) -> None:
    """Leave the folder empty, as a copy without large files does."""


def _cut_short(folder: Path, tensors: Tensors) -> None:
    write_hollow(folder / SINGLE_FILE, tensors, cut=1)


def _without_norm(folder: Path, tensors: Tensors) -> None:
    norm = next(name for name in reversed(tensors) if "norm" in name)
    write_hollow(folder / SINGLE_FILE, {name: it for name, it in tensors.items() if name != norm})


def _of_another_width(folder: Path, tensors: Tensors) -> None:
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    write_hollow(folder / SINGLE_FILE, tensors | {name: tensors[name][:, 1:]})


def _half(healthy: Implementation, config: Any, base_config: Any, plan: Any) -> Tensors:
    """Look as a loader that tolerates what is missing: half of the tensors are enough for it."""
    whole = _whole(base_config, plan)
    return {name: whole[name] for name in list(whole)[::2]}


RULE = Rule(
    code="BAS401",
    name="weights-incomplete",
    stage="device",
    severity="error",
    sources=("https://huggingface.co/docs/safetensors#format", "failure mode 32"),
    requires=("QNT102",),
    check=check,
    faults=(
        Fault("no-weights", "a folder without weights", _files(_without_weights)),
        Fault("cut-short", "a file that lacks its last byte", _files(_cut_short)),
        Fault("norm-missing", "files without the last norm", _files(_without_norm)),
        Fault("other-width", "embeddings that are one narrower than config.json says", _files(_of_another_width)),
        Fault(
            "lenient-loader",
            "a loader that takes half of the tensors for all",
            override(_unless, inspect_base=_half),
        ),
    ),
)
