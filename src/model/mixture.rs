//! A mixture of experts in a block: the router sends each token to some experts, an expert runs on the tokens that were sent to it, and the
//! outputs are added with their gates, expert by expert in rising order, so that the sum has one order. Nothing of the size of tokens times
//! experts times width is ever in memory.
//!
//! ```text
//! [gate_up] ─route─► tokens of each expert ─gate─► [down of the expert] ─► gated sum
//!     └────────────► shared expert ─gate─► [down] ──(sigmoid gate)────────────┘
//! ```

use super::block::Block;
use super::linear::Linear;
use super::ops;
use super::sites::LinearSpec;
use super::spec::MixtureSpec;
use crate::device;
use crate::error;
use crate::numerics::routing::{self, Dispatch, Routing};
use candle_core::{DType, Device, Result, Tensor};
use std::ops::Range;

/// What a mixture has besides its experts.
#[derive(Clone, Debug)]
pub struct MixtureWeights {
    /// `[experts, hidden]`
    pub router: Linear,
    /// `[experts]`, added to the scores for the choice only.
    pub correction: Option<Vec<f32>>,
    /// `[1, hidden]`: the shared expert's output is multiplied by its sigmoid.
    pub shared_gate: Option<Linear>,
}

/// What each expert is sent of a batch.
#[derive(Clone, Debug)]
pub struct Sent {
    dispatch: Dispatch,
    /// The same where the model runs: u32, and f32.
    tokens: Tensor,
    gates: Tensor,
}

impl Sent {
    fn new(dispatch: Dispatch, device: &Device) -> Result<Self> {
        Ok(Self {
            tokens: Tensor::new(&dispatch.tokens[..], device)?,
            gates: Tensor::new(&dispatch.gates[..], device)?,
            dispatch,
        })
    }

    /// The tokens that are sent to `expert`, rising.
    pub fn tokens(&self, expert: usize) -> &[u32] {
        &self.dispatch.tokens[self.dispatch.of(&(expert..expert + 1))]
    }

    /// How many tokens each of these experts is sent.
    pub fn counts(&self, experts: &Range<usize>) -> Vec<usize> {
        experts.clone().map(|expert| self.tokens(expert).len()).collect()
    }

    /// What the expert's output is multiplied by, for each.
    pub fn gates(&self, expert: usize) -> &[f32] {
        &self.dispatch.gates[self.dispatch.of(&(expert..expert + 1))]
    }

    /// The rows of `x`, `[tokens, width]`, that are sent to some experts, one expert after the other; `None` where nothing is sent.
    pub fn rows(&self, experts: &Range<usize>, x: &Tensor) -> Result<Option<Tensor>> {
        match self.dispatch.of(experts).is_empty() {
            true => Ok(None),
            false => Ok(Some(x.index_select(&self.part(&self.tokens, experts)?, 0)?)),
        }
    }

    /// Such rows, times their gates.
    pub fn gated(&self, experts: &Range<usize>, rows: &Tensor) -> Result<Tensor> {
        rows.broadcast_mul(&self.part(&self.gates, experts)?.unsqueeze(1)?)
    }

    /// Adds the outputs `y` of the experts' rows, times their gates, to the tokens' rows of `out`, expert by expert.
    pub fn add(&self, experts: &Range<usize>, out: &Tensor, y: &Tensor) -> Result<()> {
        let begin = self.dispatch.of(experts).start;
        for expert in experts.clone() {
            let expert = expert..expert + 1;
            let sent = self.dispatch.of(&expert);
            if !sent.is_empty() {
                let y = y.narrow(0, sent.start - begin, sent.len())?;
                let (tokens, gates) = (
                    self.part(&self.tokens, &expert)?,
                    self.part(&self.gates, &expert)?,
                );
                ops::add_gated_rows(out, &y, &tokens, &gates)?;
            }
        }
        Ok(())
    }

    fn part(&self, of: &Tensor, experts: &Range<usize>) -> Result<Tensor> {
        let sent = self.dispatch.of(experts);
        of.narrow(0, sent.start, sent.len())
    }
}

/// x Wᵀ + b in f32, of several linears of one shape and each its own rows of `x`: of the first linear as many as `counts` has first, and so on.
fn forward_each<'a>(
    linears: impl Iterator<Item = &'a Linear> + Clone,
    counts: &[usize],
    x: &Tensor,
) -> Result<Tensor> {
    let Some(first) = linears.clone().next() else {
        candle_core::bail!("no expert's linear");
    };
    // Rounded once for all.
    let x = x.to_dtype(first.precision())?;
    let y = Tensor::zeros((x.dim(0)?, first.weight.sides()?.0), DType::F32, x.device())?;
    let mut begin = 0;
    for (linear, &count) in linears.zip(counts) {
        if count > 0 {
            linear.forward_to(&x.narrow(0, begin, count)?, &y.narrow(0, begin, count)?)?;
            begin += count;
        }
    }
    Ok(y)
}

impl Block {
    fn mixture(&self) -> Result<(&MixtureSpec, &MixtureWeights)> {
        match (self.spec.mixture_of(&self.layer), &self.mixture) {
            (Some(spec), Some(weights)) => Ok((spec, weights)),
            _ => candle_core::bail!("this block has no mixture of experts"),
        }
    }

