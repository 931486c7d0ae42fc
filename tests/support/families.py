"""The supported families on a small scale: a tokenizer with each format's control tokens, and a random model's config.

Most tokenizers split text as the tiny one does, and differ in their control tokens. That of Mistral v0.3 is of
sentencepiece's kind: the space before a word is part of it, and every text begins with one.
"""

import copy
import json
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from d2l.io.resources import resource

LAYERS = 4
_SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "initializer_range": 0.2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    **{"pad_token_id": None, "bos_token_id": None, "eos_token_id": None},
}
_ALTERNATING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}


@dataclass(frozen=True)
class Family:
    """A published chat format with what can be built for it.

    Attributes:
        template: name below `chat_templates/`, without the ending.
        end: the token that ends an answer.
        control: the format's control tokens in the tokenizer.
        bos: what opens a conversation, if anything does.
        before: what the assistant writes before the text of its answer.
    """

    template: str
    config: type[PreTrainedConfig]
    end: str
    control: tuple[str, ...]
    bos: str | None = None
    before: str = ""
    sentencepiece: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> str:
        return f"chat_templates/{self.template}.jinja"

    @property
    def text(self) -> str:
        return resource(self.file).read_text(encoding="utf-8")

    @property
    def untagged(self) -> str:
        """What the family publishes, as far as plain turns go: the shipped template without its tags and conventions."""
        plain = self.text.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
        return plain.replace('supervision == "sampled"', "true")

    def tokenizer(self, chat_template: str | None = None, eos: str | None = None) -> PreTrainedTokenizerBase:
        """The tokenizer; some say that another token than that of an answer's end is the end of a sequence."""
        build = _sentencepiece if self.sentencepiece else _byte_level
        special = {"bos_token": self.bos, "eos_token": eos or self.end, "chat_template": chat_template}
        return PreTrainedTokenizerFast(tokenizer_object=build(self.control), **special)

    def base_config(self, vocabulary: int) -> PreTrainedConfig:
        return self.config(vocab_size=vocabulary, **_SIZES, **copy.deepcopy(self.settings))


_LLAMA_3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_GEMMA = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
_MISTRAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")

FAMILIES = {
    "llama 3": Family(
        "meta-llama/Meta-Llama-3-8B-Instruct", LlamaConfig, "<|eot_id|>", _LLAMA_3, bos="<|begin_of_text|>"
    ),
    "llama 3.1": Family(
        "meta-llama/Llama-3.1-8B-Instruct",
        LlamaConfig,
        "<|eot_id|>",
        (*_LLAMA_3, "<|eom_id|>", "<|python_tag|>"),
        bos="<|begin_of_text|>",
    ),
    "llama 3.2": Family(
        "meta-llama/Llama-3.2-3B-Instruct",
        LlamaConfig,
        "<|eot_id|>",
        (*_LLAMA_3, "<|eom_id|>", "<|python_tag|>"),
        bos="<|begin_of_text|>",
        settings={"tie_word_embeddings": True},
    ),
    "qwen3": Family("Qwen/Qwen3-8B", Qwen3Config, "<|im_end|>", (*_QWEN, "<think>", "</think>")),
    "qwen3 instruct": Family("Qwen/Qwen3-4B-Instruct-2507", Qwen3Config, "<|im_end|>", (*_QWEN, "<think>", "</think>")),
    "mistral": Family(
        "mistralai/Mistral-7B-Instruct-v0.3",
        MistralConfig,
        "</s>",
        _MISTRAL,
        bos="<s>",
        before=" ",
        sentencepiece=True,
        settings={"sliding_window": None},
    ),
    "mistral tekken": Family(
        "mistralai/Mistral-Nemo-Instruct-2407",
        MistralConfig,
        "</s>",
        _MISTRAL,
        bos="<s>",
        settings={"sliding_window": 8},
    ),
    "gemma": Family("google/gemma-3-1b-it", GemmaConfig, "<end_of_turn>", _GEMMA, bos="<bos>"),
    "gemma2": Family("google/gemma-3-1b-it", Gemma2Config, "<end_of_turn>", _GEMMA, bos="<bos>", settings=_ALTERNATING),
    "gemma3": Family(
        "google/gemma-3-1b-it", Gemma3TextConfig, "<end_of_turn>", _GEMMA, bos="<bos>", settings=_ALTERNATING
    ),
}


def _byte_level(control: tuple[str, ...]) -> Tokenizer:
    """The tiny tokenizer with other control tokens."""
    file = json.loads((resource("configs/models/tiny_gpt_oss") / "tokenizer.json").read_text(encoding="utf-8"))
    for place, token in enumerate(file["added_tokens"]):
        token["content"] = control[place] if place < len(control) else f"<unused{place}>"
        token["special"] = "think" not in token["content"]  # as published
    return Tokenizer.from_str(json.dumps(file))


def _sentencepiece(control: tuple[str, ...]) -> Tokenizer:
    """Letters, some of them merged with the space before, and bytes for all else."""
    letters = [chr(code) for code in range(0x21, 0x7F)]
    spaced = [f"▁{letter}" for letter in letters if letter.isalpha()]
    tokens = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, *spaced]
    merges = [("▁", letter[1]) for letter in spaced]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer
