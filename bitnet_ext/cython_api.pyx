# cython: language_level=3, autotestdict=False
"""The C ABI for Cython extensions; see cython_api.pxd and capi.h."""

from cpython.pycapsule cimport PyCapsule_Import
from libc.stdint cimport int8_t, int32_t, int64_t, uint32_t


cdef extern from "bitnet_ext/capi.h":
    const char* BITNET_EXT_CAPSULE
    const uint32_t BITNET_EXT_ABI_VERSION

    ctypedef struct BitnetExtTernary:
        pass

    ctypedef struct BitnetExtHeads:
        pass

    ctypedef struct BitnetExtApi:
        uint32_t abi_version
        uint32_t size
        int32_t causal_mask_fill(
            void*, int64_t, int32_t, int64_t, int64_t, int64_t, int64_t, int64_t
        ) noexcept nogil
        const BitnetExtTernary* ternary_weight(void*)
        int32_t ternary_shape(const BitnetExtTernary*, int64_t*, int64_t*) noexcept nogil
        int32_t ternary_matmul(
            const int8_t*, int64_t, int64_t, const BitnetExtTernary*, int32_t*, int64_t
        ) noexcept nogil
        int32_t ternary_linear(
            const float*, int64_t, int64_t, const BitnetExtTernary*, const float*, float*, int64_t
        ) noexcept nogil
        int32_t attention(
            const BitnetExtHeads*, const BitnetExtHeads*, const BitnetExtHeads*,
            const BitnetExtHeads*, int64_t, const int64_t*, int32_t, int64_t, int64_t, int64_t,
            float, float
        ) noexcept nogil


cdef const BitnetExtApi* api = <const BitnetExtApi*>PyCapsule_Import(BITNET_EXT_CAPSULE, 0)

if api.abi_version != BITNET_EXT_ABI_VERSION or api.size < sizeof(BitnetExtApi):
    raise ImportError(
        f"bitnet_ext._core: found C ABI {api.abi_version} of {api.size} bytes, wanted "
        f"{BITNET_EXT_ABI_VERSION} of {sizeof(BitnetExtApi)}"
    )


cdef int causal_mask_fill(
    void* out, int64_t row_bytes, int mask, int64_t q_len, int64_t k_len, int64_t past_len,
    int64_t window_left, int64_t prefix
) noexcept nogil:
    return api.causal_mask_fill(
        out, row_bytes, mask, q_len, k_len, past_len, window_left, prefix
    )


cdef const void* ternary_weight(object packed) except NULL:
    return api.ternary_weight(<void*>packed)


cdef int ternary_shape(const void* weight, int64_t* n, int64_t* k) noexcept nogil:
    return api.ternary_shape(<const BitnetExtTernary*>weight, n, k)


cdef int ternary_matmul(
    const int8_t* q, int64_t rows, int64_t q_stride, const void* weight, int32_t* out,
    int64_t out_stride
) noexcept nogil:
    return api.ternary_matmul(
        q, rows, q_stride, <const BitnetExtTernary*>weight, out, out_stride
    )


cdef int ternary_linear(
    const float* x, int64_t rows, int64_t x_stride, const void* weight, const float* bias,
    float* out, int64_t out_stride
) noexcept nogil:
    return api.ternary_linear(
        x, rows, x_stride, <const BitnetExtTernary*>weight, bias, out, out_stride
    )


cdef int attention(
    const Heads* q, const Heads* k, const Heads* v, const Heads* out, int64_t batch,
    const int64_t* kv_lengths, int causal, int64_t past_len, int64_t window_left,
    int64_t window_right, float scale, float softcap
) noexcept nogil:
    return api.attention(
        <const BitnetExtHeads*>q, <const BitnetExtHeads*>k, <const BitnetExtHeads*>v,
        <const BitnetExtHeads*>out, batch, kv_lengths, causal, past_len, window_left,
        window_right, scale, softcap
    )
