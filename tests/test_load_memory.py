"""Loading holds the packed weights and one group of tensors, never the file."""

from __future__ import annotations

from pathlib import Path

import fresh
import numpy as np
import pytest
from make_checkpoints import make_hf

from bitnet_ext.checkpoint.files import map_file, release_pages

LOAD = """
from bitnet_ext.checkpoint import open_checkpoint
from bitnet_ext.model.load import load_weights

def kib(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))

import bitnet_ext.checkpoint.gguf_model, bitnet_ext.model.load
checkpoint = open_checkpoint({path!r})
before, steps = kib("VmRSS"), []
weights = load_weights(checkpoint, progress=lambda done, total: steps.append((done, total)))
print(kib("VmHWM") - before, steps)
"""


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_latent_weights_pass_through(tmp_path: Path, dtype: str) -> None:
    """Ten layers of 6.5 MiB (f32): a peak of the packed weights, a fused pair and some slack."""
    changes = {"hidden_size": 512, "intermediate_size": 768, "tokenizer": False}
    make_hf(tmp_path, "bitnet-bf16", dtype=dtype, layers=10, **changes)
    size = (tmp_path / "model.safetensors").stat().st_size
    grown, steps = fresh.output(LOAD.format(path=str(tmp_path))).split(" ", 1)
    assert int(grown) * 1024 < size * (0.45 if dtype == "f32" else 0.65)
    assert steps == str([(i, 10) for i in range(1, 11)])


def test_released_pages_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "data"
    values = np.arange(100_000, dtype="<u4")
    path.write_bytes(values.tobytes())
    mapped = map_file(path)
    part = mapped[40:399_960].view("<u4")
    release_pages(part)
    release_pages(part[:3])
    release_pages(np.zeros(5))
    assert np.array_equal(part, values[10:-10])
    assert np.array_equal(mapped.view("<u4"), values)
