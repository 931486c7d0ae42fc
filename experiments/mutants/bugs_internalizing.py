"""Mutants of what follows a training: a checkpoint in use, documents that become adapters, and several in one."""

from experiments.mutants.mutant import bugs

_AREA = "internalizing"

MUTANTS = [
    *bugs(
        _AREA,
        "d2l.inference.load:restore_model",
        "internalize",
        (
            "scaler-b-as-initialised",
            "load_hypernet(model.hypernet, checkpoint.hypernet)",
            "load_hypernet(\n        model.hypernet,\n        {**checkpoint.hypernet, **{k: v for k, v in "
            'model.hypernet.state_dict().items() if "scaler_B" in k}},\n    )',
            "every document becomes the same LoRA: the learned bias",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.inference.reading:cut",
        "internalize",
        (
            "internalized-in-one-chunk",
            "max_ctx_chunk_num=None\n",
            "max_ctx_chunk_num=None, max_ctx_chunk_len=-1\n",
            "long documents are read otherwise than in training",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.inference.reading:join",
        "internalize",
        (
            "internalized-bias-unscaled",
            "None if bias is None else _on_host(bias)",
            "bias",
            "what all documents share is too weak in every adapter",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.inference.reading:_on_host",
        "internalize",
        (
            "internalized-unscaled",
            "moved(lora.B, lora.scale)",
            "moved(lora.B, 1.0)",
            "adapters are too weak by the LoRA's scale",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.inference.reading:read_chunks",
        "internalize",
        (
            "chunks-of-a-pack-in-reverse",
            "yield keys[place], made[number]",
            "yield keys[place], made[-1 - number]",
            "where chunks are packed, adapters get the chunks of other documents",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.inference.reading:chunk_hash",
        "internalize",
        (
            "chunks-known-by-their-beginning",
            'array("q", chunk)',
            'array("q", chunk[:16])',
            "a chunk that begins like another gets its LoRA",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.inference.written:read_rows",
        "internalize",
        (
            "old-chunks-of-another-place",
            "slice(number * rank, (number + 1) * rank)",
            "slice((len(card.chunk_hashes) - 1 - number) * rank, (len(card.chunk_hashes) - number) * rank)",
            "a document that changed in part gets the LoRAs of other chunks",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.inference.batch:Internalizer._is_right",
        "internalize",
        (
            "adapter-of-another-form-kept",
            "            and dict(card.settings) == self.settings\n",
            "",
            "the server that it is for cannot load the adapter",
        ),
        (
            "adapter-of-another-text-kept",
            'card.document["sha256"] == digest\n            and ',
            "",
            "a document that changed is answered from its old text",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.inference.batch:Internalizer._is_alike",
        "internalize",
        (
            "adapter-of-another-checkpoint-kept",
            'card.checkpoint["sha256"] == self.checkpoint["sha256"]',
            "True",
            "after more training, documents keep the adapters of earlier weights",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.inference.batch:Internalizer._old_chunks",
        "internalize",
        (
            "rounded-chunks-reused",
            'if card.settings.get("dtype") != "float32" and not same_dtype:',
            "if False:",
            "adapters in float32 hold chunks that were rounded to bfloat16",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.inference.merge:merge_documents",
        "merging",
        (
            "merged-bias-once-for-each",
            "[part.rank - part.bias_rank for part in parts[:-1]]",
            "[part.rank for part in parts[:-1]]",
            "what all documents share is as many times too strong as documents are merged",
        ),
        (
            "merged-chunks-of-the-shortest",
            "zip(sides, ends, strict=True)",
            "zip(sides, [min(ends)] * len(ends), strict=True)",
            "the last chunks of long documents are lost, and the bias with them",
        ),
    ),
]
