"""Mutants: all of them apply to the present code, and some of each area are killed by a red check."""

from datetime import date

import pytest
import torch

import checks
from checks.processes import in_group
from d2l.base import mxfp4
from d2l.data import epochs, packing
from d2l.hypernet.shape import HypernetShape
from d2l.train import loop, losses
from experiments.mutants.catalogue import MUTANTS
from experiments.mutants.mutant import DoesNotApplyError, Mutant, bugs, planted
from experiments.mutants.page import as_json, from_json, killed_share, markdown, summary
from experiments.mutants.trial import Red, Verdict, healthy_values, run_forked
from experiments.mutants.values import DiffersError, Values
from experiments.mutants.witnesses import WITNESSES
from experiments.mutants.workbench import configurations

DAY = date(2026, 11, 26)
BY_NAME = {mutant.name: mutant for mutant in MUTANTS}

# (mutant, configuration, the check that kills it): a few of every area
KILLED = (
    ("scaler-a-unused", "tiny_gpt_oss", "GRD204"),
    ("padding-attended", "tiny_gpt_oss", "ATT201"),
    ("contexts-swapped", "llama", "ATT201"),
    ("base-forward-bypassed", "tiny_gpt_oss", "LOR201"),
    ("binding-never-ends", "llama", "LOR202"),
    ("mean-of-the-micro-batch", "tiny_gpt_oss", "GRD203"),
    ("weights-not-restored", "llama", "SAV201"),
    ("adam-step-restarts", "llama", "SAV201"),
    ("key-without-template", "llama", "CCH301"),
    ("mask-inverted", "tiny_gpt_oss", "LBL101"),
    ("experts-block-gradients", "tiny_gpt_oss", "QNT202"),
    ("alpha-is-the-scale", "llama", "EXP201"),
    ("imported-in-half-precision", "tiny_gpt_oss", "IMP201"),
    ("muon-momentum-not-restored", "llama_evaluated", "SAV201"),
    ("overlap-ignored", "llama_evaluated", "DAT309"),
    ("rows-packed-by-sizes-of-others", "llama_evaluated", "DAT310"),
)


def test_every_mutant_applies() -> None:
    failures = []
    for mutant in MUTANTS:
        try:
            with planted(mutant):
                pass
        except (DoesNotApplyError, SyntaxError, AttributeError) as error:
            failures.append(f"{mutant.name}: {error}")
    assert not failures


def test_there_are_enough_of_every_area_and_each_names_a_witness() -> None:
    assert len(MUTANTS) >= 150
    assert {mutant.witness for mutant in MUTANTS} <= WITNESSES.keys()
    assert all(not it.judgement or it.judgement.startswith(("equivalent: ", "outside the claims: ")) for it in MUTANTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITNESSES)
def test_every_witness_gives_values_of_the_code_as_it_is(name: str) -> None:
    configurations()  # made once, and inherited by the processes that are forked
    assert healthy_values([name])[name]


def test_a_check_in_a_trial_may_fork_a_group_of_processes() -> None:
    assert run_forked(lambda: in_group(lambda: 1, 2)) == [1, 1]


def test_every_importer_runs_the_mutant_until_the_scope_ends() -> None:
    (mutant,) = bugs("x", "d2l.data.packing:pack", "batches", ("x", "default_rng(seed)", "default_rng(seed + 1)", "x"))
    sizes = [(size, size) for size in range(1, 30)]
    healthy = epochs.pack(sizes, 40, 40, seed=0)
    with planted(mutant) as plant:
        assert not plant.was_reached
        assert epochs.pack(sizes, 40, 40, seed=0) == packing.pack(sizes, 40, 40, seed=0) != healthy
        assert plant.was_reached
    assert epochs.pack(sizes, 40, 40, seed=0) == healthy


