"""Mutants of the whole model: reading documents, making LoRAs, answering under them."""

from experiments.mutants.mutant import bugs

_AREA = "LoRA and forward"

MUTANTS = [
    *bugs(
        _AREA,
        "d2l.hypernet.model:DocToLora.features",
        "lora",
        (
            "documents-read-each-other",
            "self.attention_mask(batch.ctx_position_ids)",
            "self.attention_mask(torch.arange(batch.ctx_ids.shape[1])[None])",
            "a document's LoRA holds what its neighbours say",
        ),
        (
            "encoder-positions-of-the-row",
            "self.encoder(batch.ctx_ids, batch.ctx_position_ids, mask)",
            "self.encoder(batch.ctx_ids, torch.arange(batch.ctx_ids.shape[1])[None], mask)",
            "a document is read at its place in the packed row",
            "equivalent: rotary positions act by their differences, which are the same at any place in the row",
        ),
        (
            "documents-shifted-by-one",
            "self.encoder(batch.ctx_ids,",
            "self.encoder(batch.ctx_ids.roll(1, 1),",
            "each chunk starts with the last token of the one before",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.model:DocToLora.lora",
        "lora",
        ("bias-left-out", "self.hypernet.bias())", "None)", "the shared LoRA has no effect and never learns"),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.model:DocToLora.chunk_loras",
        "lora",
        (
            "hypernet-in-half-precision",
            "with self._hypernet_precision():",
            "with torch.autocast('cpu', dtype=torch.bfloat16):",
            "the hypernetwork computes in bfloat16 on every device",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.model:DocToLora.logits",
        "lora",
        (
            "questions-read-each-other",
            "self.attention_mask(batch.position_ids)",
            "self.attention_mask(torch.arange(batch.n_tokens)[None])",
            "a question sees the questions and answers before it in the row",
        ),
        (
            "question-positions-continue",
            '"position_ids": batch.position_ids',
            '"position_ids": torch.arange(batch.n_tokens)[None]',
            "a question is read at its place in the packed row",
            "equivalent: rotary positions act by their differences, which are the same at any place in the row",
        ),
        (
            "question-without-mask",
            '"attention_mask": self.attention_mask(batch.position_ids)',
            '"attention_mask": None',
            "on GPT-OSS packed questions read each other",
        ),
        (
            "lora-b-detached",
            "bind(self.targets, lora, batch.contexts)",
            "bind(self.targets, Lora(lora.A, lora._map(torch.Tensor.detach).B, lora.scale), batch.contexts)",
            "half of the gradient is lost",
        ),
        (
            "sees-one-token-ahead",
            '"input_ids": batch.input_ids',
            '"input_ids": batch.input_ids.roll(-1, 1)',
            "the token to be predicted is the input: the loss falls and nothing is learnt",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.model:DocToLora.logits",
        "train",
        (
            "lora-detached",
            "bind(self.targets, lora, batch.contexts)",
            "bind(self.targets, lora._map(torch.Tensor.detach), batch.contexts)",
            "the task's gradient never reaches the hypernetwork",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.model:DocToLora.gradient_checkpointing_enable",
        "binding",
        ("checkpointing-silently-off", "self.base.train()", "pass", "memory as without checkpointing"),
        (
            "checkpointing-reentrant",
            '{"use_reentrant": False, "preserve_rng_state": False, **kwargs}',
            '{"preserve_rng_state": False, **kwargs, "use_reentrant": True}',
            "the task's gradient may be lost",
        ),
    ),
]
