"""Inference with a trained model: documents into LoRAs, and greedy answers of the base with a LoRA."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from d2l.data.chat.conversations import PROBE
from d2l.data.chat.format import ChatFormat
from d2l.data.chat.harmony import CONTROL_TOKENS, final_text, has_harmony_tokens
from d2l.data.chunks import Ids, chunk_document
from d2l.data.limits import DoesNotFitError, Limits
from d2l.data.packing import collate
from d2l.data.tokenize import Row
from d2l.errors import DataError
from d2l.hypernet.lora import Lora, bind
from d2l.hypernet.model import DocToLora
from d2l.inference.load import TrainedModel
from d2l.inference.streaming import AnswerStreamer

_FINAL_HEADER = "<|channel|>final<|message|>"  # in harmony, the header of the text for the user
_THINK, _END_THINK = "<think>", "</think>"  # tokens around reasoning, in models that have them; seldom special tokens


@torch.no_grad()
def internalize(trained: TrainedModel, document: str) -> Lora:
    """Turn a document into a LoRA of one context.

    Raises:
        DataError: the document is empty or exceeds a limit.
    """
    batch = collate([Row(record=0, chunks=tokenize_document(trained, document), queries=())])
    return trained.model.lora(batch.to(trained.model.base.device))


def tokenize_document(trained: TrainedModel, document: str) -> tuple[Ids, ...]:
    """Tokenize a document into as few chunks as the limits of training allow.

    Raises:
        DataError: the document is empty or exceeds a limit.
    """
    try:
        return chunk_document(document, trained.chat, Limits.of(trained.config, trained.model.base.config))
    except DoesNotFitError as error:
        advice = "the limits are those of the training: pass a shorter document, or train with higher ones"
        raise DataError(f"the document does not fit the checkpoint: {error}\n{advice}") from error


def ask(
    trained: TrainedModel,
    lora: Lora | None,
    question: str,
    max_new_tokens: int = 256,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """Answer a question with a document's LoRA, or with the base alone, by greedy decoding.

    With harmony, the answer is the text of the final channel. Under `content` supervision, which never trains a channel
    header, the prompt ends with that header; under `sampled` the model writes the header and it is removed.

    Args:
        lora: LoRA of one context; None for the base alone.
        max_new_tokens: upper bound on the tokens of the answer.
        on_text: called with the answer so far, while it is generated; see `AnswerStreamer`.
    """
    prompt = torch.tensor([encode_prompt(trained.chat, question)])
    stop = find_stop_ids(trained.chat, trained.model.base.generation_config.eos_token_id)

    def decode(ids: Sequence[int]) -> str:
        return decode_answer(trained.chat, truncate_at_stop(ids, stop))

    streamer = None if on_text is None else AnswerStreamer(decode, on_text)
    tokens = generate(trained.model, lora, prompt, stop=stop, max_new_tokens=max_new_tokens, streamer=streamer)
    return decode(tokens[0].tolist())


def encode_prompt(chat: ChatFormat, question: str) -> list[int]:
    """Encode a question up to the position where supervision begins in training.

    Raises:
        DataError: the template refuses the question.
    """
    ids = chat.encode([{"role": "user", "content": question}], add_generation_prompt=True).input_ids
    return [*ids, *chat.encode_text(_FINAL_HEADER)] if _is_prefilled(chat) else ids


def decode_answer(chat: ChatFormat, ids: Sequence[int]) -> str:
    """Decode generated tokens, without the stop token, as text for the user: no channel header, no control token."""
    if has_harmony_tokens(chat.tokenizer):
        other = {token for name, token in chat.tokenizer.get_added_vocab().items() if name not in CONTROL_TOKENS}
        runs = groupby((token for token in ids if token not in other), chat.control.is_control)
        texts = [(is_control, chat.decode(list(run))) for is_control, run in runs]
        hidden = chat.control.choose_hidden([text for _, text in texts])  # an answer may spell a control token
        marked = "".join(text if is_control else chat.control.hide(text, hidden) for is_control, text in texts)
        final = final_text(marked, prefilled="final" if _is_prefilled(chat) else None)
        return chat.control.reveal(final, hidden).strip()
    text = str(chat.tokenizer.decode(list(ids), skip_special_tokens=True))
    if {_THINK, _END_THINK} <= chat.tokenizer.get_added_vocab().keys():
        text = text.rpartition(_END_THINK)[2].partition(_THINK)[0]
    return text.strip()


def truncate_at_stop(ids: Sequence[int], stop: Sequence[int]) -> Sequence[int]:
    """Return the tokens before the first stop token, all of them where there is none."""
    return ids[: next((place for place, token in enumerate(ids) if token in stop), len(ids))]


def find_stop_ids(chat: ChatFormat, named: int | list[int] | None) -> list[int]:
    """Return the ids of tokens that end an answer: the one supervised in training, and those in the model's files.

    Args:
        named: `eos_token_id` of the base's generation_config.
    """
    if has_harmony_tokens(chat.tokenizer):
        vocabulary = chat.tokenizer.get_added_vocab()
        names = ["<|return|>", "<|call|>", "<|endoftext|>", *(["<|end|>"] if _is_prefilled(chat) else [])]
        return [
            vocabulary[name] for name in names if name in vocabulary
        ]  # under `sampled`, <|end|> only ends the analysis
    encoded = chat.encode(PROBE)
    added = set(chat.tokenizer.get_added_vocab().values())
    supervised = (it for it, on in zip(encoded.input_ids, encoded.supervised, strict=True) if on and it in added)
    listed = named if isinstance(named, list) else [named, chat.tokenizer.eos_token_id]
    return sorted({*list(supervised)[-1:], *(it for it in listed if it is not None)})


@torch.no_grad()
def generate(
    model: DocToLora,
    lora: Lora | None,
    prompts: Tensor,
    *,
    stop: Sequence[int],
    max_new_tokens: int,
    streamer: AnswerStreamer | None = None,
) -> Tensor:
    """Generate greedy continuations, each row with its own LoRA.

    Args:
        lora: LoRA with one context per row; None for the base alone.
        prompts: int64 [n, T], all of one length.
        stop: ids of tokens that end a row, which is then padded with the first of them; if empty, the base's own.
        max_new_tokens: upper bound on the new tokens of a row.
        streamer: takes the tokens of a single row as they come.

    Returns:
        The new tokens without the prompt, int64 [n, up to max_new_tokens], stop tokens included.
    """
    prompts = prompts.to(model.base.device)
    # every field is explicit: the defaults come from the base's files, which are made for sampling
    greedy = GenerationConfig(
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
    bound = nullcontext() if lora is None else bind(model.targets, lora, rows=[1] * len(prompts))
    with bound:
        generate_tokens: Any = model.base.generate
        output: Tensor = generate_tokens(
            prompts, attention_mask=torch.ones_like(prompts), generation_config=greedy, streamer=streamer
        )
    return output[:, prompts.shape[1] :]


def _is_prefilled(chat: ChatFormat) -> bool:
    """Return whether prompts end with the header of the final channel."""
    return has_harmony_tokens(chat.tokenizer) and chat.supervision == "content"
