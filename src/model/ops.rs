//! Operations of a block that candle does not have in a fast form: each a candle custom op whose CPU side is a kernel
//! of [`crate::numerics`]. A device kernel is added here, in `cuda_fwd`, and nowhere else.

use super::spec::Activation;
use crate::numerics::attention::{AttentionShape, attention as attention_kernel};
use crate::numerics::elementwise::{gelu_tanh_gate, silu_gate};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

/// `activation(gate) * up`, both `[tokens, width]` f32.
pub fn gated(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    gate.apply_op2_no_bwd(up, &Gated(activation))
}

/// Causal attention: see [`crate::numerics::attention`].
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, shape: AttentionShape) -> Result<Tensor> {
    q.apply_op3_no_bwd(k, v, &Attention(shape))
}

struct Gated(Activation);

impl CustomOp2 for Gated {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let mut gate = contiguous(s1, l1)?.to_vec();
        let up = contiguous(s2, l2)?;
        match self.0 {
            Activation::Silu => silu_gate(&mut gate, up),
            Activation::GeluTanh => gelu_tanh_gate(&mut gate, up),
        }
        Ok((CpuStorage::F32(gate), l1.shape().clone()))
    }
}

struct Attention(AttentionShape);

impl CustomOp3 for Attention {
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
        let out = attention_kernel(q, k, v, self.0);
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }
}

fn contiguous<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((begin, end)) => Ok(&storage.as_slice::<f32>()?[begin..end]),
        None => candle_core::bail!("this operation needs contiguous tensors"),
    }
}
