//! A quantization run as it is asked for, and what is told of it afterwards.

use crate::artifact::Artifact;
use crate::calibration::{Calibration, PROBE_TOKENS, Usage};
use crate::checkpoint::hex;
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::model::Tower;
use crate::plan::{Fit, Graph, Load, Plan};
use crate::recipe::{Method, Recipe};
use crate::system;
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

/// What to do.
#[derive(Clone, Debug)]
pub struct Job {
    /// The checkpoint's directory.
    pub model: PathBuf,
    /// The output's directory.
    pub output: PathBuf,
    /// Scheme, method, format.
    pub recipe: Recipe,
    /// Batches; empty for round-to-nearest, and where there are statistics.
    pub calibration: Calibration,
    /// Statistics to solve from, instead of forward passes.
    pub statistics: Option<Arc<Artifact>>,
    /// Worker threads.
    pub workers: usize,
    /// Budget of resident bytes; `None` for what the run needs with a small store of activations.
    pub memory: Option<u64>,
    /// Where activations spill; `None` for the output folder.
    pub scratch: Option<PathBuf>,
    /// Bytes of tensor data in a shard.
    pub shard_bytes_max: u64,
    /// Forget an unfinished run, or an earlier output of quantflow, in the output folder.
    pub fresh: bool,
    /// Order in which batches are announced; `None` for their own. Any order gives the same output.
    pub arrival: Option<Vec<usize>>,
    /// Where tensors are, and who works on them.
    pub placement: Placement,
    /// Budget on the device; `None` for what it has free.
    pub device_memory: Option<u64>,
}

/// What was done; `quantize --json` prints it.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The output's directory.
    pub output: PathBuf,
    /// Name of its format.
    pub format: String,
    /// Wall clock.
    pub elapsed_seconds: f64,
    /// All threads.
    pub cpu_seconds: f64,
    /// Peak resident bytes of the process.
    pub peak_host_bytes: u64,
    /// Peak bytes on the device; 0 on a CPU.
    pub peak_device_bytes: u64,
    /// What the plan predicted.
    pub plan_peak_host_bytes: u64,
    /// The most that operators had asked for at a time: the plan's promise is that it is no more than that.
    pub asked_peak_host_bytes: u64,
    /// What the plan predicted for the device.
    pub plan_peak_device_bytes: u64,
    /// Tokens of the calibration.
    pub calibration_tokens: u64,
    /// Quantized linears.
    pub linears: usize,
    /// Rows that depart from the recipe or lost too much.
    pub fallbacks: usize,
    /// Mean of the rows' relative errors.
    pub relative_error_mean: f64,
    /// Bytes of the source's tensors.
    pub source_bytes: u64,
    /// Bytes of the output's tensors.
    pub output_bytes: u64,
    /// Blocks that an earlier run of this command had finished.
    pub resumed_blocks: usize,
    /// Linears that were copied from the output that was there before.
    pub reused_linears: usize,
    /// Weights that the source has quantized and the recipe leaves alone, written as their values.
    pub dequantized: usize,
    /// SHA-256 over the bytes of the output's tensors in name order.
    pub output_digest: String,
    /// What the calibration used and left out.
    pub calibration: Usage,
    /// Seconds by operator: see [`crate::report::Clock`].
    pub operators: BTreeMap<&'static str, f64>,
}

impl Job {
    /// From `model` to a new folder `output`, by one worker, without calibration: what else is wanted is set on top.
    pub fn new(model: PathBuf, output: PathBuf, recipe: Recipe) -> Self {
        Self {
            model,
            output,
            recipe,
            calibration: Calibration::default(),
            statistics: None,
            workers: 1,
            memory: None,
            scratch: None,
            shard_bytes_max: 5_000_000_000,
            fresh: false,
            arrival: None,
            placement: Placement::cpu(),
            device_memory: None,
        }
    }

    /// Plans the run; reads headers only.
    pub fn plan(&self) -> Result<(Tower, Plan)> {
        let tower = Tower::open(&self.model, self.placement.clone())?;
        let mut plan = Plan::new(self.recipe.clone(), &tower)?;
        plan.arrange(&self.load(), self.memory, self.device_memory, &self.placement);
        Ok((tower, plan))
    }

    /// What the run carries.
    pub fn load(&self) -> Load {
        let graph = match (self.recipe.method, &self.statistics) {
            (Method::Rtn, _) => Graph::DataFree,
            (Method::Gptq, None) => Graph::Sequential,
            (Method::Gptq, Some(artifact)) => Graph::Solve {
                held_out: artifact.header.origin.holds_out(),
            },
        };
        let tokens = self.calibration.batches.iter().map(|batch| batch.tokens.len());
        Load {
            graph,
            workers: self.placement.workers(self.workers),
            batch_tokens: self.calibration.batch_tokens_max().max(PROBE_TOKENS),
            tokens: tokens.sum(),
            streams: 1 + usize::from(graph == Graph::Sequential && self.recipe.match_original > 0.0),
        }
    }

    /// How the run fits into its budget, or into what the machine has.
    ///
    /// # Errors
    /// `--memory` or `--device-memory` is less than what the run needs without a single resident activation.
    pub fn fit(&self, plan: &Plan) -> Result<Fit> {
        let load = self.load();
        let fit = plan.fit(&load, self.memory, system::available_host_bytes())?;
        plan.fit_device(fit, self.device_memory, &self.placement)
    }

    /// Tokens behind the statistics.
    pub fn calibration_tokens(&self) -> u64 {
        let kept = self.statistics.as_ref();
        let kept = kept.map(|artifact| artifact.header.calibration_tokens());
        kept.unwrap_or(self.calibration.usage.tokens_used)
    }

    /// A digest of everything that decides the output's bytes.
    pub(super) fn fingerprint(&self, tower: &Tower) -> Result<String> {
        let mut hash = Sha256::new();
        let text = |value: &serde_json::Value| value.to_string();
        hash.update(tower.checkpoint.digest());
        let recipe = serde_json::to_value(&self.recipe);
        hash.update(text(
            &recipe.map_err(|error| Error::invalid("recipe", error.to_string(), ""))?,
        ));
        hash.update(self.shard_bytes_max.to_le_bytes());
        if self.placement.on_device {
            // Other arithmetic: a run that was begun elsewhere is not continued here.
            hash.update(format!("{:?}\n", tower.precision()));
        }
        for batch in &self.calibration.batches {
            hash.update(format!("{}\n", batch.id));
        }
        if let Some(artifact) = &self.statistics {
            hash.update(artifact.header.digest());
        }
        Ok(hex(&hash.finalize()))
    }
}
