"""The oracle of held-out scores beside numpy and d2l's own distances, and EVL203 on what returns no scores."""

import numpy as np
import pytest
import torch

from checks.faults import override
from checks.oracles.heldout import Answered, distances, scores
from checks.production import make_subject
from checks.rules import RULES
from checks.runner import run_checks
from d2l.config.load import load_config
from d2l.hypernet.distance import compare_updates, mean_distance
from d2l.hypernet.lora import Lora


def answered(*losses: list[list[float]]) -> Answered:
    """Make the answers of documents; a question is right where its first loss is below 1."""
    return Answered(
        [[torch.tensor(q) for q in document] for document in losses], [[q[0] < 1 for q in d] for d in losses]
    )


def test_the_scores_are_those_of_numpy() -> None:
    own = answered([[1.0, 3.0], [0.5]], [[2.0]], [[0.25, 0.75, 2.0]])
    other = answered([[4.0, 3.0], [3.5]], [[2.5]], [[0.5, 0.75, 2.0]])
    none = answered([[2.0, 2.0], [2.0]], [[2.0]], [[2.0, 2.0, 2.0]])
    found = scores({"document": own, "other": other, "none": none}, "ce", per_context=False)
    assert found["document_ce_loss"] == pytest.approx((1 + 3 + 0.5 + 2 + 3) / 7)
    assert found["document_exact_match"] == 0.5
    assert found["other_exact_match"] == 0.25
    gaps = np.array([10.5 / 3 - 4.5 / 3, 0.5, 0.25 / 3])
    assert found["swap_gap"] == pytest.approx(gaps.mean())
    assert found["swap_gap_error"] == pytest.approx(gaps.std(ddof=1) / np.sqrt(3))
    by_context = scores({"document": own, "other": other, "none": none}, "kl", per_context=True)
    assert by_context["document_kl_loss"] == pytest.approx(np.mean([(2 + 0.5) / 2, 2, 1]))
    assert by_context["none_kl_loss"] == 2


def random_lora(seed: int) -> Lora:
    """Draw a LoRA of rank 2 and three layers, of two modules with 5 inputs."""
    generator = torch.Generator().manual_seed(seed)
    A, B = (
        {name: torch.randn(1, 3, 2, size, generator=generator) for name, size in sizes.items()}
        for sizes in ({"q_proj": 5, "o_proj": 5}, {"q_proj": 7, "o_proj": 4})
    )
    return Lora(A, B, 3.0)


def test_the_distances_are_those_of_factors() -> None:
    one, other = (random_lora(seed) for seed in (0, 1))
    pairs = compare_updates(one, other)
    updates = [{name: lora.scale * lora.B[name][0].mT @ lora.A[name][0] for name in lora.A} for lora in (one, other)]
    found = distances(updates, (1, 0))
    assert found["lora_distance"] == pytest.approx(mean_distance(pairs[:1]), rel=1e-5)
    for name in one.A:
        assert found[f"lora_distance_{name}"] == pytest.approx(mean_distance(pairs[:1], name), rel=1e-5)


def test_an_evaluation_that_returns_nothing_is_not_judged_by_its_scores() -> None:
    subject = make_subject(load_config())
    silent = override(evaluate=lambda healthy, run, rows: healthy.evaluate(run, rows) and {})(subject)
    (outcome,) = run_checks(silent, RULES, select=("EVL203",)).outcomes
    assert (outcome.outcome, outcome.message) == ("skip", "the implementation does not offer scores of its evaluate")
