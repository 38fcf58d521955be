// One launch over all chunks of all parameters; a block takes every gridDim-th row of the table.
// Bound by memory: each access moves four elements, and a thread issues all its loads before it
// uses the first.
#include "adam_ema.h"
#include "interface.h"

using namespace sid_fast;

namespace {

constexpr int kThreads = kChunk / 4;

// Width elements, moved in one access.
template <typename T, int Width>
struct alignas(sizeof(T) * Width) Vector {
  T at[Width];
};

template <int Width>
__device__ Vector<float, Width> read(const float* from, int64_t i) {
  __builtin_assume(__isGlobal(from));
  return *reinterpret_cast<const Vector<float, Width>*>(from + i);
}

template <typename T, int Width>
__device__ void write(T* to, int64_t i, const Vector<T, Width>& x) {
  __builtin_assume(__isGlobal(to));
  *reinterpret_cast<Vector<T, Width>*>(to + i) = x;
}

// Gradient values of a thread that were not finite, and clipped.
struct Counts {
  int nonfinite = 0, clipped = 0;
  __device__ void operator+=(const Counts& other) {
    nonfinite += other.nonfinite;
    clipped += other.clipped;
  }
};

template <int Width>
__device__ Counts update(const Row& row, const Coefficients& c, bool enabled, int compute_dtype,
                      int64_t i) {
  Vector<float, Width> g = read<Width>(row.g, i), p, first, second, ema;
  if (enabled) {
    p = read<Width>(row.p, i);
    second = read<Width>(row.exp_avg_sq, i);
    if (row.exp_avg) first = read<Width>(row.exp_avg, i);
    if (row.ema) ema = read<Width>(row.ema, i);
  }
  Counts counts;
#pragma unroll
  for (int k = 0; k < Width; ++k) {
    counts.nonfinite += !finite(g.at[k]);
    g.at[k] = clean(g.at[k]);
    counts.clipped += beyond(c, g.at[k]);
    g.at[k] = limited(c, g.at[k]);
  }
  if (counts.nonfinite + counts.clipped) write(row.g, i, g);
  if (!enabled) return counts;

  Vector<uint16_t, Width> compute_weight;
#pragma unroll
  for (int k = 0; k < Width; ++k) {
    first.at[k] = row.exp_avg ? moment(c, g.at[k], first.at[k]) : g.at[k];
    second.at[k] = square(c, g.at[k], second.at[k]);
    p.at[k] = descend(c, p.at[k], first.at[k], second.at[k]);
    if (row.ema) ema.at[k] = average(c, p.at[k], ema.at[k]);
    compute_weight.at[k] = compute_dtype == 1 ? to_bfloat16(p.at[k]) : to_float16(p.at[k]);
  }
  write(row.p, i, p);
  write(row.exp_avg_sq, i, second);
  if (row.exp_avg) write(row.exp_avg, i, first);
  if (row.ema) write(row.ema, i, ema);
  if (row.compute_weight && row.taps == 1) {
    write(row.compute_weight, row.start + i, compute_weight);
  } else if (row.compute_weight) {
#pragma unroll
    for (int k = 0; k < Width; ++k)
      row.compute_weight[compute_weight_offset(row, i + k)] = compute_weight.at[k];
  }
  return counts;
}

__global__ void __launch_bounds__(kThreads, 3)
    adam_ema(const Row* table, const double* step, const uint8_t* enabled, const double* lr,
             const double* ema_beta, unsigned long long* counts, int64_t rows, double beta1,
             double beta2, double eps, double clip, int compute_dtype) {
  // About a hundred float64 instructions: one thread computes them for the block.
  __shared__ Coefficients c;
  if (threadIdx.x == 0) c = coefficients(*step, *lr, *ema_beta, beta1, beta2, eps, clip);
  __syncthreads();

  const bool on = *enabled;
  Counts found;
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const Row row = table[r];
    if (row.full) {
      found += update<4>(row, c, on, compute_dtype, 4 * threadIdx.x);
    } else {
      for (int i = threadIdx.x; i < row.count; i += kThreads)
        found += update<1>(row, c, on, compute_dtype, i);
    }
  }
  if (found.nonfinite) atomicAdd(counts, found.nonfinite);
  if (found.clipped) atomicAdd(counts + 1, found.clipped);
}

}  // namespace

int sid_fast_adam_ema_cuda(const void* table, const double* step, const uint8_t* enabled,
                           const double* lr, const double* ema_beta, int64_t* counts,
                           int64_t rows, double beta1, double beta2, double eps, double clip,
                           int compute_dtype, int blocks, void* stream) {
  adam_ema<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const Row*>(table), step, enabled, lr, ema_beta,
      reinterpret_cast<unsigned long long*>(counts), rows, beta1, beta2, eps, clip, compute_dtype);
  return cudaGetLastError();
}
