"""Writes a Llama-shaped checkpoint of random bf16 weights, for measurements of memory and speed: no weights to download, any size.

    python benches/make_llama.py FOLDER [--layers 32 --hidden 4096 --intermediate 11008 --heads 32 --kv-heads 32 --vocab 32000]

The defaults are Llama-2-7B's shape, 13.5 GB. A tensor is written as it is drawn: the script needs little memory. Weights are normal, with
the deviation 1 / sqrt(width) that keeps activations at the size of their inputs; the output has no tokenizer, so calibrate with --calibration-tokens
(`calibration.npy`, written beside it).
"""

import argparse
import json
import pathlib

import numpy as np

SHARD_BYTES = 4 << 30
CHUNK = 1 << 24


def tensors(a):
    """Name and shape of every tensor, in order."""
    head_dim = a.hidden // a.heads
    yield "model.embed_tokens.weight", (a.vocab, a.hidden)
    for i in range(a.layers):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", (a.hidden,)
        yield layer + "post_attention_layernorm.weight", (a.hidden,)
        yield layer + "self_attn.q_proj.weight", (a.hidden, a.hidden)
        yield layer + "self_attn.k_proj.weight", (a.kv_heads * head_dim, a.hidden)
        yield layer + "self_attn.v_proj.weight", (a.kv_heads * head_dim, a.hidden)
        yield layer + "self_attn.o_proj.weight", (a.hidden, a.hidden)
        yield layer + "mlp.gate_proj.weight", (a.intermediate, a.hidden)
        yield layer + "mlp.up_proj.weight", (a.intermediate, a.hidden)
        yield layer + "mlp.down_proj.weight", (a.hidden, a.intermediate)
    yield "model.norm.weight", (a.hidden,)
    yield "lm_head.weight", (a.vocab, a.hidden)


def bf16(values):
    """The upper half of an f32, rounded to nearest."""
    return ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


def write(path, shard, values):
    header, end = {}, 0
    for name, shape in shard:
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shard:
            left = int(np.prod(shape))
            while left:
                n = min(left, CHUNK)
                left -= n
                file.write(values(name, shape, n).tobytes())
    return {name: path.name for name, _ in shard}, end


def save(folder, config, tensors, values):
    """A checkpoint of the named shapes; `values(name, shape, n)` gives the next n values of a tensor as bf16 bits."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    shards, filled = [[]], 0
    for name, shape in tensors:
        size = 2 * int(np.prod(shape))
        if filled and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += size
    index, total = {}, 0
    for i, shard in enumerate(shards, 1):
        names, size = write(folder / f"model-{i:05}-of-{len(shards):05}.safetensors", shard, values)
        index |= names
        total += size
    content = dict(metadata=dict(total_size=total), weight_map=index)
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    print(f"{total / 1e9:.1f} GB in {len(shards)} files")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    sizes = dict(layers=32, hidden=4096, intermediate=11008, heads=32, kv_heads=32, vocab=32000, sequences=4, length=512)
    for name, value in sizes.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    a = parser.parse_args()
    config = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        hidden_size=a.hidden,
        intermediate_size=a.intermediate,
        num_hidden_layers=a.layers,
        num_attention_heads=a.heads,
        num_key_value_heads=a.kv_heads,
        vocab_size=a.vocab,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        hidden_act="silu",
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
    )
    rng = np.random.default_rng(0)

    def values(_, shape, n):
        if len(shape) == 1:
            return bf16(np.ones(n, np.float32))
        return bf16(rng.standard_normal(n, np.float32) * np.float32(shape[1] ** -0.5))

    save(a.folder, config, tensors(a), values)
    tokens = rng.integers(0, a.vocab, (a.sequences, a.length), dtype=np.int32)
    np.save(a.folder / "calibration.npy", tokens)


if __name__ == "__main__":
    main()
