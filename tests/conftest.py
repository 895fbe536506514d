"""Fixtures every test shares: one run per instruction set, and the process state put back."""

from collections.abc import Iterator

import pytest

import bitnet_ext as bx


@pytest.fixture(params=bx.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force each ISA of this CPU in turn."""
    before = bx.get_isa()
    bx.set_isa(request.param)
    yield request.param
    bx.set_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Put the number of threads back after a test that changes it."""
    before = bx.get_num_threads()
    yield
    bx.set_num_threads(before)
