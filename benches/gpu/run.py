"""quantflow on a GPU, beside GPTQModel and llm-compressor: seconds by phase, what the device does of what it can, peak bytes.

    python benches/gpu/run.py FOLDER --quantflow target/cuda/release/quantflow --shape llama-3-8b|qwen3-8b|qwen3-30b-a3b

One checkpoint of random weights (make_shape.py) and 128 x 2,048 tokens for all, W4 g128, on one device, one program after another, each in a process
of its own that was run on a tiny checkpoint before, so that kernels are compiled and a peer that cannot run is found out. FOLDER takes checkpoints
and outputs (8B: 16 GB and 6 GB; with --peer-layers, the cut checkpoint besides), and the measurements and their tables, RUN.json and RUN.md, RUN
being named after shape, sizes and device. The tables:

- ceilings: products, memory and bus of the device, by PyTorch (ceilings.py).
- quantflow by phase: `operators` of its JSON, the work counted from the shape, what was achieved, and the ceiling's share. Work: a forward pass with
  causal attention; XᵀX of each distinct input as a triangle; n³/3 a factor; rows x n² a solve; the weights of the blocks, once over the bus.
  Operators run beside one another; in a build for the CPU their seconds are CPU seconds of all workers.
- programs: quantflow with --match-original 0, which is plain GPTQ, as the peers'; on a GPU again with the smallest --device-memory that it takes
  (`least`), and with half of what nvidia-smi saw a peer take, of the peer that took less (`half`); with the default recipe (`default`: the original
  is matched, two rounds of refinement). Seconds without the loading of Python modules, with reading the checkpoint and writing the result; peak bytes
  by the program's own count, by nvidia-smi (every 0.1 s, less what was in use before; the CUDA context counts), and resident on the host (ru_maxrss;
  mapped files count). Where a peer fails or is not there, the row has its error's last line, and gptq_torch.py, which renders their common loop, runs
  besides.

The target for an 8B shape: under 60 s, at least 5 times faster than either peer, at most half their device memory. `half` is the run that all
of it is held against.

On a machine with nvcc and Rust, which need not have a GPU, build:

    CARGO_TARGET_DIR=target/cuda CUDA_COMPUTE_CAP=90 cargo build --release --features cuda

Copy the repository and the binary, target/cuda/release/quantflow, to a machine with a GPU, PyTorch and transformers. If that has no package registry,
carry the wheels that it lacks, which are made elsewhere by a Python of the same version:

    pip wheel --no-deps -w wheels llmcompressor==0.14.0.1 compressed-tensors==0.19.0 loguru datasets dill multiprocess pydantic==2.14.4 \
        pydantic-core==2.50.5 typing-inspection annotated-types
    BUILD_CUDA_EXT=0 pip wheel --no-deps --no-build-isolation -w wheels gptqmodel==7.6.0 device-smi tokenicer logbar torchao==0.16.0 defuser \
        pypcre protobuf

There:

    pip install --no-index --no-deps wheels/*.whl
    python benches/gpu/run.py /tmp/bench --quantflow ./quantflow --shape llama-3-8b

Both ran with torch 2.11 and transformers 5.17 on an H100; pypcre needs libpcre2 there. GPTQModel 7.7.0 asks for torch 2.14.1 and transformers 5.20.2 or later.
Where the two cannot share an environment, run each as a part, by the Python of its own.

Peers take minutes: --peer-layers 4 runs them on four blocks and multiplies the seconds of quantize, with what they do once in that phase;
--peer-layers 2 4 runs them on two and on four, and adds the difference for each block more. Loading and saving stay as measured on the most blocks, which
favours them. --parts runs some parts alone, on the same machine; RUN.json keeps the others. To try the script without a GPU, in some minutes:

    python benches/gpu/run.py /tmp/bench --quantflow target/release/quantflow --shape llama-3-8b \\
        --tiny --layers 2 --sequences 4 --length 128 --device cpu

"""

import argparse
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from make_shape import SHAPES, linears, shape_config

OURS = ("quantflow", "least", "half", "default")
PEERS = ("GPTQModel", "llm-compressor")
# What the target is held against first: a GPU may be lent for minutes.
PARTS = ("ceilings", "quantflow", "least", *PEERS, "half", "default", "rendering")
TITLES = {
    "least": "quantflow, smallest --device-memory",
    "half": "quantflow, half of a peer's device memory",
    "default": "quantflow, default recipe",
    "rendering": "gptq_torch.py (their loop in PyTorch)",
}
# The ceiling that an operator's products are held against: on a CPU, f32 instead of bf16.
CEILINGS = {"forward": "bf16_tflops", "accumulate": "bf16_tflops", "factor": "f64_tflops", "solve": "f64_tflops"}


