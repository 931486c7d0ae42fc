"""The run's configuration: flat, with the field names of the reference implementation, frozen once made.

What is in it is what runs and what is saved; nothing changes it later. `d2l.config.load` reads it.
"""

from datetime import date
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from d2l.config.numbers import (
    Bytes,
    Count,
    Digits,
    Fraction,
    Length,
    MultipleOfFour,
    NonNegative,
    NonNegativeReal,
    Positive,
    PositiveShare,
    Probability,
    Seed,
    Several,
    Whole,
)

NEEDLE = "needle"
REMARKS = "remarks"  # the one field that is no key

TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]
Chunking = Literal["equal", "sentences"]
LossName = Literal["ce", "kl"]
LOSSES: dict[LossName, str] = {  # what each is; `d2l.train.losses` computes them
    "ce": "cross-entropy with the answer",
    "kl": "the divergence from a teacher's probabilities, which `d2l data teacher` adds to the data",
}
TEACHER_LOSSES: frozenset[LossName] = frozenset({"kl"})  # need a teacher's log-probabilities in the data


class CurriculumStage(BaseModel):
    """One stage of a curriculum of generated needles."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pairs: Count
    digits: Digits
    filler_words: NonNegative = 0
    min_filler_words: NonNegative | None = None
    passing: PositiveShare = 0.9
    documents: Count | None = None

    @field_validator("min_filler_words")
    @classmethod
    def _least_is_not_above_most(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value > info.data.get("filler_words", value):
            raise ValueError(f"must not be above filler_words ({info.data['filler_words']})")
        return value


class RunConfig(BaseModel):
    """Everything that shapes a run. Lengths are in tokens, the learning rate is per optimizer step.

    What a key means stands in `d2l.config.descriptions`, group by group. `remarks` holds what `load_config` noted, such
    as keys of the reference that have no effect here; it is not part of what is saved.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    # Base model and tokenizer
    model_name_or_path: str = "configs/models/tiny_gpt_oss"
    tokenizer_name_or_path: str | None = None
    chat_template: str | None = None
    current_date: str | None = Field(None, pattern=r"^\d{4}-\d{2}-\d{2}$")
    supervision: Literal["content", "sampled"] = "content"
    control_tokens: Literal["text", "refuse", "keep"] = "text"
    attn_implementation: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    expert_weights: Literal["auto", "packed", "dequantize", "native"] = "auto"
    expert_transient_gib: Positive = 0.5

    device_memory: Bytes | None = None

    # Context encoder
    ctx_encoder_type: Literal["embed_only", "per_layer_activations", "early_exit", "concat_layers"] = "early_exit"
    layer_idx: NonNegative | None = None
    quantize_ctx_encoder: bool = False

    # Hypernetwork
    lora_r: Count = 8
    target_modules: tuple[str, ...] = Field(("q_proj",), min_length=1)
    latent_size: Count = 512
    n_latent_queries: Count = 208
    perceiver_heads: MultipleOfFour = 16
    perceiver_head_dim: Count = 128
    perceiver_query_scale: Positive = 1.0
    num_blocks: Count = 8
    num_self_attn_per_block: NonNegative = 0
    shared_weights: bool = False
    num_pre_head_layers: NonNegative = 1
    per_rank_gen: bool = True
    per_layer_processing: bool = True
    use_bias: bool = True

    # Data
    train_ds_names: tuple[str, ...] = ()
    max_train_samples_per_ds: Count | None = None
    needle_documents: Count = 64
    needle_pairs: Count = 2
    needle_digits: Digits = 2
    needle_style: Literal["sentences", "pairs"] = "sentences"
    needle_filler_words: NonNegative = 16
    curriculum: tuple[CurriculumStage, ...] = ()
    max_ctx_len: Length = -1
    max_qas_len: Length = 2048
    max_qas_per_sample: Length = -1
    max_ctx_chunk_len: Length = -1
    min_ctx_chunk_len: Length = -1
    max_ctx_chunk_num: Count | None = None
    num_chunk_probs: dict[Whole, Probability] | None = None
    chunking: Chunking = "equal"
    chunk_overlap: NonNegative = 0
    max_packed_inp_len: Count = 16384
    max_packed_ctx_len: Count = 32768
    cache: bool = True
    cache_dir: str | None = None

    # Loss
    loss: LossName = "ce"
    use_per_ctx_average_loss: bool = False
    gen_lora_l1_reg_coef: NonNegativeReal = 0.0

    # Optimization
    learning_rate: Positive = 4e-5
    muon_learning_rate: Positive | None = None
    weight_decay: NonNegativeReal = 0.01
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    adam_epsilon: Positive = 1e-8
    max_grad_norm: Positive = 1.0
    lr_scheduler_type: Literal["cosine_with_min_lr", "constant_with_warmup", "linear", "warmup_stable_decay"] = (
        "cosine_with_min_lr"
    )
    min_lr: NonNegativeReal = 1e-7
    warmup_steps: NonNegative = 100
    decay_steps: NonNegative = 0
    max_steps: Count = 1000
    gradient_accumulation_steps: Count = 1
    gradient_checkpointing: bool = False
    gradient_checkpointing_kwargs: dict[str, Any] = Field(default_factory=lambda: {"use_reentrant": False})
    seed: Seed = 42

    # Evaluation
    eval_steps: Count | None = None
    eval_documents: Several = 32
    val_ds_names: tuple[str, ...] = ()

    # Output
    output_dir: str = "runs"
    save_steps: Count = 500
    save_total_limit: Count = 2
    grace_seconds: Positive = 30.0  # torchelastic's and Slurm's own
    report_to: tuple[TrackerName, ...] = ()
    logging_steps: Count = 1

    # Preflight
    select_checks: tuple[str, ...] = ()
    ignore_checks: dict[str, str] = Field(default_factory=dict)

    remarks: tuple[str, ...] = Field((), exclude=True)

    @field_validator("layer_idx")
    @classmethod
    def _layer_idx_is_for_early_exit(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("ctx_encoder_type", "early_exit") != "early_exit":
            raise ValueError("only used with ctx_encoder_type: early_exit; remove it or change the type")
        return value

    @field_validator("current_date", mode="before")
    @classmethod
    def _a_day_is_text(cls, value: Any) -> Any:
        return value.isoformat() if isinstance(value, date) else value  # YAML reads 2025-08-05 without quotes as a date

    @field_validator("target_modules", "train_ds_names", "val_ds_names", "select_checks", mode="before")
    @classmethod
    def _one_name_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("report_to", mode="before")
    @classmethod
    def _none_is_no_tracker(cls, value: Any) -> Any:
        return [] if value == "none" else [value] if isinstance(value, str) else value  # as TrainingArguments have it

    @field_validator("report_to")
    @classmethod
    def _trackers_are_distinct(cls, value: tuple[TrackerName, ...]) -> tuple[TrackerName, ...]:
        return tuple(dict.fromkeys(value))

    @field_validator("target_modules")
    @classmethod
    def _targets_are_distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("a module is named twice")
        return tuple(sorted(value))  # the reference sorts modules by name; every shape follows that order

    @field_validator("curriculum")
    @classmethod
    def _curriculum_is_of_needles(
        cls, value: tuple[CurriculumStage, ...], info: ValidationInfo
    ) -> tuple[CurriculumStage, ...]:
        if value and info.data.get("train_ds_names") != (NEEDLE,):
            raise ValueError(f"its stages are generated: needs train_ds_names: [{NEEDLE}] and nothing else")
        if value and info.data.get("max_train_samples_per_ds") is not None:
            raise ValueError("each stage has needle_documents documents; remove max_train_samples_per_ds")
        return value

    @field_validator("min_ctx_chunk_len")
    @classmethod
    def _chunks_have_room(cls, value: int, info: ValidationInfo) -> int:
        longest = info.data.get("max_ctx_chunk_len", -1)
        if value != -1 and longest != -1 and value > longest:
            raise ValueError(f"must not be above max_ctx_chunk_len ({longest})")
        return value

    @field_validator("num_chunk_probs")
    @classmethod
    def _probabilities_sum_to_one(cls, value: dict[int, float] | None, info: ValidationInfo) -> dict[int, float] | None:
        if value is None:
            return None
        if min(value, default=0) < 1:
            raise ValueError("needs at least one entry, and chunk counts of 1 or more")
        if abs(sum(value.values()) - 1) > 1e-6:
            raise ValueError(f"probabilities must sum to 1, these sum to {sum(value.values()):g}")
        if info.data.get("max_ctx_chunk_len", -1) == -1:
            raise ValueError("needs max_ctx_chunk_len, the longest chunk")
        return value

    @field_validator("chunk_overlap")
    @classmethod
    def _overlap_leaves_room(cls, value: int, info: ValidationInfo) -> int:
        longest = info.data.get("max_ctx_chunk_len", -1)
        if longest != -1 and 0 < longest <= value:
            raise ValueError(f"must be below max_ctx_chunk_len ({longest})")
        return value

    @property
    def needs_teacher(self) -> bool:
        """Return whether the loss compares with a teacher's log-probabilities, which the data has to carry."""
        return self.loss in TEACHER_LOSSES

    @property
    def stages(self) -> tuple[CurriculumStage, ...]:
        """Return the stages of the run's generated needles; a single one without a curriculum."""
        single = CurriculumStage(
            pairs=self.needle_pairs, digits=self.needle_digits, filler_words=self.needle_filler_words
        )
        return self.curriculum or (single,)

    def documents_of(self, stage: CurriculumStage) -> int:
        """Return the number of documents that are generated for a stage."""
        return self.needle_documents if stage.documents is None else stage.documents

    def resolved(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values, complete, in the order of the fields."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Return the configuration as YAML that `load_config` reads back to an equal value."""
        return yaml.safe_dump(self.resolved(), sort_keys=False)
