"""The sizes of tiny models in tests, in one table. A test that needs others derives them and says why."""

from typing import Any

VOCABULARY, LAYERS, WINDOW = 64, 4, 4

NO_SPECIAL_TOKENS: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,  # like the intermediate size a multiple of 32, MXFP4's block
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,  # so that activations and logits are of order one
    **NO_SPECIAL_TOKENS,
}
OBLONG: dict[str, Any] = BASE | {"intermediate_size": 48}  # no multiple of the hidden size: a transposed weight shows

ALTERNATING: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
}
ROUTED: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS: dict[str, Any] = {**ROUTED, **ALTERNATING}
MXFP4: dict[str, Any] = {"quantization_config": {"quant_method": "mxfp4"}}  # packed, as in the official checkpoints

RANK = 2
HYPERNETWORK: dict[str, Any] = {"lora_r": RANK, "latent_size": 16, "n_latent_queries": 4, "num_blocks": 1}
