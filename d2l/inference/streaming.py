"""Streaming of an answer: its text so far, after every token."""

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

_PART_OF_A_CHARACTER = "\ufffd"  # what a decoder writes for bytes whose character is not complete


class AnswerStreamer(BaseStreamer):
    """Streamer for `generate` of one row, which hands on the decoded answer whenever it changes.

    Args:
        decode: tokens of the answer → its text.
        on_text: called with the text so far. It may change its beginning: a channel of harmony that follows another.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], on_text: Callable[[str], None]) -> None:
        self._decode, self._on_text = decode, on_text
        self._ids: list[int] | None = None
        self._text = ""

    def put(self, value: Tensor) -> None:
        """Take the prompt, which is not part of the answer, then the next tokens."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        text = self._decode(self._ids).rstrip(_PART_OF_A_CHARACTER)
        if text != self._text:
            self._text = text
            self._on_text(text)

    def end(self) -> None:
        """Do nothing: the caller has the whole answer."""
