"""The bits of digest_cases.py, on every instruction set of this CPU and on other architectures."""

import json

import pytest
from digest_cases import CASES, GOLDENS, digest


@pytest.mark.parametrize("name", CASES)
def test_bits_are_those_committed(isa: str, name: str) -> None:
    """``PYTHONPATH=.:tests python tests/digest_cases.py`` writes them anew."""
    assert digest(name) == json.loads(GOLDENS.read_text())[name]
