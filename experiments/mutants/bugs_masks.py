"""Mutants of masks, attention, segments and memory."""

from experiments.mutants.mutant import bugs

_AREA = "base"
_ESTIMATE = "outside the claims: an estimate in bytes; no weight is trained otherwise"

MUTANTS = [
    *bugs(
        _AREA,
        "d2l.base.masks:_dense_mask",
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
    ),
    *bugs(
        _AREA,
        "d2l.base.masks:packed_masks",
        "masks",
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
        "d2l.base.masks:_block_mask",
        "masks",
        (
            "flex-window-lost",
            'base.config.sliding_window if kind == "sliding_attention" else None',
            "None",
            "sliding layers of packed_flex see everything",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.base.blocks:first_visible",
        "masks",
        ("flex-window-one-too-wide", "places - window + 1", "places - window", "not what the model was trained with"),
        (
            "flex-one-document",
            "torch.where(segment_starts(position_ids), places, 0)",
            "torch.zeros_like(places)",
            "packed_flex shows documents to each other",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.base.blocks:block_mask",
        "block_tables",
        (
            "flex-blocks-full-across-documents",
            "(first[BLOCK - 1 :: BLOCK] + BLOCK - 1) // BLOCK",
            "(first[::BLOCK] + BLOCK - 1) // BLOCK",
            "on a GPU, documents of long rows see the ones before them",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.base.flex:_by_formula",
        "masks",
        ("flex-scores-not-scaled", " * scale", "", "attention is far too sharp"),
        (
            "flex-heads-mixed",
            "x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)",
            "x.repeat(1, query.shape[1] // x.shape[1], 1, 1)",
            "query heads read the keys of other groups",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.base.flex:_finished",
        "masks",
        ("flex-sinks-ignored", "if sinks is not None:", "if sinks is None:", "the softmax has no sinks"),
        (
            "flex-sinks-inverted",
            "torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])",
            "torch.sigmoid(sinks.to(lse.dtype)[:, None] - lse)",
            "the sink's share is kept, and the rest is left out",
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
            "moved(occupied | (lengths == 0), x.device)",
            "moved(torch.ones_like(occupied), x.device)",
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
        "d2l.hypernet.memory:perceiver_bytes",
        "memory",
        (
            "latents-not-counted",
            "return _projection_bytes(shape, layers, tokens, compute_bytes) + encoder + decoder + norms + copies",
            "return _projection_bytes(shape, layers, tokens, compute_bytes) + copies",
            "a run of many short documents that does not fit is started",
            _ESTIMATE,
        ),
    ),
    *bugs(
        _AREA,
        "d2l.plan.memory:step_phases",
        "memory",
        (
            "features-not-counted",
            'read = held | {"context features": hypernet.features}',
            'read = held | {"context features": 0}',
            "a run of long documents that does not fit is started",
            _ESTIMATE,
        ),
    ),
    *bugs(
        _AREA,
        "d2l.plan.expert_memory:mlp_kept_bytes",
        "memory",
        (
            "gates-without-ups",
            "routes * (2 * base.intermediate * sizes.element",
            "routes * (base.intermediate * sizes.element",
            "a run with many routes that does not fit is started",
            _ESTIMATE,
        ),
    ),
]
