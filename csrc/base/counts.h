// A run-time count as a template argument.
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

}  // namespace
}  // namespace bitnet
