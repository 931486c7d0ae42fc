"""Guards before an optimizer step: which steps they refuse, and their messages."""

import math
import re
from typing import Any

import pytest
import torch
from torch import nn

from checks.rules import RULES
from d2l.errors import NonFiniteError
from d2l.train.guards import require_finite_step

NAN, INFINITY = math.nan, math.inf


def parameters(**gradients: list[float] | None) -> list[tuple[str, nn.Parameter]]:
    """Named parameters with these gradients."""
    named = [(name, nn.Parameter(torch.zeros(2))) for name in gradients]
    for name, parameter in named:
        gradient = gradients[name]
        parameter.grad = None if gradient is None else torch.tensor(gradient)
    return named


def refusal(**changes: Any) -> str:
    """Return the message about a step that is valid but for the changes."""
    sound: dict[str, Any] = {
        "step": 7,
        "loss": 1.5,
        "grad_norm": 0.5,
        "label_tokens": 4,
        "records": [3, 9],
        "parameters": [],
    }
    with pytest.raises(NonFiniteError) as raised:
        require_finite_step(**sound | changes)
    return str(raised.value)


@pytest.mark.parametrize("loss", [0.0, 1e-30, 1e30, -2.0])
@pytest.mark.parametrize("grad_norm", [0.0, 1e-30, 1e30])
def test_a_finite_step_passes_without_reading_the_gradients(loss: float, grad_norm: float) -> None:
    spoilt = parameters(head=[NAN, 0.0])
    require_finite_step(step=1, loss=loss, grad_norm=grad_norm, label_tokens=1, records=[0], parameters=spoilt)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"label_tokens": 0}, "expected at least one supervised token, found 0"),
        ({"label_tokens": 0, "loss": NAN, "grad_norm": NAN}, "expected at least one supervised token, found 0"),
        ({"loss": NAN}, "the loss is nan, expected a finite value"),
        ({"loss": INFINITY}, "the loss is inf, expected a finite value"),
        ({"loss": -INFINITY, "grad_norm": NAN}, "the loss is -inf, expected a finite value"),
        ({"grad_norm": NAN}, "the gradient norm is nan, expected a finite value (the loss is 1.5)"),
        ({"grad_norm": INFINITY}, "the gradient norm is inf, expected a finite value (the loss is 1.5)"),
    ],
)
def test_a_refusal_names_step_records_and_the_first_cause(changes: dict[str, Any], cause: str) -> None:
    text = refusal(**changes)
    assert text.startswith(f"step 7 (records 3, 9): {cause}")
    assert "nothing was written for this step" in text
    assert "intact" not in text  # nobody has looked at a checkpoint


def test_gradients_that_are_not_finite_are_named_and_no_others() -> None:
    text = refusal(
        grad_norm=NAN,
        parameters=parameters(sound=[1.0, 2.0], head=[NAN, 0.0], unused=None, scaler=[0.0, -INFINITY]),
    )
    assert "not finite in the gradients of head, scaler\n" in text


def test_a_norm_that_overflows_with_finite_gradients_has_its_own_message() -> None:
    text = refusal(grad_norm=INFINITY, parameters=parameters(head=[3e38, 3e38], unused=None))
    assert "every single gradient is finite, so their norm overflows" in text


def test_long_lists_are_shortened_and_counted() -> None:
    everything = parameters(**{f"p{i}": [NAN, NAN] for i in range(10)})
    text = refusal(grad_norm=NAN, records=range(8), parameters=everything)
    assert "(records 0, 1, 2, 3, 4, 5, 6, 7)" in text
    assert "p0, p1, p2 and 7 more" in text


def test_the_checks_that_the_advice_names_exist() -> None:
    codes = re.findall(r"d2l explain (\w+)", refusal(label_tokens=0))
    assert codes
    assert set(codes) <= {rule.code for rule in RULES}
