"""One call on every instruction set and number of threads: one answer, bit for bit."""

import numpy as np

import bitnet_ext as bx

# Which kernels a floating-point concept takes under an ISA that adds integer products only.
FLOAT_TABLES = {
    "avxvnni": "avx2",
    "avxvnni_evex": "avx2",
    "avx512vnni": "avx512",
    "amx_int8": "avx512",
}


def bits(a):
    return a.view(np.uint32) if a.dtype == np.float32 else a


def everywhere(op, function, *, threads=(1, 2, 3)):
    """function() on each ISA and number of threads: one answer, and the named op really ran."""
    before = bx.get_isa(), bx.get_num_threads()
    first = None
    for isa in bx.available_isas():
        for n in threads:
            bx.set_isa(isa)
            bx.set_num_threads(n)
            with bx.DispatchMetrics() as metrics:
                result = function()
            assert {(key[0], key[2]) for key in metrics.as_dict()} == {
                (op, FLOAT_TABLES.get(isa, isa))
            }
            first = first or result
            for a, b in zip(first, result, strict=True):
                assert np.array_equal(bits(a), bits(b)), (isa, n)
    bx.set_isa(before[0])
    bx.set_num_threads(before[1])
    return first
