"""`d2l probe` against a server over loopback that serves a tiny base and an adapter for real, or with one fault."""

import json
import socket
import threading
import warnings
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from support.adapter_server import Logprobs, Served, no_gradient, serving
from support.families import FAMILIES
from transformers import PreTrainedModel
from typer.testing import CliRunner, Result

import cli
from commands.probe import EXIT_CODES
from d2l.base.load import random_base
from d2l.base.load_plan import plan_load
from d2l.config.schema import RunConfig
from d2l.errors import ConfigError, ServerError
from d2l.hypernet.lora import Lora
from d2l.hypernet.targets import find_targets, target_sizes
from d2l.inference.adapter import export_adapter
from d2l.inference.expected import TEXT
from d2l.inference.json_http import JsonServer
from d2l.inference.served import Route, beginnings, choose_way, find_routes, tokenize_there
from d2l.inference.verdicts import BOUND, Compared, Measured, Verdict, judge

RANK = 2


@dataclass(frozen=True)
class Place:
    """The files that a user has, and what a server may serve."""

    base: Path
    adapter: Path
    expected: Path
    served: Served
    half: Logprobs
    double: Logprobs
    other_base: Logprobs


def make_base(seed: int, vocabulary: int) -> PreTrainedModel:
    config = FAMILIES["llama 3"].base_config(vocabulary)
    return random_base(config, plan_load(RunConfig(), config, device="cpu"), seed)


def make_lora(base: PreTrainedModel) -> Lora:
    generator = torch.Generator().manual_seed(0)
    sizes = target_sizes(find_targets(base, ["o_proj", "v_proj"]), base.config.hidden_size)

    def side(which: int) -> dict[str, torch.Tensor]:
        shape = (1, base.config.num_hidden_layers, RANK)
        return {
            name: torch.randn(*shape, size[which], generator=generator) / size[which] ** 0.5
            for name, size in sizes.items()
        }

    return Lora(side(0), side(1), scale=0.3)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("probe")
    tokenizer = FAMILIES["llama 3"].tokenizer()
    base = make_base(0, len(tokenizer))
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    export_adapter(make_lora(base), base, folder / "adapter", str(folder / "base"))

    def scaled(factor: float) -> Logprobs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what newer releases of transformers rename
            model = PeftModel.from_pretrained(deepcopy(base), str(folder / "adapter"))
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.data *= factor
        return no_gradient(model.eval())

    models = {"base": no_gradient(base), "adapter": scaled(1)}
    served = Served(models, tokenize=lambda text: tokenizer(text).input_ids)
    written = d2l("expect", folder / "adapter", "-o", folder / "expected.json")
    assert written.exit_code == 0, written.stderr
    paths = (folder / "base", folder / "adapter", folder / "expected.json")
    return Place(*paths, served, scaled(0.5), scaled(2), no_gradient(make_base(1, len(tokenizer))))


def d2l(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(item) for item in arguments], prog_name="d2l")


def probe(place: Place, served: Served, *options: object) -> dict[str, Any]:
    """Probe with the expected values in their file, and return what is printed for programs."""
    with serving(served) as url:
        result = d2l("probe", url, place.adapter, "--expected", place.expected, "--format", "json", *options)
    found: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == found["exit_code"] == EXIT_CODES[found["verdict"]]
    return found


def fault(place: Place, **changes: Any) -> Served:
    return replace(place.served, **{"seen": [], **changes})


def with_adapter(place: Place, model: Logprobs) -> Served:
    return fault(place, models={**place.served.models, "adapter": model})


