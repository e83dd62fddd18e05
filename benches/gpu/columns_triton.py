"""The columns of one GPTQ block in one kernel: each program keeps its rows' 128 columns in registers, as the kernel of llm-compressor does. For
gptq_torch.py."""

import torch
import triton
import triton.language as tl

ROWS = 16


@triton.jit
def kernel(weight, factor, scale, quantized, error, height, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = row < height
    place = row[:, None] * WIDTH + column[None, :]
    left = tl.load(weight + place, mask=inside[:, None], other=0.0)
    step = tl.load(scale + row, mask=inside, other=1.0)
    for i in range(0, WIDTH):
        w = tl.sum(tl.where(column[None, :] == i, left, 0.0), axis=1)
        code = tl.minimum(tl.maximum(tl.floor(w / step + 0.5), -8.0), 7.0)
        e = (w - code * step) / tl.load(factor + i * WIDTH + i)
        tl.store(quantized + row * WIDTH + i, code * step, mask=inside)
        tl.store(error + row * WIDTH + i, e, mask=inside)
        spread = tl.load(factor + i * WIDTH + column)
        left -= tl.where(column[None, :] > i, e[:, None] * spread[None, :], 0.0)


def quantize_columns(weight, factor, scale):
    """Quantized values and errors of contiguous f32 [rows, 128], given the block's part of the factor and a scale a row."""
    height, width = weight.shape
    quantized, error = torch.empty_like(weight), torch.empty_like(weight)
    kernel[(triton.cdiv(height, ROWS),)](weight, factor, scale, quantized, error, height, WIDTH=width, ROWS=ROWS)
    return quantized, error
