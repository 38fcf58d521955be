// One launch over all chunks of all parameters; a block takes every gridDim-th row of the table.
// Bound by memory: four numbers an access, a thread's loads all in flight before the first is used.
#include "adam_ema.h"
#include "interface.h"

using namespace sid_fast;

namespace {

constexpr int kThreads = kChunk / 4;

// Width numbers, moved as one access.
template <typename T, int Width>
struct alignas(sizeof(T) * Width) Numbers {
  T at[Width];
};

template <int Width>
__device__ Numbers<float, Width> read(const float* from, int64_t i) {
  __builtin_assume(__isGlobal(from));
  return *reinterpret_cast<const Numbers<float, Width>*>(from + i);
}

template <typename T, int Width>
__device__ void write(T* to, int64_t i, const Numbers<T, Width>& x) {
  __builtin_assume(__isGlobal(to));
  *reinterpret_cast<Numbers<T, Width>*>(to + i) = x;
}

template <int Width>
__device__ int update(const Row& row, const Coefficients& c, bool apply, int shadow_type,
                      int64_t i) {
  Numbers<float, Width> g = read<Width>(row.g, i), p, first, second, ema;
  if (apply) {
    p = read<Width>(row.p, i);
    second = read<Width>(row.second, i);
    if (row.first) first = read<Width>(row.first, i);
    if (row.ema) ema = read<Width>(row.ema, i);
  }
  int bad = 0;
#pragma unroll
  for (int k = 0; k < Width; ++k) {
    bad += !finite(g.at[k]);
    g.at[k] = clean(g.at[k]);
  }
  if (bad) write(row.g, i, g);
  if (!apply) return bad;

  Numbers<uint16_t, Width> shadow;
#pragma unroll
  for (int k = 0; k < Width; ++k) {
    first.at[k] = row.first ? moment(c, g.at[k], first.at[k]) : g.at[k];
    second.at[k] = square(c, g.at[k], second.at[k]);
    p.at[k] = descend(c, p.at[k], first.at[k], second.at[k]);
    if (row.ema) ema.at[k] = average(c, p.at[k], ema.at[k]);
    shadow.at[k] = shadow_type == 1 ? to_bfloat16(p.at[k]) : to_float16(p.at[k]);
  }
  write(row.p, i, p);
  write(row.second, i, second);
  if (row.first) write(row.first, i, first);
  if (row.ema) write(row.ema, i, ema);
  if (row.shadow && row.taps == 1) {
    write(row.shadow, row.start + i, shadow);
  } else if (row.shadow) {
#pragma unroll
    for (int k = 0; k < Width; ++k) row.shadow[shadow_offset(row, i + k)] = shadow.at[k];
  }
  return bad;
}

__global__ void __launch_bounds__(kThreads, 3)
    adam_ema(const Row* table, const double* step, const uint8_t* apply, const double* lr,
             const double* ema_beta, unsigned long long* nonfinite, int64_t rows, double beta1,
             double beta2, double eps, int shadow_type) {
  // A hundred float64 instructions, for one thread rather than for all.
  __shared__ Coefficients c;
  if (threadIdx.x == 0) c = coefficients(*step, *lr, *ema_beta, beta1, beta2, eps);
  __syncthreads();

  const bool on = *apply;
  int bad = 0;
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const Row row = table[r];
    if (row.full) {
      bad += update<4>(row, c, on, shadow_type, 4 * threadIdx.x);
    } else {
      for (int i = threadIdx.x; i < row.count; i += kThreads)
        bad += update<1>(row, c, on, shadow_type, i);
    }
  }
  if (bad) atomicAdd(nonfinite, bad);
}

}  // namespace

int sid_fast_adam_ema_cuda(const void* table, const double* step, const uint8_t* apply,
                           const double* lr, const double* ema_beta, int64_t* nonfinite,
                           int64_t rows, double beta1, double beta2, double eps, int shadow_type,
                           int blocks, void* stream) {
  adam_ema<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const Row*>(table), step, apply, lr, ema_beta,
      reinterpret_cast<unsigned long long*>(nonfinite), rows, beta1, beta2, eps, shadow_type);
  return cudaGetLastError();
}
