"""The hypernetwork makes the LoRA that the reference implementation makes, number by number.

What it does
------------
Gives a hypernetwork and a tiny base the weights of two stored cases of the reference and compares the LoRAs that come out
with the numbers that the reference gave. Then it compares the twin's own LoRA, with every switch of the run, with the
paper's formulas, written as loops in float64.

Why it matters
--------------
Rows of A and B swapped, another scale, the bias counted once for each chunk, layers or modules in another order: each
trains, at a loss that looks normal, and is another model than the published one. Its checkpoints fit nothing else.

How it is detected
------------------
A, B and scale of every context must agree to 1e-4 of the largest value: rows of the chunks, rows of the bias, and zeros.

How to fix
----------
Compare the part that the finding names with the formulas in `checks/oracles/hypernetwork.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoConfig

from checks.faults import override
from checks.implementation import Implementation, Model
from checks.offered import offered
from checks.oracles import edited_weights, hypernetwork
from checks.oracles.stored import StoredCase, stored_cases
from checks.probes import TOLERANCE, difference, in_double, packed_rows
from checks.result import Fail, Inapplicable, Pass, Result
from checks.rule import Fault, Rule
from checks.subject import build_drawn, changed, plan_on_cpu
from d2l.config.schema import RunConfig
from d2l.data.packing import collate
from d2l.data.tokenize import Query, Row

if TYPE_CHECKING:
    from checks.subject import Subject
    from d2l.hypernet.lora import Lora

SWITCHES = (
    *("lora_r", "num_blocks", "num_self_attn_per_block", "shared_weights", "num_pre_head_layers"),
    *("per_layer_processing", "use_bias", "perceiver_heads", "perceiver_head_dim"),
)
SINGLE = 1e-3  # of the stored cases in float32, whose rounding stays below 1e-4; bfloat16's is above 4e-3
REMEDY = "compare the part that is named with the formulas in checks/oracles/hypernetwork.py"


@dataclass(frozen=True, eq=False)
class _Expected:
    """The LoRAs that should come out: A and B by module [contexts, L, R, d]; chunks of each context; rank of a chunk."""

    A: dict[str, Tensor]
    B: dict[str, Tensor]
    scale: float
    n_chunks: tuple[int, ...]
    rank: int


@torch.no_grad()
def check(subject: "Subject") -> Result:
    """Compare the stored cases, then the twin with the formulas."""
    distances: dict[str, float] = {}
    for case in stored_cases():
        model = _of_case(subject.implementation, case)
        if problem := _other_parameters(model, case):
            return problem
        model.hypernet.load_state_dict(dict(case.weights))
        query = Query(input_ids=(1, 2), labels=(-100, 2))
        rows = [Row(record=i, chunks=chunks, queries=(query,)) for i, chunks in enumerate(case.contexts)]
        n_chunks = tuple(map(len, case.contexts))
        stored = _Expected(dict(case.A), dict(case.B), case.scale, n_chunks, case.config["lora_r"])
        single = _distances(model.lora(collate(rows)), stored)
        found = _distances(in_double(model).lora(collate(rows)), stored)
        for distances_of, bound, where in ((found, TOLERANCE, ""), (single, SINGLE, " in float32")):
            if finding := _finding(distances_of, "the reference's stored numbers", f"case {case.name}{where}", bound):
                return finding
        distances |= {f"{case.name}: {part}": distance for part, distance in found.items()}
    formula_distances: dict[str, float] = {}
    for where, config in (("the run's switches", subject.twin_config), ("all switches turned", _turned(subject))):
        lora, formulas = _of_twin(subject, config)
        if isinstance(formulas, Fail):
            return formulas
        found = _distances(lora, formulas)
        if finding := _finding(found, "the formulas in float64", where):
            return finding
        formula_distances |= {f"{where}: {part}": distance for part, distance in found.items()}
    stored_worst, worst = max(distances.values()), max(formula_distances.values())
    return Pass(
        f"LoRAs are the reference's stored ones to {stored_worst:.1g}, and the formulas' to {worst:.1g}",
        {"stored": distances, "formulas": formula_distances},
    )


def _turned(subject: "Subject") -> "RunConfig":
    """Return the twin's configuration with every switch of the hypernetwork the other way."""
    config = subject.twin_config
    return changed(
        config,
        num_blocks=2 if config.num_blocks == 3 else 3,  # of one block nothing could be shared
        num_self_attn_per_block=0 if config.num_self_attn_per_block else 1,
        num_pre_head_layers=1 if config.num_pre_head_layers == 2 else 2,
        shared_weights=not config.shared_weights,
        per_layer_processing=not config.per_layer_processing,
        use_bias=not config.use_bias,
        perceiver_heads=4 if config.perceiver_heads != 4 else 8,
        perceiver_head_dim=4 if config.perceiver_head_dim != 4 else 8,
    )


