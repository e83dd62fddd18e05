#!/usr/bin/env python3
"""Quantize a checkpoint with quantflow and load every result with its real reader.

    check.py QUANTFLOW [--model DIR] [--data DIR] [--work DIR] [--only REGEX]

compressed-tensors files are loaded by transformers, GPTQ files by GPTQModel, both on the CPU. Of each result is checked:
  structure   every source tensor is there unchanged or replaced by its packed parts, nothing else was added, the vision tower is
              byte-identical, and every name that the config leaves alone is a module of the model
  weights     the reader's own unpacking, then float32 arithmetic: logits equal `quantflow logits` up to F32_NOISE
  loaded      the reader's own arithmetic in 16 bits: logits equal up to HALF_NOISE
  perplexity  `quantflow evaluate` agrees with the reader's weights
The same of outputs whose source is quantized: 8-bit floats in blocks (DeepSeek-V3's layout; transformers reads it, too), and 4-bit integers
that compressed-tensors' own compressor packed. There, our logits of the source itself are compared, too.
Top-1 has to be identical wherever the two largest of our logits are further apart than both could move.
The last line is `N passed, N failed`; the exit status is 1 if any failed. Versions: requirements.txt.
"""
import argparse
import collections
import copy
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # GPTQModel compiles its unpacking; that needs a C compiler
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

# Same weights, float32 on both sides, sums in another order. On tiny-vl, logits up to 22: float32 is 3e-5 from float64. Measured there too, in
# one up_proj: one code off by one moves logits by 2.5e-3, one scale off by 2 % by 2.1e-3, one zero point off by one by 0.027, two columns
# swapped 0.5, all zero points off by one 1.5. So slips of layout are far above this, and single values only just, not at every place.
F32_NOISE = 5e-4
# The readers round weights to 16 bits (2^-9 relative in bf16, 2^-12 in f16); GPTQModel also computes in f16. Seen on tiny-vl: 0.03.
HALF_NOISE = 0.15
# Relative difference of perplexities from logits that agree up to F32_NOISE.
PERPLEXITY_NOISE = 1e-3
WINDOWS, LENGTH = 4, 128

# bits, group size (-1: one scale a row), symmetric
SCHEMES = [(bits, 64, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]
SCHEMES += [(4, 128, True), (4, -1, True), (4, -1, False)]
# Version 1 cannot hold a zero point of 0, and its readers refuse or misread asymmetric files: quantflow refuses to write them.
CASES = [("compressed-tensors", *s) for s in SCHEMES] + [("gptq-v2", *s) for s in SCHEMES]
CASES += [("gptq", *s) for s in SCHEMES if s[2]]

# What stands in a file in place of `weight`.
PARTS = {
    "compressed-tensors": {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point"},
    "gptq": {"qweight", "qzeros", "scales", "g_idx"},
}


class Failed(Exception):
    """A check did not hold."""


def need(condition, message):
    if not condition:
        raise Failed(message)


class Shards:
    """The tensors of a checkpoint folder, by name."""

    def __init__(self, folder):
        self.files = [safe_open(f, "pt") for f in sorted(Path(folder).glob("*.safetensors"))]
        self.at = {name: file for file in self.files for name in file.keys()}
        need(self.at, f"no tensors in {folder}")
        need(len(self.at) == sum(len(list(f.keys())) for f in self.files), "a tensor is in two shards")

    def get(self, name):
        return self.at[name].get_tensor(name)

    def same(self, other, name):
        a, b = self.get(name), other.get(name)
        return a.dtype == b.dtype and a.shape == b.shape and bool(
            torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)))


