"""Keys of the reference implementation's YAML that d2l does not have, and what it says about each.

`UNSUPPORTED` would change what is trained: only the neutral values are accepted. `HAS_NO_EFFECT` is plumbing of the
reference's trainer that cannot change what is trained here. The defaults are those of SakanaAI/doc-to-lora.
"""

from typing import Any

_NO_OTHER_ENCODER = "the frozen base reads the document itself; one copy of the base is kept"

UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "add_negative_prompt": ((False,), "negative prompts are not implemented; remove it"),
    "aggregator_type": (("perceiver",), "the Perceiver is the published aggregator; remove it"),
    "avg_chunk_loras": ((False,), "chunks are concatenated along the rank, as published; remove it"),
    "ctx_encoder_model_name_or_path": ((None,), f"{_NO_OTHER_ENCODER}; remove it"),
    "ctx_encoder_last_layer": ((None,), "the features are those of the base's own layers; remove it"),
    "dropout_rate": ((0, 0.0, None), "the hypernetwork has no dropout; set it to 0"),
    "exp_setup": (("hyper_lora",), "only hyper_lora exists here; remove it"),
    "extra_modules": ((None, []), "only LoRA is generated; remove it"),
    "from_pretrained_checkpoint": ((None,), "start from a checkpoint with `d2l train --resume`; remove it"),
    "lora_dropout": ((0, 0.0, None), "generated adapters have no dropout; set it to 0"),
    "lr_scheduler_kwargs": ((None, {}), "write its min_lr as the key min_lr"),
    "neftune_noise_alpha": ((0, 0.0, None), "embedding noise is not implemented; set it to 0"),
    "num_train_epochs": ((None,), "a run's length is given in steps; use max_steps"),
    "optim": (("adamw_torch", "adamw_torch_fused"), "the optimizer is AdamW; remove it"),
    "per_device_train_batch_size": ((-1, 1), "a micro-batch is one packed row; use gradient_accumulation_steps"),
    "streaming": ((False,), "data is read whole, so that every row can be checked before the run; remove it"),
    "use_light_weight_lora": ((False,), "only full heads exist here; remove it"),
    "use_per_rank_bias": ((False,), "bias is per module, as published; remove it"),
    "use_sequence_packing": ((True,), "rows are always packed; remove it or set it to true"),
    "use_token_mixing": ((False,), "it has no effect in the reference either; remove it"),
}

_TRACKING = "metrics go to metrics.jsonl in the run's folder"
_EVALUATION = "training does not evaluate in between"
_LOADING = "rows are tokenized and packed before the run"

HAS_NO_EFFECT: dict[str, str] = {
    "average_tokens_across_devices": "losses are always normalised by global token counts",
    "bf16": "see dtype",
    "dataloader_num_workers": _LOADING,
    "dataloader_persistent_workers": _LOADING,
    "dataloader_prefetch_factor": _LOADING,
    "ddp_find_unused_parameters": "every parameter takes part",
    "ddp_timeout": "set it through accelerate",
    "eval_on_start": _EVALUATION,
    "eval_steps": _EVALUATION,
    "eval_strategy": _EVALUATION,
    "gen_per_device_eval_batch_size": _EVALUATION,
    "include_for_metrics": _EVALUATION,
    "label_names": "labels are part of the packed batch",
    "light_weight_latent_size": "see use_light_weight_lora",
    "load_best_model_at_end": _EVALUATION,
    "logging_first_step": _TRACKING,
    "logging_steps": _TRACKING,
    "logging_strategy": _TRACKING,
    "max_base_len": "inputs are bounded by max_qas_len and max_packed_inp_len",
    "max_new_tokens": _EVALUATION,
    "max_test_samples_per_ds": _EVALUATION,
    "max_val_samples_per_ds": _EVALUATION,
    "metric_for_best_model": _EVALUATION,
    "notes": "a free text for the reference's tracker",
    "num_latent_factor": "the reference's Perceiver does not read it",
    "per_device_eval_batch_size": _EVALUATION,
    "batch_eval_metrics": _EVALUATION,
    "pooling_type": "the Perceiver does not pool",
    "remove_unused_columns": "records hold only what is read",
    "report_to": _TRACKING,
    "run_name": "the run's folder is output_dir",
    "save_safetensors": "checkpoints are always safetensors",
    "save_strategy": "see save_steps",
    "test_ds_names": _EVALUATION,
    "tf32": "set it through torch",
    "torch_empty_cache_steps": "memory is left to the allocator",
    "use_flash_attn": "see attn_implementation",
    "use_liger_kernel": "logits are only formed where labels are",
    "val_ds_names": _EVALUATION,
}
