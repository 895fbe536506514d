# Kernels for other extensions, without the interpreter:
#
#     from bitnet_ext cimport cython_api as bx
#
#     def fill(float[:, ::1] out):
#         cdef int status
#         with nogil:
#             status = bx.causal_mask_fill(&out[0, 0], out.strides[0], bx.MASK_F32, out.shape[0],
#                                          out.shape[1], 0, -1, 0)
#         if status != bx.OK:
#             raise ValueError(status)
#
# The functions are those of the C ABI; bitnet_ext/capi.h states what each does. They keep their
# signatures (tests/test_cython_api.py).

from libc.stdint cimport int8_t, int64_t, int32_t

cdef enum:  # what the functions return
    OK = 0
    INVALID = 1
    NO_MEMORY = 2
    FAILED = 3

cdef enum:  # elements of a mask
    MASK_F32 = 0
    MASK_F16 = 1
    MASK_BOOL = 2

cdef struct Heads:  # float32 [batch, heads, rows, size]; strides in elements
    float* data
    int64_t heads
    int64_t rows
    int64_t size
    int64_t batch_stride
    int64_t head_stride
    int64_t row_stride

cdef int causal_mask_fill(
    void* out, int64_t row_bytes, int mask, int64_t q_len, int64_t k_len, int64_t past_len,
    int64_t window_left, int64_t prefix
) noexcept nogil

# The matrix of a bitnet_ext.PackedTernary, valid while the object lives; TypeError for another.
cdef const void* ternary_weight(object packed) except NULL

cdef int ternary_shape(const void* weight, int64_t* n, int64_t* k) noexcept nogil

cdef int ternary_matmul(
    const int8_t* q, int64_t rows, int64_t q_stride, const void* weight, int32_t* out,
    int64_t out_stride
) noexcept nogil

cdef int ternary_linear(
    const float* x, int64_t rows, int64_t x_stride, const void* weight, const float* bias,
    float* out, int64_t out_stride
) noexcept nogil

cdef int attention(
    const Heads* q, const Heads* k, const Heads* v, const Heads* out, int64_t batch,
    const int64_t* kv_lengths, int causal, int64_t past_len, int64_t window_left,
    int64_t window_right, float scale, float softcap
) noexcept nogil