def _of_case(implementation: Implementation, case: StoredCase) -> Model:
    """Build a stored case's model around its base; the hypernetwork's weights are still its own."""
    config = RunConfig(**case.config, attn_implementation="eager", dtype="float32")
    base_config = AutoConfig.for_model(case.model_type, **case.base_config)
    base = implementation.build_base(base_config, plan_on_cpu(implementation, config, base_config), seed=0)
    base.load_state_dict(dict(case.base_weights))
    return implementation.build(base, config)


def _other_parameters(model: Model, case: StoredCase) -> Result | None:
    """Compare names and shapes of the parameters; what has names of its own cannot be given the stored weights."""
    own = {name: list(parameter.shape) for name, parameter in model.hypernet.named_parameters()}
    true = {name: list(weight.shape) for name, weight in case.weights.items()}
    if own == true:
        return None
    if not own.keys() & true.keys():
        return Inapplicable(f"no parameter has a name of the reference, such as {min(true)}: stored weights fit none")
    missing, more = sorted(true.keys() - own.keys()), sorted(own.keys() - true.keys())
    other = sorted(name for name in own.keys() & true.keys() if own[name] != true[name])
    kinds = (("no", missing), ("more", more), ("of another shape", other))
    return Fail(
        message="the hypernetwork has other parameters than the reference",
        expected=f"the {len(true)} parameters of case {case.name}",
        actual="; ".join(f"{what}: {', '.join(names[:3])}" for what, names in kinds if names),
        remedy=REMEDY,
    )


def _of_twin(subject: "Subject", config: "RunConfig") -> "tuple[Lora, _Expected | Fail]":
    """Return the twin's LoRAs and those of the formulas, from the same features; no parameter has a special value.

    Where the formulas lack a parameter, or find one of another shape, that is the finding.
    """
    model = in_double(build_drawn(subject.implementation, subject.twin_base(), config, seed=0))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.hypernet.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.add_(noise, alpha=0.2 * float(parameter.abs().mean()))
    rows = packed_rows(subject)[:2]  # of three chunks, and so of all kinds of rows
    batch = collate(rows)
    lengths = [len(chunk) for row in rows for chunk in row.chunks]
    switches = hypernetwork.Switches(
        modules=edited_weights.sizes(model.base, config.target_modules),
        n_layers=subject.twin_base_config.num_hidden_layers,
        per_layer_features=config.ctx_encoder_type == "per_layer_activations",
        side_by_side=config.ctx_encoder_type == "concat_layers",
        **{name: getattr(config, name) for name in SWITCHES},
    )
    n_chunks = tuple(len(row.chunks) for row in rows)
    weights = dict(model.hypernet.named_parameters())
    lora, features = model.lora(batch), offered(model, "features")(batch)[0].split(lengths, dim=-2)
    try:
        merged = hypernetwork.loras(weights, switches, features, n_chunks)
    except (KeyError, IndexError, RuntimeError) as error:
        return lora, Fail(
            message="the hypernetwork has other parameters than its configuration describes",
            expected="those of the reference for the run's switches",
            actual=f"{type(error).__name__} in the formulas: {error}".splitlines()[0],
            remedy=REMEDY,
        )
    A = {name: torch.stack([it.A[name] for it in merged]) for name in merged[0].A}
    B = {name: torch.stack([it.B[name] for it in merged]) for name in merged[0].B}
    return lora, _Expected(A, B, switches.scale, n_chunks, config.lora_r)


def _distances(actual: "Lora", expected: _Expected) -> dict[str, float]:
    """Return the difference of the scale, and of the rows of chunks, of the bias and of nothing, in A and B of each module."""
    found = {"scale": abs(actual.scale / expected.scale - 1)}
    for side, ours, theirs in (("A", actual.A, expected.A), ("B", actual.B, expected.B)):
        for name, true in theirs.items():
            own = ours.get(name)
            if own is None or own.shape != true.shape:
                shape = "absent" if own is None else list(own.shape)
                found[f"shape of {side} of {name}, {shape} for {list(true.shape)}"] = float("inf")
                continue
            for part, rows in _parts(expected, true).items():
                off = difference(own[rows], true[rows]) if true[rows].any() else float(own[rows].abs().max())
                found[f"{part} of {side} of {name}"] = off
    return found


