"""Measured against predicted peak memory, over shapes of models and calibrations.

    cargo build --release
    python benches/memory.py FOLDER [--quantflow target/release/quantflow]

FOLDER takes the random checkpoints (make_llama.py; 1.5 GB in all) and the outputs. Two tables: the plan against the measured peak over shapes
and options (the last with the smallest budget that the plan accepts: matrices and activations in scratch files), and the peak over the number of blocks and of calibration sequences, which must not grow.
"""

import argparse
import itertools
import json
import pathlib
import re
import shutil
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
# hidden, intermediate, heads, kv heads
SMALL, WIDE, TALL = (1024, 2816, 16, 4), (1024, 8192, 8, 8), (3072, 8192, 24, 8)


def make(folder, shape, layers, sequences, length):
    hidden, intermediate, heads, kv_heads = shape
    path = folder / f"{hidden}-{intermediate}-{layers}-{sequences}x{length}"
    if not path.exists():
        sizes = dict(layers=layers, hidden=hidden, intermediate=intermediate, heads=heads, vocab=8000)
        sizes |= {"kv-heads": kv_heads, "sequences": sequences, "length": length}
        flags = [f"--{name}={value}" for name, value in sizes.items()]
        subprocess.run([sys.executable, HERE / "make_llama.py", path, *flags], check=True, stdout=subprocess.DEVNULL)
    return path


def run(binary, folder, model, *flags):
    command = [binary, "quantize", model, "-o", folder / "out", "--fresh", "--json", *flags]
    command += ["--calibration-tokens", model / "calibration.npy"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    shutil.rmtree(folder / "out")
    return json.loads(done.stdout)


def smallest(binary, model, *flags):
    """The smallest budget, which the refusal of a smaller one names."""
    command = [binary, "plan", model, "--memory", "1", *flags, "--calibration-tokens", model / "calibration.npy"]
    refusal = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True).stderr
    return re.search(r"smallest budget that would is (\d+) bytes", refusal)[1]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--quantflow", default=HERE.parent / "target/release/quantflow")
    a = parser.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)

    print("| hidden x intermediate | tokens | flags | predicted MB | measured MB | measured / predicted |\n|---|---|---|---|---|---|")
    options = (["--match-original", "0"], [], ["--match-original", "0", "--workers", "1"], ["--memory"])
    for shape, flags in itertools.product((SMALL, WIDE, TALL), options):
        model = make(a.folder, shape, 2, 8, 512)
        if flags[-1:] == ["--memory"]:
            flags = [*flags, smallest(a.quantflow, model, *flags[:-1])]
        result = run(a.quantflow, a.folder, model, *flags)
        predicted, measured = (result[key] / 1e6 for key in ("plan_peak_host_bytes", "peak_host_bytes"))
        row = (f"{shape[0]} x {shape[1]}", "8 x 512", " ".join(flags), f"{predicted:.0f}", f"{measured:.0f}", f"{measured / predicted:.2f}")
        print("| " + " | ".join(row) + " |", flush=True)

    print("\n| blocks | sequences of 512 | measured MB |\n|---|---|---|")
    for layers, sequences in ((2, 16), (4, 16), (8, 16), (2, 32), (2, 64)):
        model = make(a.folder, SMALL, layers, sequences, 512)
        result = run(a.quantflow, a.folder, model, "--match-original", "0")
        print(f"| {layers} | {sequences} | {result['peak_host_bytes'] / 1e6:.0f} |", flush=True)


if __name__ == "__main__":
    main()
