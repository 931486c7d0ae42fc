"""Mutants of checkpoints, resuming, adapters and the import of the reference's checkpoints."""

from experiments.mutants.mutant import bugs

_RESUME, _EXPORT = "checkpoint and resume", "export and import"

MUTANTS = [
    *bugs(
        _RESUME,
        "d2l.train.loop:Trainer.checkpoint",
        "resume",
        (
            "position-not-saved",
            '"position": self.position',
            '"position": 0',
            "the epoch's first batches are seen twice",
        ),
        ("epoch-not-saved", '"epoch": self.epoch', '"epoch": 0', "the first epoch's batches again"),
        (
            "moments-saved-as-zeros",
            'name}": value for key, value in moments',
            'name}": torch.zeros_like(value) for key, value in moments',
            "the optimizer starts anew after a resume",
        ),
        (
            "curriculum-not-saved",
            '"curriculum": self.curriculum.state()',
            '"curriculum": {"stage": 0, "average": 0.0}',
            "a resumed run starts its curriculum anew",
        ),
        ("step-off-by-one", '"step": self.step_number', '"step": self.step_number + 1', "a step is left out"),
        (
            "random-state-of-a-seed",
            'trainer = {"rng.torch": torch.get_rng_state()}',
            'trainer = {"rng.torch": torch.Generator().manual_seed(0).get_state()}',
            "a resumed run draws other numbers",
        ),
    ),
    *bugs(
        _RESUME,
        "d2l.train.loop:Trainer.restore",
        "resume",
        (
            "weights-not-restored",
            "load_hypernet(self.model.hypernet, checkpoint.hypernet)",
            "pass",
            "a resumed run starts from random weights",
        ),
        (
            "adam-step-restarts",
            'value.clone() if key == "step"',
            'torch.zeros_like(value) if key == "step"',
            "the bias correction of moments starts anew: huge updates",
        ),
        (
            "second-moment-not-restored",
            "value.to(parameter.device, copy=True)",
            'value.to(parameter.device, copy=True) * (key != "exp_avg_sq")',
            "huge updates after a resume",
        ),
        (
            "schedule-not-restored",
            'self.scheduler.load_state_dict(self.scheduler.state_dict() | checkpoint.state["scheduler"])',
            "pass",
            "the warm-up starts anew after a resume",
        ),
        ("rate-not-restored", 'group["lr"] = lr', "pass", "the first step after a resume has another learning rate"),
        (
            "position-not-restored",
            'for name in ("step", "epoch", "position"))',
            'for name in ("step", "epoch", "epoch"))',
            "batches are seen twice or never",
        ),
        (
            "epoch-not-restored",
            'for name in ("step", "epoch", "position"))',
            'for name in ("step", "position", "position"))',
            "another epoch's batches",
        ),
        (
            "curriculum-not-restored",
            'self.curriculum.restore(checkpoint.state["curriculum"])',
            "pass",
            "a resumed run starts its curriculum anew",
        ),
        (
            "random-state-not-restored",
            'torch.set_rng_state(checkpoint.trainer["rng.torch"])',
            "pass",
            "a resumed run draws other numbers",
        ),
    ),
    *bugs(
        _RESUME,
        "d2l.train.curriculum:Curriculum.restore",
        "curriculum",
        ("average-not-restored", 'state["average"]', "0.0", "a stage lasts longer after a resume"),
    ),
    *bugs(
        _RESUME,
        "d2l.checkpoint:save_checkpoint",
        "checkpoint",
        (
            "saved-in-half-precision",
            "save_file(_copy_contiguous(checkpoint.hypernet), partial",
            "save_file({k: v.half().float() for k, v in _copy_contiguous(checkpoint.hypernet).items()}, partial",
            "small weights are lost at every resume",
        ),
    ),
    *bugs(
        _RESUME,
        "d2l.checkpoint:verify_checkpoint",
        "checkpoint",
        ("hashes-not-compared", "if _sha256(file) != digest:", "if False:", "damaged weights are loaded"),
    ),
    *bugs(
        _RESUME,
        "d2l.checkpoint:find_newest_checkpoint",
        "checkpoint",
        ("oldest-checkpoint-chosen", "reverse=True", "reverse=False", "a resume repeats all steps but the first"),
        (
            "damaged-checkpoint-chosen",
            "rejected.append(str(error))",
            "return folder, rejected",
            "a resume ends in an error, though an older checkpoint is whole",
        ),
    ),
    *bugs(
        _RESUME,
        "d2l.checkpoint:step_folder",
        "checkpoint",
        ("steps-not-padded", "{step:06d}", "{step}", "step 9 counts as newer than step 100"),
    ),
    *bugs(
        _RESUME,
        "d2l.checkpoint:prune_checkpoints",
        "checkpoint",
        ("newest-checkpoints-removed", "complete[:-keep]", "complete[keep:]", "a resume repeats the whole run"),
    ),
    *bugs(
        _RESUME,
        "d2l.checkpoint:load_hypernet",
        "checkpoint",
        ("weights-not-loaded", "hypernet.load_state_dict(tensors)", "pass", "a random hypernetwork serves"),
        (
            "biases-not-loaded",
            "hypernet.load_state_dict(tensors)",
            'hypernet.load_state_dict({k: v for k, v in tensors.items() if "bias_B" not in k}, strict=False)',
            "the shared LoRA is lost",
        ),
    ),
    *bugs(
        _RESUME,
        "d2l.checkpoint:_require_saveable",
        "checkpoint",
        ("nan-weights-saved", "if not bool(value.isfinite().all()):", "if False:", "the newest checkpoint is useless"),
    ),
    *bugs(
        _EXPORT,
        "d2l.inference.adapter:export_adapter",
        "export",
        ("alpha-is-the-scale", "lora_alpha=lora.scale * lora.rank", "lora_alpha=lora.scale", "r times too weak served"),
        (
            "alpha-by-the-chunk's-rank",
            "lora_alpha=lora.scale * lora.rank",
            "lora_alpha=lora.scale * (lora.scale / 2) ** (2 / 3)",
            "long documents are served too weak",
        ),
        (
            "exported-in-reverse",
            "zip(modules, lora.A[name][0]",
            "zip(modules[::-1], lora.A[name][0]",
            "each layer is served the LoRA of the one opposite",
        ),
        (
            "exported-in-half-precision",
            "value.detach().cpu().contiguous()",
            "value.detach().cpu().bfloat16().float().contiguous()",
            "served answers differ slightly",
        ),
        ("rank-stabilised-scale", "lora_dropout=0.0,", "lora_dropout=0.0, use_rslora=True,", "too strong when served"),
    ),
    *bugs(
        _EXPORT,
        "d2l.inference.adapter:_remove_padding",
        "export",
        ("last-rank-lost", ".flatten().tolist() or [0]", ".flatten().tolist()[:-1] or [0]", "a rank is not served"),
        (
            "bias-not-exported",
            "used = largest.nonzero()",
            "used = largest[: len(largest) // 2].nonzero()",
            "half of the ranks, the shared LoRA among them, are not served",
        ),
    ),
    *bugs(
        _EXPORT,
        "d2l.reference.load:import_reference",
        "reference",
        (
            "imported-in-half-precision",
            "{name: source.read_tensor(it) for",
            "{name: source.read_tensor(it).half().float() for",
            "the imported model computes something else",
        ),
    ),
    *bugs(
        _EXPORT,
        "d2l.reference.load:_make_config",
        "reference",
        (
            "imported-layer-idx-lost",
            'fields["ctx_encoder_args.layer_idx"] if is_early else None',
            "None",
            "features of another layer than in training",
        ),
    ),
    *bugs(
        _EXPORT,
        "d2l.reference.load:_list_differences",
        "reference",
        (
            "other-models-accepted",
            "if not _is_one_of(fields[key], accepted):",
            "if False:",
            "a model with another scale is imported as if it had ours",
        ),
    ),
]
