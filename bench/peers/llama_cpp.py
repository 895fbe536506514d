"""llama-cpp-python (PyPI) on a GGUF file, by the C interface it exposes: no sampling, no text."""

from __future__ import annotations

from pathlib import Path

import llama_cpp as llama
import numpy as np

NAME = "llama-cpp-python"
SILENT = llama.llama_log_callback(lambda level, text, data: None)
llama.llama_log_set(SILENT, None)


def with_own_head(path: Path, to: Path, kind: str) -> None:
    """The same file with the vocabulary table as its authors quantise it, Q6_K."""
    options = llama.llama_model_quantize_default_params()
    options.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    options.allow_requantize = True  # ternary tensors of that type are copied
    if llama.llama_model_quantize(bytes(path), bytes(to), options):
        raise SystemExit(f"{NAME}: could not quantise {path}")


class LlamaCpp:
    """The peer's prefill and decode, its defaults but for the number of threads."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(
            bytes(path), llama.llama_model_default_params()
        )
        if not self._model:
            raise SystemExit(f"{NAME}: could not load {path}")
        options = llama.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, context, 512
        options.n_threads = options.n_threads_batch = threads
        options.no_perf = True
        self.threads = threads
        self._context = llama.llama_init_from_model(self._model, options)
        self._memory = llama.llama_get_memory(self._context)
        self._vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))

    def prefill(self, ids: list[int]) -> np.ndarray:
        """Logits of the last position."""
        llama.llama_memory_clear(self._memory, False)
        return self._run(ids)

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        llama.llama_memory_seq_rm(self._memory, 0, length, -1)

    def decode(self, token: int) -> np.ndarray:
        return self._run([token])

    def close(self) -> None:
        llama.llama_free(self._context)
        llama.llama_model_free(self._model)

    def _run(self, ids: list[int]) -> np.ndarray:
        tokens = (llama.llama_token * len(ids))(*ids)
        if llama.llama_decode(self._context, llama.llama_batch_get_one(tokens, len(ids))):
            raise SystemExit(f"{NAME}: could not run {len(ids)} tokens")
        logits = llama.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self._vocab_size,))
