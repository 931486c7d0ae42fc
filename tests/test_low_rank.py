"""Refactoring to a smaller rank against numpy's SVD of the dense deltas, and what servers allow."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2l.errors import CheckpointError
from d2l.hypernet.lora import Lora
from d2l.inference.adapter import shape_lora
from d2l.inference.low_rank import refactor, relative_error
from d2l.inference.servers import VLLM_RANKS, AdapterForm, missing_modules, request_command, serve_command

LAYERS, SCALE = 2, 3.0


def random_lora(rank: int, d_in: int, d_out: int, true_rank: int | None = None) -> Lora:
    """A LoRA whose deltas have a smaller rank than its factors, if one is given."""
    generator = torch.Generator().manual_seed(rank * 10_000 + d_in * 100 + d_out)

    def side(size: int) -> torch.Tensor:
        if true_rank is None:
            return torch.randn(1, LAYERS, rank, size, generator=generator)
        mix = torch.randn(1, LAYERS, rank, true_rank, generator=generator)
        return mix @ torch.randn(1, LAYERS, true_rank, size, generator=generator)

    return Lora({"v": side(d_in)}, {"v": side(d_out)}, SCALE)


def deltas(lora: Lora) -> np.ndarray:
    return (lora.scale * (lora.A["v"][0].double().mT @ lora.B["v"][0].double())).numpy()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9), st.integers(1, 14))
def test_the_nearest_of_a_rank_is_the_truncated_svd(rank: int, d_in: int, d_out: int, wanted: int) -> None:
    lora = random_lora(rank, d_in, d_out)
    found = refactor(lora, wanted)
    assert found.A["v"].shape == (1, LAYERS, wanted, d_in)
    assert found.B["v"].shape == (1, LAYERS, wanted, d_out)
    errors = []
    for actual, dense in zip(deltas(found), deltas(lora), strict=True):
        u, values, vt = np.linalg.svd(dense, full_matrices=False)
        np.testing.assert_allclose(actual, (u[:, :wanted] * values[:wanted]) @ vt[:wanted], atol=2e-5 * values[0])
        errors.append(np.linalg.norm(values[wanted:]) / np.linalg.norm(values))
    assert relative_error(found, lora) == pytest.approx(max(errors), abs=1e-6)


@pytest.mark.parametrize(("d_in", "d_out", "true_rank"), [(30, 20, 8), (8, 40, None), (40, 8, None)])
def test_a_rank_that_the_deltas_do_not_exceed_costs_nothing(d_in: int, d_out: int, true_rank: int | None) -> None:
    shaped = shape_lora(random_lora(82, d_in, d_out, true_rank), AdapterForm("vllm", 8))
    assert shaped.refactored
    assert 0 < shaped.error < 1e-6
    assert shaped.lora.rank == 8


def test_errors_of_zeros() -> None:
    lora = random_lora(4, 6, 5)
    assert relative_error(lora, lora) < 1e-15
    assert relative_error(lora.zeroed(), lora) == pytest.approx(1)
    assert relative_error(lora.zeroed(), lora.zeroed()) == 0
    assert relative_error(lora, lora.zeroed()) == float("inf")


def test_the_error_is_that_of_the_worst_delta_wherever_it_stands() -> None:
    lora = random_lora(4, 6, 5)
    for layer in range(LAYERS):
        A = lora.A["v"].clone()
        A[:, layer] = 0
        assert relative_error(replace(lora, A={"v": A}), lora) == pytest.approx(1)


def test_room_is_filled_with_zeros_and_the_scale_is_in_b() -> None:
    lora = random_lora(24, 30, 20)
    shaped = shape_lora(lora, AdapterForm("vllm"))
    assert (shaped.lora.rank, shaped.lora.scale, shaped.error, shaped.refactored) == (32, 1.0, 0.0, False)
    assert torch.equal(shaped.lora.A["v"][:, :, :24], lora.A["v"])
    assert torch.equal(shaped.lora.B["v"][:, :, :24], lora.B["v"] * SCALE)
    assert not shaped.lora.A["v"][:, :, 24:].any()
    assert shape_lora(lora, AdapterForm(dtype="bfloat16")).lora.B["v"].dtype == torch.bfloat16


def test_a_rank_that_costs_more_than_the_bound_is_refused() -> None:
    lora = random_lora(24, 30, 20)
    with pytest.raises(
        CheckpointError, match=r"rank 24 as rank 16 moves a delta by 0\.\d+ of its length, more than 0.01"
    ):
        shape_lora(lora, AdapterForm("vllm", 16))
    assert 0.01 < shape_lora(lora, AdapterForm("vllm", 16, max_error=0.9)).error < 0.9


@pytest.mark.parametrize(
    ("form", "generated", "rank"),
    [
        (AdapterForm(), 24, 24),
        (AdapterForm("sglang"), 24, 24),
        (AdapterForm("peft", 20), 24, 20),
        *((AdapterForm("vllm"), rank, rank) for rank in VLLM_RANKS),
        (AdapterForm("vllm"), 24, 32),
        (AdapterForm("vllm"), 257, 320),
        (AdapterForm("vllm"), 520, 512),
        (AdapterForm("vllm", 16), 520, 16),
    ],
)
def test_ranks_of_servers(form: AdapterForm, generated: int, rank: int) -> None:
    assert form.rank_for(generated) == rank


@pytest.mark.parametrize("rank", [2, 24, 513])
def test_a_rank_without_a_setting_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="vLLM has settings for the ranks 1, 8, 16"):
        AdapterForm("vllm", rank)


def test_modules_that_come_together() -> None:
    assert missing_modules(["v_proj"]) == ["q_proj", "k_proj"]
    assert missing_modules(["o_proj", "up_proj"]) == ["gate_proj"]
    assert missing_modules(["o_proj"]) == []


def test_the_printed_commands_are_what_a_shell_reads(tmp_path: Path) -> None:
    folder = tmp_path / "it is"
    ids = [f"d{number}" for number in range(20)]
    command = serve_command("vllm", "some/base", folder, ids, 24, ["o_proj", "v_proj"])
    words = shlex.split(str(command))
    assert f"VLLM_LORA_RESOLVER_CACHE_DIR={folder}" in words
    rest = "serve some/base --enable-lora --max-lora-rank 32 --max-loras 8 --lora-target-modules o_proj qkv_proj v_proj"
    assert shlex.join(words[words.index("vllm") :]) == f"vllm {rest}"
    assert serve_command("vllm", "some/base", folder, ids, 513, ["v_proj"]) is None
    sglang = shlex.split(str(serve_command("sglang", "some/base", folder, ["a"], 24, ["v_proj"])))
    assert sglang[-5:] == ["k_proj", "q_proj", "v_proj", "--lora-paths", f"a={folder / 'a'}"]
    body = json.loads(shlex.split(request_command("vllm", "some/base", "d0"))[-1])
    assert (body["model"], body["messages"][0]["role"]) == ("d0", "user")
    assert json.loads(shlex.split(request_command("sglang", "some/base", "d0"))[-1])["model"] == "some/base:d0"
