//! Operations of a block that candle does not have in a fast form: each a candle custom op whose CPU side is a kernel
//! of [`crate::numerics`], and whose CUDA side is one of `src/device/kernels/forward.cu`.

use super::spec::Activation;
use crate::device;
use crate::numerics::attention::{AttentionShape, attention as attention_kernel};
use crate::numerics::elementwise::{clamped_swiglu_gate, gelu_tanh_gate, silu_gate};
use crate::numerics::routing::add_gated_rows as add_gated_rows_kernel;
use candle_core::{CpuStorage, CustomOp3, DType, InplaceOp2, Layout, Result, Shape, Tensor};

#[cfg(feature = "cuda")]
use {
    crate::device::cuda::{self, Arg, Threads},
    candle_core::CudaStorage,
};

/// `gate = activation(gate) * up`, in place, both `[tokens, width]` f32.
pub fn multiply_gated(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<()> {
    gate.inplace_op2(up, &MultiplyGated(activation))
}

/// Causal attention of queries, keys and values: see [`crate::numerics::attention`], and [`crate::device::attention`], which takes them in
/// `precision`.
pub fn attention(
    [q, k, v]: [&Tensor; 3],
    sinks: Option<&[f32]>,
    shape: AttentionShape,
    precision: DType,
) -> Result<Tensor> {
    match q.device().is_cpu() && precision == DType::F32 {
        true => q.apply_op3_no_bwd(k, v, &Attention(shape, sinks)),
        false => device::attention::attention(q, k, v, sinks, shape, precision),
    }
}

/// `out[tokens[i]] += gates[i] * rows[i]`, in place: `out` is `[tokens, width]`, `rows` `[sent, width]`, `tokens` u32 and `gates` f32 `[sent]`.
pub fn add_gated_rows(out: &Tensor, rows: &Tensor, tokens: &Tensor, gates: &Tensor) -> Result<()> {
    out.inplace_op2(rows, &AddGatedRows { tokens, gates })
}

struct MultiplyGated(Activation);

impl InplaceOp2 for MultiplyGated {
    fn name(&self) -> &'static str {
        "multiply_gated"
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<()> {
        let (gate, up) = (contiguous_mut(s1, l1)?, contiguous(s2, l2)?);
        match self.0 {
            Activation::Silu => silu_gate(gate, up),
            Activation::GeluTanh => gelu_tanh_gate(gate, up),
            Activation::ClampedSwiglu { alpha, limit } => clamped_swiglu_gate(gate, up, alpha, limit),
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s1: &mut CudaStorage, l1: &Layout, s2: &CudaStorage, l2: &Layout) -> Result<()> {
        let count = l1.shape().elem_count();
        let (activation, alpha, limit) = match self.0 {
            Activation::Silu => (0, 0.0, 0.0),
            Activation::GeluTanh => (1, 0.0, 0.0),
            Activation::ClampedSwiglu { alpha, limit } => (2, alpha, limit),
        };
        let args = [
            cuda::pointer_at(s1, l1)?,
            cuda::pointer_at(s2, l2)?,
            Arg::U64(count as u64),
            Arg::I32(activation),
            Arg::F32(alpha),
            Arg::F32(limit),
        ];
        cuda::launch(&s1.device, cuda::FORWARD, "gated", Threads::over(count, 1), &args)
    }
}

struct Attention<'a>(AttentionShape, Option<&'a [f32]>);

impl CustomOp3 for Attention<'_> {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (q, k, v) = (contiguous(s1, l1)?, contiguous(s2, l2)?, contiguous(s3, l3)?);
        let out = attention_kernel(q, k, v, self.1, self.0);
        let width = self.0.heads * self.0.value_dim;
        let shape = (out.len() / width, width).into();
        Ok((CpuStorage::F32(out), shape))
    }
}

struct AddGatedRows<'a> {
    tokens: &'a Tensor,
    gates: &'a Tensor,
}

impl InplaceOp2 for AddGatedRows<'_> {
    fn name(&self) -> &'static str {
        "add_gated_rows"
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<()> {
        let rows = contiguous(s2, l2)?;
        let (_, width) = l1.shape().dims2()?;
        let (tokens, gates) = (self.tokens.to_vec1()?, self.gates.to_vec1()?);
        add_gated_rows_kernel(contiguous_mut(s1, l1)?, rows, &tokens, &gates, width);
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s1: &mut CudaStorage, l1: &Layout, s2: &CudaStorage, l2: &Layout) -> Result<()> {
        let (rows, width) = l2.shape().dims2()?;
        let args = [
            cuda::pointer_at(s1, l1)?,
            cuda::pointer_at(s2, l2)?,
            cuda::pointer(self.tokens)?,
            cuda::pointer(self.gates)?,
            cuda::u32_arg(width)?,
        ];
        cuda::launch(
            &s1.device,
            cuda::FORWARD,
            "add_gated_rows",
            Threads::by_row(width, rows),
            &args,
        )
    }
}

fn contiguous<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((begin, end)) => Ok(&storage.as_slice::<f32>()?[begin..end]),
        None => candle_core::bail!("this operation needs contiguous tensors"),
    }
}

fn contiguous_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((begin, end))) => Ok(&mut values[begin..end]),
        _ => candle_core::bail!("this operation needs contiguous f32 tensors"),
    }
}
