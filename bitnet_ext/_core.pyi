"""The C++ extension: kernels, caches, counted memory, runtime."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__version__: str

# mask
def mask_fill(
    out: npt.NDArray[Any],
    q_len: int,
    k_len: int,
    past: int,
    left: int,
    prefix: int,
) -> None: ...

# ternary
class PackedTernary:
    @staticmethod
    def pack(
        matrix: npt.ArrayLike, scale: npt.ArrayLike, bits: Literal["2", "1.6"] = "2"
    ) -> PackedTernary: ...
    @staticmethod
    def from_sources(
        sources: list[
            tuple[str, str, npt.NDArray[Any], int, int, float, bool, npt.NDArray[np.int32] | None]
        ],
        bits: Literal["2", "1.6", "auto"],
    ) -> PackedTernary: ...
    @staticmethod
    def stored_bytes(n: int, k: int) -> int: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def scale(self) -> float | npt.NDArray[np.float32]: ...
    @property
    def divide(self) -> bool: ...
    @property
    def bits(self) -> Literal["2", "1.6"]: ...
    @property
    def nbytes(self) -> int: ...
    def unpack(self) -> npt.NDArray[np.int8]: ...

def ternary_matmul(
    q: npt.NDArray[np.int8], weight: PackedTernary, out: npt.NDArray[np.int32]
) -> None: ...
def ternary_linear(
    q: npt.NDArray[np.int8],
    s: npt.NDArray[np.float32],
    weight: PackedTernary,
    bias: npt.NDArray[np.float32] | None,
    residual: bool,
    out: npt.NDArray[np.float32],
) -> None: ...

# runtime
def available_isas() -> list[str]: ...
def get_isa() -> str: ...
def set_isa(name: str) -> None: ...
def isa_description(name: str) -> str: ...
def kernel_tables() -> dict[str, str]: ...
def cpu_brand() -> str: ...
def num_threads() -> int: ...
def set_num_threads(threads: int) -> None: ...
def usable_cpus() -> int: ...
def cpu_quota(root: str = "") -> float: ...
def memory_stats() -> dict[str, int]: ...
def reset_peak_memory() -> None: ...
def set_memory_limit(bytes: int) -> None: ...
def metrics_listen(change: int) -> None: ...
def metrics_snapshot() -> list[tuple[str, str, str, int, int, int, int]]: ...
def set_mode(mode: str) -> None: ...

class Buffer:
    def __init__(self, bytes: int) -> None: ...
    @property
    def nbytes(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

# rowwise
def norm(
    x: npt.NDArray[np.float32],
    weight: npt.NDArray[np.float32] | None,
    bias: npt.NDArray[np.float32] | None,
    eps: float,
    kind: str,
    out: npt.NDArray[np.float32],
    mean: npt.NDArray[np.float32] | None = None,
    inv_std: npt.NDArray[np.float32] | None = None,
) -> None: ...
def norm_quant(
    x: npt.NDArray[np.float32],
    weight: npt.NDArray[np.float32] | None,
    bias: npt.NDArray[np.float32] | None,
    eps: float,
    kind: str,
    q: npt.NDArray[np.int8],
    s: npt.NDArray[np.float32],
) -> None: ...
def norm_backward(
    grad: npt.NDArray[np.float32],
    x: npt.NDArray[np.float32],
    weight: npt.NDArray[np.float32] | None,
    eps: float,
    kind: str,
    grad_x: npt.NDArray[np.float32],
    grad_weight: npt.NDArray[np.float32] | None,
    grad_bias: npt.NDArray[np.float32] | None,
) -> None: ...
def act_quant(
    x: npt.NDArray[np.float32],
    act: str,
    gated: bool,
    norm_w: npt.NDArray[np.float32] | None,
    norm_b: npt.NDArray[np.float32] | None,
    kind: str,
    eps: float,
    q: npt.NDArray[np.int8],
    s: npt.NDArray[np.float32],
) -> None: ...
def embed(
    table: npt.NDArray[Any], dtype: str, ids: npt.NDArray[np.int32], out: npt.NDArray[np.float32]
) -> None: ...
def add_rows(
    x: npt.NDArray[np.float32], table: npt.NDArray[np.float32], pos: npt.NDArray[np.int32]
) -> None: ...
def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]: ...
def log_softmax_gather(
    logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]: ...
def rope_table(
    inv_freq: npt.NDArray[np.float32], positions: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]: ...
def rotary(
    x: npt.NDArray[np.float32],
    cos: npt.NDArray[np.float32],
    sin: npt.NDArray[np.float32],
    position_ids: npt.NDArray[np.int64] | None,
    interleaved: bool,
    out: npt.NDArray[np.float32],
) -> None: ...
def elementwise(op: str, x: npt.NDArray[np.float32], out: npt.NDArray[np.float32]) -> None: ...

# vocab
def project(
    x: npt.NDArray[np.float32],
    table: npt.NDArray[Any],
    dtype: str,
    scales: npt.NDArray[np.float32] | None,
    bias: npt.NDArray[np.float32] | None,
    out: npt.NDArray[np.float32],
    places: npt.NDArray[np.int32] | None = None,
) -> None: ...
def sum_products(
    a: npt.NDArray[np.float32], b: npt.NDArray[np.float32], out: npt.NDArray[np.float32]
) -> None: ...
def topk(
    logits: npt.NDArray[np.float32], k: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]: ...
def quantise_head(
    table: npt.NDArray[Any], dtype: str
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]: ...

# screen
class VocabScreen:
    def __init__(self, table: npt.NDArray[Any], dtype: str) -> None: ...
    @staticmethod
    def bytes(rows: int, width: int) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def finite(self) -> bool: ...
    def bounds(
        self, x: npt.NDArray[np.float32], bias: npt.NDArray[np.float32] | None
    ) -> npt.NDArray[np.float32] | None: ...

def project_top(
    x: npt.NDArray[np.float32],
    table: npt.NDArray[Any],
    dtype: str,
    bias: npt.NDArray[np.float32] | None,
    screen: VocabScreen,
    k: int,
    keep: list[npt.NDArray[np.int32]],
    out: npt.NDArray[np.float32],
    places: npt.NDArray[np.int32] | None = None,
) -> None: ...

# attention
def attention(
    q: npt.NDArray[Any],
    k: npt.NDArray[Any],
    v: npt.NDArray[Any],
    out: npt.NDArray[np.float32],
    mask: npt.NDArray[Any] | None,
    kv_lengths: npt.NDArray[np.int64] | None,
    seeds: npt.NDArray[np.uint64] | None,
    causal: bool,
    past_len: int,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    dropout_p: float,
    int8: bool,
    scores: npt.NDArray[np.float32] | None,
    score_kind: str,
) -> None: ...
def attention_backward(
    d_out: npt.NDArray[Any],
    q: npt.NDArray[Any],
    k: npt.NDArray[Any],
    v: npt.NDArray[Any],
    dq: npt.NDArray[np.float32],
    dk: npt.NDArray[np.float32],
    dv: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32] | None,
    mask: npt.NDArray[Any] | None,
    kv_lengths: npt.NDArray[np.int64] | None,
    seeds: npt.NDArray[np.uint64] | None,
    causal: bool,
    past_len: int,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> None: ...

class CacheLease:
    def __enter__(self) -> None: ...
    def __exit__(self, *args: object) -> None: ...

class KVCache:
    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        dk: int,
        dv: int,
        max_len: int,
        kv_dtype: str,
    ) -> None: ...
    @property
    def lengths(self) -> npt.NDArray[np.int32]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def nbytes_reserved(self) -> int: ...
    def reserve(self, total_lengths: npt.NDArray[np.int32]) -> None: ...
    def advance(self, counts: npt.NDArray[np.int32]) -> None: ...
    def truncate(self, lengths: npt.NDArray[np.int32]) -> None: ...
    def select(self, rows: npt.NDArray[np.int32]) -> None: ...
    def copy(self) -> KVCache: ...
    def lease(self) -> CacheLease: ...

def rope_append(
    qkv: npt.NDArray[np.float32],
    cos: npt.NDArray[np.float32] | None,
    sin: npt.NDArray[np.float32] | None,
    cache: KVCache,
    layer: int,
    seq: npt.NDArray[np.int32],
    pos: npt.NDArray[np.int32],
) -> None: ...
def attend(
    qkv: npt.NDArray[np.float32],
    cache: KVCache,
    layer: int,
    starts: npt.NDArray[np.int32],
    first_pos: npt.NDArray[np.int32],
    scale: float,
    out: npt.NDArray[np.float32],
    window_left: int = -1,
) -> None: ...

# layer
class LayerBuffers:
    def __init__(
        self,
        normed: npt.NDArray[np.float32],
        wide: npt.NDArray[np.float32],
        codes: npt.NDArray[np.int8],
        scales: npt.NDArray[np.float32],
        tops: npt.NDArray[np.int32],
    ) -> None: ...

class Layer:
    def __init__(self, weights: Any, act: str, gated: bool, attention_scale: float) -> None: ...
    def forward(
        self,
        hidden: npt.NDArray[np.float32],
        buffers: LayerBuffers,
        cache: KVCache,
        cache_layer: int,
        cos: npt.NDArray[np.float32] | None,
        sin: npt.NDArray[np.float32] | None,
        seq: npt.NDArray[np.int32],
        pos: npt.NDArray[np.int32],
        starts: npt.NDArray[np.int32],
        first_pos: npt.NDArray[np.int32],
        kept: npt.NDArray[np.int32] | None = None,
    ) -> None: ...
