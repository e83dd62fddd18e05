// Codes, a row packed in `words` words: see numerics/bits.rs.
#include "kernel.h"

// Codes [columns, rows] as words [rows, words], one a thread.
KERNEL pack(unsigned *packed, const double *codes, unsigned words, unsigned bits, unsigned columns, unsigned rows) {
  unsigned row = thread_x(), word = blockIdx.y, begin = 32 * word;
  if (row >= rows) return;
  unsigned value = 0;
  for (unsigned c = begin / bits; c < columns && c * bits < begin + 32; c++) {
    unsigned code = (unsigned)codes[at(c, rows, row)], from = c * bits;
    value |= from < begin ? code >> (begin - from) : code << (from - begin);
  }
  packed[at(row, words, word)] = value;
}

// values[r, c] = (codes[r, c] - zeros[r, g]) * scales[r, g]
KERNEL dequantize(void *values, const unsigned *packed, const float *scales, const unsigned char *zeros, unsigned columns,
                  unsigned group, unsigned words, unsigned bits, int kind) {
  unsigned row = blockIdx.x, column = thread_y(), groups = columns / group;
  if (column >= columns) return;
  const unsigned *word = packed + at(row, words, column * bits / 32);
  unsigned from = column * bits % 32, code = *word >> from;
  if (from + bits > 32) code |= word[1] << (32 - from);
  code &= (1u << bits) - 1;
  size_t i = at(row, columns, column), g = at(row, groups, column / group);
  float value = (float)((int)code - (int)zeros[g]) * scales[g];
  if (kind == KIND_F32) ((float *)values)[i] = value;
  else if (kind == KIND_BF16) ((unsigned short *)values)[i] = narrow_bf16(value);
  else ((unsigned short *)values)[i] = narrow_f16(value);
}
