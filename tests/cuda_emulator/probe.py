"""The modules of the probes, which lie here and not among the package's."""

from pathlib import Path

from bitnet_ext.gpu.compile import Module

HERE = Path(__file__).parent
PROBE = Module(
    "probe.cu",
    ["warp_sum", "half_votes", "reverse<true>", "reverse<false>", "hand_over", "count"]
    + ["copy<true>", "copy<false>", "deadlock", "lost_lane", "beyond", "convert"]
    + ["multiply_bytes<true>", "multiply_bytes<false>"]
    + [f"multiply_halves<{t}, {f}>" for t in ("half_t", "bfloat_t") for f in ("true", "false")],
    folder=HERE,
)
PROBE_HOPPER = Module(
    "probe_hopper.cu",
    ["bulk<true>", "bulk<false>", "no_barrier", "no_bytes", "multiply<true>", "multiply<false>"],
    arch="sm_90a",
    folder=HERE,
)
