# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, autotestdict=False
"""Sampling loops: penalty, temperature, top-k, top-p, min-p, one draw; and the generator.

Weights are integers, so that their sums are exact in any order, and one seed gives the same tokens
on every machine and every device (gpu/sample.cu). The rest is float64, each operation rounded once.

    x_i = (penalised logit - the largest) / temperature
    top_k   keeps x_i >= the k-th largest (ties of it too)
    w_i = rint(2^43 exp(x_i)) of what is kept; the largest is 2^43
    top_p   keeps the largest w, ties lowest id first, until their sum reaches top_p of all
    min_p   keeps w_i >= min_p * 2^43
    the token drawn is the first in order of id at which the sum of w exceeds u * total

With at most 2^20 tokens no sum passes 2^63. A weight below 2^-44 of the largest is 0.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef double INFINITE = float("inf")
cdef double ONE = 8796093022208.0  # 2^43, the weight of the largest logit
cdef Py_ssize_t MOST_TOKENS = 1 << 20

# --- Philox4x32-10 (Salmon et al., 2011): counter and key in, four random words out -------------


cdef void philox_rounds(uint32_t* c, uint32_t k0, uint32_t k1) noexcept nogil:
    cdef uint64_t p0, p1
    cdef uint32_t c0, c2
    cdef int i
    for i in range(10):
        p0 = <uint64_t>0xD2511F53U * c[0]
        p1 = <uint64_t>0xCD9E8D57U * c[2]
        c0 = <uint32_t>(p1 >> 32) ^ c[1] ^ k0
        c2 = <uint32_t>(p0 >> 32) ^ c[3] ^ k1
        c[0], c[1], c[2], c[3] = c0, <uint32_t>p1, c2, <uint32_t>p0
        k0 += 0x9E3779B9U
        k1 += 0xBB67AE85U


cdef double draw(uint64_t seed, uint64_t position) noexcept nogil:
    """A multiple of 2^-53 in [0, 1)."""
    cdef uint32_t c[4]
    c[0], c[1], c[2], c[3] = <uint32_t>position, <uint32_t>(position >> 32), 0, 0
    philox_rounds(c, <uint32_t>seed, <uint32_t>(seed >> 32))
    cdef uint64_t bits = ((<uint64_t>(c[0] >> 5)) << 26) | (c[1] >> 6)
    return <double>bits * (1.0 / 9007199254740992.0)


def philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1):
    """Ten rounds of Philox4x32: four random 32-bit words."""
    cdef uint32_t c[4]
    c[0], c[1], c[2], c[3] = c0, c1, c2, c3
    philox_rounds(c, k0, k1)
    return c[0], c[1], c[2], c[3]


def uniform(uint64_t seed, uint64_t position):
    """The number in [0, 1) that (seed, position) stands for."""
    return draw(seed, position)


# --- exp ------------------------------------------------------------------------------------------


cdef double exp_negative(double x) noexcept nogil:
    """exp(x) for x <= 0, within 2 units in the last place; 0 below -708.

    x = n ln 2 + r with |r| <= ln(2)/2, Taylor to r^13 / 13!, then n into the exponent.
    """
    cdef double n, r, y
    cdef int64_t bits
    if not x >= -708.0:
        return 0.0
    n = (x * 1.4426950408889634 + 6755399441055744.0) - 6755399441055744.0
    r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10
    y = 1.0 / 6227020800.0
    y = y * r + 1.0 / 479001600.0
    y = y * r + 1.0 / 39916800.0
    y = y * r + 1.0 / 3628800.0
    y = y * r + 1.0 / 362880.0
    y = y * r + 1.0 / 40320.0
    y = y * r + 1.0 / 5040.0
    y = y * r + 1.0 / 720.0
    y = y * r + 1.0 / 120.0
    y = y * r + 1.0 / 24.0
    y = y * r + 1.0 / 6.0
    y = y * r + 0.5
    y = y * r + 1.0
    y = y * r + 1.0
    memcpy(&bits, &y, 8)
    bits += <int64_t>(n * 4503599627370496.0)
    memcpy(&y, &bits, 8)
    return y


def exp(double x):
    """The sampler's exp, for x <= 0."""
    return exp_negative(x)


# --- choosing -------------------------------------------------------------------------------------


cdef inline double penalised(float logit, uint8_t seen, double penalty) noexcept nogil:
    if not seen:
        return logit
    return logit * penalty if logit < 0 else logit / penalty


def argmax(const float[::1] logits, const uint8_t[::1] seen, double penalty):
    """The id of the largest penalised logit, lowest id on ties; -1 when all are NaN or -inf.

    ``seen`` uint8 [V] marks the tokens that ``penalty`` applies to; [0] for none.
    """
    cdef Py_ssize_t i, best = -1
    cdef bint marks = seen.shape[0] > 0
    cdef double x, highest = -INFINITE
    with nogil:
        for i in range(logits.shape[0]):
            x = penalised(logits[i], marks and seen[i], penalty)
            if x > highest:
                highest, best = x, i
    return best


cdef inline bint before(const double* w, int64_t a, int64_t b) noexcept nogil:
    """The order of the nucleus: heaviest first, then lowest id."""
    return w[a] > w[b] or (w[a] == w[b] and a < b)