def _parts(expected: _Expected, like: Tensor) -> dict[str, Tensor]:
    """Return masks of the rows of chunks, bias and zeros, bool [contexts, L, R]; parts without rows are left out."""
    n_contexts, layers, rank, _ = like.shape
    block = torch.arange(rank) // expected.rank
    counts = torch.tensor(expected.n_chunks)[:, None]
    masks = {"chunk rows": block < counts, "bias rows": block == counts, "zero rows": block > counts}
    return {part: mask[:, None].expand(n_contexts, layers, rank) for part, mask in masks.items() if mask.any()}


def _finding(found: dict[str, float], truth: str, where: str, bound: float = TOLERANCE) -> Fail | None:
    """Make the finding of the part that is furthest off; `None` where all agree."""
    wrong = [part for part, distance in found.items() if not distance <= bound]
    if not wrong:
        return None
    worst = max(wrong, key=lambda part: found[part])
    others = f"; also {', '.join(part for part in wrong if part != worst)}" if len(wrong) > 1 else ""
    return Fail(
        message=f"the hypernetwork makes another LoRA than {truth}",
        expected=f"A, B and scale within {bound:g} of the largest value",
        actual=f"{where}: {worst} {found[worst]:.2g} off{others}",
        remedy=REMEDY,
        evidence={"where": where, "distances": found},
    )


def _making(change: Callable[[Any, Any, Any], Any], unless: Callable[["Subject"], str] = lambda subject: "") -> Any:
    """Make a fault of a model whose LoRAs are changed: by the configuration, the batch and the LoRA."""

    def build(healthy: Implementation, base: Any, config: Any) -> Model:
        model: Any = healthy.build(base, config)
        make = model.lora
        model.lora = lambda batch: change(config, batch, make(batch))
        return model

    return override(build=build, unless=unless)


def _each(lora: Any, change: Callable[[Tensor], Tensor]) -> Any:
    A, B = ({name: change(x) for name, x in side.items()} for side in (lora.A, lora.B))
    return replace(lora, A=A, B=B)


def _over_rank(config: Any, batch: Any, lora: Any) -> Any:
    return replace(lora, scale=lora.scale / config.lora_r)


def _reversed_layers(config: Any, batch: Any, lora: Any) -> Any:
    return _each(lora, lambda x: x.flip(1))


def _bias_twice(config: Any, batch: Any, lora: Any) -> Any:
    return _each(lora, lambda x: _doubled(x, config.lora_r, batch.n_ctx_chunks))


def _doubled(x: Tensor, rank: int, n_chunks: Sequence[int]) -> Tensor:
    """Double the rows of the bias, which stand behind the chunks of each context."""
    block = torch.arange(x.shape[2]) // rank == torch.tensor(n_chunks)[:, None]
    return x * (1 + block[:, None, :, None].to(x))


def _bias_first(config: Any, batch: Any, lora: Any) -> Any:
    """Put the learned bias in front of the chunks."""
    return _each(lora, lambda x: x.roll(config.lora_r, dims=2))


def _swapped(config: Any, batch: Any, lora: Any) -> Any:
    """Swap A and B wherever their shapes allow it; elsewhere swap halves of A."""
    same = {name for name in lora.A if lora.A[name].shape == lora.B[name].shape}
    A = {name: lora.B[name] if name in same else a.roll(a.shape[-1] // 2, -1) for name, a in lora.A.items()}
    return replace(lora, A=A, B={name: lora.A[name] if name in same else b for name, b in lora.B.items()})


def _no_bias(subject: "Subject") -> str:
    return "" if subject.config.use_bias else "use_bias is off"


RULE = Rule(
    code="HYP202",
    name="hypernetwork-differs",
    stage="twin",
    severity="error",
    sources=("failure mode C19", "failure mode 22", "https://github.com/SakanaAI/doc-to-lora"),
    requires=("ENC201", "ATT203"),
    check=check,
    faults=(
        Fault("scale-over-r", "the scale is divided by the rank", _making(_over_rank)),
        Fault("layers-reversed", "the last layer's LoRA goes to the first", _making(_reversed_layers)),
        Fault("halves-swapped", "the head's values for A and B are mixed up", _making(_swapped)),
        Fault("bias-twice", "the learned bias counts twice", _making(_bias_twice, _no_bias)),
        Fault("bias-first", "the learned bias stands before the chunks", _making(_bias_first)),
    ),
)
