"""The model hub: what the cache has comes first; a hub that refuses has answered, and one that is silent is named."""

from collections.abc import Iterator
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError

from d2l.io import hub


class Refused(HfHubHTTPError):
    """What the hub says of a repository that is absent or gated."""

    def __init__(self) -> None:
        OSError.__init__(self, "401")


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    hub.hub_answers.cache_clear()
    yield
    hub.hub_answers.cache_clear()


def answering(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    def model_info(api: Any, name: str, timeout: float) -> None:
        assert timeout == hub.TIMEOUT
        if error is not None:
            raise error

    monkeypatch.setattr(hub.HfApi, "model_info", model_info)


def load(local_files_only: bool) -> str:
    if local_files_only:
        raise OSError("not in the cache")
    return "from the hub"


@pytest.mark.parametrize(
    ("error", "answers"), [(None, True), (Refused(), True), (ConnectionError("no route"), False), (OSError(), False)]
)
def test_one_that_refuses_has_answered(monkeypatch: pytest.MonkeyPatch, error: Exception | None, answers: bool) -> None:
    """The library's own error, which says why, is what the user needs to see then."""
    answering(monkeypatch, error)
    assert hub.hub_answers("someone/model") is answers
    if answers:
        assert hub.from_cache_or_hub(load, "someone/model") == "from the hub"
    else:
        with pytest.raises(OSError, match="someone/model is not in the cache, and the hub cannot be reached"):
            hub.from_cache_or_hub(load, "someone/model")


def test_the_cache_comes_first_and_a_hub_that_is_switched_off_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, AssertionError("it was asked"))
    assert hub.from_cache_or_hub(lambda local_files_only: f"cached: {local_files_only}", "x/y") == "cached: True"
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    assert not hub.hub_answers("x/y")
