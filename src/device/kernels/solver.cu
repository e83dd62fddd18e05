// Scales and codes: see solver.rs. Matrices are [columns of the weight, lanes], a weight row a lane; a thread has one lane.
#include "kernel.h"

// As in numerics/scales.rs.
#define SHRINKS 40
#define SHRINK_MIN 0.35
// As in solver.rs and solver/steps.rs: columns of a block, threads of a launch that keeps a block's values in shared memory.
#define BLOCK 64
#define THREADS 64
// Columns of a block whose values a thread has in registers.
#define PART 16

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
// [rows, lanes], has what the columns before the block feed to it; `lower` is the block of L, [rows, rows]. state is [2 * width + 2, lanes]: by
// original column targets, in whose place codes come, then errors by row of L, then each lane's squared error and clipped codes so far.
// `columns` has the original column of each row. Of each PART of the rows what they read is there before the first is rounded, and what is
// fed to them is in registers: else a thread waits for memory once a row.
KERNEL sweep(double *state, const double *RESTRICT carried, const double *RESTRICT lower, const double *RESTRICT scales,
             const unsigned *RESTRICT columns, unsigned begin, unsigned rows, unsigned width, unsigned lanes, unsigned group,
             double max_code) {
  __shared__ double errors[BLOCK * THREADS];
  unsigned lane = thread_x(), groups = width / group;
  if (lane >= lanes) return;
  double *mine = errors + threadIdx.x;
  double *square_sum = state + at((size_t)width * 2, lanes, lane), *clip_sum = state + at((size_t)width * 2 + 1, lanes, lane);
  double squares = *square_sum, clipped = *clip_sum;
  for (unsigned part = (rows + PART - 1) / PART; part-- > 0;) {
    unsigned first = part * PART, count = rows - first < PART ? rows - first : PART;
    double fed[PART], weight[PART], scale[PART], zero[PART];
    UNROLL for (unsigned k = 0; k < PART; k++) {
      if (k >= count) continue;
      unsigned column = columns[begin + first + k], g = column / group;
      fed[k] = carried[at(first + k, lanes, lane)];
      weight[k] = state[at(column, lanes, lane)];
      scale[k] = scales[at(g, lanes, lane)];
      zero[k] = scales[at((size_t)groups + g, lanes, lane)];
    }
    // Only the last part has fewer rows than PART, and nothing is behind it.
    for (unsigned j = first + PART; j < rows; j++) {
      const double *l = lower + at(j, rows, first);
      double error = mine[j * THREADS];
      UNROLL for (unsigned k = 0; k < PART; k++) fed[k] += error * l[k];
    }
    UNROLL for (unsigned i = PART; i-- > 0;) {
      if (i >= count) continue;
      unsigned row = first + i;
      const double *l = lower + at(row, rows, first);
      double pivot = l[i], t = weight[i] + fed[i] / pivot;
      double wanted = rint(t / scale[i] + zero[i]), code = clamp_code(wanted, max_code);
      double value = (code - zero[i]) * scale[i], residual = (t - value) * pivot, error = weight[i] - value;
      mine[row * THREADS] = error;
      state[at((size_t)width + begin + row, lanes, lane)] = error;
      state[at(columns[begin + row], lanes, lane)] = code;
      squares += residual * residual;
      clipped += code != wanted;
      UNROLL for (unsigned k = 0; k < PART; k++) {
        if (k < i) fed[k] += error * l[k];
      }
    }
  }
  *square_sum = squares;
  *clip_sum = clipped;
}

// The columns begin.. in original order, at most BLOCK, from the first to the last: moves each code to the grid point nearest to its
// conditional minimum. state is [2 * width, lanes]: codes, and by how much the values moved. `gradient` is [rows, lanes],
// `gram` these rows of XᵀX, [rows, width]. In parts, as `sweep`.
KERNEL descend(double *state, const double *RESTRICT gradient, const double *RESTRICT gram, const double *RESTRICT damping,
               const double *RESTRICT scales, unsigned begin, unsigned rows, unsigned width, unsigned lanes, unsigned group,
               double max_code) {
  __shared__ double moves[BLOCK * THREADS];
  unsigned lane = thread_x(), groups = width / group;
  if (lane >= lanes) return;
  double *mine = moves + threadIdx.x;
  for (unsigned first = 0; first < rows; first += PART) {
    unsigned count = rows - first < PART ? rows - first : PART;
    double slope[PART], codes[PART], scale[PART], zero[PART];
    UNROLL for (unsigned k = 0; k < PART; k++) {
      if (k >= count) continue;
      size_t column = begin + first + k, g = column / group;
      slope[k] = gradient[at(first + k, lanes, lane)];
      codes[k] = state[at(column, lanes, lane)];
      scale[k] = scales[at(g, lanes, lane)];
      zero[k] = scales[at(groups + g, lanes, lane)];
    }
    for (unsigned j = 0; j < first; j++) {
      const double *h = gram + at(j, width, begin + first);
      double step = mine[j * THREADS];
      UNROLL for (unsigned k = 0; k < PART; k++) {
        if (k < count) slope[k] -= step * h[k];
      }
    }
    UNROLL for (unsigned i = 0; i < PART; i++) {
      if (i >= count) continue;
      size_t column = begin + first + i;
      const double *h = gram + at(first + i, width, begin + first);
      double wanted = (codes[i] - zero[i]) * scale[i] + slope[i] / (h[i] + damping[column]);
      double next = clamp_code(rint(wanted / scale[i] + zero[i]), max_code), step = (next - codes[i]) * scale[i];
      mine[(first + i) * THREADS] = step;
      state[at(column, lanes, lane)] = next;
      state[at((size_t)width + column, lanes, lane)] = step;
      UNROLL for (unsigned k = 0; k < PART; k++) {
        if (k > i && k < count) slope[k] -= step * h[k];
      }
    }
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
