//! What travels between operators. Large content is behind an `Arc`: within a process only the pointer moves.

use crate::budget::Grant;
use crate::device::{self, hessian::Symmetric, solver::Solved, sums::Sums};
use crate::error::Result;
use crate::model::SiteKind;
use crate::numerics::QuantizedWeight;
use crate::numerics::factor::Factor;
use crate::numerics::panels::Panels;
use crate::numerics::solver::SolvedRows;
use crate::report::Row;
use crate::statistics::SiteStatistics;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Begin a step with the batches that this worker holds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Go;

/// A step's inputs for one batch, on the worker that holds the batch.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// It is the probe: it sets the exponents and is not summed.
    pub probe: bool,
    /// How often it counts.
    pub multiplicity: i64,
    /// It is kept apart, to measure on.
    pub held_out: bool,
    /// Those that are to be summed. None where an earlier step summed them; of an expert, where no token is sent to it.
    pub sites: Vec<SiteInput>,
    /// Of what the batch takes on its way.
    pub bytes: Grant,
}

/// A site's input for one batch: `[tokens, width]`. An expert's rows are multiplied by their gates.
#[derive(Clone, Debug)]
pub struct SiteInput {
    /// The site.
    pub site: SiteKind,
    /// In the model whose inputs are summed.
    pub x: Tensor,
    /// In the original model, where that is matched.
    pub original: Option<Tensor>,
}

/// The complete statistics of a site, on the worker that owns it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Merged {
    /// Decoder layer.
    pub block: usize,
    /// The site.
    pub site: SiteKind,
    /// None where nothing is to be solved from them, or an earlier step has them.
    pub statistics: Option<Summed>,
}

/// The sums of a site, where they were made. Those on a device do not leave their process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Summed {
    /// In memory, or in scratch files.
    Host(SiteStatistics),
    /// On the device.
    #[serde(skip)]
    Device(Arc<Sums>),
}

impl Summed {
    /// Channels.
    pub fn width(&self) -> usize {
        match self {
            Self::Host(sums) => sums.width(),
            Self::Device(sums) => sums.width(),
        }
    }

    /// Tokens that were added, less those that were taken away.
    pub fn tokens(&self) -> i64 {
        match self {
            Self::Host(sums) => sums.tokens(),
            Self::Device(sums) => sums.tokens(),
        }
    }
}

/// The factor of a site, for every worker.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Factored {
    /// The site; none for all of a step's linears.
    pub site: Option<SiteKind>,
    /// The factors, and what to choose from them by.
    pub factors: SiteFactors,
    /// Tokens that reached the site.
    pub tokens: u64,
    /// Tokens that an expert borrowed: they were sent to others, and count in the place of those that it lacks.
    pub borrowed: u64,
}

/// The factors of a site, where its sums were. None where the step has nothing to quantize, or the method needs no statistics; several, with
/// different damping, to choose from by the held-out error.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum SiteFactors {
    /// In memory, or in scratch files.
    Host {
        /// By damping.
        factors: Vec<Arc<Factor>>,
        /// XᵀX over held-out tokens, upper panels.
        held_out: Option<Arc<Panels>>,
    },
    /// On the device.
    #[serde(skip)]
    Device {
        /// By damping.
        factors: Vec<Arc<device::factor::Factor>>,
        /// XᵀX over held-out tokens.
        held_out: Option<Symmetric>,
    },
}

impl Default for SiteFactors {
    fn default() -> Self {
        Self::Host {
            factors: Vec::new(),
            held_out: None,
        }
    }
}

/// Codes of some rows, where they were chosen.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Rows {
    /// In memory.
    Host(SolvedRows),
    /// On the device.
    #[serde(skip)]
    Device(Solved),
}

impl Rows {
    /// In memory; those of a device are waited for.
    pub(super) fn into_host(self) -> Result<SolvedRows> {
        match self {
            Self::Host(rows) => Ok(rows),
            Self::Device(solved) => solved.to_rows(),
        }
    }
}

/// Some rows of a linear, solved.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SolvedChunk {
    /// Position in the plan.
    pub linear: usize,
    /// The first of the rows.
    pub first_row: usize,
    /// `None` for a linear that is left alone.
    pub rows: Option<Rows>,
    /// The factor's damping and dead columns, for the report.
    pub factor: FactorFacts,
    /// Squared error of the outputs and their energy over held-out tokens.
    pub held_out: Option<(f64, f64)>,
    /// CPU seconds.
    pub seconds: f64,
    /// Of the codes.
    #[serde(skip)]
    pub bytes: Grant,
}

/// What the report tells of a factor.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct FactorFacts {
    /// Tokens that reached the site.
    pub tokens: u64,
    /// Tokens that count besides, in the place of those that an expert lacks.
    pub borrowed: u64,
    /// Damping used.
    pub damp_percent: f64,
    /// Failed factorizations before it.
    pub retries: u32,
    /// Channels that no token woke.
    pub dead: usize,
}

/// What some rows of a linear would lose.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PredictedChunk {
    /// Position in the plan.
    pub linear: usize,
    /// The first of the rows.
    pub first_row: usize,
    /// One a width, in the order that was asked for.
    pub losses: Vec<f64>,
}

/// A whole linear: what the forward pass takes of it, and what the disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PackedLinear {
    /// Position in the plan.
    pub linear: usize,
    /// For the forward pass; `None` for a linear that is left alone.
    pub quantized: Option<Quantized>,
    /// For the disk.
    pub content: Content,
    /// Of the codes.
    #[serde(skip)]
    pub bytes: Grant,
}

/// A quantized weight, as the forward pass takes it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Quantized {
    /// Its codes, in memory.
    Codes(Arc<QuantizedWeight>),
    /// Its values, `[rows, columns]` in the model's own dtype, on the device.
    #[serde(skip)]
    Values(Tensor),
}

/// What is to be written of a linear.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Content {
    /// Nothing of a linear that is left alone.
    Packed(Option<Packed>),
    /// Chunks that are on the device still: they are packed while the device goes on.
    #[serde(skip)]
    Solved(Vec<SolvedChunk>),
}

/// A linear in the output's layout.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Packed {
    /// Bytes of the format's tensors, in its order.
    pub tensors: Vec<Vec<u8>>,
    /// Its line in the report.
    pub row: Row,
    /// Of the tensors.
    #[serde(skip)]
    pub bytes: Grant,
}

/// A linear that is on its way to the disk: the forward pass may use it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Committed {
    /// Position in the plan.
    pub linear: usize,
    /// `None` for a linear that is left alone.
    pub quantized: Option<Quantized>,
    /// Of the codes.
    #[serde(skip)]
    pub bytes: Grant,
}
