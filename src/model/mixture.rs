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
use candle_core::{Device, Result, Tensor};

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
        &self.dispatch.tokens[self.dispatch.of(expert)]
    }

    /// What the expert's output is multiplied by, for each.
    pub fn gates(&self, expert: usize) -> &[f32] {
        &self.dispatch.gates[self.dispatch.of(expert)]
    }

    /// Their rows of `x`, `[tokens, width]`; `None` where nothing is sent.
    pub fn rows(&self, expert: usize, x: &Tensor) -> Result<Option<Tensor>> {
        match self.dispatch.of(expert).is_empty() {
            true => Ok(None),
            false => Ok(Some(x.index_select(&self.part(&self.tokens, expert)?, 0)?)),
        }
    }

    /// These `rows`, times their gates.
    pub fn gated(&self, expert: usize, rows: &Tensor) -> Result<Tensor> {
        rows.broadcast_mul(&self.part(&self.gates, expert)?.unsqueeze(1)?)
    }

    /// Adds the expert's output `y`, times its gates, to the tokens' rows of `out`.
    pub fn add(&self, expert: usize, out: &Tensor, y: &Tensor) -> Result<()> {
        let (tokens, gates) = (self.part(&self.tokens, expert)?, self.part(&self.gates, expert)?);
        ops::add_gated_rows(out, y, &tokens, &gates)
    }

    fn part(&self, of: &Tensor, expert: usize) -> Result<Tensor> {
        let sent = self.dispatch.of(expert);
        of.narrow(0, sent.start, sent.len())
    }
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
            if let Some(rows) = sent.rows(expert, x)? {
                let y = run(&rows, spec.expert_linears(hidden, expert))?;
                sent.add(expert, &out, &y)?;
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
