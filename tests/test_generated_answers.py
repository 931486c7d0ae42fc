"""What EVL202 says where the model library's cache, or its own settings for generation, change an answer."""

from typing import Any

import pytest
import torch
from test_attention_terms import of_base
from transformers.cache_utils import DynamicSlidingWindowLayer

from checks.faults import override
from checks.result import Outcome
from checks.rules import RULES
from checks.runner import run_checks
from checks.subject import Subject


def judged(subject: Subject) -> Outcome:
    (outcome,) = run_checks(subject, RULES, select=("EVL202",)).outcomes
    return outcome


def test_a_full_window_that_loses_its_oldest_token_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in transformers 4.51, whose sliding cache lost a key too many once the text was as long as the window."""
    update = DynamicSlidingWindowLayer.update

    def lossy(self: Any, *arguments: Any, **named: Any) -> Any:
        seen = update(self, *arguments, **named)
        if self.cumulative_length >= self.sliding_window:
            self.keys = torch.cat([self.keys[:, :, 1:2], self.keys[:, :, 1:]], dim=2)
        return seen

    assert judged(of_base("gpt-oss-20b")).outcome == "pass"
    monkeypatch.setattr(DynamicSlidingWindowLayer, "update", lossy)
    assert judged(of_base("gpt-oss-20b")).found_fault


def test_what_the_base_files_ask_for_is_sampled_nowhere() -> None:
    """GPT-OSS ships `do_sample: true`, others penalties and short limits: d2l's answers are greedy all the same."""

    def with_files_of(subject: Subject) -> Subject:
        def build(healthy: Any, base: Any, config: Any) -> Any:
            base.generation_config.update(do_sample=True, temperature=50.0, repetition_penalty=3.0, max_new_tokens=2)
            return healthy.build(base, config)

        return override(build=build)(subject)

    assert judged(with_files_of(of_base("gpt-oss-20b"))).outcome == "pass"


def test_an_answer_that_is_asked_without_a_cache_passes_too() -> None:
    """An implementation may read the whole text for every token."""

    def generate(healthy: Any, model: Any, lora: Any, prompts: Any, stop: Any, max_new_tokens: int) -> Any:
        ids = prompts
        for _ in range(max_new_tokens):
            ids = torch.cat([ids, healthy.generate(model, lora, ids, stop, 1)], dim=1)
        return ids[:, prompts.shape[1] :]

    assert judged(override(generate=generate)(of_base("gpt-oss-20b"))).outcome == "pass"
