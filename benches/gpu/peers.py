"""Quantizes a checkpoint with one of the peers: W4, groups of 128, symmetric. Prints one line of JSON; run.py runs it, each peer in a process of its
own.

    python benches/gpu/peers.py GPTQModel|llm-compressor|rendering MODEL -o OUT --calibration-tokens FILE.npy [--device cuda|cpu]

JSON: `seconds` by phase (load, quantize, save), without the loading of Python modules; `detail`, seconds within quantize, where known;
`peak_device_bytes`, PyTorch's max_memory_allocated; `version`. Both programs run with their defaults, one sequence at a time, and order columns as
they do by default (no g_idx at run time); of a mixture, experts see the tokens that are sent to them. `rendering` is gptq_torch.py.
"""

import argparse
import contextlib
import importlib.metadata
import json
import pathlib
import time

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


class Clock:
    """Wall clock by phase; the device's work is waited for."""

    def __init__(self, device):
        self.device, self.seconds = device, {}

    @contextlib.contextmanager
    def __call__(self, phase):
        begin = time.perf_counter()
        yield
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0) + time.perf_counter() - begin


def is_mixture(model):
    return "num_experts" in json.loads((model / "config.json").read_text())


def import_model(model):
    """transformers imports an architecture's modules when its first model is made: an empty one, before the clock runs."""
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))


def gptqmodel(a, tokens, clock):
    from gptqmodel import GPTQModel, QuantizeConfig

    with clock("load"):
        config = QuantizeConfig(bits=4, group_size=128, sym=True, desc_act=False, device=a.device)
        model = GPTQModel.load(str(a.model), config)
    with clock("quantize"):
        rows = [dict(input_ids=row[None], attention_mask=torch.ones_like(row[None])) for row in tokens]
        model.quantize(rows, batch_size=1)
    with clock("save"):
        model.save(str(a.output))


def llm_compressor(a, tokens, clock):
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe
    from llmcompressor.modifiers.gptq import GPTQModifier

    with clock("load"), load_quantizable_moe() if is_mixture(a.model) else contextlib.nullcontext():
        model = AutoModelForCausalLM.from_pretrained(a.model, dtype="auto")
    with clock("quantize"):
        rows = [dict(input_ids=row, attention_mask=torch.ones_like(row)) for row in tokens]
        oneshot(
            model=model,
            processor=AutoTokenizer.from_pretrained(a.model),
            dataset=torch.utils.data.DataLoader(rows, batch_size=1),
            recipe=GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head", r"re:.*mlp\.gate$"]),
            moe_calibrate_all_experts=False,
        )
    with clock("save"):
        model.save_pretrained(a.output, save_compressed=True)


def rendering(a, tokens, clock):
    import gptq_torch
    from safetensors.torch import save_file

    if is_mixture(a.model):
        raise SystemExit("the rendering has no mixtures of experts")
    with clock("load"):
        model = AutoModelForCausalLM.from_pretrained(a.model, dtype="auto")
    with clock("quantize"):
        detail = Clock(a.device)
        packed = gptq_torch.quantize(model, tokens, a.device, detail)
    with clock("save"):
        kept = {name: tensor for name, tensor in model.state_dict().items() if name.replace(".weight", ".weight_packed") not in packed}
        a.output.mkdir(parents=True)
        save_file(packed | kept, a.output / "model.safetensors")
    return detail.seconds


PEERS = {"GPTQModel": (gptqmodel, "gptqmodel"), "llm-compressor": (llm_compressor, "llmcompressor"), "rendering": (rendering, "torch")}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("-o", "--output", type=pathlib.Path, required=True)
    parser.add_argument("--calibration-tokens", type=pathlib.Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    a = parser.parse_args()
    peer, package = PEERS[a.peer]
    tokens = torch.from_numpy(np.load(a.calibration_tokens).astype(np.int64))
    import_model(a.model)
    clock = Clock(a.device)
    detail = peer(a, tokens, clock)
    peak = torch.cuda.max_memory_allocated() if a.device == "cuda" else 0
    result = dict(seconds=clock.seconds, detail=detail, peak_device_bytes=peak, version=f"{package} {importlib.metadata.version(package)}")
    print("\n" + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
