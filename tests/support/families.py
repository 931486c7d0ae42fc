"""The supported families, one entry each: chat format, control tokens, base model, and what the published template writes.

Add a family here and nowhere else: tests of templates, chunks, training, twins, masks, targets, adapters and the fuzz
read this table.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    AutoConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from d2l.io.resources import resource
from support.family_tokenizers import byte_level, sentencepiece
from support.sizes import ALTERNATING, BASE, EXPERTS, OBLONG, ROUTED, WINDOW

# The conversation of `Family.asked`; `Family.answered` writes its two answered questions.
CONVERSATION = (
    {"role": "system", "content": "You are a helpful assistant"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi there"},
    {"role": "user", "content": "Who are you"},
    {"role": "assistant", "content": "   I am an assistant   "},
    {"role": "user", "content": "Another question"},
)
ANSWERED = CONVERSATION[1:5]


@dataclass(frozen=True)
class Family:
    """A published chat format with what can be built for it.

    Attributes:
        template: name below `chat_templates/`, without the ending.
        end: the token that ends an answer.
        control: the format's control tokens in the tokenizer.
        asked: `CONVERSATION` with a generation prompt, as the published template writes it.
        answered: `ANSWERED` without one.
        edges: what stands before and after the text of a user's message that opens a conversation, at the default date.
        bos: the token that opens a conversation, if any does.
        before: what the assistant writes before the text of its answer.
        sentencepiece: whether the tokenizer makes the space before a word part of it.
        shares_tokens_with: the family whose template a tokenizer with these control tokens gets, where it is another.
        settings: fields of the base's config beside the sizes.
    """

    template: str
    config: type[PreTrainedConfig]
    end: str
    control: tuple[str, ...]
    asked: str
    answered: str
    edges: tuple[str, str]
    bos: str | None = None
    before: str = ""
    sentencepiece: bool = False
    shares_tokens_with: str = ""
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
        build = sentencepiece if self.sentencepiece else byte_level
        special = {"bos_token": self.bos, "eos_token": eos or self.end, "chat_template": chat_template}
        return PreTrainedTokenizerFast(tokenizer_object=build(self.control), **special)

    def base_config(self, vocabulary: int) -> PreTrainedConfig:
        return self.config(**OBLONG | copy.deepcopy(self.settings) | {"vocab_size": vocabulary})


# What the published templates write, worked out by hand from their rules, and compared once with the templates themselves
# on random conversations. Llama 3, ChatML and Gemma: as in the table of llama.cpp's tests/test-chat-template.cpp, with the
# BOS token, which it leaves out. Llama 3.1 and 3.2: with their system message before it. Mistral: the table "Templates" of
# docs.mistral.ai/cookbook/concept-deep-dive-tokenization-templates; a system message goes into the last question. Gemma:
# ai.google.dev/gemma/docs/core/prompt-structure.
LLAMA_TURNS = (
    "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHi there<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWho are you<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nI am an assistant<|eot_id|>"
)
LLAMA_QUESTION = "<|start_header_id|>user<|end_header_id|>\n\nAnother question<|eot_id|>"
LLAMA_PROMPT = "<|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA_USER = "<|start_header_id|>user<|end_header_id|>\n\n"
LLAMA_SYSTEM = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
DATE = "2024-02-09"  # of `asked` and `answered`, where a format writes one
CUTOFF = "Cutting Knowledge Date: December 2023\nToday Date: "
CHATML_TURNS = (
    "<|im_start|>user\nHello<|im_end|>\n"
    "<|im_start|>assistant\nHi there<|im_end|>\n"
    "<|im_start|>user\nWho are you<|im_end|>\n"
)
CHATML_SYSTEM = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
CHATML_QUESTION = "<|im_start|>user\nAnother question<|im_end|>\n<|im_start|>assistant\n"
CHATML_ANSWER = "<|im_start|>assistant\n   I am an assistant   <|im_end|>\n"
THOUGHTLESS = "<think>\n\n</think>\n\n"
GEMMA_FIRST = "<bos><start_of_turn>user\n"
GEMMA_TURNS = (
    "Hello<end_of_turn>\n<start_of_turn>model\nHi there<end_of_turn>\n<start_of_turn>user\nWho are you<end_of_turn>\n"
    "<start_of_turn>model\nI am an assistant<end_of_turn>\n"
)
GEMMA_QUESTION = "<start_of_turn>user\nAnother question<end_of_turn>\n<start_of_turn>model\n"

_LLAMA_3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_GEMMA = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
_MISTRAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")

_GEMMA_CHAT: dict[str, Any] = {
    "template": "google/gemma-3-1b-it",
    "end": "<end_of_turn>",
    "control": _GEMMA,
    "bos": "<bos>",
    "asked": f"{GEMMA_FIRST}You are a helpful assistant\n\n{GEMMA_TURNS}{GEMMA_QUESTION}",
    "answered": f"{GEMMA_FIRST}{GEMMA_TURNS}",
    "edges": (GEMMA_FIRST, "<end_of_turn>\n"),
}

FAMILIES = {
    "llama 3": Family(
        "meta-llama/Meta-Llama-3-8B-Instruct",
        LlamaConfig,
        end="<|eot_id|>",
        control=_LLAMA_3,
        bos="<|begin_of_text|>",
        asked=f"{LLAMA_SYSTEM}You are a helpful assistant<|eot_id|>{LLAMA_TURNS}{LLAMA_QUESTION}{LLAMA_PROMPT}",
        answered=f"<|begin_of_text|>{LLAMA_TURNS}",
        edges=(f"<|begin_of_text|>{LLAMA_USER}", "<|eot_id|>"),
    ),
    "llama 3.1": Family(
        "meta-llama/Llama-3.1-8B-Instruct",
        LlamaConfig,
        end="<|eot_id|>",
        control=(*_LLAMA_3, "<|eom_id|>", "<|python_tag|>"),
        bos="<|begin_of_text|>",
        asked=f"{LLAMA_SYSTEM}{CUTOFF}26 Jul 2024\n\nYou are a helpful assistant<|eot_id|>"
        f"{LLAMA_TURNS}{LLAMA_QUESTION}{LLAMA_PROMPT}",
        answered=f"{LLAMA_SYSTEM}{CUTOFF}26 Jul 2024\n\n<|eot_id|>{LLAMA_TURNS}",
        edges=(f"{LLAMA_SYSTEM}{CUTOFF}26 Jul 2024\n\n<|eot_id|>{LLAMA_USER}", "<|eot_id|>"),
    ),
    "llama 3.2": Family(
        "meta-llama/Llama-3.2-3B-Instruct",
        LlamaConfig,
        end="<|eot_id|>",
        control=(*_LLAMA_3, "<|eom_id|>", "<|python_tag|>"),
        bos="<|begin_of_text|>",
        asked=f"{LLAMA_SYSTEM}{CUTOFF}09 Feb 2024\n\nYou are a helpful assistant<|eot_id|>"
        f"{LLAMA_TURNS}{LLAMA_QUESTION}{LLAMA_PROMPT}",
        answered=f"{LLAMA_SYSTEM}{CUTOFF}09 Feb 2024\n\n<|eot_id|>{LLAMA_TURNS}",
        edges=(f"{LLAMA_SYSTEM}{CUTOFF}05 Aug 2025\n\n<|eot_id|>{LLAMA_USER}", "<|eot_id|>"),
        shares_tokens_with="llama 3.1",
        settings={"tie_word_embeddings": True},
    ),
    "qwen3": Family(
        "Qwen/Qwen3-8B",
        Qwen3Config,
        end="<|im_end|>",
        control=(*_QWEN, "<think>", "</think>"),
        # with `enable_thinking=False` there: the prompt ends with the block that training does not supervise
        asked=f"{CHATML_SYSTEM}{CHATML_TURNS}{CHATML_ANSWER}{CHATML_QUESTION}{THOUGHTLESS}",
        answered=f"{CHATML_TURNS}<|im_start|>assistant\n{THOUGHTLESS}   I am an assistant   <|im_end|>\n",
        edges=("<|im_start|>user\n", "<|im_end|>\n"),
    ),
    "qwen3 instruct": Family(
        "Qwen/Qwen3-4B-Instruct-2507",
        Qwen3Config,
        end="<|im_end|>",
        control=(*_QWEN, "<think>", "</think>"),
        asked=f"{CHATML_SYSTEM}{CHATML_TURNS}{CHATML_ANSWER}{CHATML_QUESTION}",
        answered=f"{CHATML_TURNS}{CHATML_ANSWER}",
        edges=("<|im_start|>user\n", "<|im_end|>\n"),
        shares_tokens_with="qwen3",
    ),
    "mistral": Family(
        "mistralai/Mistral-7B-Instruct-v0.3",
        MistralConfig,
        end="</s>",
        control=_MISTRAL,
        bos="<s>",
        before=" ",
        asked="<s>[INST] Hello[/INST] Hi there</s>[INST] Who are you[/INST] I am an assistant</s>"
        "[INST] You are a helpful assistant\n\nAnother question[/INST]",
        answered="<s>[INST] Hello[/INST] Hi there</s>[INST] Who are you[/INST] I am an assistant</s>",
        edges=("<s>[INST]", "[/INST]"),  # the space is part of the document's first word
        sentencepiece=True,
        settings={"sliding_window": None},
    ),
    "mistral tekken": Family(
        "mistralai/Mistral-Nemo-Instruct-2407",
        MistralConfig,
        end="</s>",
        control=_MISTRAL,
        bos="<s>",
        asked="<s>[INST]Hello[/INST]Hi there</s>[INST]Who are you[/INST]   I am an assistant   </s>"
        "[INST]You are a helpful assistant\n\nAnother question[/INST]",
        answered="<s>[INST]Hello[/INST]Hi there</s>[INST]Who are you[/INST]   I am an assistant   </s>",
        edges=("<s>[INST]", "[/INST]"),
        shares_tokens_with="mistral",
        settings={"sliding_window": WINDOW},
    ),
    "gemma": Family(config=GemmaConfig, **_GEMMA_CHAT),
    "gemma2": Family(config=Gemma2Config, **_GEMMA_CHAT, settings=ALTERNATING),
    "gemma3": Family(config=Gemma3TextConfig, **_GEMMA_CHAT, settings=ALTERNATING),
}

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Base:
    """A base model's kind on a small scale: its config class, fields beside the sizes, and the Linears of every layer."""

    config: type[PreTrainedConfig]
    settings: dict[str, Any]
    linears: tuple[str, ...] = ATTENTION + MLP

    def tiny(self, **changes: Any) -> PreTrainedConfig:
        """The config of `sizes.BASE`, with these fields changed."""
        return self.config(**copy.deepcopy(BASE | self.settings | changes))


