// Steps of sixteen lanes along a row, the last of them partial: written once for both by tag.
// Include a lanes header first.
#pragma once

namespace bitnet {
namespace {

struct Whole {};
struct Part {
  int n;  // 1..15 lanes
};

BITNET_INLINE constexpr int width_of(Whole) { return 16; }
BITNET_INLINE int width_of(Part part) { return part.n; }
BITNET_INLINE F16 load(const float* p, Whole) { return load(p); }
BITNET_INLINE F16 load(const float* p, Part part) { return load_partial(p, part.n); }
BITNET_INLINE void store(float* p, F16 a, Whole) { store(p, a); }
BITNET_INLINE void store(float* p, F16 a, Part part) { store_partial(p, a, part.n); }
BITNET_INLINE void store_i8(int8_t* p, F16 a, Whole) { store_i8(p, a); }
BITNET_INLINE void store_i8(int8_t* p, F16 a, Part part) { store_i8_partial(p, a, part.n); }
// a, and `fill` in the lanes past the end of the row.
BITNET_INLINE F16 keep(F16 a, F16, Whole) { return a; }
BITNET_INLINE F16 keep(F16 a, F16 fill, Part part) { return select(mask_first(part.n), a, fill); }

// step(i, Whole or Part) for i = 0, 16, ... below n.
template <class Step>
BITNET_INLINE void each_span(int64_t n, Step step) {
  const int64_t whole = n & ~int64_t(15);
  for (int64_t i = 0; i < whole; i += 16) step(i, Whole{});
  if (n > whole) step(whole, Part{int(n - whole)});
}

// A row of a table as it is stored, widened to float.
struct F32Row {
  const float* p;
  BITNET_INLINE F16 at(int64_t i, Whole) const { return load(p + i); }
  BITNET_INLINE F16 at(int64_t i, Part part) const { return load_partial(p + i, part.n); }
};
struct Half16Row {
  const uint16_t* p;
  BITNET_INLINE F16 at(int64_t i, Whole) const { return load_f16(p + i); }
  BITNET_INLINE F16 at(int64_t i, Part part) const { return load_f16_partial(p + i, part.n); }
};
struct Brain16Row {
  const uint16_t* p;
  BITNET_INLINE F16 at(int64_t i, Whole) const { return load_bf16(p + i); }
  BITNET_INLINE F16 at(int64_t i, Part part) const { return load_bf16_partial(p + i, part.n); }
};
struct Int8Row {
  const int8_t* p;
  BITNET_INLINE F16 at(int64_t i, Whole) const { return load_i8(p + i); }
  BITNET_INLINE F16 at(int64_t i, Part part) const { return load_i8_partial(p + i, part.n); }
};

// Calls use(a function from row number to one of the row types above).
template <class Use>
BITNET_INLINE void with_rows(const void* table, Dtype dtype, int64_t stride, Use use) {
  switch (dtype) {
    case Dtype::f32:
      return use([=](int64_t r) { return F32Row{static_cast<const float*>(table) + r * stride}; });
    case Dtype::f16:
      return use(
          [=](int64_t r) { return Half16Row{static_cast<const uint16_t*>(table) + r * stride}; });
    case Dtype::bf16:
      return use(
          [=](int64_t r) { return Brain16Row{static_cast<const uint16_t*>(table) + r * stride}; });
    case Dtype::i8:
      return use(
          [=](int64_t r) { return Int8Row{static_cast<const int8_t*>(table) + r * stride}; });
  }
}

BITNET_INLINE float as_float(int32_t b) {
  float x;
  __builtin_memcpy(&x, &b, 4);
  return x;
}
// NaN of any bits becomes the one quiet NaN: what arithmetic makes of them differs between ISAs.
BITNET_INLINE F16 one_nan(F16 a) { return select(is_nan(a), set1(__builtin_nanf("")), a); }
BITNET_INLINE float one_nan(float a) { return a == a ? a : __builtin_nanf(""); }

}  // namespace
}  // namespace bitnet
