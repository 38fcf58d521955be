// The library's exports: plain C, independent of the torch version. _host takes pointers to host
// memory, _cuda to device memory.
//
// table: [rows] of sid_fast::Row. step (counting this update), lr, ema_beta: double scalars.
// enabled: one byte. counts: two int64 counters, incremented: gradient values that were not finite,
// and clipped; clip 0 clips none. compute_dtype: 0 none, 1 bfloat16, 2 float16. _cuda launches
// `blocks` blocks asynchronously and returns a cudaError.
#pragma once

#include <cstdint>

#ifdef _WIN32
#define SID_FAST_EXPORT extern "C" __declspec(dllexport)
#else
#define SID_FAST_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Incremented with every change of the functions below; see _cuda.py.
SID_FAST_EXPORT const int sid_fast_interface;

SID_FAST_EXPORT void sid_fast_adam_ema_host(const void* table, const double* step,
                                            const uint8_t* enabled, const double* lr,
                                            const double* ema_beta, int64_t* counts,
                                            int64_t rows, double beta1, double beta2, double eps,
                                            double clip, int compute_dtype);

SID_FAST_EXPORT int sid_fast_adam_ema_cuda(const void* table, const double* step,
                                           const uint8_t* enabled, const double* lr,
                                           const double* ema_beta, int64_t* counts,
                                           int64_t rows, double beta1, double beta2, double eps,
                                           double clip, int compute_dtype, int blocks, void* stream);

// The group norm of kernels/group_norm/host.py; every pointer is to float32 in host memory, and all
// tensors are contiguous but for the row strides of add, scale and shift.
namespace sid_fast {

struct GroupNorm {
  const float* x;  // [samples, channels, pixels]
  const float* weight;
  const float* bias;
  const float* add;  // [samples, channels] or null; scale and shift too, both or neither
  const float* scale;
  const float* shift;
  int64_t samples, channels, pixels, groups, add_stride, scale_shift_stride, silu;
  double eps;
};

// Gradients. All but y_grad and dx may be null: they are not computed.
struct GroupNormGrads {
  const float* y_grad;
  float* dx;
  float* param_sums;  // scratch [2, samples, channels]: weight, bias
  float* dparam;      // [2, channels]; null if param_sums is
  float* dadd;        // [samples, channels]
  float* dscale;
  float* dshift;  // null if dscale is
};

}  // namespace sid_fast

// stats: [2, samples, groups], written by forward and read by backward: mean, 1/std.
SID_FAST_EXPORT void sid_fast_group_norm_host(const sid_fast::GroupNorm* norm, float* y,
                                              float* stats, int threads);

SID_FAST_EXPORT void sid_fast_group_norm_backward_host(const sid_fast::GroupNorm* norm,
                                                       const sid_fast::GroupNormGrads* grads,
                                                       const float* stats, int threads);
