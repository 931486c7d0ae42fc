"""What LBL102 says of templates that ask otherwise than the model's own, without its opening token or with it twice."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from checks.production import make_subject
from checks.result import Outcome
from checks.rules import RULES
from checks.runner import run_checks
from d2l.config.load import load_config

# the way of Gemma: an opening token, then turns
OWN = (
    "{{ bos_token }}{% for message in messages %}<turn>{{ message.role }} {% generation %}{{ message.content }}</turn>"
    "{% endgeneration %}{% endfor %}{% if add_generation_prompt %}<turn>assistant {% endif %}"
)


def judged(folder: Path, own: str | dict[str, str] | None, template: str) -> Outcome:
    """Judge a run with a template of the user's and a tokenizer that comes with its own."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained("configs/models/tiny_gpt_oss")
    tokenizer.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": ["<turn>", "</turn>"]})
    tokenizer.chat_template = own
    tokenizer.save_pretrained(folder)
    (folder / "mine.jinja").write_text(template, encoding="utf-8")
    config = load_config(None, {"chat_template": str(folder / "mine.jinja")}, tokenizer=str(folder))
    (outcome,) = run_checks(make_subject(config, with_data=False), RULES, select=("LBL102",)).outcomes
    return outcome


@pytest.mark.parametrize("own", [OWN, {"default": OWN, "tool_use": "other"}])
def test_the_own_template_passes(tmp_path: Path, own: str | dict[str, str]) -> None:
    assert judged(tmp_path, own, "{# mine #}" + OWN).outcome == "pass"


def test_a_lost_opening_token_is_a_warning(tmp_path: Path) -> None:
    outcome = judged(tmp_path, OWN, OWN.replace("{{ bos_token }}", ""))
    assert outcome.outcome == "warn"
    assert (outcome.expected, outcome.actual) == (
        "'<bos><turn>user Zebras' from token 1 on",
        "'<turn>user Zebras g'",
    )


@pytest.mark.parametrize("own", [OWN, None])
def test_an_opening_token_that_stands_twice_is_a_warning(tmp_path: Path, own: str | None) -> None:
    outcome = judged(tmp_path, own, "{{ bos_token }}" + OWN)
    assert (outcome.outcome, outcome.expected, outcome.actual) == ("warn", "<bos> once", "<bos><bos><turn>")


def test_a_tokenizer_without_a_template_has_nothing_to_compare_with(tmp_path: Path) -> None:
    assert judged(tmp_path, None, "Be brief. " + OWN).outcome == "pass"
