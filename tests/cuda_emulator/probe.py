"""The module of probe.cu, which lies here and not among the package's."""

from pathlib import Path

from bitnet_ext.gpu.compile import Module, source


class Probe(Module):
    """A module whose source is in this folder."""

    def source(self) -> str:
        return source(self.file, {self.file: Path(__file__).with_name(self.file).read_text()})


PROBE = Probe(
    "probe.cu",
    ["warp_sum", "half_votes", "reverse<true>", "reverse<false>", "hand_over", "count"]
    + ["copy<true>", "copy<false>", "deadlock", "lost_lane", "beyond", "convert"]
    + ["multiply_bytes<true>", "multiply_bytes<false>"]
    + [f"multiply_halves<{t}, {f}>" for t in ("half_t", "bfloat_t") for f in ("true", "false")],
)
PROBE_HOPPER = Probe(
    "probe_hopper.cu",
    ["bulk<true>", "bulk<false>", "no_barrier", "no_bytes", "multiply<true>", "multiply<false>"],
    arch="sm_90a",
)
