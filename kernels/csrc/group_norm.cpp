// The host build of the group norm, for float32 tensors [N, C, H, W] in that memory order, in which
// a group of an image is one contiguous block. A task is one such block; it fits a core's cache, so
// the passes below read memory once. No result depends on the number of threads: a task's sums have
// a fixed order, and the sums over images run per channel, in the images' order.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "interface.h"

// The loader picks the copy for the machine's vector unit. The tasks are cloned, not the loops over
// them, because GCC does not clone the body of a parallel loop.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define SID_FAST_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SID_FAST_CLONES
#endif
#ifdef _MSC_VER
#define SID_FAST_INLINE __forceinline
#else
#define SID_FAST_INLINE inline __attribute__((always_inline))
#endif

using sid_fast::GroupNorm;
using sid_fast::GroupNormGrads;

namespace {

constexpr int64_t kSpan = 4096;  // elements that are summed up in float32

// exp(x), relative error below 2e-7; x is clamped to the range of normal numbers. NaN stays NaN.
SID_FAST_INLINE float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const int32_t n = int32_t(x * 1.44269504f + 256.5f) - 256;  // rounds: the cast truncates
  const float r = x - float(n) * 0.693147181f;
  float p = 1.9875691500e-4f;  // a minimax polynomial (Cephes, expf) for |r| ≤ ln(2)/2
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1);
  const uint32_t bits = uint32_t(n + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

// The affine map of channel c: z = (x + offset)·rstd·weight + bias.
struct Channel {
  float offset, weight, bias;
};

SID_FAST_INLINE Channel channel_of(const GroupNorm& f, int64_t n, int64_t c, float mean) {
  Channel k = {(f.add ? f.add[n * f.add_stride + c] : 0) - mean, f.weight[c], f.bias[c]};
  if (f.scale) {
    const int64_t at = n * f.scale_shift_stride + c;
    k.weight *= f.scale[at] + 1;
    k.bias = k.bias * (f.scale[at] + 1) + f.shift[at];
  }
  return k;
}

// Σ (row[p] + offset)^power, power 1 or 2: two sums at a time, since each waits for its own last
// addition.
template <int power>
SID_FAST_INLINE float sum_of(const float* row, int64_t count, float offset) {
  const int64_t half = count / 2;
  float a = 0, b = 0;
#pragma omp simd reduction(+ : a, b)
  for (int64_t p = 0; p < half; ++p) {
    const float x = row[p] + offset, y = row[p + half] + offset;
    a += power == 2 ? x * x : x;
    b += power == 2 ? y * y : y;
  }
  if (count % 2) {
    const float x = row[count - 1] + offset;
    a += power == 2 ? x * x : x;
  }
  return a + b;
}

SID_FAST_CLONES void forward_task(const GroupNorm& f, float* out, float* stats, int64_t task) {
  const int64_t n = task / f.groups, channels = f.channels / f.groups;
  const int64_t first = task % f.groups * channels, count = channels * f.pixels;
  const float* x = f.x + (n * f.channels + first) * f.pixels;
  float* y = out + (n * f.channels + first) * f.pixels;
  if (f.add) {
    for (int64_t c = 0; c < channels; ++c) {
      const float add = f.add[n * f.add_stride + first + c];
#pragma omp simd
      for (int64_t p = 0; p < f.pixels; ++p) y[c * f.pixels + p] = x[c * f.pixels + p] + add;
    }
    x = y;
  }
  double total = 0, squares = 0;
  for (int64_t at = 0; at < count; at += kSpan)
    total += sum_of<1>(x + at, std::min(kSpan, count - at), 0);
  const float mean = float(total / double(count));
  for (int64_t at = 0; at < count; at += kSpan)
    squares += sum_of<2>(x + at, std::min(kSpan, count - at), -mean);
  const float rstd = float(1 / std::sqrt(squares / double(count) + f.eps));
  stats[task] = mean;
  stats[task + f.samples * f.groups] = rstd;
  for (int64_t c = 0; c < channels; ++c) {
    const Channel k = channel_of(f, n, first + c, mean);
    const float factor = k.weight * rstd, bias = k.bias;
    const float* from = x + c * f.pixels;
    float* to = y + c * f.pixels;
    if (f.silu) {
#pragma omp simd
      for (int64_t p = 0; p < f.pixels; ++p) {
        const float z = (from[p] - mean) * factor + bias;
        to[p] = z / (1 + exponential(-z));
      }
    } else {
#pragma omp simd
      for (int64_t p = 0; p < f.pixels; ++p) to[p] = (from[p] - mean) * factor + bias;
    }
  }
}

// With z = x̂·w + b per channel and dz the gradient of z, Σ over the pixels of a channel and means
// over the group: dx = rstd·(dz·w − mean(dz·w) − x̂·mean(dz·w·x̂)).
SID_FAST_CLONES void backward_task(const GroupNorm& f, const GroupNormGrads& g, const float* stats,
                                   int64_t task) {
  const int64_t n = task / f.groups, channels = f.channels / f.groups;
  const int64_t first = task % f.groups * channels;
  const float mean = stats[task], rstd = stats[task + f.samples * f.groups];
  double mean_dz = 0, mean_dz_x = 0;
  for (int64_t c = first; c < first + channels; ++c) {
    const Channel k = channel_of(f, n, c, mean);
    const float offset = k.offset, weight = k.weight, bias = k.bias;
    const int64_t row = n * f.channels + c;
    const float* x = f.x + row * f.pixels;
    const float* y_grad = g.y_grad + row * f.pixels;
    float* dx = g.dx + row * f.pixels;  // holds dz until the group's means are known
    float sum = 0, sum_x = 0;
    if (f.silu) {
#pragma omp simd reduction(+ : sum, sum_x)
      for (int64_t p = 0; p < f.pixels; ++p) {
        const float normed = (x[p] + offset) * rstd, z = normed * weight + bias;
        const float e = exponential(-z), sigmoid = 1 / (1 + e);
        const float dz = y_grad[p] * (sigmoid * (1 + z * (e * sigmoid)));
        dx[p] = dz;
        sum += dz;
        sum_x += dz * normed;
      }
    } else {
#pragma omp simd reduction(+ : sum, sum_x)
      for (int64_t p = 0; p < f.pixels; ++p) {
        dx[p] = y_grad[p];
        sum += y_grad[p];
        sum_x += y_grad[p] * ((x[p] + offset) * rstd);
      }
    }
    mean_dz += double(weight) * sum;
    mean_dz_x += double(weight) * sum_x;
    const float scale = f.scale ? f.scale[n * f.scale_shift_stride + c] + 1 : 1.0f;
    if (g.param_sums) {
      g.param_sums[row] = scale * sum_x;
      g.param_sums[f.samples * f.channels + row] = scale * sum;
    }
    if (g.dscale) {
      g.dscale[row] = f.weight[c] * sum_x + f.bias[c] * sum;
      g.dshift[row] = sum;
    }
  }
  const double count = double(channels) * double(f.pixels);
  const float constant = float(mean_dz / count) * rstd, slope = float(mean_dz_x / count) * rstd;
  for (int64_t c = first; c < first + channels; ++c) {
    const Channel k = channel_of(f, n, c, mean);
    const float offset = k.offset, factor = k.weight * rstd;
    const int64_t row = n * f.channels + c;
    const float* x = f.x + row * f.pixels;
    float* dx = g.dx + row * f.pixels;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t p = 0; p < f.pixels; ++p) {
      const float value = dx[p] * factor - constant - (x[p] + offset) * rstd * slope;
      dx[p] = value;
      sum += value;
    }
    if (g.dadd) g.dadd[row] = sum;
  }
}

}  // namespace

void sid_fast_group_norm_host(const GroupNorm* norm, float* y, float* stats, int threads) {
  const GroupNorm f = *norm;
  const int64_t tasks = f.samples * f.groups;
  (void)threads;  // unused without OpenMP
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < tasks; ++task) forward_task(f, y, stats, task);
}

void sid_fast_group_norm_backward_host(const GroupNorm* norm, const GroupNormGrads* grads,
                                       const float* stats, int threads) {
  const GroupNorm f = *norm;
  const GroupNormGrads g = *grads;
  const int64_t tasks = f.samples * f.groups, rows = 2 * f.channels;
  (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < tasks; ++task) backward_task(f, g, stats, task);
  if (!g.param_sums) return;
  for (int64_t row = 0; row < rows; ++row) {  // of weight, then of bias
    const float* from = g.param_sums + row / f.channels * f.samples * f.channels + row % f.channels;
    double sum = 0;
    for (int64_t n = 0; n < f.samples; ++n) sum += from[n * f.channels];
    g.dparam[row] = float(sum);
  }
}
