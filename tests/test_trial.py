"""Foreign templates that never end or fill the memory are refused in bounded time, others are used as they are."""

import subprocess
import sys
import time
from typing import Any

import pytest
from support.chat_formats import ANSWER, CHATML, QUESTION, generic
from support.families import FAMILIES

from d2l.data.chat import trial
from d2l.data.chat.format import chat_format
from d2l.data.chat.trial import why_not_bounded
from d2l.errors import DataError, ModelError
from d2l.io.resources import resource

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
LETTERS = "{% for a in messages[0].content %}{% for b in messages[0].content %}{% endfor %}{% endfor %}" * 4
DOUBLED = "{% set it = namespace(s='aaaa') %}{% for a in range(60) %}{% set it.s = it.s ~ it.s %}{% endfor %}{{ it.s }}"


@pytest.fixture
def less_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of computing instead of five, for the process too."""
    run: Any = subprocess.run
    script = f"import runpy; runpy.run_path({trial.__file__!r})"
    start = f"m = runpy.run_path({trial.__file__!r}); m['_main'].__globals__['CPU_SECONDS'] = 1; m['_main']()"
    monkeypatch.setattr(
        trial.subprocess, "run", lambda command, **rest: run([sys.executable, "-c", f"{script}; {start}"], **rest)
    )
    why_not_bounded.cache_clear()


TIME, MEMORY = "it did not end within 5 s of computing", "it needs more than 1,024 MiB"


@pytest.mark.parametrize(
    ("hostile", "why"),
    [
        (LOOPS, {TIME}),
        pytest.param(LETTERS, {TIME}, marks=pytest.mark.slow),
        pytest.param("{{ 9 ** (9 ** 9) }}", {TIME}, marks=pytest.mark.slow),
        ("{{ 'a' * 10**10 }}", {MEMORY}),
        (DOUBLED, {TIME, MEMORY}),  # a busy machine needs more than this test's second for a GiB
        ("{{ 'a' * 20000000 }}", {"it writes more than 10,000,000 characters"}),
    ],
)
@pytest.mark.usefixtures("less_time")
def test_a_template_that_does_not_end_is_refused(hostile: str, why: set[str]) -> None:
    chat = chat_format(generic, template=CHATML + hostile)
    started = time.monotonic()
    with pytest.raises(ModelError) as caught:
        chat.encode([QUESTION, ANSWER])
    first, *rest = str(caught.value).splitlines()
    assert first in {f"the chat template cannot be used: {it}, for a question with its answer" for it in why}
    assert rest == ["pass another template: --set chat_template=FILE"]
    assert time.monotonic() - started < 40
    with pytest.raises(ModelError):  # known by now
        chat.context_affixes()


def test_a_range_beyond_the_sandbox_is_refused_by_the_template() -> None:
    chat = chat_format(generic, template=CHATML + "{% for a in range(10**9) %}{% endfor %}")
    with pytest.raises(DataError, match="Range too big"):
        chat.encode([QUESTION, ANSWER])


def test_errors_of_a_template_are_no_reason() -> None:
    for text in (
        "{{ messages[0",
        "{{ raise_exception('no') }}",
        "{{ unknown.name.other }}",
        "{% if x %}",
        "{{ 1 / 0 }}",
    ):
        assert why_not_bounded(text, "{}") == ""


def test_every_shipped_template_ends_in_a_trial() -> None:
    for name in ("chat_templates/openai/gpt-oss-20b.jinja", FAMILIES["qwen3"].file):
        assert why_not_bounded(resource(name).read_text(encoding="utf-8"), '{"supervision": "content"}') == ""


def test_shipped_templates_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial.subprocess, "run", None)
    assert chat_format(FAMILIES["qwen3"].tokenizer()).has_generation_tags


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    why_not_bounded.cache_clear()
    monkeypatch.setattr(trial, "WALL_SECONDS", 0.01)
    assert why_not_bounded("{{ 1 }}", "{}") == "it did not end within 0.01 s"
    why_not_bounded.cache_clear()