@pytest.mark.parametrize("flavour", ["vllm", "sglang", "llamacpp"])
def test_an_adapter_served_as_trained_passes(place: Place, flavour: Any) -> None:
    models = dict(place.served.models)
    if flavour == "sglang":
        models["base:adapter"] = models.pop("adapter")
    found = probe(
        place,
        fault(
            place,
            flavour=flavour,
            models=models,
            listed=None if flavour != "sglang" else [{"id": "base", "owned_by": "sglang"}],
        ),
    )
    assert found["verdict"] == "served"
    assert found["compared_with_peft"]
    compared = found["compared"]
    assert compared["adapter_error"] < 1e-5 < 0.01 < compared["effect"]
    assert compared["slope"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("flavour", ["vllm", "llamacpp"])
def test_a_base_under_the_adapters_name_is_seen(place: Place, flavour: Any) -> None:
    served = with_adapter(place, place.served.models["base"])
    found = probe(place, replace(served, flavour=flavour))
    assert (found["verdict"], found["exit_code"]) == ("served_base", 20)
    assert "lora-target-modules" in found["findings"][0]["remedy"]


@pytest.mark.parametrize(("which", "slope"), [("half", 0.5), ("double", 2)])
def test_another_scale_is_seen_and_measured(place: Place, which: str, slope: float) -> None:
    found = probe(place, with_adapter(place, getattr(place, which)))
    assert found["verdict"] == "differs_from_peft"
    assert found["compared"]["slope"] == pytest.approx(slope, rel=0.3)


def test_a_bound_of_zero_is_one(place: Place) -> None:
    adapter = place.served.models["adapter"]
    rounded = with_adapter(place, lambda ids: adapter(ids) - 1e-4 * torch.arange(len(ids))[:, None])
    assert probe(place, rounded)["verdict"] == "served"
    assert probe(place, rounded, "--bound", 0)["verdict"] == "differs_from_peft"


def test_sglangs_name_of_an_adapter_is_taken_as_it_is_given(place: Place) -> None:
    listed = [{"id": "base", "owned_by": "sglang"}]
    with serving(fault(place, flavour="sglang", listed=listed)) as url:
        for name in ("adapter", "base:adapter"):
            assert find_routes(JsonServer(url, timeout=30), name).adapter == Route("base:adapter")


def test_another_base_is_seen(place: Place) -> None:
    found = probe(place, fault(place, models={"base": place.other_base, "adapter": place.other_base}))
    assert found["verdict"] == "other_base"


@pytest.mark.parametrize("flavour", ["vllm", "sglang"])
def test_another_tokenizer_is_seen(place: Place, flavour: Any) -> None:
    models = {**place.served.models, "base:adapter": place.served.models["adapter"]}
    twice = fault(place, flavour=flavour, models=models, tokenize=lambda text: [5, *place.served.tokenize(text)])
    found = probe(place, twice)
    assert found["verdict"] == "tokenization_differs"
    ids = json.loads(place.expected.read_text())["ids"]
    assert f"{len(ids) + 1} tokens" in found["findings"][0]["actual"]


def test_tokens_other_than_expected_in_the_same_number_are_seen(place: Place) -> None:
    other = fault(place, tokenize=lambda text: [*place.served.tokenize(text)[:-1], 7])
    found = probe(place, other)
    assert found["verdict"] == "tokenization_differs"


@pytest.mark.parametrize("status", [400, 404, 422])
def test_an_adapter_that_is_not_loaded_is_named(place: Place, status: int) -> None:
    found = probe(place, fault(place, models={"base": place.served.models["base"]}, absent=status))
    assert found["verdict"] == "adapter_not_loaded"
    assert "`adapter` does not exist" in found["findings"][0]["actual"]


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "500": ({"status": 500, "body": lambda text: b"Internal Server Error"[: len(text)].ljust(len(text))}, "status 500"),
    "503": ({"status": 503}, "status 503"),
    "redirect": ({"status": 302}, "status 302"),
    "html": ({"body": lambda text: b"<html>welcome</html>".ljust(len(text))}, "not JSON"),
    "truncated": ({"body": lambda text: text[: len(text) // 2]}, "the answer breaks off"),
    "NaN": ({"body": lambda text: b"NaN".ljust(len(text))}, "not JSON"),
    "nested": ({"body": lambda text: b"[" * len(text)}, "not JSON"),
    "list": ({"change": lambda answer: []}, "expected an object"),
    "null": ({"change": lambda answer: None}, "expected an object"),
    "no choice": ({"change": lambda answer: {"choices": []}}, "one choice"),
    "count": ({"change": lambda answer: edit(answer, lambda rows: rows[:-3])}, "expected prompt_logprobs for"),
    "text": ({"change": lambda answer: edit(answer, lambda rows: "abc")}, "expected prompt_logprobs for"),
    "rows": ({"change": lambda answer: edit(answer, lambda rows: [None, *[3] * (len(rows) - 1)])}, "every token"),
    "above 0": ({"change": lambda answer: edit(answer, lambda rows: positive(rows))}, "not above 0"),
    "ids": (
        {"change": lambda answer: edit(answer, lambda rows: [None, *[{"0": {"logprob": -1}}] * (len(rows) - 1)])},
        "log-prob",
    ),
    "none": ({"flavour": "generated-only"}, "no log-probabilities"),
    "models": ({"listed": [{"name": "base"}]}, "list of models"),
    "no models": ({"listed": []}, "no base to compare"),
}


def edit(answer: dict[str, Any], change: Any) -> dict[str, Any]:
    choice = answer["choices"][0]
    return {**answer, "choices": [{**choice, "prompt_logprobs": change(choice["prompt_logprobs"])}]}


def positive(rows: list[Any]) -> list[Any]:
    return [None, *({token: {"logprob": 0.5} for token in row} for row in rows[1:])]


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_no_answer_is_named(place: Place, name: str) -> None:
    changes, words = FAULTS[name]
    found = probe(place, fault(place, **changes), "--timeout", 0.5)
    assert found["verdict"] == "server_failed"
    assert words in found["findings"][0]["actual"]


def test_a_slow_server_is_left(place: Place) -> None:
    over = threading.Event()
    try:
        found = probe(place, fault(place, before=lambda: over.wait(0.6)), "--timeout", 0.2)
    finally:
        over.set()
    assert found["verdict"] == "server_failed"
    assert "no whole answer within 0.2 s" in found["findings"][0]["actual"]
    assert "--timeout" in found["findings"][0]["remedy"]


def test_an_answer_may_take_longer_than_the_connection(place: Place) -> None:
    over = threading.Event()
    with serving(fault(place, before=lambda: over.wait(0.3))) as url:
        listed = JsonServer(url, timeout=30, connect_timeout=0.1).get("/v1/models")
    assert [model["id"] for model in listed["data"]] == ["base", "adapter"]


def test_a_server_that_sends_a_byte_at_a_time_is_left() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        server = JsonServer(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.3)
        with pytest.raises(ServerError, match=r"no whole answer within 0\.3 s") as caught:
            server.get("/v1/models")
        thread.join()
    assert caught.value.kind == "slow"


def test_a_socket_that_tires_before_the_alarm_is_a_slow_server_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2l.inference.json_http._hang_up", lambda *arguments: None)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # connects, and never answers
        server = JsonServer(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.1)
        with pytest.raises(ServerError, match=r"no whole answer within 0\.1 s") as caught:
            server.get("/v1/models")
    assert caught.value.kind == "slow"


def drip(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        for byte in b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100:
            try:
                connection.sendall(bytes([byte]))
            except OSError:
                return
            threading.Event().wait(0.02)


def test_a_server_that_is_down_is_named(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    result = d2l("probe", f"http://127.0.0.1:{port}", place.adapter, "--expected", place.expected)
    assert result.exit_code == 25
    assert "verdict   server failed\n" in result.stdout
    assert "no connection" in result.stdout
    assert "start the server" in result.stdout


def test_a_long_answer_is_not_read_to_its_end(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2l.inference.json_http.MAX_BYTES", 1000)
    found = probe(place, fault(place))
    assert "longer than 1,000 bytes" in found["findings"][0]["actual"]


def test_a_key_is_sent_and_never_shown(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROBE_KEY", "secret-1")
    assert probe(place, fault(place, key="secret-1"), "--api-key-env", "PROBE_KEY")["verdict"] == "served"
    found = probe(place, fault(place, key="another"), "--api-key-env", "PROBE_KEY")
    assert "status 401" in found["findings"][0]["actual"]
    assert "secret-1" not in json.dumps(found)
    assert d2l("probe", "http://localhost:1", place.adapter, "--api-key-env", "NO_SUCH").exit_code == 2


def test_an_adapter_of_this_folder_has_its_name(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.adapter)
    with serving(fault(place)) as url:
        result = d2l("probe", url, ".", "--expected", place.expected)
    assert result.exit_code == 0, result.output
    assert "models    adapter on base\n" in result.stdout


def test_with_the_base_at_hand_nothing_else_is_needed(place: Place) -> None:
    with serving(fault(place)) as url:
        result = d2l("probe", f"{url}/v1/", place.adapter)
    assert result.exit_code == 0, result.output
    assert f"server    {url}\nmodels    adapter on base\nverdict   served\n" in result.stdout


@pytest.mark.parametrize("flavour", ["vllm", "sglang", "llamacpp"])
@pytest.mark.parametrize("name", ["adapter", "base"])
def test_without_the_base_the_adapter_has_to_differ(place: Place, tmp_path: Path, flavour: Any, name: str) -> None:
    moved = tmp_path / "adapter"
    moved.mkdir()
    (moved / "adapter_model.safetensors").write_bytes((place.adapter / "adapter_model.safetensors").read_bytes())
    config = json.loads((place.adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (moved / "adapter_config.json").write_text(json.dumps(config))
    models = {**place.served.models, "adapter": place.served.models[name]}
    models["base:adapter"] = models["adapter"]
    with serving(fault(place, flavour=flavour, models=models)) as url:
        result = d2l("probe", url, moved, "--format", "json")
    found = json.loads(result.stdout)
    assert found["verdict"] == ("served" if name == "adapter" else "served_base")
    assert not found["compared_with_peft"]
    assert "Note: not compared with PEFT" in result.stderr


def test_what_the_user_gives_is_checked_before_a_request(place: Place, tmp_path: Path) -> None:
    stale = tmp_path / "adapter"
    stale.mkdir()
    for file in place.adapter.iterdir():
        (stale / file.name).write_bytes(file.read_bytes())
    with (stale / "adapter_model.safetensors").open("ab") as tensors:
        tensors.write(b" ")
    (tmp_path / "broken.json").write_text('{"format": "d2l-expected-1"}')
    served = fault(place)
    with serving(served) as url:
        for arguments, words in (
            ((url, stale, "--expected", place.expected), "belongs to another adapter"),
            ((url, place.adapter, "--expected", tmp_path / "broken.json"), "adapter: Field required"),
            ((url, place.adapter, "--expected", tmp_path / "none.json"), "No such file"),
            ((url, tmp_path, "--expected", place.expected), "adapter_config.json"),
            ((url, place.adapter, "--model", tmp_path), "tokenizer"),
            ((url, place.adapter, "--expected", place.expected, "--model", place.base), "leave out --model"),
            (("ftp://host", place.adapter), "expected a server's address"),
        ):
            result = d2l("probe", *arguments)
            assert (result.exit_code, result.stdout) == (2, ""), result.output
            assert words in result.stderr
    assert served.seen == []
    again = d2l("expect", place.adapter, "-o", place.expected)
    assert again.exit_code == 2
    assert "never written over" in again.stderr


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "http://", "http://a:b@host", "http://h?x=1", "http://h:99999", "http://a b"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="expected a server's address"):
        JsonServer(url, timeout=1)


def test_every_verdict_has_an_exit_code_of_its_own() -> None:
    assert set(EXIT_CODES) == {verdict.value for verdict in Verdict}
    assert len(set(EXIT_CODES.values())) == len(Verdict)


CASES: dict[str, tuple[Measured, Compared, Verdict | None]] = {
    "noise of a precision": (Measured(100, 0.2, 0.01), Compared(0.2, 0.03, 0.03, 0.97, 0.02), None),
    "a small effect": (Measured(100, 0.01, 0), Compared(0.01, 0.001, 0.001, 1.01, 0.01), None),
    "half of a small effect": (Measured(100, 0.005, 0), Compared(0.01, 0.001, 0.005, 0.5, 0.01), Verdict.DIFFERS),
    "too much": (Measured(100, 0.015, 0), Compared(0.01, 0.001, 0.005, 1.5, 0.01), Verdict.DIFFERS),
    "right on average": (Measured(100, 0.4, 0), Compared(0.4, 0.03, 0.2, 1.0, 0.05), Verdict.DIFFERS),
    "another adapter": (Measured(100, 0.4, 0), Compared(0.4, 0.03, 0.5, 0.02, 0.1), Verdict.DIFFERS),
    "the base": (Measured(100, 0.0, 0), Compared(0.4, 0.03, 0.4, 0, 0), Verdict.BASE),
    "the base, never twice the same": (Measured(100, 0.02, 0.01), Compared(0.05, 0.03, 0.05, 0.03, 0.05), Verdict.BASE),
    "noise above the effect": (Measured(100, 0.04, 0.04), Compared(0.01, 0.03, 0.04, 0.3, 0.4), Verdict.UNSURE),
    "another base": (Measured(100, 0.4, 0), Compared(0.4, 1.5, 1.5, 0.5, 0.2), Verdict.OTHER_BASE),
}


@pytest.mark.parametrize("name", CASES)
def test_figures_become_a_verdict(name: str) -> None:
    served, compared, verdict = CASES[name]
    assert [finding.verdict for finding in judge(served, compared, BOUND)] == ([] if verdict is None else [verdict])


@dataclass
class Answering:
    """A server that gives one answer to everything."""

    answer: Any
    url: str = "http://here"

    def get(self, path: str) -> Any:
        return self.answer

    def post(self, path: str, body: Any) -> Any:
        return self.answer


WORDS = ("choices", "data", "id", "parent", "owned_by", "usage", "prompt_tokens", "prompt_token_ids", "prompt_logprobs")
MORE = ("logprobs", "token_logprobs", "content", "top_logprobs", "logprob", "5", "6", "llamacpp", "base")
VALUES = st.sampled_from([None, True, 0, -1, 5, -0.5, 10**400, *WORDS, *MORE])
KEYS = st.sampled_from(WORDS + MORE)
ANSWERS = st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))


@settings(derandomize=True, deadline=None, max_examples=50)
@given(ANSWERS, ANSWERS)
def test_no_answer_ends_in_a_traceback(whole: Any, choice: Any) -> None:
    for answer in (whole, {"choices": [choice]}, {"data": [choice], "choices": [whole], "usage": choice}):
        server: Any = Answering(answer)
        with suppress(ServerError):
            choose_way(server, Route("base"), (5, 6))
        with suppress(ServerError):
            choose_way(server, Route("base"), "text")
        with suppress(ServerError):
            tokenize_there(server, Route("base"), "text")
        with suppress(ServerError):
            find_routes(server, "adapter")


@settings(derandomize=True, deadline=None)
@given(st.integers(2, 600))
def test_beginnings_end_with_the_whole_text(length: int) -> None:
    found = beginnings(length)
    assert found == sorted(set(found))
    assert found[0] >= 1
    assert found[-1] == length


def test_the_shipped_text_is_short(place: Place) -> None:
    assert 50 < len(place.served.tokenize(TEXT)) <= 512
