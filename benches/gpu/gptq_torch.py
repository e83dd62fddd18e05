"""The loop that GPTQModel and llm-compressor share, rendered in PyTorch, for machines where neither can be installed. peers.py runs it.

Per block: a forward pass of all sequences, one at a time, with a hook on each linear that sums its own f32 Hessian (q, k and v share none, as in
llm-compressor); a Cholesky factor of the damped Hessian's inverse; GPTQ in blocks of 128 columns, groups of 128, symmetric, without act-order; then a
second forward pass with the quantized weights, to make the next block's inputs. Activations lie on the host between blocks, as llm-compressor keeps
them, and weights are on the device a block at a time. Where the programs differ, this takes what is fast: a block's columns are one Triton kernel,
and products are added in place. Dense models alone: transformers keeps a mixture's experts in one tensor, which both programs take apart first.
"""

import torch

BLOCK = 128
DAMP = 0.01


class Caught(Exception):
    """The first block was reached."""


def first_inputs(model, tokens, device):
    """The first block's input for each sequence, on the host, and the further arguments, which are the same for all."""
    decoder = model.model
    decoder.embed_tokens.to(device)
    decoder.rotary_emb.to(device)
    inputs, arguments = [], {}

    def catch(_, args, kwargs):
        inputs.append(args[0].cpu())
        arguments.update(kwargs)
        raise Caught

    hook = decoder.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for row in tokens:
        try:
            decoder(input_ids=row[None].to(device), use_cache=False)
        except Caught:
            pass
    hook.remove()
    decoder.embed_tokens.to("cpu")
    return inputs, arguments


def forward(block, x, arguments, device):
    out = block(x.to(device), **arguments)
    return out[0] if isinstance(out, tuple) else out


def capture(block, linears, inputs, arguments, device):
    """The Hessian of every linear, over all sequences."""
    hessians = {linear: torch.zeros(linear.in_features, linear.in_features, device=device) for linear in linears}

    def add(linear, args):
        x = args[0].flatten(0, -2).float()
        hessians[linear].addmm_(x.T, x)

    hooks = [linear.register_forward_pre_hook(add) for linear in linears]
    for x in inputs:
        forward(block, x, arguments, device)
    for hook in hooks:
        hook.remove()
    return hessians


def inverse_factor(hessian):
    """Upper Cholesky factor of the damped Hessian's inverse; inputs that were never seen get a diagonal of 1."""
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMP * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def quantize_columns(weight, factor, scale):
    """What columns_triton does, column by column."""
    weight, quantized, error = weight.clone(), torch.empty_like(weight), torch.empty_like(weight)
    for i in range(weight.shape[1]):
        quantized[:, i] = torch.floor(weight[:, i] / scale + 0.5).clamp(-8, 7) * scale
        error[:, i] = (weight[:, i] - quantized[:, i]) / factor[i, i]
        weight[:, i:] -= error[:, i : i + 1] * factor[i, i:]
    return quantized, error


def solve(weight, factor):
    """GPTQ over an f32 weight, in place; its scales, [rows, groups]."""
    columns = quantize_columns
    if weight.is_cuda:
        from columns_triton import quantize_columns as columns
    rows, width = weight.shape
    scales = weight.view(rows, -1, BLOCK).abs().amax(2).clamp(min=1e-8) / 7.5
    for group, begin in enumerate(range(0, width, BLOCK)):
        end = begin + BLOCK
        part, scale = factor[begin:end, begin:end].contiguous(), scales[:, group].contiguous()
        quantized, error = columns(weight[:, begin:end].contiguous(), part, scale)
        weight[:, begin:end] = quantized
        weight[:, end:] -= error @ factor[begin:end, end:]
    return scales


def pack(weight, scales):
    """Eight codes an i32, lowest first."""
    codes = (weight.view(*scales.shape, BLOCK) / scales[..., None]).round().to(torch.int32).flatten(1) + 8
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)
    return (codes.view(len(codes), -1, 8) << shifts).sum(2, dtype=torch.int32)


@torch.no_grad()
def quantize(model, tokens, device, clock):
    """Quantizes the blocks of a dense model that lies on the host; packed codes and scales by tensor name."""
    packed = {}
    with clock("embed"):
        inputs, arguments = first_inputs(model, tokens, device)
    for index, block in enumerate(model.model.layers):
        block.to(device)
        linears = {module: name for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)}
        with clock("calibrate"):
            hessians = capture(block, linears, inputs, arguments, device)
        with clock("solve"):
            for linear, name in linears.items():
                weight = linear.weight.float()
                scales = solve(weight, inverse_factor(hessians.pop(linear)))
                packed[f"model.layers.{index}.{name}.weight_packed"] = pack(weight, scales).cpu()
                packed[f"model.layers.{index}.{name}.weight_scale"] = scales.to(linear.weight.dtype).cpu()
                linear.weight.data = weight.to(linear.weight.dtype)
        with clock("propagate"):
            inputs = [forward(block, x, arguments, device).cpu() for x in inputs]
        block.to("cpu")
    return packed
