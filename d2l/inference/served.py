"""Log-probabilities of a text from a server with the completions endpoint, in the ways of vLLM, SGLang and llama.cpp.

vLLM answers `prompt_logprobs`, SGLang and others `echo` with `logprobs`. llama.cpp gives those of the next token only, so
it is asked after several beginnings of the text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from d2l.errors import ServerError
from d2l.inference.json_http import JsonServer

Key = tuple[int, int]  # position of a token in the text, and its id
Values = dict[Key, float]  # log-probabilities, natural logarithm
Prompt = str | Sequence[int]
Way = Callable[[JsonServer, "Route", Prompt], Values | None]

UNKNOWN = -1  # the id where a server names none
NEXT_TOKENS = 32  # likeliest next tokens that a server is asked for
BEGINNINGS = 8
_LEAST = -1e5  # vLLM writes -9999 for minus infinity
_COMPLETIONS = "/v1/completions"
_NOT_OFFERED = (400, 405, 422, 501)  # how servers refuse a field that they do not know


@dataclass(frozen=True)
class Route:
    """How one model of a server is asked for: its name, and fields beside it."""

    model: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Routes:
    """How a server is asked for its base alone, and for the adapter."""

    base: Route
    adapter: Route


def find_routes(server: JsonServer, adapter: str, base: str | None = None) -> Routes:
    """Work out the names of base and adapter on a server from what it lists.

    Args:
        adapter: the adapter's name there, or its folder's.
        base: the base's name there; by default the first model listed that is no adapter.

    Raises:
        ServerError: kind `adapter` where the server lists its adapters and this is none of them.
    """
    models = _list_models(server)
    names = [model["id"] for model in models]
    roots = [model["id"] for model in models if not model.get("parent") and model["id"] != adapter]
    if base is None:
        if not roots:
            listed = ", ".join(names) or "no model"
            raise ServerError("nonsense", f"GET {server.url}/v1/models lists {listed}, and no base to compare with")
        base = roots[0]
    makers = {str(model.get("owned_by")) for model in models}
    if "llamacpp" in makers:
        return _llama_cpp_routes(server, base, adapter)
    separate = "sglang" in makers and adapter not in names and ":" not in adapter
    return Routes(Route(base), Route(f"{base}:{adapter}" if separate else adapter))  # SGLang's BASE:ADAPTER


def _list_models(server: JsonServer) -> list[dict[str, Any]]:
    try:
        answer = server.get("/v1/models")
    except ServerError as error:
        if error.status in (404, 405, 501):
            return []
        raise
    models = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(models, list) or not all(
        isinstance(model, dict) and isinstance(model.get("id"), str) for model in models
    ):
        raise ServerError("nonsense", f"GET {server.url}/v1/models: expected a list of models. Got {answer!r:.200}")
    return models


def _llama_cpp_routes(server: JsonServer, base: str, adapter: str) -> Routes:
    """Return one model with the adapter's scale 0 and 1: llama.cpp does not look at the name of a request."""
    loaded = server.get("/lora-adapters")
    found = loaded if isinstance(loaded, list) and all(isinstance(item, dict) for item in loaded) else []
    ours = [item.get("id") for item in found if len(found) == 1 or adapter in str(item.get("path", ""))]
    if len(ours) != 1:
        listed = ", ".join(str(item.get("path")) for item in found) or "none"
        raise ServerError("adapter", f"GET {server.url}/lora-adapters: {adapter!r} is not one of them: {listed}")
    return Routes(*(Route(base, {"lora": [{"id": ours[0], "scale": scale}]}) for scale in (0.0, 1.0)))


def choose_way(server: JsonServer, route: Route, prompt: Prompt) -> tuple[Way, Values]:
    """Return the first way of asking that the server answers, and its answer.

    Raises:
        ServerError: none of them works, or an answer makes no sense.
    """
    refused: ServerError | None = None
    for way in (_by_prompt_logprobs, _by_echo, _by_next_token):
        try:
            values = way(server, route, prompt)
        except ServerError as error:
            if error.status not in _NOT_OFFERED:
                raise
            refused = error
            continue
        if values:
            return way, values
    if refused is not None:
        raise refused
    wanted = "neither prompt_logprobs (vLLM), nor echo (SGLang), nor ids of the likeliest next tokens (llama.cpp)"
    raise ServerError("nonsense", f"POST {server.url}{_COMPLETIONS}: no log-probabilities: {wanted}")


def tokenize_there(server: JsonServer, route: Route, text: str) -> tuple[int, tuple[int, ...] | None]:
    """Return how many tokens the server makes of a text, and their ids where it gives them.

    Raises:
        ServerError: see `JsonServer`; or the answer does not say.
    """
    answer = _complete(server, route, text, {"return_token_ids": True})
    ids = _choice(server, answer).get("prompt_token_ids")
    if isinstance(ids, list) and all(type(item) is int for item in ids):
        return len(ids), tuple(ids)
    count = answer["usage"].get("prompt_tokens") if isinstance(answer.get("usage"), dict) else None
    if type(count) is not int:
        raise _nonsense(server, "usage.prompt_tokens", count)
    return count, None


