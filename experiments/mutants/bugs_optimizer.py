"""Mutants of the optimizer and of the schedule."""

from experiments.mutants.mutant import bugs

_AREA = "optimizer and schedule"

MUTANTS = [
    *bugs(
        _AREA,
        "d2l.train.optimizer:parameter_groups",
        "optimizer",
        (
            "decay-on-everything",
            '"weight_decay": 0.0}',
            '"weight_decay": config.weight_decay}',
            "norms and scalers decay",
        ),
        ("no-decay-at-all", '"weight_decay": config.weight_decay', '"weight_decay": 0.0', "the option has no effect"),
        (
            "groups-swapped",
            "(others if no_decay else weights)",
            "(weights if no_decay else others)",
            "norms decay and weights do not",
        ),
        ("queries-decay", '"latents_q", ', "", "the Perceiver's queries shrink"),
        ("muon-rate-ignored", "config.muon_learning_rate or lr", "lr", "the option has no effect"),
        (
            "shared-lora-not-trained",
            "(others if no_decay else weights).append(parameter)",
            '"bias_B" in name or (others if no_decay else weights).append(parameter)',
            "a part of the parameters never learns",
        ),
        ("tenth-of-the-rate", "lr = config.learning_rate", "lr = config.learning_rate / 10", "not as configured"),
    ),
    *bugs(
        _AREA,
        "d2l.train.optimizer:make_optimizer",
        "optimizer",
        (
            "betas-swapped",
            "betas=(config.adam_beta1, config.adam_beta2)",
            "betas=(config.adam_beta2, config.adam_beta1)",
            "updates lag a thousand steps behind",
        ),
        (
            "betas-ignored",
            "betas=(config.adam_beta1, config.adam_beta2)",
            "betas=(0.9, 0.999)",
            "the options have no effect",
        ),
        ("epsilon-ignored", "eps=config.adam_epsilon", "eps=1e-8", "the option has no effect"),
        (
            "coupled-weight-decay",
            "kind = torch.optim.AdamW if",
            "kind = torch.optim.Adam if",
            "decay is part of the gradient and is normalised away",
        ),
        ("gradient-ascent", "eps=config.adam_epsilon,", "eps=config.adam_epsilon, maximize=True,", "the loss rises"),
        (
            "amsgrad-unrequested",
            "eps=config.adam_epsilon,",
            "eps=config.adam_epsilon, amsgrad=True,",
            "another optimizer",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.train.optimizer:MuonAdamW.step",
        "optimizer",
        ("muon-skips-matrices", "it.grad is not None", "it.grad is None", "no weight matrix learns"),
    ),
    *bugs(
        _AREA,
        "d2l.train.optimizer:MuonAdamW._step_matrices",
        "optimizer",
        (
            "muon-momentum-inverted",
            "lerp_(momenta, gradients, 1 - MUON_MOMENTUM)",
            "lerp_(momenta, gradients, MUON_MOMENTUM)",
            "no momentum",
        ),
        (
            "muon-without-nesterov",
            "torch._foreach_lerp(gradients, momenta, MUON_MOMENTUM)",
            "momenta",
            "another optimizer",
        ),
        (
            "muon-size-ignored",
            "_ADAMW_RMS * max(parameters[0].shape[-2:]) ** 0.5",
            "_ADAMW_RMS",
            "large matrices learn tens of times too slowly",
        ),
        (
            "muon-decay-without-rate",
            "1 - lr * weight_decay",
            "1 - weight_decay",
            "weights vanish within a hundred steps",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.train.optimizer:orthogonalize",
        "optimizer",
        (
            "stack-orthogonalised-as-one",
            "x.norm(dim=(-2, -1), keepdim=True)",
            "x.norm()",
            "layers with small gradients hardly learn",
        ),
        ("one-iteration", "range(_ITERATIONS)", "range(1)", "updates are hardly orthogonal"),
    ),
    *bugs(
        _AREA,
        "d2l.train.optimizer:make_schedule",
        "optimizer",
        ("no-warm-up", "num_warmup_steps=config.warmup_steps", "num_warmup_steps=0", "first steps are too large"),
        (
            "schedule-over-ten-runs",
            "num_training_steps=config.max_steps",
            "num_training_steps=10 * config.max_steps",
            "the learning rate hardly falls",
        ),
        (
            "schedule-in-micro-batches",
            "num_training_steps=config.max_steps",
            "num_training_steps=config.max_steps * config.gradient_accumulation_steps",
            "the learning rate does not reach its end with accumulation",
        ),
        ("minimum-rate-ignored", '"min_lr": config.min_lr', '"min_lr": 0.0', "the option has no effect"),
        (
            "decay-steps-ignored",
            '"num_decay_steps": config.decay_steps',
            '"num_decay_steps": config.max_steps // 2',
            "the option has no effect",
        ),
        (
            "schedule-by-another-name",
            "        config.lr_scheduler_type,\n",
            '        "constant_with_warmup",\n',
            "the learning rate never falls",
        ),
    ),
]
