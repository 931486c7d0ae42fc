"""Checks whose failure looks like a value that is not finite: by the part of a step and the module where it appeared."""

# Part of the step (see d2l.train.autopsy.Suspect) → words in the module's name → codes, the likeliest first. An empty
# word is in every name.
_CODES: dict[str, dict[str, tuple[str, ...]]] = {
    "data": {"": ("LBL301", "LBL101", "DAT302")},
    "document pass": {
        "experts": ("QNT203", "QNT204", "QNT201"),
        "attn": ("ATT201", "ATT202"),
        "": ("QNT201", "ENC201"),
    },
    "hypernetwork": {"": ("HYP203", "HYP202", "OPT204")},
    "question pass": {
        "experts": ("QNT203", "QNT204", "QNT201"),
        "attn": ("LOR204", "ATT201"),
        "": ("LOR204", "LOR202", "QNT201"),
    },
    "loss": {"": ("LSS201", "LSS202")},
    "backward pass": {"base": ("QNT202", "ATT101", "GRD201"), "": ("GRD204", "GRD201")},
    "gradient norm": {"": ("OPT202", "OPT204", "LSS202")},
    "update": {"": ("OPT204", "OPT201", "OPT203")},
    "start": {"": ("HYP203", "SAV201", "SAV203")},
}


def lookalikes(phase: str, module: str) -> tuple[str, ...]:
    """Return the codes of the checks that a first suspect calls for, none for a part that is not known.

    Args:
        phase: part of the step.
        module: name in the whole model; empty where it is none.
    """
    by_word = _CODES.get(phase, {})
    codes = (code for word, codes in by_word.items() if word in module for code in codes)
    return tuple(dict.fromkeys(codes))
