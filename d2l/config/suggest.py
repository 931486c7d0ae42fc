"""The keys that a user may mean by one that does not exist: words of other tools first, then the nearest spellings."""

import difflib
from collections.abc import Iterable

from d2l.config.huggingface import TRANSLATED
from d2l.config.reference_keys import HAS_NO_EFFECT, UNSUPPORTED
from d2l.config.renamed import OLD_NAMES
from d2l.config.schema import REMARKS, CurriculumStage, RunConfig

_SURE = 0.8  # likeness of a misspelt word of another tool: below, it is only by chance like one
_ALIKE = 0.03  # names whose likeness differs by less are all shown
_BATCH = "per_device_train_batch_size gradient_accumulation_steps max_packed_inp_len"
_LENGTHS = "max_packed_inp_len max_packed_ctx_len max_qas_len max_ctx_len"

# What it is called here ← words of axolotl, litgpt, torchtitan, TRL, peft and others.
_WORDS: dict[str, str] = {
    _BATCH: "batch_size micro_batch_size train_batch_size global_batch_size local_batch_size bs",
    _LENGTHS: "seq_len sequence_len sequence_length max_seq_len max_seq_length max_length block_size cutoff_len "
    "context_length model_max_length",
    "model_name_or_path": "model base_model model_id model_name model_path",
    "tokenizer_name_or_path": "tokenizer tokenizer_name tokenizer_path",
    "chat_template": "template chat_format prompt_template",
    "attn_implementation": "attention attn attn_impl flash_attention flash_attn sdp_attention",
    "dtype": "precision torch_dtype mixed_precision compute_dtype",
    "expert_weights": "load_in_4bit load_in_8bit quantize quantization",
    "lora_r": "r rank lora_rank lora_dim",
    "target_modules": "modules lora_modules lora_target_modules targets",
    "latent_size": "hidden_size hidden_dim d_model width",
    "num_blocks": "n_layers num_layers depth",
    "perceiver_heads": "num_heads n_heads heads",
    "perceiver_head_dim": "head_dim",
    "train_ds_names": "data dataset datasets dataset_name dataset_path train_data train_file train_files data_path data_files",
    "max_train_samples_per_ds": "max_samples num_samples limit max_train_samples",
    "max_ctx_chunk_len": "chunk_size chunk_len chunk_length",
    "loss": "kl kl_loss distillation loss_type criterion",
    "gen_lora_l1_reg_coef": "l1 l1_coef l1_weight",
    "learning_rate": "lr max_lr base_lr",
    "muon_learning_rate optim": "optimizer optimiser muon",
    "weight_decay": "wd decay",
    "adam_beta1 adam_beta2": "beta1 beta2 betas adam_betas",
    "adam_epsilon": "eps epsilon",
    "max_grad_norm": "grad_clip clip_grad clip_grad_norm max_norm gradient_clipping gradient_clip_val clip",
    "lr_scheduler_type": "scheduler lr_scheduler lr_schedule lr_decay",
    "warmup_steps": "warmup warmup_iters num_warmup_steps",
    "max_steps": "steps num_steps total_steps train_steps max_iters iterations epochs num_epochs max_epochs",
    "gradient_accumulation_steps": "grad_accum grad_accum_steps accumulation_steps gradient_accumulation "
    "accumulate_grad_batches",
    "gradient_checkpointing": "grad_checkpoint checkpointing",
    "seed": "random_seed rng_seed",
    "output_dir": "out_dir output save_dir checkpoint_dir save_path",
    "save_steps": "save_every save_interval checkpoint_interval ckpt_interval",
    "grace_seconds": "grace grace_period kill_wait terminate_timeout",
    "save_total_limit": "keep_last max_checkpoints save_limit",
}
OTHER_WORDS: dict[str, tuple[str, ...]] = {
    word: tuple(keys.split()) for keys, words in _WORDS.items() for word in words.split()
}


def known_names() -> list[str]:
    """Return every name that a configuration may hold: own keys, those of the reference, and old names."""
    own = [name for name in RunConfig.model_fields if name != REMARKS]
    return [*own, *UNSUPPORTED, *HAS_NO_EFFECT, *TRANSLATED, *OLD_NAMES]


def nearest(key: str, *, stage: bool = False) -> tuple[str, ...]:
    """Return the names that may be meant, the likeliest first; empty where none is near.

    Args:
        key: a name that does not exist.
        stage: whether it stands in an entry of the curriculum.
    """
    asked = key.strip().lower().replace("-", "_").replace(" ", "_")
    if stage:
        return _close(asked, CurriculumStage.model_fields)[:1]
    names = known_names()
    if asked in names:
        return (asked,)
    near = _close(asked, [*names, *OTHER_WORDS])
    if near and near[0] in OTHER_WORDS and _ratio(near[0], asked) > _SURE:
        return OTHER_WORDS[near[0]]
    if near := _close(asked, names):
        return tuple(dict.fromkeys(OLD_NAMES[name].name if name in OLD_NAMES else name for name in near))
    return tuple(name for name in names if asked in name.split("_"))[:3]


def hint(key: str, *, stage: bool = False) -> str:
    """Return the end of a message about an unknown key: what may be meant, else where all keys are listed."""
    near = nearest(key, stage=stage)
    if not near:
        return "`d2l config` lists the keys"
    return f"did you mean {near[0]}?" if len(near) == 1 else f"did you mean {', '.join(near[:-1])} or {near[-1]}?"


def _close(key: str, names: Iterable[str]) -> tuple[str, ...]:
    """Return the nearest spelling, and up to two more that are nearly as near."""
    found = difflib.get_close_matches(key, list(names), n=3)
    return tuple(name for name in found if _ratio(name, key) > _ratio(found[0], key) - _ALIKE)


def _ratio(name: str, key: str) -> float:
    """Return how alike two words are, as difflib counts it: 1 for equal ones."""
    return difflib.SequenceMatcher(None, name, key).ratio()
