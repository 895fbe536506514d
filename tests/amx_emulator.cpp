// AMX on a CPU without it: a handler of SIGILL reads each tile instruction as it is encoded and
// does what the manual says (Intel SDM volume 2, LDTILECFG to TILEZERO, TDPB*), so that the
// kernel runs as it was compiled.  Where the CPU has tiles, nothing traps and they run.
//
// test_amx.py builds this with the sources of the ternary products and calls amx_product.
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <atomic>
#include <vector>

#include "base/os.h"
#include "base/threads.h"
#include "ternary/pack.h"

namespace {

struct Tile {
  uint8_t bytes[16][64];
};
thread_local struct {
  bool configured;
  int row_bytes[8], rows[8];
  Tile tile[8];
} amx;

std::atomic<int64_t> products{0};  // tdp* done
std::atomic<int> holders{0};       // threads between ldtilecfg and tilerelease
std::atomic<const char*> fault{nullptr};

constexpr int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                REG_R12, REG_R13, REG_R14, REG_R15};

// A VEX instruction of map 0F38: C4, RXBmmmmm, WvvvvLpp, opcode, ModRM, SIB, displacement.
struct Instruction {
  int prefix, opcode, mod, reg, rm, vvvv, length;
  uint8_t* address;  // of a memory operand, without what SIB's index adds
  int64_t stride;    // what the index adds
};

bool decode(const greg_t* registers, Instruction& out) {
  const uint8_t* code = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  if (code[0] != 0xc4 || (code[1] & 31) != 2 || code[2] & 0x84) return false;  // W0, L0
  const int x = ~code[1] >> 6 & 1, b = ~code[1] >> 5 & 1;
  out.prefix = code[2] & 3;
  out.vvvv = ~code[2] >> 3 & 15;
  out.opcode = code[3];
  out.mod = code[4] >> 6;
  out.reg = code[4] >> 3 & 7;
  out.rm = code[4] & 7;
  const uint8_t* p = code + 5;
  int64_t address = 0;
  out.stride = 0;
  if (out.mod != 3) {
    int base = out.rm | b << 3;
    const bool relative = out.mod == 0 && out.rm == 5;
    bool none = relative;
    if (out.rm == 4) {
      const int sib = *p++, index = (sib >> 3 & 7) | x << 3;
      base = (sib & 7) | b << 3;
      none = out.mod == 0 && (sib & 7) == 5;
      if (index != 4) out.stride = registers[kRegisters[index]] << (sib >> 6);
    }
    int32_t displacement = 0;
    if (out.mod == 1) {
      displacement = int8_t(*p++);
    } else if (out.mod == 2 || none) {
      memcpy(&displacement, p, 4);
      p += 4;
    }
    address = displacement;
    if (relative) address += int64_t(p);
    if (!none) address += registers[kRegisters[base]];
  }
  out.address = reinterpret_cast<uint8_t*>(address);
  out.length = int(p - code);
  return true;
}

const char* configure(const uint8_t* from) {
  if (from[0] != 1 || from[1] != 0) return "ldtilecfg: palette or start row";
  for (int i = 2; i < 16; ++i)
    if (from[i]) return "ldtilecfg: a reserved byte is set";
  for (int i = 0; i < 16; ++i) {
    uint16_t row_bytes;
    memcpy(&row_bytes, from + 16 + 2 * i, 2);
    const int rows = from[48 + i];
    if (row_bytes > 64 || rows > 16 || (row_bytes == 0) != (rows == 0) || (i >= 8 && rows))
      return "ldtilecfg: a tile's size";
    if (i < 8) amx.row_bytes[i] = row_bytes, amx.rows[i] = rows;
  }
  memset(amx.tile, 0, sizeof amx.tile);
  holders += !amx.configured;
  amx.configured = true;
  return nullptr;
}