    /// input of gate and up, `[tokens, hidden]` → where each token goes
    pub fn route(&self, x: &Tensor) -> Result<Routing> {
        let (spec, weights) = self.mixture()?;
        let logits = device::values::<f32>(&weights.router.forward(x)?)?;
        Ok(routing::route(
            &logits,
            weights.correction.as_deref(),
            spec.routing,
        ))
    }

    /// input of gate and up → what each expert is sent of it
    pub fn dispatch(&self, x: &Tensor) -> Result<Sent> {
        let (spec, _) = self.mixture()?;
        Sent::new(self.route(x)?.dispatch(spec.routing.experts), x.device())
    }

    /// input of gate and up, rows of one expert after the other, `counts` of each → input of their downs. `linears` are each one's gate and up.
    pub fn gate_each(&self, x: &Tensor, counts: &[usize], linears: &[Linear]) -> Result<Tensor> {
        let (gates, ups) = (linears.iter().step_by(2), linears.iter().skip(1).step_by(2));
        let gate = forward_each(gates, counts, x)?;
        ops::multiply_gated(&gate, &forward_each(ups, counts, x)?, self.spec.activation)?;
        Ok(gate)
    }

    /// input of the downs of several experts, as [`Self::gate_each`] has it → their outputs
    pub fn down_each(&self, x: &Tensor, counts: &[usize], downs: &[Linear]) -> Result<Tensor> {
        forward_each(downs.iter(), counts, x)
    }

    /// input of gate and up → the shared expert's gate of each token, `[tokens, 1]`, where it has one
    pub fn shared_gate(&self, x: &Tensor) -> Result<Option<Tensor>> {
        let (_, weights) = self.mixture()?;
        let sigmoid = |gate: &Linear| candle_nn::ops::sigmoid(&gate.forward(x)?);
        weights.shared_gate.as_ref().map(sigmoid).transpose()
    }

    /// input of gate and up → what the mixture adds to the residual; asks `linear` for one expert at a time.
    ///
    /// # Errors
    /// Those of `linear`, and of tensor operations.
    pub fn mix(
        &self,
        x: &Tensor,
        linear: &dyn Fn(&LinearSpec) -> error::Result<Linear>,
    ) -> error::Result<Tensor> {
        let (spec, _) = self.mixture()?;
        let run = |x: &Tensor, [gate, up, down]: [LinearSpec; 3]| -> error::Result<Tensor> {
            // Gate and up are dropped before down is read.
            let inner = self.gate(x, &[linear(&gate)?, linear(&up)?])?;
            Ok(linear(&down)?.forward(&inner)?)
        };
        let hidden = self.spec.hidden_size;
        let sent = self.dispatch(x)?;
        let out = x.zeros_like()?;
        for expert in 0..spec.routing.experts {
            let one = expert..expert + 1;
            if let Some(rows) = sent.rows(&one, x)? {
                let y = run(&rows, spec.expert_linears(hidden, expert))?;
                sent.add(&one, &out, &y)?;
            }
        }
        let Some(shared) = spec.shared_linears(hidden) else {
            return Ok(out);
        };
        let mut y = run(x, shared)?;
        if let Some(gate) = self.shared_gate(x)? {
            y = y.broadcast_mul(&gate)?;
        }
        Ok((out + y)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::linear::Weight;
    use proptest::prelude::*;

    proptest! {
        /// Several linears and their rows at a time are those one after the other, to the bit; some have no rows.
        #[test]
        fn each_linear_has_its_own_rows(
            counts in prop::collection::vec(0usize..5, 1..6), rows in 1usize..6, columns in 1usize..6, with_bias in any::<bool>(),
            dtype in prop::sample::select(vec![DType::F32, DType::BF16, DType::F16]),
        ) {
            let tensor = |shape: &[usize], seed: usize| {
                let count = shape.iter().product::<usize>();
                let values: Vec<f32> = (0..count).map(|i| ((i * 37 + seed * 53) % 101) as f32 / 31.0 - 1.5).collect();
                Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
            };
            let linear = |seed: usize| Linear {
                weight: Weight::Whole(tensor(&[rows, columns], seed).to_dtype(dtype).unwrap()),
                bias: with_bias.then(|| tensor(&[rows], seed + 7)),
            };
            let linears: Vec<Linear> = (0..counts.len()).map(linear).collect();
            let total: usize = counts.iter().sum();
            prop_assume!(total > 0);
            let x = tensor(&[total, columns], 3);
            let ours = forward_each(linears.iter(), &counts, &x).unwrap();
            let mut expected = Vec::new();
            for (linear, &count) in linears.iter().zip(&counts) {
                if count > 0 {
                    let begin = expected.len();
                    let y = linear.forward(&x.narrow(0, begin, count).unwrap()).unwrap();
                    expected.extend(y.to_vec2::<f32>().unwrap());
                }
            }
            prop_assert_eq!(ours.to_vec2::<f32>().unwrap(), expected);
        }
    }
}
