"""The base, loaded as the run loads it, computes what transformers' own loading of the same files computes.

What it does
------------
Loads the base with its real weights as the run would, onto the run's device, and looks at what came of the plan: dtype,
device, attention, packed or dense experts, nothing trainable. Then it gives it one packed row of three documents of random
tokens, without a LoRA, and compares its logits with those of transformers' own `from_pretrained`, with dense experts and
eager attention, one document at a time.

Why it matters
--------------
What the twin shows, it shows of random weights. Blocks and scales that are read in another order, tensors in another
layer's place or a dtype that the loader did not keep change what the real base computes: training then goes on with
another function, at a loss that is a little higher than it should be, and the adapter is served on the true one.

How it is detected
------------------
The measure is the difference of a token's logits over their spread; of each half of a document the median over its tokens
counts, since rounding may send a single token to another expert. In float32 it is at most 5e-4 (2e-6 was seen). Where the run
computes in bfloat16, both are compared with transformers' copy computed in float32, one layer at a time: the run's error is
at most three times that of the plain copy (1.7 was seen, exchanged layers 30 and more). transformers' copy is dense: it is
compared where it fits into the free memory of the GPU, on a CPU up to 4 GiB. Random bases, and weights that are not on this
machine, are not judged.

How to fix
----------
Set `expert_weights: dequantize` and `attn_implementation: per_document`, which leave loading and attention to
transformers, and report the difference.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from checks.faults import override
from checks.implementation import Implementation
from checks.quiet import quiet_transformers
from checks.result import Fail, Pass, Result, Skip
from checks.rule import Fault, Rule
from checks.training.on_device import nothing_to_load
from d2l.base.config import frozen_config, skeleton
from d2l.base.files import weights_folder
from d2l.data.packing import collate
from d2l.data.tokenize import IGNORE_INDEX, Query, Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from checks.subject import Subject

IN_FLOAT32 = 5e-4  # of the spread of a token's logits
ROUNDED = 3.0  # times the error of plain eager attention in the same dtype
LONGEST, SHORT = 584, (77, 150)  # tokens of the probe's documents: windows of up to 512 have an edge in the longest
ON_CPU = 4 * 2**30  # bytes: what a CPU loads and computes in some seconds
GIB = 2**30
REMEDY = "set expert_weights: dequantize and attn_implementation: per_document, and report the difference"


def check(subject: "Subject") -> Result:
    """Compare what was loaded with the plan, and its logits with those of transformers' own loading."""
    if reason := nothing_to_load(subject):
        return reason
    size = _dense_bytes(subject)
    if subject.plan.device.value == "cpu" and size > ON_CPU:  # before anything is loaded: a laptop may not hold it
        return _too_large(size, ON_CPU)
    base = subject.implementation.load_base(Path(subject.config.model_name_or_path), subject.plan)
    if otherwise := _otherwise(base, subject):
        return Fail(
            message="the base was not loaded as planned",
            expected=", ".join(f"{what} {planned}" for what, planned, _ in otherwise),
            actual=", ".join(f"{what} {found}" for what, _, found in otherwise),
            remedy=REMEDY,
        )
    free = subject.implementation.free_memory()
    if subject.plan.device.value != "cpu" and free is not None and size > free:
        return _too_large(size, free)
    probe = _Probe.of(subject)
    found = probe.packed(subject, base)
    del base  # a GPU need not hold both
    plain = _as_transformers_loads(subject)
    if subject.plan.torch_dtype == torch.float32:
        worst, bound = max(probe.errors(found, probe.alone(plain))), IN_FLOAT32
        measure = "logits apart by {:.2g} of their spread"
    else:
        exact = probe.alone_in_float32(plain)
        errors, own = probe.errors(found, exact), probe.errors(probe.alone(plain), exact)
        worst, bound = max(error / max(rounding, 1e-9) for error, rounding in zip(errors, own, strict=True)), ROUNDED
        measure = "logits with errors {:.2g} times those of eager attention"
    evidence = {"apart": worst, "dtype": subject.plan.dtype.value, "tokens": sum(probe.lengths)}
    if not worst <= bound:
        return Fail(
            message="the loaded base computes other logits than transformers' own loading of the same files",
            expected=f"at most {measure.format(bound)}",
            actual=measure.format(worst),
            remedy=REMEDY,
            evidence=evidence,
        )
    return Pass(f"loaded as planned; {measure.format(worst)}, beside transformers' own", evidence)