cdef void sift(const double* w, int64_t* heap, Py_ssize_t count, Py_ssize_t at) noexcept nogil:
    """Let the entry at ``at`` sink to its place in a heap whose root comes first."""
    cdef Py_ssize_t child
    cdef int64_t item = heap[at]
    while True:
        child = 2 * at + 1
        if child >= count:
            break
        if child + 1 < count and before(w, heap[child + 1], heap[child]):
            child += 1
        if not before(w, heap[child], item):
            break
        heap[at] = heap[child]
        at = child
    heap[at] = item


cdef int64_t last_of_nucleus(
    const double* w, int64_t* heap, Py_ssize_t vocab, double top_p, uint64_t total
) noexcept nogil:
    """The last id, in the nucleus' order, that top_p keeps."""
    cdef Py_ssize_t i, count = 0
    cdef uint64_t held = 0
    cdef double wanted = top_p * <double>total
    cdef int64_t last = -1
    for i in range(vocab):
        if w[i] > 0.0:
            heap[count] = i
            count += 1
    for i in range(count // 2 - 1, -1, -1):
        sift(w, heap, count, i)
    while count > 0 and (last < 0 or <double>held < wanted):
        last = heap[0]
        held += <uint64_t>w[last]
        count -= 1
        heap[0] = heap[count]
        sift(w, heap, count, 0)
    return last


cdef double kth_largest(const double* x, double* heap, Py_ssize_t vocab, Py_ssize_t k) noexcept nogil:
    """The k-th largest of x, through a heap of the k largest with the least at its root."""
    cdef Py_ssize_t i, at, child
    cdef double item
    for i in range(vocab):
        item = x[i]
        if i < k:  # rise from the end
            at = i
            while at > 0 and heap[(at - 1) // 2] > item:
                heap[at] = heap[(at - 1) // 2]
                at = (at - 1) // 2
        else:
            if not item > heap[0]:
                continue
            at = 0  # sink from the root
            while True:
                child = 2 * at + 1
                if child >= k:
                    break
                if child + 1 < k and heap[child + 1] < heap[child]:
                    child += 1
                if not heap[child] < item:
                    break
                heap[at] = heap[child]
                at = child
        heap[at] = item
    return heap[0]


cdef inline double weight(double x) noexcept nogil:
    """rint(2^43 exp(x)), x <= 0: a whole number, ties to even."""
    return (exp_negative(x) * ONE + 4503599627370496.0) - 4503599627370496.0


cdef int64_t choose(
    double* x, int64_t* scratch, Py_ssize_t vocab, Py_ssize_t top_k, double top_p, double min_p, double u
) noexcept nogil:
    """Filter the scaled logits ``x``, 0 the largest, turn them into weights in place, and draw."""
    cdef Py_ssize_t i
    cdef double least = -INFINITE, edge, wanted
    cdef uint64_t total = 0, held = 0
    cdef int64_t last
    if 0 < top_k < vocab:
        least = kth_largest(x, <double*>scratch, vocab, top_k)
    for i in range(vocab):
        x[i] = weight(x[i]) if x[i] >= least else 0.0
        total += <uint64_t>x[i]
    if top_p < 1.0:
        last = last_of_nucleus(x, scratch, vocab, top_p, total)
        edge = x[last]
        for i in range(vocab):
            if x[i] < edge or (x[i] == edge and i > last):
                x[i] = 0.0
    total = 0
    for i in range(vocab):
        if x[i] < min_p * ONE:
            x[i] = 0.0
        total += <uint64_t>x[i]
    wanted = u * <double>total
    for i in range(vocab):
        held += <uint64_t>x[i]
        if <double>held > wanted or held == total:  # the product may have been rounded up
            return i
    return -1


def sample(
    const float[::1] logits,
    const uint8_t[::1] seen,
    double[::1] weights,
    int64_t[::1] scratch,
    double penalty,
    double temperature,
    Py_ssize_t top_k,
    double top_p,
    double min_p,
    uint64_t seed,
    uint64_t position,
):
    """Draw a token; -1 when every logit is NaN or -inf.

    Args:
        logits: float32 [V].
        seen: uint8 [V] marks the tokens that ``penalty`` applies to; [0] for none.
        weights, scratch: float64 [V] and int64 [V] to work in.
        top_k: 0 keeps all; top_p: 1 keeps all; min_p: 0 keeps all.
        seed, position: name the random number; nothing else enters.
    """
    cdef Py_ssize_t i, vocab = logits.shape[0]
    cdef bint marks = seen.shape[0] > 0
    cdef double x, highest = -INFINITE
    cdef int64_t chosen = -1
    if vocab > MOST_TOKENS:
        raise ValueError(f"logits: found {vocab}, wanted at most {MOST_TOKENS}")
    if vocab == 0 or weights.shape[0] < vocab or scratch.shape[0] < vocab:
        raise ValueError(f"weights, scratch: found {weights.shape[0]}, {scratch.shape[0]}, wanted {vocab}")
    if marks and seen.shape[0] != vocab:
        raise ValueError(f"seen: found {seen.shape[0]} marks, wanted {vocab}")
    with nogil:
        for i in range(vocab):
            x = penalised(logits[i], marks and seen[i], penalty)
            weights[i] = x if x == x else -INFINITE
            if x > highest:
                highest = x
        if highest > -INFINITE:
            for i in range(vocab):
                x = weights[i]  # the largest itself may be infinite
                weights[i] = 0.0 if x == highest else (x - highest) / temperature
            chosen = choose(
                &weights[0], &scratch[0], vocab, top_k, top_p, min_p, draw(seed, position)
            )
    return chosen
