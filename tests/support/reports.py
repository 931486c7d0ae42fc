"""Reports with every outcome, and reports drawn at random whose texts want to be markup, commands or escapes."""

from typing import Any

from hypothesis import strategies as st

from checks.result import STAGES, Outcome, Report

HOSTILE = (
    "]]>",
    "%0A::error file=x::pwned",
    "\n::error::pwned",
    "\r\n##[error]pwned",
    "<script>alert(1)</script>",
    "</td></table><img src=x onerror=alert(1)>",
    "&lt;b&amp;",
    '" onload="x',
    "{0} {{1}} }",
    "[click](https://evil.example)",
    "{{ 7 * 7 }} {% raw %}",
    "\x00\x07\x1b[31m\x7f\x9b",
    "\ud800",
    "\ufffe\u202e\u2028",
    ":,=;%",
)
texts = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=8), max_size=3).map("".join)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=6,
)


@st.composite
def outcomes(draw: Any) -> Outcome:
    """An outcome of any kind, of one of d2l's own checks or of a plugin's."""
    kind = draw(st.sampled_from(("pass", "warn", "fail", "skip", "inapplicable", "blocked", "crash")))
    found = kind in ("warn", "fail", "crash")
    return Outcome(
        *(draw(st.sampled_from(("LBL301", "QNT202", "MY_1"))), "a-check", draw(st.sampled_from(STAGES))),
        *(draw(st.sampled_from(("error", "warning"))), kind, draw(texts)),
        expected=draw(texts) if found else "",
        actual=draw(texts) if found else "",
        remedy=draw(texts) if found else "",
        evidence=draw(st.dictionaries(texts | st.sampled_from(("where", "traceback")), values, max_size=3)),
        settings=draw(st.dictionaries(st.sampled_from(("lora_r", "loss")), st.integers(), max_size=1)),
        blocked_by="QNT202" if kind == "blocked" else None,
        ignored=kind == "warn" and draw(st.booleans()),
        seconds=draw(st.floats(0, 100)),
    )


reports = st.builds(
    Report,
    st.just("0.2.0"),
    texts.map(lambda text: f"{text}.yaml".replace("\x00", "").replace("\ud800", "\udc80")),  # what a file can be called
    st.just("f" * 64),
    st.lists(outcomes(), max_size=3, unique_by=lambda outcome: outcome.code).map(tuple),
    unused_ignores=st.sampled_from(((), ("LBL301",))),
    judged=st.dictionaries(st.sampled_from(("data", "device")), texts, max_size=2),
    required=st.sampled_from((frozenset(), frozenset({"LBL301"}))),
    seconds=st.floats(0, 1000),
)

FULL = Report(
    "0.2.0",
    "run.yaml",
    "abcdef0123456789",
    (
        Outcome("TGT101", "targets-unmatched", "static", "error", "pass", "q_proj in every layer", seconds=0.25),
        Outcome(
            *("QNT102", "quantized-twice", "static", "warning", "warn", "ignored (fits): kernels"),
            ignored=True,
            expected="packed",
            actual="bf16",
            remedy="pip install kernels",
        ),
        Outcome(
            *("QNT202", "experts-gradient-missing", "twin", "error", "fail", "gradients are missing\nin 4 layers"),
            expected="a cosine above 0.999",
            actual="layer 0: 0.341",
            remedy="set expert_weights: packed or dequantize",
            evidence={"cosine_by_layer": [0.25, 0.5, -0.75, 1.0], "beyond": {"layer 0": 1e-9, "layer 3": 0.1}},
            settings={"expert_weights": "auto"},
            seconds=1.5,
        ),
        Outcome(
            *("HYP202", "hypernetwork-differs", "twin", "error", "crash", "crashed: KeyError: 'x'"),
            evidence={"traceback": "Traceback\n  File b, line 2\n    b()\nKeyError: 'x'\n"},
            remedy="report it",
        ),
        Outcome("GRD204", "dead-parameters", "twin", "error", "blocked", "blocked by QNT202", blocked_by="QNT202"),
        Outcome("EXP201", "exported-adapter-differs", "twin", "error", "inapplicable", "no adapter format"),
        Outcome(
            *("LBL301", "labels-lost", "data", "error", "pass", "25 labels"),
            evidence={"label_tokens": 25, "tokens": 200, "faults": []},
        ),
        Outcome(
            "OPT101",
            "odd-schedule",
            "data",
            "warning",
            "warn",
            "the rate ends early",
            expected="it ends with the run",
            actual="after 4 of 40 steps",
            remedy="raise decay_steps",
            evidence={"rates by step": {"0": 0.0, "10": 0.001, "40": 0.0}},
        ),
        Outcome("MEM401", "memory-exceeded", "device", "error", "skip", "no GPU here"),
    ),
    unused_ignores=("TGT101",),
    expired_ignores=("OPT101@2026-01-31",),
    judged={"base model": "tiny", "data": "none named"},
    twin_cannot_show=("running out of memory: a twin is small",),
    seconds=4.25,
)
