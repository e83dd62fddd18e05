// Scales and codes: see solver.rs. Matrices are [columns of the weight, lanes], a weight row a lane; a thread has one lane.
#include "kernel.h"

// As in numerics/scales.rs.
#define SHRINKS 40
#define SHRINK_MIN 0.35
// As in solver.rs: columns of a block, threads of a launch that keeps a block's values in shared memory.
#define BLOCK 64
#define THREADS 64

HELPER double clamp_code(double code, double max_code) { return code < 0.0 ? 0.0 : code > max_code ? max_code : code; }

// scales[0] and scales[1], [groups, lanes] each: scale and zero point of the smallest weighted error over the shrinks of the range.
KERNEL search(double *scales, const double *weights, const double *importance, unsigned symmetric, int kind, unsigned width,
              unsigned lanes, unsigned group, double max_code) {
  unsigned lane = thread_x(), g = blockIdx.y, groups = width / group;
  if (lane >= lanes) return;
  const double *w = weights + at((size_t)g * group, lanes, lane);
  double low = 0.0, high = 0.0;
  for (unsigned c = 0; c < group; c++) {
    double value = w[at(c, lanes, 0)];
    low = value < low ? value : low;
    high = value > high ? value : high;
  }
  if (symmetric) {
    high = -low > high ? -low : high;
    low = -high;
  }
  double best = INFINITY, best_scale = 0.0, best_zero = 0.0;
  for (int step = 0; step < SHRINKS; step++) {
    double shrink = 1.0 - (1.0 - SHRINK_MIN) * step / (SHRINKS - 1);
    double scale = round_scale((high - low) * shrink / max_code, kind);
    double zero = symmetric ? (max_code + 1.0) / 2.0 : clamp_code(rint(-low * shrink / scale), max_code);
    double inverse = 1.0 / scale, error = 0.0;
    for (unsigned c = 0; c < group; c++) {
      double value = w[at(c, lanes, 0)];
      double code = clamp_code(rint(value * inverse + zero), max_code);
      double miss = value - (code - zero) * scale;
      error += importance[(size_t)g * group + c] * miss * miss;
    }
    if (error < best) {
      best = error;
      best_scale = scale;
      best_zero = zero;
    }
  }
  scales[at(g, lanes, lane)] = best_scale;
  scales[at((size_t)groups + g, lanes, lane)] = best_zero;
}

// Rounds to nearest. state is [width + 3, lanes]: codes, then each lane's squared error, energy, clipped codes.
KERNEL round_plainly(double *state, const double *weights, const double *scales, unsigned width, unsigned lanes, unsigned group,
                     double max_code) {
  unsigned lane = thread_x(), groups = width / group;
  if (lane >= lanes) return;
  double error = 0.0, energy = 0.0, clipped = 0.0;
  for (unsigned c = 0; c < width; c++) {
    double w = weights[at(c, lanes, lane)];
    double scale = scales[at(c / group, lanes, lane)], zero = scales[at((size_t)groups + c / group, lanes, lane)];
    double wanted = rint(w / scale + zero), code = clamp_code(wanted, max_code);
    double miss = w - (code - zero) * scale;
    state[at(c, lanes, lane)] = code;
    error += miss * miss;
    energy += w * w;
    clipped += code != wanted;
  }
  state[at(width, lanes, lane)] = error;
  state[at((size_t)width + 1, lanes, lane)] = energy;
  state[at((size_t)width + 2, lanes, lane)] = clipped;
}

// The rows begin.. of L, at most BLOCK, from the last to the first: rounds their columns and feeds each error to the later ones. `carried`,
// [rows, lanes], has what the columns before the block feed to it. state is [2 * width + 2, lanes] by row of L: errors, codes, then each lane's
// squared error and clipped codes so far. `columns` has the original column of each row.
KERNEL sweep(double *state, const double *carried, const double *target, const double *lower, const double *scales,
             const unsigned *columns, unsigned begin, unsigned rows, unsigned width, unsigned lanes, unsigned group, double max_code) {
  __shared__ double errors[BLOCK * THREADS];
  unsigned lane = thread_x(), groups = width / group;
  if (lane >= lanes) return;
  double *mine = errors + threadIdx.x;
  double *square_sum = state + at((size_t)width * 2, lanes, lane), *clip_sum = state + at((size_t)width * 2 + 1, lanes, lane);
  double squares = *square_sum, clipped = *clip_sum;
  for (unsigned i = rows; i-- > 0;) {
    size_t row = begin + i;
    double fed = carried[at(i, lanes, lane)];
    for (unsigned j = i + 1; j < rows; j++) fed += mine[j * THREADS] * lower[at(begin + j, width, row)];
    double pivot = lower[at(row, width, row)], w = target[at(row, lanes, lane)];
    unsigned g = columns[row] / group;
    double scale = scales[at(g, lanes, lane)], zero = scales[at((size_t)groups + g, lanes, lane)];
    double t = w + fed / pivot;
    double wanted = rint(t / scale + zero), code = clamp_code(wanted, max_code);
    double value = (code - zero) * scale, residual = (t - value) * pivot;
    mine[i * THREADS] = w - value;
    state[at(row, lanes, lane)] = w - value;
    state[at((size_t)width + row, lanes, lane)] = code;
    squares += residual * residual;
    clipped += code != wanted;
  }
  *square_sum = squares;
  *clip_sum = clipped;
}

// The columns begin.. in original order, at most BLOCK, from the first to the last: moves each code to the grid point nearest to its
// conditional minimum. state is [2 * width, lanes]: codes, and by how much the values moved. `gradient` is [rows, lanes].
KERNEL descend(double *state, const double *gradient, const double *hessian, const double *damping, const double *scales,
               unsigned begin, unsigned rows, unsigned width, unsigned lanes, unsigned group, double max_code) {
  __shared__ double moves[BLOCK * THREADS];
  unsigned lane = thread_x(), groups = width / group;
  if (lane >= lanes) return;
  double *mine = moves + threadIdx.x;
  for (unsigned i = 0; i < rows; i++) {
    size_t column = begin + i;
    double slope = gradient[at(i, lanes, lane)];
    for (unsigned k = 0; k < i; k++) slope -= mine[k * THREADS] * hessian[at(begin + k, width, column)];
    unsigned g = column / group;
    double scale = scales[at(g, lanes, lane)], zero = scales[at((size_t)groups + g, lanes, lane)];
    double *code = state + at(column, lanes, lane);
    double wanted = (*code - zero) * scale + slope / (hessian[at(column, width, column)] + damping[column]);
    double next = clamp_code(rint(wanted / scale + zero), max_code);
    double step = (next - *code) * scale;
    *code = next;
    mine[i * THREADS] = step;
    state[at((size_t)width + column, lanes, lane)] = step;
  }
}

// One Newton step of a group's scales, kept where it lowers the error once rounded.
KERNEL refit(double *scale, const double *slope, const double *curvature, unsigned lanes, int kind) {
  unsigned lane = thread_x();
  if (lane >= lanes || !(curvature[lane] > 0.0)) return;
  double wanted = scale[lane] + slope[lane] / curvature[lane];
  if (!(wanted > 0.0)) return;
  double next = round_scale(wanted, kind), step = next - scale[lane];
  if (step * (curvature[lane] * step - 2.0 * slope[lane]) < 0.0) scale[lane] = next;
}
