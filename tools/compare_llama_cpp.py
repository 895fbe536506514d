"""Compare logits with llama.cpp on the same GGUF files; write tests/goldens/llama_cpp.json.

    PYTHONPATH=.:tests python tools/compare_llama_cpp.py      # needs llama-cpp-python

llama.cpp is not an oracle for bits. On TQ2_0 it quantises activations by blocks of 256, not by
token; on F16 it does not quantise them at all; and its arch "bitnet" is SiLU's. What is stated is
how often the largest logit is the same and how the logits correlate, over tiny random models, whose
logits lie closer together than a trained model's. The models are those of make_checkpoints.py,
written by save_gguf; each side reads the same file.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from golden_cases import GOLDENS
from make_checkpoints import make_hf

import bitnet_ext as bx
from bitnet_ext.checkpoint import save_gguf

TOKENS, SEEDS = 64, 3
FAMILIES = {"llama": "llama3", "bitnet": "1bitllm"}  # arch of the file: family it is made from
F32 = 0  # ggml's type id, for K and V


def llama_logits(path: Path, ids: list[int]) -> np.ndarray:
    """llama.cpp's logits [tokens, V]."""
    model = llama_cpp.Llama(
        str(path), n_ctx=256, n_batch=256, logits_all=True, type_k=F32, type_v=F32, verbose=False
    )
    model.eval(ids)
    return np.array(model.scores[: len(ids)], np.float32)


def compare(arch: str, kind: str, seed: int, folder: Path) -> dict[str, Any]:
    made = make_hf(folder / "hf", FAMILIES[arch], seed=2000 + seed, spread=0.1)
    model = bx.BitNetModel.from_pretrained(made.path)
    path = folder / "model.gguf"
    save_gguf(path, model.config, model._engine.weights, model._checkpoint, kind)
    ours = bx.BitNetModel.from_pretrained(path)
    vocab = model.config.vocab_size
    ids = np.random.RandomState(seed).randint(0, vocab - 3, TOKENS)
    got, want = ours.forward_full(ids), llama_logits(path, ids.tolist())
    return {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "top1_agreement": float((got.argmax(1) == want.argmax(1)).mean()),
        "correlation": float(np.corrcoef(got.ravel(), want.ravel())[0, 1]),
        "largest_difference": float(np.abs(got - want).max() / np.abs(got).max()),
    }


def main() -> None:
    entries = {}
    for arch in FAMILIES:
        for kind in ("tq2_0", "f16"):
            for seed in range(SEEDS):
                with tempfile.TemporaryDirectory() as folder:
                    entry = compare(arch, kind, seed, Path(folder))
                entries[f"{arch}/{kind}/{seed}"] = entry
                print(arch, kind, seed, entry)
    provenance = {
        "command": "PYTHONPATH=.:tests python tools/compare_llama_cpp.py",
        "date": datetime.date.today().isoformat(),
        "llama_cpp_python": llama_cpp.__version__,
        "bitnet_ext": bx.__version__,
        "numpy": np.__version__,
        "tokens": TOKENS,
    }
    text = json.dumps({"provenance": provenance, "entries": entries}, indent=1)
    (GOLDENS / "llama_cpp.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
