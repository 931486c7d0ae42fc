"""Fixtures for every test: the oracle data beside the checkout, where it exists."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of oracle data; tests that need it say so where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (oracle data)")
    return SHARED
