"""Verdicts on a server of adapters, from differences of log-probabilities or from what went wrong, each with a remedy."""

from dataclasses import dataclass
from enum import StrEnum

from d2l.errors import ServerError

BOUND = 0.1  # nats: bfloat16 and other kernels stay below, as do most 4-bit weights; another base is off by 1 and more
SLOPES = (0.8, 1.2)  # of an adapter that counts as whole
NO_SLOPE = 0.1  # below it the base is served
UNSURE = 0.1  # standard error of a slope beyond which it tells nothing


class Verdict(StrEnum):
    """What a server serves under the adapter's name; the value is for programs."""

    SERVED = "served"
    BASE = "served_base"
    DIFFERS = "differs_from_peft"
    TOKENIZATION = "tokenization_differs"
    NOT_LOADED = "adapter_not_loaded"
    OTHER_BASE = "other_base"
    SERVER = "server_failed"
    UNSURE = "cannot_tell"


@dataclass(frozen=True)
class Finding:
    """A verdict with what was expected, what was found, and what to do about it."""

    verdict: Verdict
    expected: str
    actual: str
    remedy: str


@dataclass(frozen=True)
class Measured:
    """What a server says of itself: mean absolute differences of log-probabilities over `count` tokens, in nats.

    Attributes:
        effect: its adapter against its base.
        repeat: its base against itself, asked again.
    """

    count: int
    effect: float
    repeat: float


@dataclass(frozen=True)
class Compared:
    """A server against PEFT: mean absolute differences of log-probabilities, in nats.

    Attributes:
        effect: PEFT's adapter against its base.
        base_error: the server's base against the local one.
        adapter_error: the server's adapter against PEFT's.
        slope: of the server's change over PEFT's.
        slope_error: standard error of the slope.
    """

    effect: float
    base_error: float
    adapter_error: float
    slope: float
    slope_error: float


_BASE_CAUSES = (
    "the usual causes: the server was started with target modules other than the adapter's (vLLM --lora-target-modules), its "
    "names of modules differ (a wrapped model), a fused path passes LoRA by, or it looks at another field than `model`. Read "
    "its log of the load, start it without restricted target modules, and probe again"
)


def judge(served: Measured, found: Compared, bound: float) -> list[Finding]:
    """Judge what a server serves under the adapter's name, where PEFT's values are known; nothing if it is right."""
    if found.base_error > bound:
        return [_other_base(served, found, bound)]
    unchanged = served.effect <= NO_SLOPE * found.effect + 2 * served.repeat
    if unchanged and abs(found.slope) < NO_SLOPE and found.slope_error <= UNSURE:
        return [_served_base(served, f"changed by {found.effect:.3g} nats a token, as by PEFT")]
    if found.adapter_error > bound:
        return [_differs(found, bound)]
    if found.slope_error > UNSURE:
        return [_unsure(found)]
    return [] if SLOPES[0] <= found.slope <= SLOPES[1] else [_differs(found, bound)]


def judge_alone(served: Measured) -> Finding:
    """Judge without PEFT's values: the adapter has to differ from the base by more than the base from itself."""
    if served.effect <= 2 * served.repeat:
        return _served_base(served, "some change")
    return Finding(
        Verdict.SERVED,
        "an adapter that changes what the base says",
        f"it changes log-probabilities by {served.effect:.3g} nats; whether as in training was not compared",
        "to compare with PEFT, name the base's weights (--model MODEL) or a file of d2l expect (--expected FILE)",
    )


def judge_tokens(ids: tuple[int, ...], there: tuple[int, tuple[int, ...] | None] | None) -> list[Finding]:
    """Compare the tokens that a server makes of the text with those of the base's own tokenizer."""
    if there is None or (there[0] == len(ids) and there[1] in (None, ids)):
        return []
    count, tokens = there
    first = next(
        (place for place, pair in enumerate(zip(tokens or ids, ids, strict=False)) if pair[0] != pair[1]), None
    )
    where = "" if first is None else f", other ones from position {first}"
    return [
        Finding(
            Verdict.TOKENIZATION,
            f"{len(ids)} tokens, as the base's tokenizer makes of the text",
            f"{count} tokens{where}",
            "start the server with the base's own tokenizer files, and see whether it adds a start token twice or never",
        )
    ]


