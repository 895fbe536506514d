"""Compare logits with llama.cpp on the same GGUF files; write tests/goldens/llama_cpp.json.

    python tools/compare_llama_cpp.py      # needs cyllama: a wheel of mainline llama.cpp's bindings

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
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cyllama  # noqa: E402
import numpy as np  # noqa: E402
from cyllama.llama import llama_cpp as llama  # noqa: E402
from make_checkpoints import make_hf  # noqa: E402

import bitnet_ext as bx  # noqa: E402
from bitnet_ext.checkpoint import save_gguf  # noqa: E402

TOKENS, SEEDS = 64, 3
FAMILIES = {"llama": "llama3", "bitnet": "1bitllm"}  # arch of the file: family it is made from
F32 = 0  # ggml's type id, for K and V


class Model(llama.LlamaModel):
    """With the attribute that cyllama 0.2.18's LlamaContext.get_logits_ith asks it for."""

    n_vocab = 0


def llama_logits(path: Path, ids: list[int], vocab: int) -> np.ndarray:
    """llama.cpp's logits [tokens, V]."""
    model = Model(path_model=str(path), params=llama.LlamaModelParams())
    model.n_vocab = vocab
    params = llama.LlamaContextParams()
    params.n_ctx = params.n_batch = params.n_ubatch = 256
    params.type_k = params.type_v = F32
    context = llama.LlamaContext(model=model, params=params)
    batch = llama.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
    for position, token in enumerate(ids):
        batch.add(token, position, [0], True)
    context.decode(batch)
    rows = [np.array(context.get_logits_ith(i), np.float32) for i in range(len(ids))]
    return np.stack(rows)


def compare(arch: str, kind: str, seed: int, folder: Path) -> dict[str, Any]:
    made = make_hf(folder / "hf", FAMILIES[arch], seed=2000 + seed, spread=0.1)
    model = bx.BitNetModel.from_pretrained(made.path)
    path = folder / "model.gguf"
    save_gguf(path, model.config, model._engine.weights, model._checkpoint, kind)
    ours = bx.BitNetModel.from_pretrained(path)
    vocab = model.config.vocab_size
    ids = np.random.RandomState(seed).randint(0, vocab - 3, TOKENS)
    got, want = ours.forward_full(ids), llama_logits(path, ids.tolist(), vocab)
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
    build = json.loads((Path(cyllama.__file__).parent / "build_config.json").read_text())
    provenance = {
        "command": "python tools/compare_llama_cpp.py",
        "date": datetime.date.today().isoformat(),
        "cyllama": cyllama.__version__,
        "llama.cpp": build["versions"]["llama_cpp_version"],
        "bitnet_ext": bx.__version__,
        "numpy": np.__version__,
        "tokens": TOKENS,
    }
    text = json.dumps({"provenance": provenance, "entries": entries}, indent=1)
    (ROOT / "tests/goldens/llama_cpp.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
