"""Witness of answers: prompts, generated tokens and their texts."""

from unittest import mock

import torch
from transformers import GenerationConfig

from d2l.build import Components
from d2l.data.chat.format import chat_format
from d2l.data.chat.harmony import Supervision
from d2l.inference.generate import decode_answer, encode_prompt, generate
from experiments.mutants.values import Values
from experiments.mutants.witnesses_model import build, kinds, one_batch
from experiments.mutants.workbench import configurations


def answers(values: Values) -> None:
    """Ask by both conventions, answer three prompts under three LoRAs and one under none, beside settings of the base."""
    for name in ("per_layer_activations", "early_exit"):
        config = kinds()[name]
        model = build(config)
        prompts = torch.arange(12).reshape(3, 4) + 20
        made = model.lora(one_batch(config))
        values[f"{name} answers"] = generate(model, made, prompts, stop=[0], max_new_tokens=12)
        values[f"{name} base"] = generate(model, None, prompts[:1], stop=[0], max_new_tokens=12)
        for key, value in (("repetition_penalty", 1.5), ("no_repeat_ngram_size", 1), ("do_sample", True)):
            own = GenerationConfig(**{key: value, "top_k": 0})
            with mock.patch.object(model.base, "generation_config", own):
                found = generate(model, made, prompts, stop=[0], max_new_tokens=12)
            values[f"{name} beside {key}"] = found
    tokenizer = Components(configurations()["tiny_gpt_oss"]).tokenizer
    conventions: tuple[Supervision, ...] = ("content", "sampled")
    for supervision in conventions:
        chat = chat_format(tokenizer, supervision=supervision)
        values[f"{supervision} prompt"] = encode_prompt(chat, "How far?")
        for text in ("12 <|end|> miles", "<|channel|>final<|message|>12 miles"):
            values[f"{supervision} {text}"] = decode_answer(chat, chat.encode_text(text))
            values[f"{supervision} spelled {text}"] = decode_answer(chat, chat.encode_contents(text))
