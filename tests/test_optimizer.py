"""Muon against `torch.optim.Muon`, against singular values, and for stacks of matrices; what is stepped by which."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_model import random_rows, run_config, tiny_model
from torch import Tensor, nn

from d2l.train import optimizer as optimizer_module
from d2l.train.loop import Trainer
from d2l.train.optimizer import MuonAdamW, optimizer_values, orthogonalize, parameter_groups, state_names

SHAPES = [(8, 8), (8, 32), (32, 8)]


def gradients(*shape: int, steps: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for _ in range(steps)]


def stepped(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, taken: list[Tensor]) -> Tensor:
    for gradient in taken:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach().clone()


def muon(parameter: nn.Parameter, weight_decay: float = 0.1) -> MuonAdamW:
    return MuonAdamW([{"params": [parameter], "matrices": True, "lr": 0.1, "weight_decay": weight_decay}])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_steps_as_in_torch(shape: tuple[int, int]) -> None:
    ours, theirs = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
    oracle = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    actual, expected = stepped(muon(ours), ours, gradients(*shape)), stepped(oracle, theirs, gradients(*shape))
    moved = (expected - 1).norm()
    assert (actual - expected).norm() < 0.02 * moved  # torch iterates in bfloat16


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), stack=st.integers(1, 3), seed=st.integers(0, 99))
def test_singular_vectors_stay_and_singular_values_follow_the_quintic(
    rows: int, columns: int, stack: int, seed: int
) -> None:
    matrices = torch.randn(stack, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for matrix, actual in zip(matrices, orthogonalize(matrices), strict=True):
        left, values, right = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        torch.testing.assert_close(actual, left * values @ right, rtol=1e-6, atol=1e-9)


def test_a_gradient_of_zero_moves_nothing() -> None:
    parameter = nn.Parameter(torch.ones(2, 3, 4))
    after = stepped(muon(parameter, weight_decay=0.0), parameter, [torch.zeros(2, 3, 4)])
    assert torch.equal(after, torch.ones(2, 3, 4))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_matrix_of_a_stack_steps_as_if_it_were_alone(shape: tuple[int, int]) -> None:
    taken = gradients(3, *shape)
    together = nn.Parameter(torch.ones(3, *shape))
    actual = stepped(muon(together), together, taken)
    for i in range(3):
        alone = nn.Parameter(torch.ones(shape))
        expected = stepped(muon(alone), alone, [gradient[i] for gradient in taken])
        torch.testing.assert_close(actual[i], expected)


def test_parameters_of_one_shape_step_as_if_each_were_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(8, 32), (3, 8, 32), (32, 8), (8, 32), (2, 2, 8, 32), (5, 7)]
    taken = [gradients(*shape) for shape in shapes]
    for bound in (2**26, 1100, 1):  # all of a shape together, the first two of one, each by itself
        monkeypatch.setattr("d2l.train.optimizer.STACK_VALUES", bound)
        together = [nn.Parameter(torch.ones(shape)) for shape in shapes]
        optimizer = MuonAdamW([{"params": together, "matrices": True, "lr": 0.1, "weight_decay": 0.1}])
        counts = {2**26: [4, 1, 1], 1100: [2, 1, 1, 1, 1], 1: [1] * 6}
        assert [len(group) for group in optimizer_module._of_one_shape(together)] == counts[bound]
        for step in range(3):
            for parameter, own in zip(together, taken, strict=True):
                parameter.grad = own[step].clone()
            optimizer.step()
        for parameter, shape, own in zip(together, shapes, taken, strict=True):
            alone = nn.Parameter(torch.ones(shape))
            torch.testing.assert_close(parameter.detach(), stepped(muon(alone), alone, own), rtol=1e-5, atol=1e-6)
            assert optimizer.state[parameter]["momentum"].shape == shape


@pytest.mark.parametrize("spectrum", ["random", "low rank", "six decades"])
def test_gram_matrices_in_float32_are_as_precise_as_a_step_needs(spectrum: str) -> None:
    """In bfloat16, as published, the error is one in a hundred."""
    x = torch.randn(3, 64, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    if spectrum == "low rank":
        values[:, 4:] *= 1e-5
    if spectrum == "six decades":
        values = torch.logspace(0, -6, 64, dtype=torch.float64).expand(3, -1)
    x = left * values[:, None] @ right
    expected = orthogonalize(x)
    error = (orthogonalize(x.float()).double() - expected).norm() / expected.norm()
    assert error < 1e-3


def test_weights_take_muons_steps_and_everything_else_adamws() -> None:
    config = run_config(muon_learning_rate=0.3, learning_rate=0.01, warmup_steps=0, max_grad_norm=1e9)
    both, adamw = (Trainer(tiny_model(it), random_rows(), it) for it in (config, run_config(**_without_muon(config))))
    metrics, _ = both.step(), adamw.step()
    assert metrics.lr == pytest.approx(0.01)
    kept = state_names(both.optimizer)
    expected = dict(adamw.model.hypernet.named_parameters())
    for name, parameter in both.model.hypernet.named_parameters():
        assert set(both.optimizer.state[parameter]) == set(kept[parameter]), name
        assert torch.equal(parameter, expected[name]) == (kept[parameter] != ("momentum",)), name
    names = {name for name, parameter in both.model.hypernet.named_parameters() if kept[parameter] == ("momentum",)}
    assert {"head.weight", "layers.0.layers.1.weight"} <= names


def _without_muon(config: object) -> dict[str, object]:
    return vars(config) | {"muon_learning_rate": None, "remarks": ()}


@pytest.mark.parametrize("muon_lr", [None, 1e-3])
def test_optimizer_values_counts_the_state(muon_lr: float | None) -> None:
    config = run_config(muon_learning_rate=muon_lr)
    trainer = Trainer(tiny_model(config), random_rows(), config)
    trainer.step()
    states = trainer.optimizer.state.values()
    kept = sum(value.numel() for state in states for key, value in state.items() if key != "step")
    assert optimizer_values(trainer.model.hypernet, config) == kept


def test_matrices_decay_and_nothing_else() -> None:
    config = run_config(num_blocks=2, num_self_attn_per_block=1, num_pre_head_layers=2, weight_decay=0.3)
    hypernet = tiny_model(config).hypernet
    decayed, kept = parameter_groups(hypernet, config)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in hypernet.named_parameters()}
    groups = [[names.pop(id(parameter)) for parameter in group["params"]] for group in (decayed, kept)]
    assert not names, "a parameter in no group"
    assert {"head.weight", "layers.0.layers.1.weight"} <= set(groups[0])
    assert all(name.endswith(".weight") and hypernet.get_parameter(name).ndim >= 2 for name in groups[0])
    spared = ("scaler_A.", "scaler_B.", "bias_A.", "bias_B.", "latents_q", "norm.weight", ".bias")
    for part in spared:
        assert any(part in name for name in groups[1]), part
        assert not any(part in name for name in groups[0]), part
    for name in groups[1]:
        parameter = hypernet.get_parameter(name)
        assert parameter.ndim < 2 or any(part in name for part in spared), name
