"""A short run of tools/fuzz_checkpoint.py; the long one is in CONTRIBUTING.md."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools/fuzz_checkpoint.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_checkpoint", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["safetensors", "config", "gguf", "vocabulary"])
def test_damaged_checkpoints_load_or_raise_checkpoint_error(
    tool: ModuleType, tmp_path: Path, name: str
) -> None:
    reader = tool.readers(tmp_path)[name]
    result = tool.fuzz(name, reader, tmp_path, start=0, count=150)
    assert not result.failures, result.failures[0][1]
    assert result.growth_mib < tool.GROWTH_MIB
    assert 2 * result.past_header >= result.inputs
    assert result.loaded >= 10  # the samples are sound, so damage without effect loads
    assert len(result.messages) >= 10  # and the rest is refused for many reasons


def test_an_input_depends_on_its_number_alone(tool: ModuleType, tmp_path: Path) -> None:
    reader = tool.readers(tmp_path)["gguf"]
    path = tmp_path / "input.gguf"
    tool.fuzz("gguf", reader, tmp_path, start=0, count=8)
    first = path.read_bytes()
    tool.fuzz("gguf", reader, tmp_path, start=7, count=1)
    assert path.read_bytes() == first
