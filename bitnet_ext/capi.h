/* The C ABI of bitnet_ext: kernels for other extensions, called without the interpreter.
 *
 *   const BitnetExtApi* api =
 *       (const BitnetExtApi*)PyCapsule_Import(BITNET_EXT_CAPSULE, 0);
 *   if (!api || api->abi_version != BITNET_EXT_ABI_VERSION || api->size < sizeof(BitnetExtApi))
 *     ... built against a newer bitnet_ext than the one installed
 *
 * The table only grows: functions keep their place and meaning, `size` tells how many there are.
 * `abi_version` changes when something already there must change. From Cython, cimport
 * bitnet_ext.cython_api instead.
 *
 * Functions run on the package's thread pool with the instruction set in force, may be called from
 * any thread with or without the GIL (ternary_weight: with it), and return a BitnetExtStatus; after
 * BITNET_EXT_INVALID nothing was written. */
#ifndef BITNET_EXT_CAPI_H
#define BITNET_EXT_CAPI_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define BITNET_EXT_CAPSULE "bitnet_ext._core._C_API"
#define BITNET_EXT_ABI_VERSION 1

enum BitnetExtStatus {
  BITNET_EXT_OK = 0,
  BITNET_EXT_INVALID = 1,   /* a size, stride, enumerator or null pointer that makes no sense */
  BITNET_EXT_NO_MEMORY = 2, /* the system or the memory limit refused */
  BITNET_EXT_FAILED = 3     /* BITNET_ISA names an instruction set that this CPU lacks */
};

enum BitnetExtMask {
  BITNET_EXT_MASK_F32 = 0, /* 0 where a query attends, else -inf */
  BITNET_EXT_MASK_F16 = 1, /* the same in half precision */
  BITNET_EXT_MASK_BOOL = 2 /* bytes: 1 where a query attends, else 0 */
};

/* float32 [batch, heads, rows, size] with contiguous vectors; strides in elements. */
typedef struct BitnetExtHeads {
  float* data; /* written in the output alone */
  int64_t heads, rows, size, batch_stride, head_stride, row_stride;
} BitnetExtHeads;

/* A packed ternary matrix [n, k]. */
typedef struct BitnetExtTernary BitnetExtTernary;

typedef struct BitnetExtApi {
  uint32_t abi_version;
  uint32_t size; /* bytes of this table in the installed package */

  /* Row i of [q_len, k_len], rows `row_bytes` apart (any sign): key j attends where
   * j <= i + past_len and (window_left < 0 or j >= i + past_len - window_left), or j < prefix. */
  int32_t (*causal_mask_fill)(void* out, int64_t row_bytes, int32_t mask, int64_t q_len,
                              int64_t k_len, int64_t past_len, int64_t window_left, int64_t prefix);

  /* With the GIL: the matrix of a bitnet_ext.PackedTernary, valid while the object lives; null
   * with TypeError set for another object. */
  const BitnetExtTernary* (*ternary_weight)(void* object);
  int32_t (*ternary_shape)(const BitnetExtTernary* weight, int64_t* n, int64_t* k);

  /* out[m, n] = sum over k of q[m, k] w[n, k], exact. Strides in elements. */
  int32_t (*ternary_matmul)(const int8_t* q, int64_t rows, int64_t q_stride,
                            const BitnetExtTernary* weight, int32_t* out, int64_t out_stride);

  /* bitnet_ext.ternary_linear: rows of x [rows, k] quantised, multiplied, scaled; bias [n] or
   * null. Strides in elements. */
  int32_t (*ternary_linear)(const float* x, int64_t rows, int64_t x_stride,
                            const BitnetExtTernary* weight, const float* bias, float* out,
                            int64_t out_stride);

  /* bitnet_ext.attention: q and out [batch, Hq, Tq, Dk or Dv], k and v [batch, Hkv, Tk, ..].
   * kv_lengths [batch] or null; with it past_len is 0. Window extents below 0: unbounded.
   * softcap 0: none. */
  int32_t (*attention)(const BitnetExtHeads* q, const BitnetExtHeads* k, const BitnetExtHeads* v,
                       const BitnetExtHeads* out, int64_t batch, const int64_t* kv_lengths,
                       int32_t causal, int64_t past_len, int64_t window_left, int64_t window_right,
                       float scale, float softcap);
} BitnetExtApi;

#ifdef __cplusplus
}
#endif
#endif
