// From sums to matrices in f64: see factor.rs.
#include "kernel.h"

HELPER double symmetric(const long long *sums, const double *inverse, unsigned width, unsigned a, unsigned b) {
  unsigned row = a < b ? a : b, column = a < b ? b : a;
  return (double)sums[at(row, width, column)] * inverse[row] * inverse[column];
}

// Rows of a matrix: out[r, lane] = values[indices[r], lane], `count` values in all.
KERNEL select_rows(double *out, const double *values, const unsigned *indices, unsigned lanes, unsigned long long count) {
  unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) out[i] = values[at(indices[i / lanes], lanes, i % lanes)];
}

// out[i, j] = H[order[i], order[j]] of a symmetric H, of which `sums` has the upper half: all of it, or the lower half with another
// diagonal, which is by original column.
KERNEL hessian(double *out, const long long *sums, const double *inverse, const unsigned *order, const double *diagonal,
               unsigned width, unsigned whole) {
  unsigned column = thread_x(), row = blockIdx.y;
  if (column >= width || (!whole && column > row)) return;
  unsigned a = order[row], b = order[column];
  out[at(row, width, column)] = row == column && !whole ? diagonal[a] : symmetric(sums, inverse, width, a, b);
}

// out = M - H, M in `cross` whole, H in `sums` by its upper half.
KERNEL shift(double *out, const long long *cross, const long long *sums, const double *inverse, unsigned width) {
  unsigned column = thread_x(), row = blockIdx.y;
  if (column >= width) return;
  double m = (double)cross[at(row, width, column)] * inverse[row] * inverse[column];
  out[at(row, width, column)] = m - symmetric(sums, inverse, width, row, column);
}
