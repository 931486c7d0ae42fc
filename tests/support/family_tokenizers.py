"""Small tokenizers with the control tokens of a published chat format.

Most published tokenizers split text as the tiny one does, and differ in their control tokens. That of Mistral v0.3 is of
sentencepiece's kind: the space before a word is part of it, and every text begins with one.
"""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from d2l.io.resources import resource


def byte_level(control: tuple[str, ...]) -> Tokenizer:
    """The tiny tokenizer with other control tokens."""
    file = json.loads((resource("configs/models/tiny_gpt_oss") / "tokenizer.json").read_text(encoding="utf-8"))
    for place, token in enumerate(file["added_tokens"]):
        token["content"] = control[place] if place < len(control) else f"<unused{place}>"
        token["special"] = "think" not in token["content"]  # as published
    return Tokenizer.from_str(json.dumps(file))


def sentencepiece(control: tuple[str, ...]) -> Tokenizer:
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
