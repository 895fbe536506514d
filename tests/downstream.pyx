# cython: language_level=3
# An extension of somebody else's: tests/test_cython_api.py builds it against the installed package.
from bitnet_ext cimport cython_api as bx
from libc.stdint cimport int8_t, int32_t, int64_t

STATUS = (bx.OK, bx.INVALID, bx.NO_MEMORY, bx.FAILED)
MASKS = (bx.MASK_F32, bx.MASK_F16, bx.MASK_BOOL)

cdef extern from *:
    """
    #include <time.h>
    static int meet(int* here, int all) {  /* 0 when `all` callers never come to be here at once */
      const time_t start = time(0);
      __atomic_add_fetch(here, 1, __ATOMIC_SEQ_CST);
      while (__atomic_load_n(here, __ATOMIC_SEQ_CST) < all)
        if (time(0) - start > 60) return 0;
      return 1;
    }
    """
    int meet(int* here, int all) nogil


def fill(char[:, :] out, int mask, int64_t element, int64_t past, int64_t left, int64_t prefix,
         int[::1] here, int callers):
    """Rows of bytes; fills after `callers` of these calls were past the interpreter at once."""
    cdef int status = -1
    with nogil:
        if meet(&here[0], callers):
            status = bx.causal_mask_fill(&out[0, 0], out.strides[0], mask, out.shape[0],
                                         out.shape[1] // element, past, left, prefix)
    return status


def shape(weight):
    cdef int64_t n = 0, k = 0
    cdef int status = bx.ternary_shape(bx.ternary_weight(weight), &n, &k)
    return status, n, k


def matmul(int8_t[:, :] q, weight, int32_t[:, :] out):
    cdef const void* w = bx.ternary_weight(weight)
    cdef int status
    with nogil:
        status = bx.ternary_matmul(&q[0, 0], q.shape[0], q.strides[0], w, &out[0, 0],
                                   out.strides[0] // 4)
    return status


def linear(float[:, :] x, weight, float[::1] bias, float[:, :] out):
    cdef const void* w = bx.ternary_weight(weight)
    cdef const float* b = NULL
    cdef int status
    if bias is not None:
        b = &bias[0]
    with nogil:
        status = bx.ternary_linear(&x[0, 0], x.shape[0], x.strides[0] // 4, w, b, &out[0, 0],
                                   out.strides[0] // 4)
    return status


cdef bx.Heads heads(float[:, :, :, :] a):
    cdef bx.Heads h
    h.data = &a[0, 0, 0, 0]
    h.heads, h.rows, h.size = a.shape[1], a.shape[2], a.shape[3]
    h.batch_stride, h.head_stride = a.strides[0] // 4, a.strides[1] // 4
    h.row_stride = a.strides[2] // 4
    return h


def attention(float[:, :, :, :] q, float[:, :, :, :] k, float[:, :, :, :] v,
              float[:, :, :, :] out, int64_t[::1] lengths, bint causal, int64_t past,
              int64_t left, int64_t right, float scale, float softcap):
    cdef bx.Heads hq = heads(q), hk = heads(k), hv = heads(v), ho = heads(out)
    cdef const int64_t* n = NULL
    cdef int status
    if lengths is not None:
        n = &lengths[0]
    with nogil:
        status = bx.attention(&hq, &hk, &hv, &ho, q.shape[0], n, causal, past, left, right, scale,
                              softcap)
    return status
