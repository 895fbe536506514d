"""Sixty-four sequences on a device, the most that a step is made for: the CPU's bits."""

import dataclasses

import numpy as np

import bitnet_ext as bx

BATCH = 64
CONFIG = dataclasses.replace(bx.BitNetConfig.tiny(), num_layers=1)


def test_a_step_of_sixty_four_sequences(device):
    """Of several lengths; some sit the second step out."""
    rng = np.random.default_rng(64)
    prompts = rng.integers(0, CONFIG.vocab_size, (BATCH, 4))
    lengths, active = rng.integers(1, 5, BATCH), rng.random(BATCH) < 0.8
    found = []
    for place in ("cpu", "cuda"):
        model = bx.BitNetModel.random(CONFIG, 3, device=place)
        cache = model.new_cache(BATCH, 8)
        steps = [model.prefill(prompts, cache, lengths=lengths)]
        steps += [model.decode(prompts[:, i], cache, active=(None, active)[i]) for i in range(2)]
        found.append([device.to_host(step) if device.owns(step) else step for step in steps])
    for wanted, on_device in zip(*found, strict=True):
        assert np.array_equal(on_device, wanted, equal_nan=True)
    assert np.isnan(wanted).any(1).tolist() == (~active).tolist()
