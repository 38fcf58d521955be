// The update of adam_ema.py for one element; see there for the equations. Compiled for the device
// by nvcc and for the host by any C++17 compiler. Neither may contract a·b + c into an FMA, so that
// both give the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SID_FAST_BOTH __host__ __device__ __forceinline__
#else
#define SID_FAST_BOTH inline
#endif

namespace sid_fast {

constexpr int kChunk = 1024;

// One row of the pointer table: a chunk of a parameter, its gradient, moments, EMA and compute
// weight. exp_avg, ema and compute_weight may be null. compute_weight points to the tensor's first
// element, the chunk begins at its element `start`. With taps > 1, a parameter [outer, inner, taps]
// has a compute weight in the order [outer, taps, inner].
struct Row {
  float* p;
  float* g;
  float* exp_avg;
  float* exp_avg_sq;
  float* ema;
  uint16_t* compute_weight;
  int64_t count, start, inner, taps, full;
};
static_assert(sizeof(Row) == 11 * sizeof(int64_t), "a row of the table is 11 int64");

struct Coefficients {
  float beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
  float step_size, correction2_sqrt, ema_weight, clip;
};

SID_FAST_BOTH Coefficients coefficients(double step, double lr, double ema_beta, double beta1,
                                        double beta2, double eps, double clip) {
  return {float(beta1),
          float(1 - beta1),
          float(beta2),
          float(1 - beta2),
          float(eps),
          float(lr / (1 - pow(beta1, step))),
          float(sqrt(1 - pow(beta2, step))),
          float(1 - ema_beta),
          float(clip)};
}

SID_FAST_BOTH bool finite(float x) { return fabsf(x) < INFINITY; }

SID_FAST_BOTH float clean(float g) {
  if (finite(g)) return g;
  return g > 0 ? 1e5f : g < 0 ? -1e5f : 0.0f;
}

SID_FAST_BOTH bool beyond(const Coefficients& c, float g) {
  return c.clip > 0 && fabsf(g) > c.clip;  // of a clean gradient
}

SID_FAST_BOTH float limited(const Coefficients& c, float g) {
  return beyond(c, g) ? copysignf(c.clip, g) : g;
}

SID_FAST_BOTH float moment(const Coefficients& c, float g, float first) {
  return first * c.beta1 + g * c.one_minus_beta1;
}

SID_FAST_BOTH float square(const Coefficients& c, float g, float second) {
  return second * c.beta2 + g * g * c.one_minus_beta2;
}

SID_FAST_BOTH float descend(const Coefficients& c, float p, float first, float second) {
  return p - c.step_size * (first / (sqrtf(second) / c.correction2_sqrt + c.eps));
}

SID_FAST_BOTH float average(const Coefficients& c, float p, float ema) {
  return ema + (p - ema) * c.ema_weight;
}

// Round to nearest, ties to even, like the hardware's conversions.
SID_FAST_BOTH uint16_t to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;  // NaN
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

SID_FAST_BOTH uint16_t to_float16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return 0x7fff;                       // NaN
  if (size >= 0x47800000) return uint16_t(sign | 0x7c00);     // 2^16 and above: infinity
  if (size < 0x38800000)                                      // below 2^-14: a multiple of 2^-24
    return uint16_t(sign | uint32_t(rintf(fabsf(x) * 16777216.0f)));
  return uint16_t(sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
}

SID_FAST_BOTH int64_t compute_weight_offset(const Row& row, int64_t i) {
  const int64_t at = row.start + i;
  if (row.taps == 1) return at;
  const uint32_t taps = row.taps, inner = row.inner;  // 32 bits: division is slow in 64
  const uint32_t channel = uint32_t(at) / taps, outer = channel / inner;
  return (int64_t(outer) * taps + uint32_t(at) % taps) * inner + channel % inner;
}

}  // namespace sid_fast
