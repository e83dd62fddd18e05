// Matrices in f64, and what they are made of: see hessian.rs and matrix.rs.
#include "kernel.h"

// Where an element of the upper half of a matrix is that lies in panels of `panel` rows, each from its first row's diagonal on: see panels.rs.
HELPER size_t upper(unsigned row, unsigned column, size_t width, size_t panel) {
  size_t p = row / (unsigned)panel, first = p * panel;
  return first * width - panel * panel * (p * (p - 1) / 2) + at(row - first, width - first, column - first);
}

// H[a, b] of a symmetric H, of which `sums` has the upper half.
HELPER double symmetric(const long long *sums, const double *inverse, unsigned width, unsigned panel, unsigned a, unsigned b) {
  unsigned row = a < b ? a : b, column = a < b ? b : a;
  return (double)sums[upper(row, column, width, panel)] * inverse[row] * inverse[column];
}

// Rows of a matrix: out[r, lane] = values[indices[r], lane], `count` values in all.
KERNEL select_rows(double *out, const double *values, const unsigned *indices, unsigned lanes, unsigned long long count) {
  unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) out[i] = values[at(indices[i / lanes], lanes, i % lanes)];
}

// The upper half of H[order[i], order[j]] with another diagonal, which is by original column, in panels.
KERNEL ordered(double *out, const long long *sums, const double *inverse, const unsigned *order, const double *diagonal,
               unsigned width, unsigned panel) {
  unsigned column = thread_x(), row = blockIdx.y;
  if (column >= width || column < row) return;
  unsigned a = order[row], b = order[column];
  out[upper(row, column, width, panel)] = row == column ? diagonal[a] : symmetric(sums, inverse, width, panel, a, b);
}

// Rows first.. of H, whole.
KERNEL whole_rows(double *out, const long long *sums, const double *inverse, unsigned first, unsigned width, unsigned panel) {
  unsigned column = thread_x(), row = first + blockIdx.y;
  if (column >= width) return;
  out[at(blockIdx.y, width, column)] = symmetric(sums, inverse, width, panel, row, column);
}

// Rows first.. of M - H; `cross` has all of M.
KERNEL shift_rows(double *out, const long long *sums, const double *inverse, const long long *cross, unsigned first, unsigned width,
                  unsigned panel) {
  unsigned column = thread_x(), row = first + blockIdx.y;
  if (column >= width) return;
  double m = (double)cross[at(row, width, column)] * inverse[row] * inverse[column];
  out[at(blockIdx.y, width, column)] = m - symmetric(sums, inverse, width, panel, row, column);
}
