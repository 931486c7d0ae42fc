"""Using a trained model: a document becomes a LoRA, and the base under that LoRA answers questions about it."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from d2l.data.chat.conversations import PROBE
from d2l.data.chat.format import ChatFormat
from d2l.data.chat.harmony import CONTROL_TOKENS, final_text, speaks_harmony
from d2l.data.limits import DoesNotFitError, Limits
from d2l.data.packing import collate
from d2l.data.tokenize import Ids, Row, document_chunks
from d2l.errors import DataError
from d2l.hypernet.lora import Lora, Spans, bind
from d2l.hypernet.model import DocToLora
from d2l.inference.load import TrainedModel

_FINAL = "<|channel|>final<|message|>"  # the header of what the user sees, in harmony
_THINK, _END_THINK = "<think>", "</think>"  # around thoughts; tokens of such models, but seldom special ones


@torch.no_grad()
def internalize(trained: TrainedModel, document: str) -> Lora:
    """Read a document into a LoRA of one context.

    Raises:
        DataError: the document is empty or over a limit.
    """
    batch = collate([Row(record=0, chunks=document_in_chunks(trained, document), queries=())])
    return trained.model.lora(batch.to(trained.model.base.device))


def document_in_chunks(trained: TrainedModel, document: str) -> tuple[Ids, ...]:
    """The token chunks in which a document is read: as few as the limits of training allow.

    Raises:
        DataError: the document is empty or over a limit.
    """
    try:
        return document_chunks(document, trained.chat, Limits.of(trained.config, trained.model.base.config))
    except DoesNotFitError as error:
        advice = "the limits are those of the training: pass a shorter document, or train with higher ones"
        raise DataError(f"the document does not fit the checkpoint: {error}\n{advice}") from error


def ask(trained: TrainedModel, lora: Lora | None, question: str, max_new_tokens: int) -> str:
    """The answer under a document's LoRA, or that of the base alone, decoded greedily.

    With harmony, an answer is what stands in the final channel: under `content` supervision, which never trains a
    channel header, the prompt ends with that header; under `sampled` the model writes it, and it is parsed away.

    Args:
        lora: of one context; None for the base alone.
    """
    prompt = torch.tensor([prompt_ids(trained.chat, question)])
    stop = stop_ids(trained)
    tokens = generate(trained.model, lora, prompt, stop=stop, max_new_tokens=max_new_tokens)[0].tolist()
    length = next((place for place, token in enumerate(tokens) if token in stop), len(tokens))
    return answer_text(trained.chat, tokens[:length])


def prompt_ids(chat: ChatFormat, question: str) -> list[int]:
    """A question up to where supervision begins in training.

    Raises:
        DataError: the template refuses the question.
    """
    ids = chat.encode([{"role": "user", "content": question}], add_generation_prompt=True).input_ids
    return [*ids, *chat.encode_text(_FINAL)] if _is_prefilled(chat) else ids


def answer_text(chat: ChatFormat, ids: Sequence[int]) -> str:
    """What a user gets to see of generated tokens, without the stop token: no channel, no control token."""
    if speaks_harmony(chat.tokenizer):
        other = {token for name, token in chat.tokenizer.get_added_vocab().items() if name not in CONTROL_TOKENS}
        text = chat.decode([token for token in ids if token not in other])
        return final_text(text, prefilled="final" if _is_prefilled(chat) else None).strip()
    text = str(chat.tokenizer.decode(list(ids), skip_special_tokens=True))
    if {_THINK, _END_THINK} <= chat.tokenizer.get_added_vocab().keys():
        text = text.rpartition(_END_THINK)[2].partition(_THINK)[0]
    return text.strip()


def stop_ids(trained: TrainedModel) -> list[int]:
    """The tokens that end an answer: the one that training puts there, and those that the model's files name."""
    chat = trained.chat
    if speaks_harmony(chat.tokenizer):
        vocabulary = chat.tokenizer.get_added_vocab()
        names = ["<|return|>", "<|call|>", "<|endoftext|>", *(["<|end|>"] if _is_prefilled(chat) else [])]
        return [vocabulary[name] for name in names if name in vocabulary]  # under `sampled`, <|end|> ends the analysis
    encoded = chat.encode(PROBE)
    added = set(chat.tokenizer.get_added_vocab().values())
    trained_ends = [it for it, on in zip(encoded.input_ids, encoded.supervised, strict=True) if on and it in added][-1:]
    named: int | list[int] | None = trained.model.base.generation_config.eos_token_id
    listed = named if isinstance(named, list) else [named, chat.tokenizer.eos_token_id]
    return sorted({*trained_ends, *(it for it in listed if it is not None)})


@torch.no_grad()
def generate(
    model: DocToLora, lora: Lora | None, prompts: Tensor, *, stop: Sequence[int], max_new_tokens: int
) -> Tensor:
    """Greedy continuations under each row's LoRA.

    Args:
        lora: one context per row; None for the base alone.
        prompts: int64 [n, T], all of one length.
        stop: tokens that end a row, which is then padded with the first of them; if none, those that the base's files
            name.
        max_new_tokens: at most.

    Returns:
        The new tokens alone, int64 [n, up to max_new_tokens], stop tokens included.
    """
    prompts = prompts.to(model.base.device)
    greedy = GenerationConfig(  # all said explicitly: what is left open comes from the base's files, made for sampling
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop) or None,
        pad_token_id=stop[0] if stop else 0,
        use_cache=True,
    )
    bound = nullcontext() if lora is None else bind(model.targets, lora, Spans.rows([1] * len(prompts)))
    with bound:
        generate_tokens: Any = model.base.generate
        output: Tensor = generate_tokens(prompts, attention_mask=torch.ones_like(prompts), generation_config=greedy)
    return output[:, prompts.shape[1] :]


def _is_prefilled(chat: ChatFormat) -> bool:
    return speaks_harmony(chat.tokenizer) and chat.supervision == "content"
