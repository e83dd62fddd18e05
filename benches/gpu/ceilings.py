"""What the device can do, in PyTorch: TFLOP/s of products, GB/s of its memory and of copies to it. Prints one line of JSON; run.py runs it.

    python benches/gpu/ceilings.py [--device cuda|cpu]

Products are square, of normal numbers: n = 8,192 (f64: 4,096), on a CPU 512. Means of ten after three. A copy within the device counts what is read
and what is written; one from the host comes out of pinned memory, and there is none on a CPU.
"""

import argparse
import json
import time

import torch


def seconds(work, device):
    """Mean wall clock of `work`."""

    def repeat(times):
        for _ in range(times):
            work()
        if device == "cuda":
            torch.cuda.synchronize()

    repeat(3)
    begin = time.perf_counter()
    repeat(10)
    return (time.perf_counter() - begin) / 10


def gemm(dtype, n, device):
    """TFLOP/s of a product of two n x n matrices."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / seconds(lambda: torch.matmul(a, b, out=out), device) / 1e12


def copy(size, source, target):
    """GB/s of a copy between memories, `source` and `target` being devices or "pinned"."""
    a, b = (
        torch.empty(size, dtype=torch.uint8, pin_memory=True) if place == "pinned" else torch.empty(size, dtype=torch.uint8, device=place)
        for place in (source, target)
    )
    moved = 2 * size if source == target else size
    return moved / seconds(lambda: b.copy_(a, non_blocking=True), target) / 1e9


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args().device
    cuda = device == "cuda"
    n = 8192 if cuda else 512
    size = 4 << 30 if cuda else 64 << 20
    result = dict(
        device=torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        torch=torch.__version__,
        bf16_tflops=gemm(torch.bfloat16, n, device),
        f32_tflops=gemm(torch.float32, n, device),
        f64_tflops=gemm(torch.float64, n // 2 if cuda else n, device),
        memory_gbs=copy(size, device, device),
        bus_gbs=copy(size // 4, "pinned", device) if cuda else None,
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
