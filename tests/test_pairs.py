"""Two planted faults at once, a few of the pairs that `make pairs` tries all of."""

import pytest

from checks.result import Outcome
from checks.rules import RULES
from experiments.pairs import Clean, Planted, clean_subject, try_pair


def planted(code: str, name: str) -> Planted:
    (found,) = ((rule, fault) for rule in RULES for fault in rule.faults if (rule.code, fault.name) == (code, name))
    return found


@pytest.mark.parametrize(
    ("one", "two", "result"),
    [
        pytest.param(("LOR201", "linear-forward"), ("OPT202", "never-clipped"), "both named", marks=pytest.mark.slow),
        (("TGT102", "keys-only"), ("DAT304", "tail-lost"), "both named"),
        (("HYP201", "rank-broadcast"), ("GRD201", "latest-binding"), "blocked"),
        (("ATT201", "no-mask"), ("LOR204", "scale-over-r"), "blocked"),
        pytest.param(("LOR204", "scale-over-r"), ("ATT205", "larger-scores"), "blocked", marks=pytest.mark.slow),
        pytest.param(("LOR204", "scale-over-r"), ("ATT401", "no-sinks"), "blocked", marks=pytest.mark.slow),
        pytest.param(("GRD201", "reentrant"), ("GRD202", "not-handed-on"), "blocked", marks=pytest.mark.slow),
        pytest.param(("STP201", "no-guard"), ("LSS203", "one-too-many"), "both named", marks=pytest.mark.slow),
        (("DAT301", "tight-budget"), ("DAT304", "document-cut"), "blocked"),
        (("DAT308", "kept-in-documents"), ("DAT304", "document-cut"), "blocked"),
        (("DAT308", "kept-in-documents"), ("DAT303", "question-lost"), "blocked"),
        (("TGT101", "experts"), ("TGT102", "queries-only"), "inapplicable"),
        # which shows in dequantized ones alone
        pytest.param(("BAS101", "packed-experts"), ("BAS203", "held-whole"), "inapplicable", marks=pytest.mark.slow),
        pytest.param(("LOR204", "scale-over-r"), ("BAS203", "held-whole"), "blocked", marks=pytest.mark.slow),
    ],
)
def test_both_are_named_or_one_waits_for_the_other(one: tuple[str, str], two: tuple[str, str], result: str) -> None:
    pair = try_pair(Clean(clean_subject(), {}, {}), planted(*one), planted(*two))
    assert pair.result == result, pair


def test_a_requirement_keeps_its_clean_outcome_unless_a_fault_can_change_it() -> None:
    one, two = planted("TGT102", "keys-only"), planted("DAT304", "tail-lost")
    needed = Outcome("LBL101", "a requirement", "static", "error", "crash", "did not run: who requires it is blocked")
    for changed, result in ((frozenset[str](), "lost"), (frozenset({"LBL101"}), "both named")):
        clean = Clean(clean_subject(), {"LBL101": needed}, {one[1]: changed, two[1]: frozenset()})
        assert try_pair(clean, one, two).result == result


def test_a_fault_that_shows_under_the_settings_of_another_is_lost_beside_it() -> None:
    needed = Outcome("LBL101", "a requirement", "static", "error", "crash", "did not run: who requires it is blocked")
    one, two = planted("DAT304", "tail-lost"), planted("BAS203", "held-whole")
    clean = Clean(clean_subject(), {"LBL101": needed}, {one[1]: frozenset(), two[1]: frozenset()})
    assert try_pair(clean, one, two).result == "lost"