// c[m][n] += sum over k and i of a[m][4k + i] b[k][4n + i].
const char* multiply(int c, int a, int b, bool signed_a, bool signed_b) {
  if (c == a || c == b || a == b) return "tdp: a tile twice";
  if (amx.rows[c] != amx.rows[a] || amx.row_bytes[c] != amx.row_bytes[b] ||
      amx.row_bytes[a] != 4 * amx.rows[b] || !amx.rows[c] || !amx.rows[b])
    return "tdp: sizes that do not match";
  for (int m = 0; m < amx.rows[c]; ++m)
    for (int n = 0; n < amx.row_bytes[c] / 4; ++n) {
      int32_t old, sum = 0;
      for (int k = 0; k < amx.rows[b]; ++k)
        for (int i = 0; i < 4; ++i) {
          const uint8_t x = amx.tile[a].bytes[m][4 * k + i], y = amx.tile[b].bytes[k][4 * n + i];
          sum += (signed_a ? int8_t(x) : int(x)) * (signed_b ? int8_t(y) : int(y));
        }
      memcpy(&old, amx.tile[c].bytes[m] + 4 * n, 4);
      const uint32_t wrapped = uint32_t(old) + uint32_t(sum);
      memcpy(amx.tile[c].bytes[m] + 4 * n, &wrapped, 4);
    }
  ++products;
  return nullptr;
}

// Does it; null, or what a CPU would have refused.
const char* execute(const Instruction& at) {
  enum { kNone, k66, kF3, kF2 };
  if (at.opcode == 0x49 && at.mod != 3 && at.prefix == kNone) return configure(at.address);
  if (!amx.configured) return "a tile instruction without a configuration";
  Tile& tile = amx.tile[at.reg];
  if (at.opcode == 0x49 && at.mod == 3 && at.prefix == kNone) {
    amx.configured = false;
    --holders;
  } else if (at.opcode == 0x49 && at.mod == 3 && at.prefix == kF2) {
    memset(&tile, 0, sizeof tile);
  } else if (at.opcode == 0x4b && at.mod != 3 && at.rm == 4 && at.prefix == kF2) {
    memset(&tile, 0, sizeof tile);
    for (int r = 0; r < amx.rows[at.reg]; ++r)
      memcpy(tile.bytes[r], at.address + r * at.stride, size_t(amx.row_bytes[at.reg]));
  } else if (at.opcode == 0x4b && at.mod != 3 && at.rm == 4 && at.prefix == kF3) {
    for (int r = 0; r < amx.rows[at.reg]; ++r)
      memcpy(at.address + r * at.stride, tile.bytes[r], size_t(amx.row_bytes[at.reg]));
  } else if (at.opcode == 0x5e && at.mod == 3 && at.vvvv < 8) {
    return multiply(at.reg, at.rm, at.vvvv, at.prefix == kF2 || at.prefix == kF3,
                    at.prefix == kF2 || at.prefix == k66);
  } else {
    return "an instruction that is not known here";
  }
  return nullptr;
}

struct sigaction before;

void on_illegal(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  Instruction at;
  if (!decode(registers, at)) {
    sigaction(SIGILL, &before, nullptr);  // it traps again, there
    return;
  }
  if (const char* refused = execute(at)) fault = refused;
  registers[REG_RIP] += at.length;
}

}  // namespace

// out [rows][n] = q [rows][k] times codes - 1 [n][k], by the kernels for AMX.  Returns null or what
// went wrong; `done`: tile products that were emulated.
extern "C" const char* amx_product(const int8_t* weights, int64_t n, int64_t k, int32_t quads,
                                   const int8_t* q, int64_t rows, int32_t* out, int threads,
                                   int64_t* done) {
  using namespace bitnet;
  set_num_threads(threads);
  const TernaryMatrix matrix =
      ternary_pack({{"weights", SourceKind::codes, reinterpret_cast<const uint8_t*>(weights), n, k,
                     1.0f, false, nullptr}},
                   quads);
  TernaryProduct product = {};
  product.q = q;
  product.rows = rows;
  product.q_stride = k;
  product.acc = out;
  product.out_stride = n;
  os_allow_tiles();
  struct sigaction action = {};
  action.sa_sigaction = on_illegal;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, &before);
  products = 0;
  fault = nullptr;
  ternary_product(ternary_amx_int8, matrix, product);
  sigaction(SIGILL, &before, nullptr);
  *done = products;
  if (holders) return "a thread kept its tiles";
  return fault;
}
