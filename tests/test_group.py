"""Groups of forked processes: what they give, what is said of one that fails, and that those who wait for ever are ended."""

import os
import re
import time

import pytest
import torch
from torch import distributed

from checks import processes
from checks.processes import GroupError, in_group
from checks.production import make_subject
from checks.rules import RULES
from checks.runner import run_checks
from d2l.config.load import load_config


def test_the_values_of_a_group_come_in_the_order_of_their_ranks() -> None:
    def add() -> tuple[int, str, float]:
        total = torch.tensor([10.0 + distributed.get_rank()])
        distributed.all_reduce(total)
        return distributed.get_rank(), os.environ["WORLD_SIZE"], float(total)

    assert in_group(add, 3) == [(0, "3", 33.0), (1, "3", 33.0), (2, "3", 33.0)]
    assert not distributed.is_initialized()


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_fails_is_named_and_ends_the_others(rank: int) -> None:
    def fail() -> None:
        if distributed.get_rank() == rank:
            raise ValueError("no such row\nlook at the data")
        distributed.barrier()

    with pytest.raises(GroupError, match=rf"^process {rank}: ValueError: no such row$"):
        in_group(fail, 2)


def test_those_that_wait_for_each_other_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PATIENCE", 0.5)
    with pytest.raises(GroupError, match=re.escape("2 processes wait for each other: no end after 0 s")):
        in_group(lambda: time.sleep(60), 2)


@pytest.mark.parametrize("place", ["checks.training.group_steps.can_fork", "torch.distributed.is_initialized"])
def test_where_no_process_can_be_forked_the_check_is_skipped(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, lambda: place.endswith("initialized"))
    config = load_config(overrides={"base_sharding": "full", "expert_weights": "dequantize"})
    for outcome in run_checks(make_subject(config), RULES, select=("GRD206", "BAS203")).outcomes:
        assert (outcome.outcome, outcome.message[:26]) == ("skip", "no process can be forked h")
