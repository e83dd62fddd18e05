"""Writes a checkpoint of a real model's shape with random bf16 weights, and tokens to calibrate it with.

    python benches/make_shape.py FOLDER --shape llama-3-8b|qwen3-8b|qwen3-30b-a3b [--layers N] [--sequences 128 --length 2048] [--tiny]

The configs are those of tests/fixtures/configs. --layers cuts the number of blocks (of Qwen3-30B-A3B's 61 GB, one block is 1.3 GB); --tiny shrinks
all widths, for tests. Weights have the config's deviation (0.02), those that write to the residual 1 / sqrt(2 blocks) of it, so that activations keep
their size over all blocks; norms are 1. Values come out of one pool of random numbers, over and over: writing takes as long as the disk does. The
pool's length is a prime, so that neither rows nor blocks repeat. Beside the weights: `calibration.npy`, int32, and a tokenizer of one word, for
programs that load none without. Needs numpy alone.
"""

import argparse
import json
import pathlib

import numpy as np
from make_llama import bf16, save

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "tests/fixtures/configs"
SHAPES = {"llama-3-8b": "llama-3.1-8b", "qwen3-8b": "qwen3-8b", "qwen3-30b-a3b": "qwen3-30b-a3b"}
POOL = (1 << 24) + 43
TINY = dict(hidden_size=256, intermediate_size=512, head_dim=64, num_attention_heads=4, num_key_value_heads=2, vocab_size=1000)
TINY_MIXTURE = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128)
# One word, which every text is; pads and ends with it, too.
TOKENIZER = dict(version="1.0", added_tokens=[], pre_tokenizer=dict(type="WhitespaceSplit"))
TOKENIZER |= dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
TOKENIZER["model"] = dict(type="WordLevel", vocab=dict(a=0), unk_token="a")
TOKENIZER_CONFIG = dict(tokenizer_class="PreTrainedTokenizerFast", unk_token="a", pad_token="a", eos_token="a")


def shape_config(shape, layers=None, tiny=False):
    """The config.json of a named shape, cut to `layers` blocks."""
    config = json.loads((CONFIGS / f"{SHAPES[shape]}.json").read_text())
    if tiny:
        config |= TINY | (TINY_MIXTURE if "num_experts" in config else {})
        config |= dict.fromkeys(("bos_token_id", "eos_token_id"), 0)
    if layers:
        config["num_hidden_layers"] = layers
    return config


def linears(config):
    """Name within a block, outputs, inputs of every linear; a mixture's router is not one: it is never quantized."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    for name, count in ("q", heads), ("k", config["num_key_value_heads"]), ("v", config["num_key_value_heads"]):
        yield f"self_attn.{name}_proj", count * head_dim, hidden
    yield "self_attn.o_proj", hidden, heads * head_dim
    experts = [f"mlp.experts.{i}." for i in range(config.get("num_experts", 0))]
    width = config["moe_intermediate_size"] if experts else config["intermediate_size"]
    for mlp in experts or ["mlp."]:
        yield mlp + "gate_proj", width, hidden
        yield mlp + "up_proj", width, hidden
        yield mlp + "down_proj", hidden, width


def tensors(config):
    """Name and shape of every tensor, in order."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for norm in "input_layernorm", "post_attention_layernorm":
            yield f"{layer}{norm}.weight", (hidden,)
        if config["model_type"].startswith("qwen3"):
            for norm in "q_norm", "k_norm":
                yield f"{layer}self_attn.{norm}.weight", (config["head_dim"],)
        if "num_experts" in config:
            yield layer + "mlp.gate.weight", (config["num_experts"], hidden)
        for name, *shape in linears(config):
            yield f"{layer}{name}.weight", tuple(shape)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


class Pool:
    """Normal numbers of the wanted deviation, over and over; each tensor goes on where the one before has ended."""

    def __init__(self, config):
        self.normal = np.random.default_rng(0).standard_normal(POOL, np.float32)
        self.deviation = config["initializer_range"]
        self.residual = (2 * config["num_hidden_layers"]) ** -0.5
        self.scaled, self.place = {}, 0

    def values(self, name, shape, n):
        """The next n values of a tensor, as bf16 bits."""
        if len(shape) == 1:
            return bf16(np.ones(n, np.float32))
        to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        deviation = self.deviation * (self.residual if to_residual else 1)
        if deviation not in self.scaled:
            self.scaled[deviation] = bf16(self.normal * np.float32(deviation))
        begin = self.place
        self.place = (begin + n) % POOL
        pool = self.scaled[deviation]
        return pool[begin : begin + n] if begin + n <= POOL else np.concatenate([pool[begin:], pool[: self.place]])


def make(folder, config, sequences, length):
    save(folder, config, tensors(config), Pool(config).values)
    tokens = np.random.default_rng(1).integers(0, config["vocab_size"], (sequences, length), dtype=np.int32)
    np.save(folder / "calibration.npy", tokens)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--tiny", action="store_true")
    a = parser.parse_args()
    make(a.folder, shape_config(a.shape, a.layers, a.tiny), a.sequences, a.length)


if __name__ == "__main__":
    main()
