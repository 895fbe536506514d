"""Logits of stock transformers (float32), made by tools/make_goldens.py: contract 5.

Within 1e-5 of the largest logit, except in rows whose difference is traced to a flip: an
activation that stands next to a half-integer in the int8 quantiser and falls the other way, or a
latent weight that stands next to half of mean(|W|).
"""

import json

import numpy as np
import pytest
from golden_cases import (
    CASES,
    DEMO_COLUMNS,
    GOLDENS,
    SEEDS,
    case_ids,
    demo_ids,
    make_case,
    quantised_inputs,
)

from bitnet_ext import BitNetModel

RECORD = json.loads((GOLDENS / "transformers.json").read_text())["cases"]
_EXACT = 1e-5
_NEAR_HALF = 2e-5
_NEAR_HALF_WEIGHT = 1e-6


def _free(record, prefix=""):
    return not record[prefix + "flips"] and not record["weight_flips"]


def _compare(model, ids, wanted, record, columns=slice(None)):
    with quantised_inputs(model) as seen:
        found = model.forward_full(ids)[:, columns]
    error = np.abs(found - wanted).max(-1) / np.abs(wanted).max()
    if record["weight_flips"]:
        assert error.max() < 0.1
        values = [flip["value"] for flip in record["weight_flips"]]
        assert np.abs(np.abs(values) - 0.5).max() < _NEAR_HALF_WEIGHT
        return
    for row in np.flatnonzero(error > _EXACT):
        flips = record["flips"].get(str(row))
        assert flips, f"row {row}: error {error[row]:.2e} without a flip"
        assert error[row] < 0.1
        for flip in flips:
            assert abs(flip["value"] % 1 - 0.5) < _NEAR_HALF
            assert seen[flip["linear"]][flip["row"], flip["column"]] == flip["ours"]
            assert flip["ours"] != np.rint(flip["value"])


@pytest.mark.parametrize("name", CASES)
def test_logits_of_transformers(name, tmp_path):
    golden = np.load(GOLDENS / f"{name}.npz")["logits"]
    seeds = RECORD[name]["seeds"]
    assert len(seeds) == len(golden) == SEEDS
    assert sum(map(_free, seeds)) >= 15
    for seed, (wanted, record) in enumerate(zip(golden, seeds, strict=True)):
        make_case(name, seed, tmp_path / str(seed))
        _compare(BitNetModel.from_pretrained(tmp_path / str(seed)), case_ids(seed), wanted, record)


def test_the_demo_as_transformers_runs_it():
    golden = np.load(GOLDENS / "demo.npz")["logits"]
    seeds = RECORD["demo"]["seeds"]
    assert len(seeds) == len(golden) == SEEDS
    assert sum(map(_free, seeds)) >= 15
    model = BitNetModel.from_pretrained("demo")
    for seed, (wanted, record) in enumerate(zip(golden, seeds, strict=True)):
        _compare(model, demo_ids(seed), wanted, record, DEMO_COLUMNS)


@pytest.mark.parametrize("name", [name for name in CASES if name != "gpt2"])
def test_transformers_read_what_we_save(name):
    seeds = RECORD[name]["seeds"]
    assert all(s["saved_error"] <= _EXACT or not _free(s, "saved_") for s in seeds)
    assert sum(_free(s, "saved_") for s in seeds) >= 15