def _complete(server: JsonServer, route: Route, prompt: Prompt, fields: Mapping[str, Any]) -> dict[str, Any]:
    body = {"model": route.model, "prompt": prompt if isinstance(prompt, str) else list(prompt), "max_tokens": 1}
    answer = server.post(_COMPLETIONS, {**body, "temperature": 0, **route.fields, **fields})
    if not isinstance(answer, dict):
        raise _nonsense(server, "an object", answer)
    return answer


def _choice(server: JsonServer, answer: dict[str, Any]) -> dict[str, Any]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise _nonsense(server, "a list with one choice", choices)
    return choices[0]


def _by_prompt_logprobs(server: JsonServer, route: Route, prompt: Prompt) -> Values | None:
    """Ask as vLLM is asked: for each position a mapping from ids, as text, to their log-probabilities."""
    choice = _choice(server, _complete(server, route, prompt, {"prompt_logprobs": 1, "return_token_ids": True}))
    rows = choice.get("prompt_logprobs")
    if rows is None:
        return None
    ids = choice.get("prompt_token_ids") if isinstance(prompt, str) else prompt
    if not isinstance(rows, list) or (ids is not None and len(rows) != len(ids)):
        raise _nonsense(server, f"prompt_logprobs for {'the' if ids is None else len(ids)} tokens", rows)
    values: Values = {}
    for position, row in enumerate(rows[1:], start=1):  # nothing comes before the first token
        if not isinstance(row, dict) or not row:
            raise _nonsense(server, "prompt_logprobs of every token but the first", row)
        token = str(next(iter(row)) if ids is None else ids[position])  # vLLM puts the text's own token first
        if not token.isdecimal() or not isinstance(row.get(token), dict):
            raise _nonsense(server, f"the log-probability of token {token} at {position}", row)
        values[position, int(token)] = _logprob(server, row[token].get("logprob"))
    return values


def _by_echo(server: JsonServer, route: Route, prompt: Prompt) -> Values | None:
    """Ask as OpenAI's first completions were asked: the text comes back with its own log-probabilities."""
    choice = _choice(server, _complete(server, route, prompt, {"echo": True, "logprobs": 1}))
    found = choice.get("logprobs")
    rows = found.get("token_logprobs") if isinstance(found, dict) else None
    if rows is None or (isinstance(rows, list) and len(rows) <= 1):
        return None  # of the generated token only: the server does not know `echo`
    known = not isinstance(prompt, str)
    if not isinstance(rows, list) or (known and len(rows) not in (len(prompt), len(prompt) + 1)):
        count = f"{len(prompt)} log-probabilities and one of a generated token" if known else "log-probabilities"
        raise _nonsense(server, count, rows)
    rows = rows[: len(prompt)] if known else rows[:-1]
    return {
        (position, UNKNOWN if isinstance(prompt, str) else prompt[position]): _logprob(server, row)
        for position, row in enumerate(rows)
        if position > 0
    }


def _by_next_token(server: JsonServer, route: Route, prompt: Prompt) -> Values | None:
    """Ask as llama.cpp is asked: for the likeliest tokens after several beginnings of the text."""
    values: Values = {}
    fields = {"logprobs": NEXT_TOKENS, "cache_prompt": False, "ignore_eos": True}
    for length in beginnings(len(prompt)):
        found = _choice(server, _complete(server, route, prompt[:length], fields)).get("logprobs")
        if found is None:
            continue  # as llama.cpp answers where the likeliest token is part of a character
        rows = found.get("content") if isinstance(found, dict) else None
        tops = rows[0].get("top_logprobs") if isinstance(rows, list) and rows and isinstance(rows[0], dict) else None
        if not isinstance(tops, list) or not all(isinstance(top, dict) and type(top.get("id")) is int for top in tops):
            return None
        values |= {(length, top["id"]): _logprob(server, top.get("logprob")) for top in tops}
    return values


def beginnings(length: int) -> list[int]:
    """Return the lengths of the beginnings after which next tokens are compared."""
    return sorted({max(1, length * part // BEGINNINGS) for part in range(1, BEGINNINGS + 1)})


def _logprob(server: JsonServer, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not _LEAST < value < 1e-3:
        raise _nonsense(server, "a log-probability, a number not above 0", value)
    return float(value)


def _nonsense(server: JsonServer, expected: str, actual: object) -> ServerError:
    size = f" {len(actual)} of them:" if isinstance(actual, list) else ""
    return ServerError("nonsense", f"POST {server.url}{_COMPLETIONS}: expected {expected}. Got{size} {actual!r:.200}")
