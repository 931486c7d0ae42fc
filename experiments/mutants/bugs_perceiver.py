"""Mutants of the Perceiver and of the context encoder."""

from experiments.mutants.mutant import bugs

_AREA = "hypernetwork"

MUTANTS = [
    *bugs(
        _AREA,
        "d2l.hypernet.perceiver:NORM_EPS",
        "lora",
        ("norm-epsilon-too-large", "1e-6", "1e-1", "small latents are damped; imported weights compute something else"),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.perceiver:SwiGLU.forward",
        "lora",
        (
            "gate-and-up-swapped",
            "F.silu(self.gate_proj(x)) * self.up_proj(x)",
            "F.silu(self.up_proj(x)) * self.gate_proj(x)",
            "imported weights compute something else",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.perceiver:Attention.forward",
        "lora",
        (
            "padding-attended",
            "attn_mask=key_mask",
            "attn_mask=None",
            "a chunk's LoRA depends on the longest chunk beside it",
        ),
        (
            "query-heads-grouped-otherwise",
            '"b q (h g d) -> b h (g q) d"',
            '"b q (g h d) -> b h (g q) d"',
            "imported weights compute something else",
        ),
        ("perceiver-attention-unscaled", "attn_mask=key_mask", "attn_mask=key_mask, scale=1.0", "attention saturates"),
        ("values-are-keys", "self.v_proj(context)", "self.k_proj(context)", "v_proj never learns"),
        (
            "perceiver-causal",
            "attn_mask=key_mask",
            "attn_mask=None, is_causal=True",
            "latents read only the first tokens of a chunk, and its padding",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.perceiver:Layer.forward",
        "lora",
        (
            "context-not-normed",
            "self.input_context_layernorm(context)",
            "context",
            "features of large norm drown the rest",
        ),
        (
            "attention-residual-lost",
            "latents = latents + self.post_attention_layernorm(attended)",
            "latents = self.post_attention_layernorm(attended)",
            "no skip connection",
        ),
        ("feed-forward-not-normed", "self.mlp(self.pre_ff_layernorm(latents))", "self.mlp(latents)", "no norm before"),
        (
            "feed-forward-residual-lost",
            "return latents + self.post_ff_layernorm(",
            "return self.post_ff_layernorm(",
            "no skip connection",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.perceiver:Resampler.forward",
        "lora",
        ("latents-not-normed-at-the-end", "self.layernorm(latents)", "latents", "a norm never learns"),
        ("queries-detached", "repeat(self.latents_q,", "repeat(self.latents_q.detach(),", "the queries never learn"),
        ("last-block-skipped", "in self.layers:", "in self.layers[:-1] or self.layers:", "a block is never run"),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.perceiver:Perceiver.__init__",
        "lora",
        (
            "query-scale-ignored",
            "module.q_proj.weight.mul_(config.perceiver_query_scale)",
            "module.q_proj.weight.mul_(1.0)",
            "the option has no effect",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.perceiver:Perceiver.forward",
        "lora",
        (
            "ranks-and-modules-interleaved",
            '"lf n (lq m r) d -> n (lf lq) m r d"',
            '"lf n (lq r m) d -> n (lf lq) m r d"',
            "imported weights give a module the other's ranks",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.perceiver:Perceiver.read",
        "lora",
        (
            "chunks-and-layers-mixed",
            '"(l n) q d -> l n q d"',
            '"(n l) q d -> l n q d"',
            "a document's LoRA is made of its neighbours' features",
        ),
        (
            "mask-of-another-chunk",
            '"n s -> (l n) s"',
            '"n s -> (n l) s"',
            "padding is read in one chunk and tokens are hidden in another",
        ),
        (
            "features-averaged-over-layers",
            '["modality_projection"](features)',
            '["modality_projection"](features.mean(0, keepdim=True).expand_as(features))',
            "every layer reads the same features",
        ),
        (
            "features-doubled",
            '["modality_projection"](features)',
            '["modality_projection"](2 * features)',
            "imported weights compute something else",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.recompute:in_pieces",
        "lora",
        (
            "chunks-in-the-order-of-their-lengths",
            "for i in group[0].chunks]).argsort()",
            "for i in group[0].chunks])",
            "where chunks differ much in length, documents get each other's LoRA",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.recompute:_Recomputed.backward",
        "pieces",
        (
            "pieces-without-the-gradient-from-above",
            "autograd.grad(decoded, wanted, gradient)",
            "autograd.grad(decoded, wanted, torch.ones_like(gradient))",
            "at real sizes the Perceiver learns nothing of the loss",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.recompute:_Part.__call__",
        "pieces",
        (
            "pieces-of-the-first-layers",
            "features[self.layers.start : self.layers.stop]",
            "features[: len(self.layers)]",
            "at real sizes all layers are adapted by the features of the first ones",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.perceiver:_blocks",
        "lora",
        (
            "blocks-share-weights-unrequested",
            "first + [layer for _ in range(others) for layer in block()]",
            "first + first * others",
            "a fraction of the parameters that the configuration asks for",
        ),
        (
            "first-cross-attention-shared",
            "[Layer(shape, cross=True), *first[1:]] * others",
            "first * others",
            "block 0 has no cross-attention of its own with shared_weights",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.encoder:ContextEncoder.__init__",
        "lora",
        (
            "layer-idx-off-by-one",
            "else layer_idx\n",
            "else layer_idx - 1\n",
            "features of another layer than requested",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.encoder:ContextEncoder._written",
        "lora",
        (
            "last-features-not-normed",
            "self.norm(x) if layer == self.last else x",
            "x",
            "the last layer's features are not those of the reference",
        ),
        (
            "all-features-normed",
            "self.norm(x) if layer == self.last else x",
            "self.norm(x)",
            "features are not those of the reference",
        ),
        (
            "features-in-reverse-order",
            "features[:, layer] =",
            "features[:, -1 - layer] =",
            "the first layer's LoRA is made of the last layer's features",
        ),
        (
            "embeddings-for-all-layers",
            "features[:, layer] = self.norm(x) if layer == self.last else x",
            "features[:, layer] = self.norm(x) if layer == self.last else features[:, 0] if layer else x",
            "nothing of the document but its words is read",
        ),
        (
            "early-exit-not-normed",
            "else self.norm(x)",
            "else x",
            "features are not those of the reference",
        ),
        ("layers-side-by-side-unscaled", "functional.rms_norm(x, x.shape[-1:])", "x", "late layers drown early ones"),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.encoder:ContextEncoder._read_documents",
        "lora",
        (
            "encoder-positions-continue",
            "position_ids=position_ids, ",
            "",
            "a document is read at its place in the packed row",
            "equivalent: rotary positions act by their differences, which are the same at any place in the row",
        ),
        (
            "encoder-without-mask",
            "attention_mask=attention_mask, ",
            "attention_mask=None, ",
            "on GPT-OSS packed documents read each other",
        ),
    ),
]