def run(command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def quantflow(args, *command):
    code, out, err = run([args.quantflow, *command])
    need(code == 0, f"quantflow {command[0]} ended with {code}: {err.strip()[-500:]}")
    return out


def auto_class(folder):
    """Image-text models have their own class."""
    config = AutoConfig.from_pretrained(folder)
    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


@torch.no_grad()
def logits(model, tokens):
    ids = torch.from_numpy(tokens.astype(np.int64))
    return torch.cat([model(input_ids=row[None], use_cache=False).logits.float() for row in ids])


def compare(what, ours, theirs, noise):
    """The largest difference, as text; raises where it passes `noise` or top-1 differs beyond it."""
    need(ours.shape == theirs.shape, f"{what}: shapes {tuple(ours.shape)} and {tuple(theirs.shape)}")
    need(bool(torch.isfinite(theirs).all()) and bool(torch.isfinite(ours).all()), f"{what}: logits are not finite")
    worst = (ours - theirs).abs().max().item()
    top = ours.topk(2).values
    clear = top[..., 0] - top[..., 1] > 2 * noise  # either logit may move by the noise
    equal = ours.argmax(-1) == theirs.argmax(-1)
    wrong = int((clear & ~equal).sum())
    need(wrong == 0, f"{what}: top-1 differs at {wrong} of {int(clear.sum())} clear positions, logits by {worst:.3g}")
    need(worst <= noise, f"{what}: logits differ by {worst:.3g}, more than {noise}")
    return f"{what} {worst:.2g} ({int(clear.sum())}/{clear.numel()} clear)"


def perplexity(scores, tokens):
    target = torch.from_numpy(tokens.astype(np.int64))[:, 1:]
    return torch.nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1).double(), target.flatten()).exp().item()


def quantized_linears(out, family):
    mark = ".weight_packed" if family == "compressed-tensors" else ".qweight"
    return {name.removesuffix(mark) for name in out.at if name.endswith(mark)}


def check_structure(source, out, linears, family, config, modules):
    for name in source.at:
        linear = name.removesuffix(".weight")
        if linear in linears and name.endswith(".weight"):
            need(name not in out.at, f"{name} is there both plain and packed")
        else:
            need(name in out.at, f"{name} is missing")
            need(source.same(out, name), f"{name} was changed")
    for name in out.at:
        linear, _, part = name.rpartition(".")
        packed = linear in linears and part in PARTS[family]
        need(packed or name in source.at, f"{name} is in no source")
    for linear in linears:
        need(f"{linear}.weight" in source.at, f"{linear} was packed, but has no source")
        need("visual" not in linear and "vision" not in linear, f"{linear} of the vision tower was packed")
    vision = sum("visual" in name or "vision" in name for name in source.at)
    if family == "compressed-tensors":
        for name in config["ignore"]:
            need(name in modules, f"ignore names {name}, which is no module")
            need(name not in linears, f"ignore names {name}, which is packed")
        left = {n for n, m in modules.items() if isinstance(m, torch.nn.Linear)} - linears
        need(left <= set(config["ignore"]), f"not in ignore: {sorted(left - set(config['ignore']))[:3]}")
    for pattern in config.get("dynamic", {}):
        fits = [n for n in modules if re.match(pattern[2:], n)]
        need(fits, f"dynamic has {pattern}, which fits no module")
        need(not pattern.startswith("-:") or not linears & set(fits), f"dynamic leaves out packed linears: {pattern}")
    return f"structure ({len(linears)} packed, {vision} vision tensors identical)"


