// The host build: the device's arithmetic, one element at a time.
#include "adam_ema.h"
#include "interface.h"

using namespace sid_fast;

const int sid_fast_interface = 3;

void sid_fast_adam_ema_host(const void* table, const double* step, const uint8_t* enabled,
                            const double* lr, const double* ema_beta, int64_t* counts,
                            int64_t rows, double beta1, double beta2, double eps,
                            double clip, int compute_dtype) {
  const Coefficients c = coefficients(*step, *lr, *ema_beta, beta1, beta2, eps, clip);
  for (int64_t r = 0; r < rows; ++r) {
    const Row& row = static_cast<const Row*>(table)[r];
    for (int64_t i = 0; i < row.count; ++i) {
      const float found = row.g[i], cleaned = clean(found), g = limited(c, cleaned);
      counts[0] += !finite(found);
      counts[1] += beyond(c, cleaned);
      row.g[i] = g;
      if (!*enabled) continue;
      float first = g;
      if (row.exp_avg) first = row.exp_avg[i] = moment(c, g, row.exp_avg[i]);
      row.exp_avg_sq[i] = square(c, g, row.exp_avg_sq[i]);
      const float p = row.p[i] = descend(c, row.p[i], first, row.exp_avg_sq[i]);
      if (row.ema) row.ema[i] = average(c, p, row.ema[i]);
      if (row.compute_weight)
        row.compute_weight[compute_weight_offset(row, i)] =
            compute_dtype == 1 ? to_bfloat16(p) : to_float16(p);
    }
  }
}
