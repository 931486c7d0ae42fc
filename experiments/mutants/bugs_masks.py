"""Mutants of masks, attention, segments and memory."""

from experiments.mutants.mutant import bugs

_AREA = "base"
_ESTIMATE = "outside the claims: an estimate in bytes; no weight is trained otherwise"

MUTANTS = [
    *bugs(
        _AREA,
        "d2l.base.masks:packed_masks",
        "masks",
        (
            "masks-ignore-positions",
            "position_ids=position_ids,",
            "position_ids=None,",
            "packed documents see each other",
        ),
        (
            "window-lost",
            "_BUILDERS[kind](",
            '_BUILDERS["full_attention"](',
            "sliding layers see everything",
        ),
        (
            "one-mask-for-all-layers",
            "masks if len(masks) > 1 else masks[layout.kinds[0]]",
            "masks[layout.kinds[0]]",
            "full layers see a window only",
        ),
        (
            "documents-cut-every-8-tokens",
            "Segments.from_position_ids(position_ids).grid(position_ids.device)[None, None]",
            "Segments.from_position_ids(position_ids % 8).grid(position_ids.device)[None, None]",
            "per_document attention cuts documents every 8 tokens",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.base.attention:_causal",
        "masks",
        ("window-one-too-wide", "(distance >= window)", "(distance > window)", "not what the model was trained with"),
        ("window-ignored", "if window is None else (distance < 0) | (distance >= window)", "", "no sliding window"),
        ("future-visible", "distance < 0 if window is None", "distance < -1 if window is None", "sees one token ahead"),
    ),
    *bugs(
        _AREA,
        "d2l.base.attention:per_document_attention",
        "masks",
        (
            "documents-out-of-order",
            "torch.cat(outputs)[torch.cat(places).argsort()]",
            "torch.cat(outputs)",
            "tokens get the attention of another document's tokens",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.base.segments:Segments.pad",
        "masks",
        (
            "padding-counted-as-keys",
            "(occupied | (lengths == 0)).to(x.device)",
            "torch.ones_like(occupied).to(x.device)",
            "a chunk's LoRA depends on the longest chunk beside it",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.base.segments:Segments.joined",
        "masks",
        (
            "questions-of-another-context",
            "accumulate(counts, initial=0)",
            "accumulate(counts[::-1], initial=0)",
            "questions are answered under another document's LoRA",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.plan.memory:_between_steps",
        "memory",
        (
            "optimizer-not-counted",
            "sizes.optimizer * _FLOAT32",
            "0",
            "a run that does not fit is started",
            _ESTIMATE,
        ),
    ),
    *bugs(
        _AREA,
        "d2l.plan.base_memory:weight_bytes",
        "memory",
        (
            "packed-as-dense",
            'if _packed(sizes) or sizes.load.experts.value == "native"',
            'if sizes.load.experts.value == "native"',
            "a run that fits is called too large",
            _ESTIMATE,
        ),
    ),
    *bugs(
        _AREA,
        "d2l.plan.hypernet_memory:hypernet_memory",
        "memory",
        (
            "latents-not-counted",
            "perceiver=latents + context",
            "perceiver=context",
            "a run of many short documents that does not fit is started",
            _ESTIMATE,
        ),
    ),
]
