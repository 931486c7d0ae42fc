"""Trainers as the checks examine them: light float64 twins, rows whose tokens say whose they are, settings of their own.

No setting here is the run's where it could hide a fault: a run's own schedule, clipping, loss or accumulation decides
nothing. What decides which code runs (kind of base, encoder, targets, shape of the hypernetwork) is the run's.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from checks.subject import build_drawn, changed, plan_on_cpu
from checks.training.observed import Observed, observed_step
from d2l.data.tokenize import Query, Row

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from checks.implementation import Model, Stepper
    from checks.subject import Subject
    from d2l.config.schema import RunConfig

Value = TypeVar("Value")

# Equal computations in float64 twins differ by float32 rounding inside the model library (norms, softmax, rope), about
# 1e-7 of the largest; a term that is lost or counted twice changes values by 1e-2 and more.
TOLERANCE = 1e-4
LIGHT_BASE = "light_base"  # what `shared` calls it
LAYERS = 2  # of it
TEACHER = 3  # tokens that the probes' teacher names for every label

# The learning rate is so small that no weight moves: several steps can be compared from the same weights.
STILL: dict[str, Any] = {
    "learning_rate": 1e-30,
    "muon_learning_rate": None,
    "weight_decay": 0.0,
    "max_grad_norm": 1e30,
    "lr_scheduler_type": "constant_with_warmup",
    "min_lr": 0.0,
    "warmup_steps": 0,
    "decay_steps": 0,
    "max_steps": 1000,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "loss": "ce",
    "use_per_ctx_average_loss": False,
    "gen_lora_l1_reg_coef": 0.0,
    "curriculum": (),
    "max_packed_inp_len": 1000,
    "max_packed_ctx_len": 1000,
    "seed": 0,
}

OWN = (  # settings of the run that decide what a step computes
    "loss",
    "use_per_ctx_average_loss",
    "gen_lora_l1_reg_coef",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
)

# Three documents of several chunks, and of several questions (tokens, supervised tokens), all of unequal lengths.
CHUNKS = ((3,), (2, 4, 3), (4, 2))
QUESTIONS = (((5, 2), (7, 4)), ((6, 3),), ((4, 1), (8, 5), (5, 3)))
# Room for the first two rows together and for the third alone: micro-batches of unequal numbers of contexts and chunks.
TWO_BATCHES: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_packed_inp_len": 18, "max_packed_ctx_len": 12}


def shared(subject: "Subject", key: str, compute: Callable[[], Value]) -> Value:
    """Return what several checks need of one subject, computed once."""
    kept: dict[str, Any] = subject.__dict__.setdefault("_shared", {})
    if key not in kept:
        kept[key] = compute()
    return kept[key]


def light_config(subject: "Subject", layers: int = LAYERS, **values: Any) -> "RunConfig":
    """Return the twin's configuration with a smaller hypernetwork, settings for still weights, and other values.

    Args:
        layers: of the base that it is for.
    """
    # heads of 3 make matrices of 12 x 8: d2l's Muon takes another way where one side is twice the other, as all others have it
    small = {"num_blocks": 1, "perceiver_heads": 4, "perceiver_head_dim": 3, "lora_r": 2, "n_latent_queries": 3}
    exit_at = {"layer_idx": layers - 1} if subject.config.layer_idx is not None else {}
    return changed(subject.twin_config, **{**small, **exit_at, **STILL, **values})


def light_model(
    subject: "Subject",
    config: "RunConfig | None" = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    layers: int = LAYERS,
) -> "Model":
    """Make a twin of two layers, or of one, on the CPU, whose LoRA is not zero."""
    config = light_config(subject) if config is None else config
    base = deepcopy(light_base(subject, layers))
    model = build_drawn(subject.implementation, base, config, seed)
    for part in (model.base, model.hypernet):
        part.to(dtype)
    return model


def guarded_config(subject: "Subject", layers: int = LAYERS) -> "RunConfig":
    """Return the light configuration with the run's own losses and optimizer, at a learning rate that moves a twin.

    Args:
        layers: of the base that it is for.
    """
    own = {name: getattr(subject.config, name) for name in OWN}
    muon = None if subject.config.muon_learning_rate is None else 1e-2
    # of the run's own rates OPT204 judges
    return light_config(subject, layers, **own, learning_rate=1e-3, muon_learning_rate=muon)


def hypernet_values(model: Any) -> dict[str, Tensor]:
    """Return a copy of the parameters of the hypernetwork by name."""
    return {name: value.detach().clone() for name, value in model.hypernet.named_parameters()}


def still_model(subject: "Subject") -> "Model":
    """Return the light twin that the steps of `loss_step` leave as it is; made once for all checks."""
    return shared(subject, "still_model", lambda: light_model(subject))


def loss_step(subject: "Subject", **values: Any) -> Observed:
    """Return one step over the loss rows, of a new trainer on the still model; taken once for the same values."""
    return shared(subject, _of_step(values), lambda: loss_step_anew(subject, **values))


def loss_step_anew(subject: "Subject", **values: Any) -> Observed:
    """Return what `loss_step` does, taken once more, under whatever is planted into the still model now."""
    return observed_step(_loss_trainer(subject, values))


def loss_step_again(subject: "Subject") -> tuple[Observed, Observed]:
    """Return the loss step without other values, taken anew, and the next step of the same trainer over the same rows."""
    trainer = _loss_trainer(subject, {})
    first = observed_step(trainer)
    return shared(subject, _of_step({}), lambda: first), observed_step(trainer)


def loss_step_in_pieces(subject: "Subject") -> Observed:
    """Return the loss step without other values, taken where the hypernetwork reads documents in the smallest pieces."""
    with subject.implementation.in_pieces():
        return loss_step_anew(subject)


def _loss_trainer(subject: "Subject", values: Mapping[str, Any]) -> "Stepper":
    config = light_config(subject, **values)
    return subject.implementation.trainer(still_model(subject), loss_rows(subject), config)


def _of_step(values: Mapping[str, Any]) -> str:
    """Return the key of the loss step with these values: what it would have anyway makes no other step."""
    other = {name: value for name, value in values.items() if name not in STILL or STILL[name] != value}
    return f"loss_step {sorted(other.items())}"


def light_base(subject: "Subject", layers: int = LAYERS, vocabulary: int | None = None) -> "PreTrainedModel":
    """Return the base of the light twin, to be copied; made once for all checks.

    Args:
        vocabulary: its size; None: the twin's.
    """

    def make() -> "PreTrainedModel":
        base_config = _light_base_config(subject.twin_base_config, layers)
        base_config.vocab_size = vocabulary or base_config.vocab_size
        plan = plan_on_cpu(subject.implementation, light_config(subject, layers), base_config)
        return subject.implementation.build_base(base_config, plan, seed=0)

    return shared(subject, f"{LIGHT_BASE} {layers} {vocabulary}", make)


def _light_base_config(config: "PreTrainedConfig", layers: int) -> "PreTrainedConfig":
    """Return the twin's base config with so many layers, of two types where it has two, and two experts, both taken.

    With all experts taken, in one group, nothing jumps where the routing changes: the loss has a derivative everywhere.
    """
    values = config.to_dict()
    layers = min(layers, config.num_hidden_layers)
    for name, value in values.items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            kinds = list(dict.fromkeys(value)) if name == "layer_types" else []
            values[name] = kinds[:layers] if len(kinds) >= layers else value[:layers]
    experts = ("num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok")
    groups = {"n_group": 1, "topk_group": 1}
    for name, size in {"num_hidden_layers": layers, **dict.fromkeys(experts, 2), **groups}.items():
        own_name = config.attribute_map.get(name, name)
        if values.get(own_name) is not None:
            values[own_name] = size
    return type(config).from_dict(values)


def loss_rows(subject: "Subject") -> list[Row]:
    """Make the rows of `CHUNKS` and `QUESTIONS`, of random ids; every label has a teacher whose top-k do not sum to 1."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = subject.twin_base_config.vocab_size

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocabulary, (length,), generator=generator).tolist())

    def query(length: int, labels: int) -> Query:
        tokens = ids(length)
        likely = torch.rand(labels, TEACHER, generator=generator) * 0.3 + 0.01
        return Query(
            input_ids=tokens,
            labels=(*[-100] * (length - labels), *tokens[length - labels :]),
            logprobs_vals=tuple(map(tuple, likely.log().tolist())),
            logprobs_indices=tuple(ids(TEACHER) for _ in range(labels)),
        )

    return [
        Row(record=index, chunks=tuple(map(ids, chunks)), queries=tuple(query(*shape) for shape in questions))
        for index, (chunks, questions) in enumerate(zip(CHUNKS, QUESTIONS, strict=True))
    ]


def worst_parameter(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest error of any parameter's gradient, over that gradient's largest entry, and the parameter.

    A gradient that is as good as zero beside the others (1e-6 of the largest) is measured by that share of the largest.
    """
    largest = max(float(value.abs().max()) for value in expected.values())
    errors = {name: float("inf") for name in expected if name not in actual}
    for name in expected.keys() & actual.keys():
        scale = max(float(expected[name].abs().max()), 1e-6 * largest, 1e-300)
        error = float((actual[name] - expected[name]).abs().max()) / scale
        errors[name] = error if error == error else float("inf")
    name = max(errors, key=lambda key: errors[key])
    return errors[name], name