def work(config, sequences, length):
    """Flop by operator, over all blocks."""
    tokens, experts = sequences * length, config.get("num_experts", 0)
    heads = config["num_attention_heads"]
    width = heads * config.get("head_dim", config["hidden_size"] // heads)
    # scores and their product with the values, each half of length x length
    forward = 2 * sequences * length**2 * width + 2 * tokens * experts * config["hidden_size"]
    inputs, solve = {}, 0
    for name, rows, columns in linears(config):
        seen = tokens * config["num_experts_per_tok"] / experts if ".experts." in name else tokens
        forward += 2 * seen * rows * columns
        solve += rows * columns**2
        # all experts share the Hessian of their input; the inputs of their down_proj differ
        site = name if name.endswith("down_proj") else "gate_up" if name.startswith("mlp.") else "o" if "o_proj" in name else "qkv"
        inputs[site] = (seen if name.endswith("down_proj") else tokens, columns)
    accumulate = sum(seen * n**2 for seen, n in inputs.values())
    factor = sum(n**3 / 3 for _, n in inputs.values())
    block = dict(forward=forward, accumulate=accumulate, factor=factor, solve=solve)
    return {operator: flop * config["num_hidden_layers"] for operator, flop in block.items()}


def weight_bytes(config):
    """Of all blocks' linears, in bf16."""
    return 2 * config["num_hidden_layers"] * sum(rows * columns for _, rows, columns in linears(config))


class DeviceMemory:
    """Peak bytes in use on the first GPU while the `with` lasts, less those in use at its begin; `None` without nvidia-smi."""

    def __enter__(self):
        self.log, self.peak, self.watch = tempfile.TemporaryFile("w+"), None, None
        command = ["nvidia-smi", "-i", "0", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "100"]
        if shutil.which(command[0]):
            self.watch = subprocess.Popen(command, stdout=self.log, stderr=subprocess.DEVNULL)
            time.sleep(1)
        return self

    def __exit__(self, *_):
        if self.watch:
            self.watch.terminate()
            self.watch.wait()
            self.log.seek(0)
            used = [int(line) << 20 for line in self.log.read().split("\n")[:-1] if line.strip().isdigit()]
            self.peak = max(used) - used[0] if used else None
        self.log.close()


def child(command, a):
    """Runs a program; the JSON object that its output ends with, or the error's last line, with its peak bytes."""
    environment = os.environ | dict(HF_HUB_OFFLINE="1")
    if a.device == "cpu":
        environment |= dict(CUDA_VISIBLE_DEVICES="", GPTQMODEL_CPU_WORKERS="2")
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, DeviceMemory() as memory:
        process = subprocess.Popen([str(word) for word in command], stdout=out, stderr=err, env=environment, cwd=a.folder)
        timer = threading.Timer(a.timeout, process.kill)
        timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            process.kill()
            timed_out = not timer.is_alive()
            timer.cancel()
        out.seek(0), err.seek(0)
        text, errors = "\n" + out.read(), err.read()
    measured = dict(host_bytes=usage.ru_maxrss * 1024, smi_bytes=memory.peak)
    if timed_out:
        return measured | dict(error=f"stopped after {a.timeout} s")
    try:
        result, _ = json.JSONDecoder().raw_decode(text[text.rindex("\n{") + 1 :])
        return measured | result
    except ValueError:
        lines = [line for line in errors.splitlines() if line.strip() and not line.startswith("hint:")]
        return measured | dict(error=f"exit status {process.returncode}: {lines[-1] if lines else 'no message'}")


def checkpoint(a, name, *flags):
    """The folder of a checkpoint, made if it is not there."""
    folder = a.folder / name
    if not (folder / "calibration.npy").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, HERE.parent / "make_shape.py", folder, "--shape", a.shape, *flags], check=True)
    return folder


def cut(a, layers):
    """The checkpoint with so many blocks."""
    flags = [f"--layers={layers}", f"--sequences={a.sequences}", f"--length={a.length}", *["--tiny"] * a.tiny]
    return checkpoint(a, f"{a.shape}-{layers}-{a.sequences}x{a.length}{'-tiny' * a.tiny}", *flags)


