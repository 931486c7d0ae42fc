"""A small server of a base and an adapter over loopback: the answers of vLLM, SGLang and llama.cpp, and faults of each kind."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import torch
from torch import Tensor

Logprobs = Callable[[list[int]], Tensor]  # ids -> log-probabilities [ids, vocabulary]
Flavour = Literal["vllm", "sglang", "llamacpp", "generated-only"]


@dataclass
class Served:
    """What is served, and how.

    Attributes:
        models: by the name in a request; "" answers to llama.cpp's scale 1.
        tokenize: of a text in a request.
        body: changes an answer's bytes before they are sent.
        absent: status of an answer about a model that is not served.
        before: called before an answer is sent, such as to wait.
        seen: paths and bodies of all requests.
    """

    models: dict[str, Logprobs]
    tokenize: Callable[[str], list[int]]
    flavour: Flavour = "vllm"
    status: int = 200
    absent: int = 404
    change: Callable[[dict[str, Any]], Any] = lambda answer: answer
    body: Callable[[bytes], bytes] = lambda text: text
    before: Callable[[], object] = lambda: None
    key: str | None = None
    listed: list[dict[str, Any]] | None = None
    seen: list[tuple[str, Any]] = field(default_factory=list)

    def complete(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """Answer /v1/completions; None where there is no such model."""
        prompt = request["prompt"]
        ids = self.tokenize(prompt) if isinstance(prompt, str) else prompt
        scale = next((item["scale"] for item in request.get("lora", [])), 0.0)
        name = ("adapter" if scale else "base") if self.flavour == "llamacpp" else request["model"]
        if name not in self.models:
            return None
        rows = self.models[name](ids)
        choice: dict[str, Any] = {"index": 0, "text": "x", "finish_reason": "length", "logprobs": None}
        if self.flavour == "vllm":
            choice["prompt_logprobs"] = self._prompt_rows(ids, rows) if "prompt_logprobs" in request else None
            choice["prompt_token_ids"] = ids if request.get("return_token_ids") else None
        if self.flavour == "sglang" and request.get("echo"):
            own = [None, *(float(rows[place - 1, token]) for place, token in enumerate(ids) if place), -0.5]
            choice["logprobs"] = {"tokens": [str(token) for token in [*ids, 0]], "token_logprobs": own}
        elif self.flavour == "generated-only" and "logprobs" in request:
            choice["logprobs"] = {"tokens": ["x"], "token_logprobs": [-0.5], "top_logprobs": [{"x": -0.5}]}
        elif self.flavour == "llamacpp" and "logprobs" in request:
            top = rows[-1].topk(min(request["logprobs"], rows.shape[1]))
            pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            tops = [{"id": token, "token": str(token), "logprob": value} for token, value in pairs]
            choice["logprobs"] = {"content": [{**tops[0], "top_logprobs": tops}]}
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1}
        return {"object": "text_completion", "model": name, "choices": [choice], "usage": usage}

    @staticmethod
    def _prompt_rows(ids: list[int], rows: Tensor) -> list[Any]:
        """The text's own token first, then the likeliest one, as vLLM writes them: ids are keys and so texts."""
        found: list[Any] = [None]
        for place, token in enumerate(ids[1:]):
            tokens = dict.fromkeys([token, int(rows[place].argmax())])
            found.append({str(item): {"logprob": float(rows[place, item]), "rank": 1} for item in tokens})
        return found

    def models_listed(self) -> dict[str, Any]:
        """Answer /v1/models."""
        if self.listed is not None:
            return {"object": "list", "data": self.listed}
        maker = "vllm" if self.flavour == "generated-only" else self.flavour
        names = ["base"] if maker == "llamacpp" else list(self.models)
        data = [{"id": name, "owned_by": maker, "parent": "base" if name != "base" else None} for name in names]
        return {"object": "list", "data": data}


class _Handler(BaseHTTPRequestHandler):
    server: "_Server"

    def do_GET(self) -> None:
        served = self.server.served
        served.seen.append((self.path, None))
        if self.path == "/v1/models":
            self._send(200, served.models_listed())
        elif self.path == "/lora-adapters":
            self._send(200, [{"id": 3, "path": "/adapters/adapter.gguf", "scale": 0.0}])
        else:
            self._send(404, {"error": "no such page"})

    def do_POST(self) -> None:
        served = self.server.served
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        served.seen.append((self.path, request))
        if served.key is not None and self.headers["Authorization"] != f"Bearer {served.key}":
            self._send(401, {"error": "Unauthorized"})
            return
        with self.server.computing:
            answer = served.complete(request)
        if answer is None:
            error = {"message": f"The model `{request['model']}` does not exist.", "code": served.absent}
            self._send(served.absent, {"error": error})
        else:
            self._send(served.status, served.change(answer))

    def _send(self, status: int, answer: Any) -> None:
        served = self.server.served
        text = json.dumps(answer).encode()
        completion = self.command == "POST" and status == served.status
        served.before()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(served.body(text) if completion else text)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


class _Server(ThreadingHTTPServer):
    served: Served
    computing = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing where a client hung up."""


@contextmanager
def serving(served: Served) -> Iterator[str]:
    """Serve on a free port of loopback and yield the URL."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.served = served
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def no_gradient(model: Any) -> Logprobs:
    """The log-probabilities of a model of transformers or PEFT, each computed once."""

    @cache
    @torch.no_grad()
    def logprobs(*ids: int) -> Tensor:
        logits: Tensor = model(torch.tensor([ids])).logits[0]
        return logits.float().log_softmax(-1)

    return lambda ids: logprobs(*ids)