def test_tables_methods_properties_and_constants_are_exchanged_too() -> None:
    with planted(BY_NAME["likely-labels-only"]):
        assert losses.TOKEN_LOSSES["ce"] is losses._cross_entropy
        assert "clamp" in losses.TOKEN_LOSSES["ce"].__code__.co_names
    scale = HypernetShape.__dict__["scale"].fget
    before = scale.__code__
    with planted(BY_NAME["scale-divided-by-rank"]):
        assert scale.__code__ is not before
    assert scale.__code__ is before
    one = torch.full((1, 16), 0x77, dtype=torch.uint8), torch.full((1,), 127, dtype=torch.uint8)
    with planted(BY_NAME["largest-code-wrong"]):
        assert mxfp4.dequantize(*one, torch.float32).max() == 5
    assert mxfp4.dequantize(*one, torch.float32).max() == 6


@pytest.mark.parametrize(
    ("symbol", "old"),
    [
        ("d2l.train.loop:Trainer.step", "no such text"),
        ("d2l.train.loop:Trainer.step", "self"),
        ("d2l.train.loop:Trainer.no_such_method", "x"),
        ("d2l.base.mxfp4:NO_SUCH_CONSTANT", "x"),
    ],
)
def test_a_mutant_of_other_code_says_so(symbol: str, old: str) -> None:
    before = loop.Trainer.step.__code__
    with pytest.raises(DoesNotApplyError), planted(Mutant("x", "x", symbol, old, "y", "x", "train")):
        pass
    assert loop.Trainer.step.__code__ is before


def test_the_first_value_that_differs_ends_a_witness() -> None:
    healthy = Values()
    healthy |= {"same": torch.ones(2), "text": [1, 2], "number": 3.0}
    again = Values(healthy)
    again |= {"same": torch.ones(2) + 1e-8, "text": [1, 2]}
    with pytest.raises(DiffersError, match="number: by 1 of 3"):
        again["number"] = 4.0
    with pytest.raises(DiffersError, match="same: is gone"):
        Values(healthy).finish()


def test_the_share_counts_neither_invalid_nor_judged_mutants() -> None:
    plain = BY_NAME["no-clipping"]
    judged = Mutant(**vars(plain) | {"judgement": "equivalent: it is"})
    killed = Verdict("killed", "llama", (Red("STP201", "step-not-guarded", "no"),))
    results = [
        *((plain, killed), (plain, Verdict("survived")), (plain, Verdict("crashed", note="HYP201"))),
        *((plain, Verdict("invalid")), (judged, Verdict("survived")), (judged, killed)),
    ]
    assert killed_share(results) == (1, 3)
    assert "| all | 2 | 1 | 1 | 1 | 1 | 1 of 3, 33% |" in summary(results)
    assert summary(results).endswith("names the cause: 1 of 3, 33.3%.")
    page, table = markdown(results, {"torch": "2"}, 60, DAY), as_json(results, {}, 60, DAY)
    assert "**survived**: equivalent: it is" in page
    assert "2026-11-26, 6 mutants" in page
    assert table["counted"] == 3
    assert [verdict for _, verdict in from_json(table)] == [verdict for _, verdict in results]


@pytest.mark.parametrize(
    "change", [{"new": "0"}, {"symbol": "d2l.train.losses:other"}, {"name": "gone"}, {"why": "other"}]
)
def test_rows_of_mutants_that_are_others_now_are_not_taken_over(change: dict[str, str]) -> None:
    table = as_json([(BY_NAME["no-clipping"], Verdict("survived"))], {}, 60, DAY)
    table["mutants"][0] |= change
    assert len(from_json(table)) == int("why" in change)


@pytest.mark.parametrize(
    ("name", "config", "code"),
    [pytest.param(*it, marks=() if number % 3 == 0 else pytest.mark.slow) for number, it in enumerate(KILLED)],
)
def test_a_mutant_is_killed(name: str, config: str, code: str) -> None:
    with planted(BY_NAME[name]):
        (outcome,) = checks.preflight(configurations()[config], select=[code])
    assert outcome.outcome == "fail"