def _too_large(size: int, room: int) -> Skip:
    return Skip(f"transformers' own copy takes {size / GIB:.1f} GiB, and {room / GIB:.1f} GiB are to be had")


def _otherwise(base: "PreTrainedModel", subject: "Subject") -> list[tuple[str, object, object]]:
    """Return what of the loaded base is not as planned: (what, planned, found)."""
    plan, parameters = subject.plan, dict(base.named_parameters())
    dtypes = {parameter.dtype for parameter in parameters.values() if parameter.is_floating_point()}
    devices = {parameter.device.type for parameter in parameters.values()}
    packed = any(name.endswith("_blocks") for name in base.state_dict())
    found: tuple[tuple[str, object, object], ...] = (
        ("dtype", {plan.torch_dtype}, dtypes),
        ("device", {torch.device(plan.device.value).type}, devices),
        ("attention", plan.attention.value, base.config._attn_implementation),
        ("packed experts", plan.experts.value == "packed", packed),
        ("trainable", [], [name for name, parameter in parameters.items() if parameter.requires_grad]),
        ("in training mode", False, base.training),
    )
    return [(what, planned, actual) for what, planned, actual in found if planned != actual]


def _dense_bytes(subject: "Subject") -> int:
    """Return the bytes of the base with dense experts."""
    parameters = sum(parameter.numel() for parameter in skeleton(subject.base_config).parameters())
    return parameters * subject.plan.torch_dtype.itemsize