# model_type → base, for every family of the table, for Qwen2.5, and for those with experts, which are no Linears
BASES = {"gpt_oss": Base(GptOssConfig, EXPERTS, ATTENTION)}
for _family in FAMILIES.values():
    BASES.setdefault(_family.config.model_type, Base(_family.config, _family.settings))
BASES["qwen2"] = Base(Qwen2Config, {})  # its chats are ChatML, as Qwen3's
BASES["qwen3_moe"] = Base(Qwen3MoeConfig, {"moe_intermediate_size": 48, **ROUTED}, ATTENTION)
BASES["mixtral"] = Base(MixtralConfig, ROUTED, ATTENTION)  # its chats are Mistral's

# Other model types that a twin can be made of; no chat template is shipped for them.
UNSHIPPED = ("deepseek_v3", "phi3", "gpt2")

_PARTS = {  # a class of transformers 5.13 has no defaults for them
    "musicgen": {"text_encoder": "t5", "audio_encoder": "encodec", "decoder": "musicgen_decoder"}
}


def default_config(model_type: str) -> PreTrainedConfig:
    """Return a family's configuration with its default values."""
    parts = {name: {"model_type": kind} for name, kind in _PARTS.get(model_type, {}).items()}
    return AutoConfig.for_model(model_type, **parts)
