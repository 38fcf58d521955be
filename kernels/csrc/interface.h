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
