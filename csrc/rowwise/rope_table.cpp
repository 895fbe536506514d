// cos and sin in double arithmetic of our own: libm's results differ between systems.
#include "rowwise/rowwise.h"

namespace bitnet {
namespace {

// pi/2 in two parts: the first has 33 bits, so its multiples up to 2^20 are exact.
constexpr double kHalfPiTop = 0x1.921fb544p+0;
constexpr double kHalfPiRest = 0x1.0b4611a626331p-34;
constexpr double kTwoOverPi = 0x1.45f306dc9c883p-1;

// The Taylor polynomials on [-pi/4, pi/4]; their first omitted terms are below 1e-13.
double sin_near(double r) {
  const double z = r * r;
  double p = 1.0 / 6227020800.0;
  p = p * z - 1.0 / 39916800.0;
  p = p * z + 1.0 / 362880.0;
  p = p * z - 1.0 / 5040.0;
  p = p * z + 1.0 / 120.0;
  p = p * z - 1.0 / 6.0;
  return r + r * z * p;
}
double cos_near(double r) {
  const double z = r * r;
  double p = 1.0 / 479001600.0;
  p = p * z - 1.0 / 3628800.0;
  p = p * z + 1.0 / 40320.0;
  p = p * z - 1.0 / 720.0;
  p = p * z + 1.0 / 24.0;
  p = p * z - 0.5;
  return 1.0 + z * p;
}

}  // namespace

void rope_table(const float* inv_freq, int64_t half, float* cos, float* sin, int64_t begin,
                int64_t end) {
  for (int64_t position = begin; position < end; ++position)
    for (int64_t i = 0; i < half; ++i) {
      const float angle = float(position) * inv_freq[i];
      const double a = double(angle);
      // Adding and subtracting 1.5 * 2^52 rounds to the nearest integer.
      const double turns = (a * kTwoOverPi + 0x1.8p52) - 0x1.8p52;
      const double r = (a - turns * kHalfPiTop) - turns * kHalfPiRest;
      const double s = sin_near(r), c = cos_near(r);
      const int64_t quarter = int64_t(turns) & 3;
      const double cosines[4] = {c, -s, -c, s}, sines[4] = {s, c, -s, -c};
      cos[position * half + i] = float(cosines[quarter]);
      sin[position * half + i] = float(sines[quarter]);
    }
}

}  // namespace bitnet
