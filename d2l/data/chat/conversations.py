"""Short conversations that chat templates are tried on."""

from typing import Any

Conversation = tuple[dict[str, Any], ...]

QUESTION, ANSWER = {"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": "Blue."}

PROBE: Conversation = (QUESTION, ANSWER)

# Two templates that write all of these alike are of one format, white space at the edges included.
PLAIN_TURNS: tuple[Conversation, ...] = (
    PROBE,
    (*PROBE, {"role": "user", "content": " And now?\n"}, {"role": "assistant", "content": "\n Red. "}),
    ({"role": "system", "content": " Be brief. "}, *PROBE, QUESTION),
)

# One turn, several turns, and text beyond ASCII: what the supervised tokens of a template are measured on.
SUPERVISED: tuple[Conversation, ...] = (
    ({"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": "Paris."}),
    (
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And three?"},
        {"role": "assistant", "content": "The number after it: 3."},
    ),
    ({"role": "user", "content": "Größe? 大きさ"}, {"role": "assistant", "content": "Straße 42 — 四十二 🙂"}),
)
