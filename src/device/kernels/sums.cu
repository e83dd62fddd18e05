// Exact sums: see sums.rs.
#include "kernel.h"

// As in statistics/gram.rs: what is not below this limit is too large, NaN included.
#define BATCH_SUM_MAX 2251799813685248.0

// sums[r, c] += count * round(product[r, c] * row_scales[r] * column_scales[c]); `bad` is a row that failed, from 1.
KERNEL add_rounded(long long *sums, const float *product, const double *row_scales, const double *column_scales,
                   unsigned columns, long long count, unsigned *bad) {
  unsigned column = thread_x(), row = blockIdx.y;
  if (column >= columns) return;
  size_t i = at(row, columns, column);
  double value = (double)product[i] * (row_scales[row] * column_scales[column]);
  if (!(fabs(value) < BATCH_SUM_MAX)) {
    *bad = row + 1;
    return;
  }
  long long add = (long long)rint(value) * count;
  long long next = (long long)((unsigned long long)sums[i] + (unsigned long long)add);
  if (((sums[i] ^ next) & (add ^ next)) < 0) *bad = row + 1;
  sums[i] = next;
}

// sums[c] += count * round(sum over t of x[t, c] * scales[c]), summed in f64 in the order of the tokens.
KERNEL add_columns(long long *sums, const float *x, const double *scales, unsigned tokens, unsigned columns, long long count,
                   unsigned *bad) {
  unsigned column = thread_x();
  if (column >= columns) return;
  double total = 0.0;
  for (unsigned token = 0; token < tokens; token++) total += (double)x[at(token, columns, column)];
  double value = total * scales[column];
  if (!(fabs(value) < BATCH_SUM_MAX)) {
    *bad = column + 1;
    return;
  }
  sums[column] += (long long)rint(value) * count;
}
