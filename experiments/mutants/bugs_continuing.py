"""Mutants of runs that go on with other inputs, and of adapters of a smaller rank."""

from experiments.mutants.mutant import bugs

_CONTINUED, _SMALLER = "resuming with other inputs", "adapters of a smaller rank"

MUTANTS = [
    *bugs(
        _CONTINUED,
        "d2l.train.changes:_compare_batches",
        "continuing",
        (
            "processes-not-counted",
            "now.gradient_accumulation_steps * processes",
            "now.gradient_accumulation_steps * before",
            "a second GPU doubles the batch of a resumed run, and nobody is told",
        ),
        (
            "processes-not-multiplied",
            "then.gradient_accumulation_steps * before, now.gradient_accumulation_steps * processes",
            "then.gradient_accumulation_steps, now.gradient_accumulation_steps",
            "a second GPU that takes half of the micro-batches is refused, and one that doubles them is not",
        ),
        (
            "a-multiple-is-the-same",
            "if was == found:",
            "if found % was == 0:",
            "a batch twice as large goes through",
        ),
    ),
    *bugs(
        _CONTINUED,
        "d2l.train.changes:compare_configs",
        "continuing",
        (
            "rates-not-compared",
            "elif key not in CHANGEABLE and ours[key] != theirs[key]:",
            'elif key not in {*CHANGEABLE, "learning_rate"} and ours[key] != theirs[key]:',
            "a run is resumed with another learning rate",
        ),
        (
            "places-compared",
            "elif key not in CHANGEABLE and ours[key] != theirs[key]:",
            "elif ours[key] != theirs[key]:",
            "a run cannot be resumed with another save_steps",
        ),
    ),
    *bugs(
        _CONTINUED,
        "d2l.train.changes:compare_inputs",
        "continuing",
        (
            "base-not-compared",
            "for part in PARTS:",
            'for part in ("data", "tokenizer", "chat"):',
            "a run is resumed on another base",
        ),
    ),
    *bugs(
        _CONTINUED,
        "d2l.fingerprint:_contents",
        "continuing",
        (
            "answers-not-hashed",
            "[record.context, record.prompts, record.responses]",
            "[record.context, record.prompts]",
            "answers that were edited meanwhile are trained on unnoticed",
        ),
        (
            "questions-not-hashed",
            "[record.context, record.prompts, record.responses]",
            "[record.context, record.responses]",
            "questions that were edited meanwhile are trained on unnoticed",
        ),
        (
            "documents-not-hashed",
            "[record.context, record.prompts, record.responses]",
            "[record.prompts, record.responses]",
            "documents that were edited meanwhile are trained on unnoticed",
        ),
        (
            "teacher's-tokens-not-hashed",
            "[record.logprobs_vals, record.logprobs_indices]",
            "[record.logprobs_vals]",
            "a teacher of another vocabulary is not noticed",
        ),
    ),
    *bugs(
        _CONTINUED,
        "d2l.fingerprint:_data_sha256",
        "continuing",
        (
            "first-record-hashed",
            "for index, record in enumerate(records):",
            "for index, record in enumerate(records[:1]):",
            "all other records may change unnoticed",
        ),
        (
            "order-not-hashed",
            "for index, record in enumerate(records):",
            "for index, record in enumerate(sorted(records, key=str)):",
            "a run goes on with other batches than it would have had",
        ),
    ),
    *bugs(
        _CONTINUED,
        "d2l.checkpoint:take_snapshot",
        "snapshot",
        (
            "moments-shared",
            "_copy(checkpoint.trainer)",
            "dict(checkpoint.trainer)",
            "moments of later steps are written beside the weights of this one",
        ),
        (
            "weights-shared",
            "_copy(checkpoint.hypernet)",
            "dict(checkpoint.hypernet)",
            "weights of later steps are written beside the moments of this one",
        ),
        (
            "state-shared",
            "deepcopy(dict(checkpoint.state))",
            "dict(checkpoint.state)",
            "a stage of the curriculum could be written that is reached later",
            "equivalent: every checkpoint's state is made anew",
        ),
    ),
    *bugs(
        _SMALLER,
        "d2l.inference.low_rank:_nearest",
        "smaller_rank",
        (
            "root-lost",
            "values[:kept].sqrt()[:, None]",
            "values[:kept][:, None]",
            "a served adapter of another rank is one with squared singular values",
        ),
        (
            "largest-lost",
            "u[:, :kept]).mT, root * (vt[:kept]",
            "u[:, -kept:]).mT, root * (vt[-kept:]",
            "the least important directions are kept",
        ),
        ("one-less", "kept = min(rank, len(values))", "kept = min(rank, len(values)) - 1", "a rank is lost"),
    ),
]