def unpack_compressed_tensors(out, linears, config):
    """Weights by compressed-tensors' own decompress, in float32, by the scheme that its own matching picks."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_targets

    parsed = QuantizationConfig.model_validate(config)
    schemes = {target: scheme for scheme in parsed.config_groups.values() for target in scheme.targets}
    probe = torch.nn.Linear(1, 1)
    weights = {}
    for linear in linears:
        scheme = schemes[match_targets(linear, probe, schemes)[0]]
        state = {n.rpartition(".")[2]: out.get(n) for n in out.at if n.rpartition(".")[0] == linear and not n.endswith("bias")}
        state["weight_scale"] = state["weight_scale"].float()  # the result has the dtype of the scales
        compressor = BaseCompressor.get_value_from_registry(scheme.format or parsed.format)
        weights[f"{linear}.weight"] = compressor.decompress(state, scheme)["weight"]
    return weights


def load_compressed_tensors(folder, config):
    from transformers import CompressedTensorsConfig

    # transformers 5.23 with compressed-tensors 0.20 builds an unpacked zero point for its compressed modules and refuses
    # packed ones, also llm-compressor's own; the other public route unpacks while loading, with weights rounded to the scales' dtype.
    symmetric = all(group["weights"]["symmetric"] for group in config["config_groups"].values())
    how = {} if symmetric else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    return auto_class(folder).from_pretrained(folder, dtype=torch.float32, **how).eval()


def load_gptq(folder):
    from gptqmodel import BACKEND, GPTQModel

    # Not BACKEND.AUTO: its fused CPU kernel (TorchFusedLinear, taken for 4 bits with one scale a row) drops the zero points.
    return GPTQModel.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model.eval()


def unpack_gptq(model):
    """Weights by GPTQModel's own unpacking, in float32."""
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseQuantLinear):
            module.scales.data = module.scales.data.float()  # the result has the dtype of the scales
            module.clear_weight_cache()
            weights[f"{name}.weight"] = module.dequantize_weight().float().T.contiguous()
    return weights


def our_logits(args, folder):
    quantflow(args, "logits", folder, "--tokens", args.work / "tokens.npy", "-o", args.work / "logits.safetensors")
    return load_file(args.work / "logits.safetensors")["logits"]