def _as_transformers_loads(subject: "Subject") -> "PreTrainedModel":
    """Load the same files without d2l."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import Mxfp4Config

    plan = subject.plan
    options: dict[str, Any] = {"dtype": plan.torch_dtype, "device_map": {"": plan.device.value}}
    if plan.quantization.value == "mxfp4":
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    with quiet_transformers():
        base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            weights_folder(subject.config.model_name_or_path),
            config=frozen_config(subject.base_config),
            attn_implementation="eager",
            trust_remote_code=False,
            **options,
        )
    base.set_experts_implementation("eager")
    _cast_weights(base, plan.torch_dtype)
    return base.eval()


def _cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Change the dtype of a module's parameters, and of no buffer: the frequencies of positions are float32 in any base."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


@dataclass(frozen=True)
class _Probe:
    """Documents of random tokens, of these lengths, one after another [1, T]."""

    ids: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, subject: "Subject") -> "_Probe":
        """Draw documents, the longest past a window's edge, of the base's vocabulary and within its positions."""
        config = subject.base_config
        most = min(config.max_position_embeddings, LONGEST)
        lengths = (most, *(min(most, length) for length in SHORT))
        generator = torch.Generator().manual_seed(0)
        return cls(torch.randint(config.vocab_size, (1, sum(lengths)), generator=generator), lengths)

    @torch.no_grad()
    def packed(self, subject: "Subject", base: "PreTrainedModel") -> Tensor:
        """Return the logits [T, V] of all documents as the questions of one packed row, without a LoRA."""
        documents = [ids.tolist() for ids in self.ids[0].split(list(self.lengths))]
        rows = [
            Row(record=index, chunks=((0, 0),), queries=(Query(input_ids=(*ids,), labels=(IGNORE_INDEX, *ids[1:])),))
            for index, ids in enumerate(documents)
        ]
        model = subject.implementation.build(base, subject.twin_config)
        return model.logits(collate(rows).to(base.device), None).float().cpu()

    @torch.no_grad()
    def alone(self, base: "PreTrainedModel") -> Tensor:
        """Return the same of each document by itself, without a mask."""
        documents = self.ids.to(base.device).split(list(self.lengths), dim=1)
        return torch.cat([base(input_ids=ids, use_cache=False).logits[0].float().cpu() for ids in documents])

    def alone_in_float32(self, base: "PreTrainedModel") -> Tensor:
        """Return the same, computed in float32; one layer at a time holds its weights so."""
        decoder: Any = base.get_decoder()
        dtype: Any = base.dtype
        parts = [*decoder.layers, *(it for it in decoder.children() if it is not decoder.layers)]
        hooks = []
        for part in (*parts, base.get_output_embeddings()):
            hooks.append(part.register_forward_pre_hook(lambda module, inputs: _cast_weights(module, torch.float32)))
            hooks.append(part.register_forward_hook(lambda module, inputs, output: _cast_weights(module, dtype)))
        try:
            return self.alone(base)
        finally:
            for hook in hooks:
                hook.remove()

    def errors(self, found: Tensor, expected: Tensor) -> list[float]:
        """Return the median over tokens of the relative difference, of every half of every document."""
        spread = (expected - expected.mean(dim=-1, keepdim=True)).norm(dim=-1)
        relative = ((found - expected).norm(dim=-1) / spread.clamp(min=1e-12)).nan_to_num(torch.inf, posinf=torch.inf)
        halves = [part for document in relative.split(list(self.lengths)) for part in document.chunk(2)]
        return [float(part.median()) for part in halves]


# Faults: loaders that do something else


def _in_another_dtype(healthy: Implementation, folder: Path, plan: Any) -> Any:
    base: Any = healthy.load_base(folder, plan)
    return base.to(torch.bfloat16 if plan.torch_dtype == torch.float32 else torch.float32)


def _with_other_attention(healthy: Implementation, folder: Path, plan: Any) -> Any:
    base = healthy.load_base(folder, plan)
    base.set_attn_implementation("eager")
    return base


def _in_training_mode(healthy: Implementation, folder: Path, plan: Any) -> Any:
    return healthy.load_base(folder, plan).train()


def _elsewhere(healthy: Implementation, folder: Path, plan: Any) -> Any:
    base: Any = healthy.load_base(folder, plan)
    return base.to("meta")


def _dequantized(healthy: Implementation, folder: Path, plan: Any) -> Any:
    return healthy.load_base(folder, replace(plan, experts=replace(plan.experts, value="dequantize")))


def _trainable(healthy: Implementation, folder: Path, plan: Any) -> Any:
    base = healthy.load_base(folder, plan)
    base.get_output_embeddings().weight.requires_grad_()
    return base


def _with_layers_exchanged(healthy: Implementation, folder: Path, plan: Any) -> Any:
    """Exchange the first matrices of two layers, which have one shape."""
    base: Any = healthy.load_base(folder, plan)
    first, second = (_first_matrix(layer) for layer in base.get_decoder().layers[:2])
    first.data, second.data = second.data, first.data
    return base


def _first_matrix(layer: nn.Module) -> nn.Parameter:
    return next(parameter for parameter in layer.parameters() if parameter.dim() == 2)


def _unless(subject: "Subject") -> str:
    return "" if nothing_to_load(subject) is None else "there are no weights to load"


def _unless_eager(subject: "Subject") -> str:
    return _unless(subject) or ("eager is planned" if subject.plan.attention.value == "eager" else "")


def _unless_dense(subject: "Subject") -> str:
    return _unless(subject) or ("" if subject.plan.experts.value == "packed" else "no packed experts are planned")


def _unless_one_layer(subject: "Subject") -> str:
    return _unless(subject) or ("" if subject.base_config.num_hidden_layers > 1 else "the base has one layer")


RULE = Rule(
    code="BAS402",
    name="loaded-base-differs",
    stage="device",
    severity="error",
    sources=("fix 1", "failure mode 32", "failure mode C4", "failure mode C13"),
    requires=("QNT101", "QNT102", "ATT101", "ATT401", "BAS401"),
    check=check,
    lasting=True,
    faults=(
        Fault("another-dtype", "a base in another dtype", override(_unless, load_base=_in_another_dtype)),
        Fault(
            "eager-attention",
            "eager attention in place of the planned",
            override(_unless_eager, load_base=_with_other_attention),
        ),
        Fault("dense-experts", "experts that are not packed", override(_unless_dense, load_base=_dequantized)),
        Fault("elsewhere", "a base on another device", override(_unless, load_base=_elsewhere)),
        Fault("training-mode", "a base in training mode", override(_unless, load_base=_in_training_mode)),
        Fault("trainable-head", "a head that requires gradients", override(_unless, load_base=_trainable)),
        Fault(
            "layers-exchanged",
            "the first matrices of two layers in each other's places",
            override(_unless_one_layer, load_base=_with_layers_exchanged),
        ),
    ),
)