def warmed(run, a, *layers):
    """What `run` says of the checkpoints with so many blocks, after a tiny one; the error alone, where one fails. Outputs are not kept."""
    output = a.folder / "out"

    def one(model):
        shutil.rmtree(output, ignore_errors=True)
        result = run(model, output)
        shutil.rmtree(output, ignore_errors=True)
        return result

    result = one(checkpoint(a, f"{a.shape}-warm", "--layers=1", "--sequences=4", "--length=128", "--tiny"))
    results = []
    for blocks in layers:
        if "error" not in result:
            result = one(cut(a, blocks)) | dict(layers=blocks)
            results.append(result)
    return [result] if "error" in result else results


def measure_quantflow(a, part, results):
    """`least`: with the smallest --device-memory, which the refusal of a smaller one names. `half`: with half of what the peers took."""
    peers = [results[peer] for peer in PEERS if peer in results]
    taken = [peer["smi_bytes"] for peer in peers if "error" not in peer and peer["smi_bytes"]]
    if part == "half" and not taken:
        return dict(error="no peer's device memory is known")

    def run(model, output):
        command = [a.quantflow, "quantize", model, "-o", output, "--calibration-tokens", model / "calibration.npy"]
        command += ["--group-size", "128", "--json", *shlex.split(a.flags)]
        command += ["--match-original", "0"] * (part != "default")
        command += ["--device", "cuda"] * (a.device == "cuda")
        if part == "least":
            refusal = subprocess.run([*command, "--device-memory", "1"], capture_output=True, text=True).stderr
            named = re.search(r"smallest budget that would is (\d+) bytes", refusal)
            if not named:
                return dict(error=f"no smallest --device-memory was named: {refusal[-200:]}")
            command += ["--device-memory", named[1]]
        if part == "half":
            command += ["--device-memory", min(taken) // 2]
        return child(command, a)

    return warmed(run, a, a.layers)[-1]


def measure_peer(a, peer):
    """On the most blocks; with `block_seconds`, what quantize takes for one more, where it ran on fewer, too."""
    *fewer, layers = sorted({min(layers, a.layers) for layers in a.peer_layers or [a.layers]})

    def run(model, output):
        command = [sys.executable, HERE / "peers.py", peer, model, "-o", output, "--calibration-tokens", model / "calibration.npy"]
        return child(command + ["--device", a.device], a)

    results = warmed(run, a, *fewer, layers)
    result = results[-1]
    if len(results) == 2:
        more = result["seconds"]["quantize"] - results[0]["seconds"]["quantize"]
        result["block_seconds"] = more / (layers - fewer[0])
    return result


def table(header, rows):
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def number(value, scale=1.0):
    """Three digits; a dash for what was not measured."""
    if not value:
        return "-"
    value /= scale
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ceilings_table(ceilings):
    keys = ("bf16_tflops", "f32_tflops", "f64_tflops", "memory_gbs", "bus_gbs")
    header = ["", "bf16 TFLOP/s", "f32 TFLOP/s", "f64 TFLOP/s", "memory GB/s", "pinned host to device GB/s"]
    return table(header, [[f"{ceilings['device']}, PyTorch {ceilings['torch']}", *(number(ceilings[key]) for key in keys)]])


def phases_table(quantflow, ceilings, flops, weights):
    """quantflow's operators; the whole run against the sum of what each operator would take at its ceiling; weights over the bus."""

    def row(name, seconds, flop, ceiling):
        achieved = flop / seconds / 1e12 if seconds else 0
        share = f"{achieved / ceiling:.1%}" if ceiling and achieved else "-"
        return [name, number(seconds), number(flop, 1e12), number(achieved), number(ceiling), share]

    bus = ceilings.get("bus_gbs")
    limits = {name: ceilings[key if bus else key.replace("bf16", "f32")] for name, key in CEILINGS.items()} if ceilings else {}
    rows = []
    for operator, seconds in sorted(quantflow["operators"].items(), key=lambda item: -item[1]):
        rows.append(row(operator, seconds, flops.get(operator, 0), limits.get(operator)))
    elapsed, total = quantflow["elapsed_seconds"], sum(flops.values())
    floor = sum(flop / 1e12 / limits[operator] for operator, flop in flops.items()) if limits else 0
    rows.append(row("whole run, elapsed", elapsed, total, total / 1e12 / floor if floor else None))
    header = ["quantflow", "seconds", "TFLOP", "TFLOP/s", "ceiling", "share"]
    streamed = f"Weights of the blocks: {number(weights, 1e9)} GB, {number(weights / elapsed, 1e9)} GB/s; the bus: {number(bus)} GB/s."
    return table(header, rows) + f"\n\nAll work at its ceilings: {number(floor)} s. {streamed}"


def peer_seconds(result, layers):
    """Load, quantize for all blocks, save."""
    load, quantize, save = (result["seconds"][phase] for phase in ("load", "quantize", "save"))
    block = result.get("block_seconds", quantize / result["layers"])
    return load, quantize + (layers - result["layers"]) * block, save


def programs_table(results, layers):
    header = ["", "blocks run", "load s", "quantize s", "save s", "all s", "/ quantflow"]
    header += ["device GB", "by nvidia-smi", "/ quantflow", "host GB"]
    ours = results.get("quantflow", {})
    ours_device = ours.get("smi_bytes") or ours.get("peak_device_bytes")
    rows = []
    for name in PARTS[1:]:
        result = results.get(name)
        if result is None:
            continue
        title = TITLES.get(name, name)
        if "error" in result:
            rows.append([f"{title}: {result['error']}".replace("|", "/"), *["-"] * 10])
            continue
        if name in OURS:
            times, seconds = ["-", "-", "-"], result["elapsed_seconds"]
        else:
            title += f", {result['version']}"
            phases = peer_seconds(result, layers)
            times, seconds = [number(phase) for phase in phases], sum(phases)
        device = result.get("smi_bytes") or result["peak_device_bytes"]
        ratio = number(seconds, ours["elapsed_seconds"]) if "elapsed_seconds" in ours else "-"
        device_ratio = number(device, ours_device) if ours_device else "-"
        memory = [number(result["peak_device_bytes"], 1e9), number(result["smi_bytes"], 1e9), device_ratio, number(result["host_bytes"], 1e9)]
        rows.append([title, f"{result.get('layers', layers)} of {layers}", *times, number(seconds), ratio, *memory])
    details = []
    for name, result in results.items():
        if isinstance(result, dict) and result.get("detail"):
            spent = ", ".join(f"{phase} {number(seconds)}" for phase, seconds in result["detail"].items())
            details.append(f"\n\nSeconds within quantize, {name}, {result['layers']} blocks: {spent}.")
    return table(header, rows) + "".join(details)


def report(results, config, a):
    """All tables, as markdown."""
    layers = config["num_hidden_layers"]
    head = f"{a.shape}{', tiny' * a.tiny}, {layers} blocks, {a.sequences} x {a.length:,} tokens, W4 g128, --device {a.device}"
    tables = [head]
    ceilings = results.get("ceilings", {})
    if "error" in ceilings:
        tables.append(f"ceilings: {ceilings.pop('error')}")
        ceilings = {}
    if ceilings:
        tables.append(ceilings_table(ceilings))
    if "operators" in results.get("quantflow", {}):
        flops = work(config, a.sequences, a.length)
        tables.append(phases_table(results["quantflow"], ceilings, flops, weight_bytes(config)))
    tables.append(programs_table(results, layers))
    return "\n\n".join(tables) + "\n"


def measure(part, a, results):
    if part == "ceilings":
        return child([sys.executable, HERE / "ceilings.py", "--device", a.device], a)
    return measure_quantflow(a, part, results) if part in OURS else measure_peer(a, part)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--quantflow", type=pathlib.Path, default=HERE.parent.parent / "target/release/quantflow")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--layers", type=int, help="blocks; default: all")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small widths, to try the script")
    parser.add_argument("--peer-layers", type=int, nargs="+", help="blocks that the peers are run on, one number or two; default: all")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all, and the rendering if a peer fails")
    parser.add_argument("--timeout", type=int, default=3600, help="seconds that a program may take")
    parser.add_argument("--flags", default="", help="further flags of quantflow")
    a = parser.parse_args()
    # so that the program that is being measured is ended, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    config = shape_config(a.shape, a.layers, a.tiny)
    a.layers = config["num_hidden_layers"]
    a.folder, a.quantflow = a.folder.resolve(), a.quantflow.resolve()
    a.folder.mkdir(parents=True, exist_ok=True)
    kept = a.folder / f"{a.shape}-{a.layers}-{a.sequences}x{a.length}{'-tiny' * a.tiny}-{a.device}.json"
    results = json.loads(kept.read_text()) if a.parts and kept.exists() else {}
    for part in a.parts or [part for part in PARTS if part not in ("least", "half") or a.device == "cuda"]:
        peers_ran = all("error" not in results[peer] for peer in PEERS if peer in results)
        if part == "rendering" and not a.parts and peers_ran:
            continue
        results[part] = measure(part, a, results)
        kept.write_text(json.dumps(results, indent=1))
        print(f"{part}: {results[part].get('error', 'done')}", file=sys.stderr, flush=True)
    text = report(results, config, a)
    kept.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