def with_weights(original, weights):
    """A copy of the model that has these weights."""
    dense = copy.deepcopy(original)
    parameters = dict(dense.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            need(parameters[name].shape == weight.shape, f"{name} is {tuple(weight.shape)}")
            parameters[name].copy_(weight)
    return dense


def write_floats(state, chosen):
    """8-bit floats, a scale for each block of 128 x 128, as DeepSeek-V3's `weight_dequant` reads them."""
    parts, values = {}, {}
    for name in chosen:
        rows, columns = (side // 128 for side in state[name].shape)
        blocks = state[name].float().reshape(rows, 128, columns, 128)
        scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        parts |= {name: codes.reshape(state[name].shape), f"{name}_scale_inv": scale}
        values[name] = (codes.float() * scale[:, None, :, None]).reshape(state[name].shape)
    return parts, values, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def write_integers(state, chosen):
    """4-bit integers in groups of 64, packed and unpacked by compressed-tensors."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor as packed
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=64)
    scheme = QuantizationScheme(targets=[r"re:.*layers\..*_proj$"], weights=weights, format="pack-quantized")
    config = QuantizationConfig(config_groups={"group_0": scheme}, format="pack-quantized",
                                quantization_status="compressed", ignore=["lm_head", "re:.*visual.*"])
    parts, values = {}, {}
    for name in chosen:
        weight = state[name].float()
        scale = (weight.unflatten(1, (-1, 64)).abs().amax(2) / 7.5).bfloat16()
        made = packed.compress({"weight": weight, "weight_scale": scale.float()}, scheme)
        values[name] = packed.decompress(made, scheme)["weight"]
        made["weight_scale"] = scale
        parts |= {name.removesuffix("weight") + part: tensor for part, tensor in made.items()}
    return parts, values, json.loads(config.model_dump_json())


def check_source(write, args, tokens, original, plain):
    """A quantized source: evaluated, loaded by its reader, quantized anew with one layer left alone."""
    from safetensors.torch import save_file

    folder, out_dir = args.work / write.__name__, args.work / f"from-{write.__name__}"
    folder.mkdir()
    for file in args.model.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    state = {name: plain.get(name) for name in plain.at}
    chosen = [name for name in state if "language_model.layers" in name and name.endswith("_proj.weight")]
    parts, values, quantization = write(state, chosen)
    kept = {name: tensor for name, tensor in state.items() if name not in values}
    save_file({k: v.contiguous() for k, v in (kept | parts).items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))

    dense = with_weights(original, values)
    reference = logits(dense, tokens)
    notes = [compare("source", our_logits(args, folder), reference, F32_NOISE)]
    if quantization["quant_method"] == "fp8":
        # On a CPU, transformers gives weights back in bf16, whatever it is asked for.
        loaded = dict(auto_class(folder).from_pretrained(folder, dtype=torch.bfloat16).named_parameters())
        theirs = {name: loaded[name].detach().float() for name in chosen}
        for name, weight in theirs.items():
            need(torch.equal(weight, values[name].bfloat16().float()), f"{name}: the reader has other values")
        loaded = with_weights(original, theirs)
    else:
        loaded = load_compressed_tensors(folder, quantization)
    notes.append(compare("source loaded", reference, logits(loaded, tokens), HALF_NOISE))
    del loaded

    quantflow(args, "quantize", folder, "-o", out_dir, "--calibration", args.data / "text_calib.jsonl",
              "--samples", 16, "--length", 256, "--group-size", 64, "--ignore", r"layers\.1\.")
    report = json.loads(quantflow(args, "verify", out_dir, "--source", folder, "--json"))
    need(not report["problems"], f"verify: {report['problems'][:3]}")
    out = Shards(out_dir)
    linears = quantized_linears(out, "compressed-tensors")
    left = {name for name in chosen if name.removesuffix(".weight") not in linears}
    need(len(left) == report["dequantized"] == 7, f"{len(left)} weights of layer 1 were left alone")
    for name in left:
        need(torch.equal(out.get(name), values[name].bfloat16()), f"{name} is not the source's value in bf16")
        values[name] = out.get(name).float()
    for name in out.at:
        linear, _, part = name.rpartition(".")
        need(name in state or (linear in linears and part in PARTS["compressed-tensors"]), f"{name} is left over")
    config = json.loads((out_dir / "config.json").read_text())["quantization_config"]
    modules = dict(original.named_modules())
    unnamed = {n for n, m in modules.items() if isinstance(m, torch.nn.Linear)} - linears - set(config["ignore"])
    need(not unnamed, f"not in ignore: {sorted(unnamed)[:3]}")
    notes.append(f"{len(linears)} packed, {len(left)} dequantized")
    notes += against_reader(out_dir, out, linears, config, args, tokens, with_weights(original, values), folder,
                            perplexity(reference, tokens))
    return ", ".join(notes)


def check(case, args, tokens, original, source, reference):
    form, bits, group, symmetric = case
    family = "gptq" if form.startswith("gptq") else form
    out_dir = args.work / f"{form}-{bits}-{group}-{'sym' if symmetric else 'asym'}"
    quantflow(args, "quantize", args.model, "-o", out_dir, "--calibration", args.data / "text_calib.jsonl",
              "--samples", 16, "--length", 256, "--format", form, "--bits", bits, "--group-size", group,
              "--symmetric" if symmetric else "--asymmetric")
    out = Shards(out_dir)
    config = json.loads((out_dir / "config.json").read_text())["quantization_config"]
    linears = quantized_linears(out, family)
    need(linears, "nothing was packed")
    notes = [check_structure(source, out, linears, family, config, dict(original.named_modules()))]
    if family == "gptq":
        need(json.loads((out_dir / "quantize_config.json").read_text()) == config, "quantize_config.json is another config")
    notes += against_reader(out_dir, out, linears, config, args, tokens, original, args.model, reference)
    return ", ".join(notes)


def against_reader(out_dir, out, linears, config, args, tokens, original, reference_dir, reference):
    """Our logits and perplexity of an output against its reader's; `original` has all weights that are not packed."""
    family = config["quant_method"]
    ours = our_logits(args, out_dir)
    loaded = load_gptq(out_dir) if family == "gptq" else load_compressed_tensors(out_dir, config)
    # GPTQModel keeps other tensors in f16 too, transformers in f32.
    theirs = logits(loaded, tokens)
    weights = unpack_gptq(loaded) if family == "gptq" else unpack_compressed_tensors(out, linears, config)
    del loaded
    need({f"{linear}.weight" for linear in linears} == set(weights), "the reader unpacked other linears than are packed")
    dense = with_weights(original, weights)
    exact = logits(dense, tokens)
    notes = [compare("weights", ours, exact, F32_NOISE), compare("loaded", ours, theirs, HALF_NOISE)]

    report = json.loads(quantflow(args, "evaluate", out_dir, "--reference", reference_dir,
                                  "--tokens", args.work / "tokens.npy", "--json"))
    for key, want in (("perplexity", perplexity(exact, tokens)), ("reference_perplexity", reference)):
        need(abs(report[key] / want - 1) < PERPLEXITY_NOISE, f"{key}: evaluate says {report[key]:.4f}, the reader {want:.4f}")
    notes.append(f"perplexity {report['perplexity']:.2f} of {report['reference_perplexity']:.2f}")
    del dense
    gc.collect()
    return notes


def check_refusal(args):
    """Asymmetric version 1 is refused, with a way out, and leaves no checkpoint behind."""
    out = args.work / "gptq-asymmetric"
    code, _, err = run([args.quantflow, "quantize", args.model, "-o", out, "--calibration", args.data / "text_calib.jsonl",
                        "--samples", 16, "--length", 256, "--format", "gptq", "--bits", 4, "--group-size", 64, "--asymmetric"])
    need(code != 0, "it was written")
    need("gptq-v2" in err, f"the message names no way out: {err.strip()[-300:]}")
    need(not list(out.glob("*.safetensors")), "it left tensors behind")
    return f"exit status {code}"


def main():
    here = Path(__file__).resolve().parent
    fixture = here.parent / "fixtures" / "tiny-vl"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quantflow", type=lambda path: Path(path).resolve())
    parser.add_argument("--model", type=Path, default=fixture / "model")
    parser.add_argument("--data", type=Path, default=fixture / "data")
    parser.add_argument("--work", type=Path, help="keep the outputs here")
    parser.add_argument("--only", default="", help="regular expression on a case's name")
    args = parser.parse_args()
    temporary = None
    if args.work is None:
        temporary = tempfile.TemporaryDirectory(prefix="quantflow-interop-")
        args.work = Path(temporary.name)
    args.work.mkdir(parents=True, exist_ok=True)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = [json.loads(line)["text"] for line in (args.data / "text_eval.jsonl").open()]
    windows = [ids[:LENGTH] for ids in (tokenizer(row)["input_ids"] for row in rows) if len(ids) >= LENGTH][:WINDOWS]
    tokens = np.array(windows, dtype=np.int32)
    np.save(args.work / "tokens.npy", tokens)
    source = Shards(args.model)
    original = auto_class(args.model).from_pretrained(args.model, dtype=torch.float32).eval()

    reference = perplexity(logits(original, tokens), tokens)

    checks = {f"{form} {bits} bit, group {group}, {'symmetric' if sym else 'asymmetric'}":
              lambda case=(form, bits, group, sym): check(case, args, tokens, original, source, reference)
              for form, bits, group, sym in CASES}
    for write in (write_floats, write_integers):
        checks[f"source: {write.__name__}"] = lambda write=write: check_source(write, args, tokens, original, source)
    checks["gptq refuses asymmetric"] = lambda: check_refusal(args)
    count = collections.Counter()
    for name, todo in checks.items():
        if not re.search(args.only, name):
            continue
        try:
            note, ok = todo(), True
        except Failed as error:
            note, ok = str(error), False
        except Exception as error:  # a reader's own error is a finding, and the other cases still count
            note, ok = f"{type(error).__name__}: {error}", False
        count[ok] += 1
        print(f"{'ok' if ok else 'FAILED':7}{name}: {note}", flush=True)
    if temporary:
        temporary.cleanup()
    print(f"{count[True]} passed, {count[False]} failed", flush=True)
    return 1 if count[False] or not count[True] else 0


if __name__ == "__main__":
    sys.exit(main())
