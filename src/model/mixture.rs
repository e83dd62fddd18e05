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
use crate::numerics::routing::{self, Routing};
use candle_core::{Result, Tensor};

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

/// The tokens that are sent to one expert.
#[derive(Clone, Debug)]
pub struct Sent {
    /// Their inputs, `[sent, hidden]`.
    pub rows: Tensor,
    /// Which tokens they are, rising.
    pub tokens: Vec<u32>,
    /// What the expert's output is multiplied by, for each.
    pub gates: Vec<f32>,
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

    /// What of `x`, the input of gate and up, is sent to `expert`; `None` where nothing is.
    pub fn sent_to(&self, expert: usize, x: &Tensor, routing: &Routing) -> Result<Option<Sent>> {
        let (tokens, gates) = routing.tokens_of(expert);
        if tokens.is_empty() {
            return Ok(None);
        }
        let rows = x.index_select(&Tensor::new(tokens.as_slice(), x.device())?, 0)?;
        Ok(Some(Sent { rows, tokens, gates }))
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
        let routing = self.route(x)?;
        let out = x.zeros_like()?;
        for expert in 0..spec.routing.experts {
            if let Some(sent) = self.sent_to(expert, x, &routing)? {
                let y = run(&sent.rows, spec.expert_linears(hidden, expert))?;
                ops::add_gated_rows(&out, &y, &sent.tokens, &sent.gates)?;
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
