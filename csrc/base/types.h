// Plain types shared by every kernel file. Nothing here may instantiate code: a kernel object is
// compiled with its ISA's flags, and a weak symbol in it could be the copy the linker keeps.
#pragma once
#include <stdint.h>

#define BITNET_LINE 64  // bytes in a cache line; every buffer of ours starts on one
#define BITNET_INLINE inline __attribute__((always_inline))

namespace bitnet {

// How the bytes of a table, a cache or an embedding are to be read.
enum class Dtype : int32_t { f32 = 0, f16 = 1, bf16 = 2, i8 = 3 };

}  // namespace bitnet