def passed(served: Measured, found: Compared, bound: float) -> Finding:
    """Say by how much a server that passed differs from PEFT."""
    return Finding(
        Verdict.SERVED,
        f"log-probabilities of PEFT within {bound:g} nats",
        f"off by {found.adapter_error:.3g} nats on {served.count} tokens, which the adapter changes by {found.effect:.3g}",
        "nothing",
    )


def _served_base(served: Measured, expected: str) -> Finding:
    return Finding(
        Verdict.BASE,
        f"log-probabilities other than the base's: {expected}",
        f"those of the base: changed by {served.effect:.3g}",
        _BASE_CAUSES,
    )


def _differs(found: Compared, bound: float) -> Finding:
    if found.slope < NO_SLOPE:
        remedy = "another adapter answers under this name: unload it, or give it a name of its own, and load it again"
    elif found.slope < SLOPES[0]:
        remedy = (
            "only part of it is applied: compare alpha/r and the modules that its log names (SGLang needs q, k and v)"
        )
    elif found.slope > SLOPES[1]:
        remedy = "it is applied too strongly: compare alpha/r, and whether the base was merged with it before"
    else:
        remedy = "compare precision and quantization of base and adapter there; --bound N if the difference is accepted"
    return Finding(
        Verdict.DIFFERS,
        f"log-probabilities of PEFT within {bound:g} nats, and its whole change",
        f"off by {found.adapter_error:.3g} nats; {found.slope:.2f} ± {found.slope_error:.2f} of PEFT's change",
        remedy,
    )


def _other_base(served: Measured, found: Compared, bound: float) -> Finding:
    return Finding(
        Verdict.OTHER_BASE,
        f"log-probabilities of the adapter's base within {bound:g} nats",
        f"the server's base is off by {found.base_error:.3g} nats a token on {served.count} tokens",
        "serve the base that the adapter was made for, with the weights and quantization of its training; the wrong model of "
        "several: --base-name NAME; a quantization that is meant: --bound N",
    )


def _unsure(found: Compared) -> Finding:
    return Finding(
        Verdict.UNSURE,
        "a text on which the adapter changes more than the server's precision does",
        f"changed by {found.effect:.3g} nats by PEFT, the server's base is off by {found.base_error:.3g}",
        "pass the adapter's own document as the text: --text FILE",
    )


def other_tokens(count: int) -> Finding:
    """Say that none of the tokens that a server answered about is known."""
    return Finding(
        Verdict.SERVER,
        "log-probabilities of tokens that PEFT was asked for",
        f"{count} log-probabilities of other tokens",
        "serve the adapter's base; with --expected, write the file again (d2l expect)",
    )


_REMEDIES = {
    "adapter": "load it under this name (vLLM: --lora-modules NAME=FOLDER, or POST /v1/load_lora_adapter; SGLang: "
    "/load_lora_adapter; llama.cpp: --lora FILE), or pass its name there: --adapter-name NAME",
    "down": "start the server, or correct the address",
    "slow": "wait until it has loaded, or allow more: --timeout SECONDS",
    "nonsense": "point at an OpenAI-compatible server with /v1/completions (vLLM, SGLang, llama-server), not at a proxy's page",
}
_STATUS_REMEDIES = {
    401: "pass the key's variable: --api-key-env NAME",
    403: "pass the key's variable: --api-key-env NAME",
    404: "pass the base's name there (--base-name NAME), and the address without a path of its own",
    503: "wait until it has loaded",
}


def failed(error: ServerError, timeout: float) -> Finding:
    """Say what a server did instead of answering, and what to do about it."""
    if error.kind == "adapter":
        return Finding(Verdict.NOT_LOADED, "the adapter under this name", str(error), _REMEDIES["adapter"])
    by_status = _STATUS_REMEDIES.get(error.status or 0, "read the server's log")
    expected = f"log-probabilities within {timeout:g} s"
    return Finding(Verdict.SERVER, expected, str(error), _REMEDIES.get(error.kind, by_status))
