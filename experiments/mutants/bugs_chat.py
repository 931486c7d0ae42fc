"""Mutants of chat formats, needles and the teacher."""

from experiments.mutants.mutant import bugs

_AREA = "data"

MUTANTS = [
    *bugs(
        _AREA,
        "d2l.data.chat.rendering:mark_supervised",
        "chat",
        (
            "everything-is-the-assistant's",
            "[False] * length",
            "[True] * length",
            "most of the loss is about questions",
        ),
        (
            "mask-inverted",
            "return supervised",
            "return [not mark for mark in supervised]",
            "the loss is about questions",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.data.chat.format:ChatFormat.encode",
        "chat",
        (
            "first-token-lost-in-rendering",
            "Encoded(ids, mark_supervised(encoding, spans, len(ids)))",
            "Encoded(ids[1:], mark_supervised(encoding, spans, len(ids))[1:])",
            "prompts lack their first control token",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.data.chat.format:ChatFormat._encoded_contents",
        "chat",
        (
            "control-tokens-of-documents-kept",
            "not self._holds_control_tokens(text)",
            "True",
            "a document ends its message and opens one of its own",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.data.chat.format:ChatFormat._hidden",
        "chat",
        (
            "control-tokens-of-messages-kept",
            "not self._holds_control_tokens([*messages, tools])",
            "True",
            "an answer that spells an end token is trained to end there",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.data.chat.format:ChatFormat.context_affixes",
        "chat",
        ("prefix-without-its-first", "list(self._affixes[0])", "list(self._affixes[0][1:])", "a control token is lost"),
        (
            "affixes-swapped",
            "list(self._affixes[0]), list(self._affixes[1])",
            "list(self._affixes[1]), list(self._affixes[0])",
            "documents are read between the wrong tokens",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.data.chat.rendering:Renderer._variables",
        "chat",
        (
            "supervision-ignored",
            '"supervision": self.supervision',
            '"supervision": "content"',
            "the option has no effect",
        ),
        (
            "date-not-frozen",
            '"current_date": self.current_date',
            '"current_date": date.today().isoformat()',
            "ids change with the day",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.data.chat.rendering:Renderer.render",
        "chat",
        (
            "generation-prompt-always",
            "add_generation_prompt=add_generation_prompt",
            "add_generation_prompt=True",
            "answers end as if another turn followed",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.build:build_chat",
        "rows",
        ("supervision-not-passed", "supervision=config.supervision,", "", "the option has no effect"),
    ),
    *bugs(
        _AREA,
        "d2l.data.needles:_write_sentences",
        "needles",
        (
            "needle-answers-rotated",
            "responses=tuple(values.values())",
            "responses=tuple(values.values())[::-1]",
            "answers of other questions",
        ),
        (
            "needles-not-in-the-document",
            'context=" ".join(sentences)',
            'context=" ".join(sentences[1:])',
            "one in three questions cannot be answered",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.data.needles:_draw_values",
        "needles",
        (
            "splits-overlap",
            'if split_of(f"{key} {value}") == split:',
            "if True:",
            "held-out pairs were trained",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.train.teacher:_make_question_rows",
        "teacher",
        (
            "teacher-without-the-document",
            "for query in queries[1]]",
            "for query in queries[0]]",
            "the teacher knows no document",
            "outside the claims: `d2l data teacher` makes data before a run, and preflight judges what the data hold",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.train.teacher:_compute_top_k",
        "teacher",
        (
            "teacher-of-the-token-itself",
            "logits_to_keep=batch.prediction_positions",
            "logits_to_keep=batch.label_positions",
            "the teacher tells the token after next",
            "outside the claims: `d2l data teacher` makes data before a run, and preflight judges what the data hold",
        ),
    ),
]
