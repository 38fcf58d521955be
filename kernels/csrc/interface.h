// What the library exports: plain C, no dependence on the version of torch. Pointers are to the
// host's memory for _host and to the device's for _cuda.
//
// table is [rows] of sid_fast::Row; step (already counting this update), lr and ema_beta are
// double, enabled is one byte, nonfinite is int64 and is added to. compute_dtype: 0 none, 1 bfloat16,
// 2 float16. _cuda launches so many blocks, returns a cudaError and waits for nothing.
#pragma once

#include <cstdint>

#ifdef _WIN32
#define SID_FAST_EXPORT extern "C" __declspec(dllexport)
#else
#define SID_FAST_EXPORT extern "C" __attribute__((visibility("default")))
#endif

SID_FAST_EXPORT void sid_fast_adam_ema_host(const void* table, const double* step,
                                            const uint8_t* enabled, const double* lr,
                                            const double* ema_beta, int64_t* nonfinite,
                                            int64_t rows, double beta1, double beta2, double eps,
                                            int compute_dtype);

SID_FAST_EXPORT int sid_fast_adam_ema_cuda(const void* table, const double* step,
                                           const uint8_t* enabled, const double* lr,
                                           const double* ema_beta, int64_t* nonfinite,
                                           int64_t rows, double beta1, double beta2, double eps,
                                           int compute_dtype, int blocks, void* stream);
