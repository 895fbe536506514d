// Counts as template arguments.
#pragma once
#include "base/types.h"

namespace bitnet {
namespace {

// f.operator()<n>() for n from 1 on; from `Most` on, f.operator()<Most>().
template <int Most, class F>
BITNET_INLINE void with_count(int64_t n, F f) {
  if constexpr (Most > 1)
    if (n < Most) return with_count<Most - 1>(n, f);
  f.template operator()<Most>();
}

#define BITNET_LAMBDA __attribute__((always_inline))  // of every lambda that these take

// f.operator()<0>() ... f.operator()<N - 1>().  Arrays that only constants index become registers;
// GCC 12 leaves those of an unrolled loop in memory where assembly updates them.
template <int N, class F>
BITNET_INLINE void each(F f) {
  if constexpr (N > 0) {
    each<N - 1>(f);
    f.template operator()<N - 1>();
  }
}
// f.operator()<m, n>() for every m < M and n < N.
template <int M, int N, class F>
BITNET_INLINE void each_of(F f) {
  each<M>([&]<int m>() BITNET_LAMBDA {
    each<N>([&]<int n>() BITNET_LAMBDA { f.template operator()<m, n>(); });
  });
}

}  // namespace
}  // namespace bitnet
