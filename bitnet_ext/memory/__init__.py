"""KV caches, memory estimates and counted memory."""

from bitnet_ext.memory.estimate import MemoryEstimate, estimate_memory
from bitnet_ext.memory.kv_cache import KVCache
from bitnet_ext.memory.stats import (
    MemoryStats,
    memory_stats,
    reset_peak_memory,
    set_memory_limit,
)

__all__ = [
    "KVCache",
    "MemoryEstimate",
    "MemoryStats",
    "estimate_memory",
    "memory_stats",
    "reset_peak_memory",
    "set_memory_limit",
]
