"""Fixtures for every test: the oracle data beside the checkout, where it exists."""

from pathlib import Path

import pytest
from support import golden

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of oracle data; tests that need it are skipped with the reason where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (oracle data)")
    return SHARED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """After `make golden`, how many of the reference's cases there were."""
    if terminalreporter.config.option.markexpr == "golden" and golden.READ:
        terminalreporter.write_line(golden.account(SHARED))
