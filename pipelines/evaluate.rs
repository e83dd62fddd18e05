//! Two checkpoints streamed side by side, block by block, and compared on text: works for models larger than memory.
//!
//! ```text
//! windows ─exchange─► embed both ─► [ block 0 ─► block 1 ─► … ] ─► score ─exchange to 0─► gather
//!                                     time = block, both models' weights loaded once a process
//! ```

use super::run;
use crate::calibration::Calibration;
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::model::{LoadedBlock, Rotary, Source};
use crate::numerics::divergence::Divergence;
use crate::operators::Halt;
use crate::operators::activations::{ActivationStore, Precision, Slot, Stream};
use crate::operators::carry::carry;
use crate::operators::gather::gather;
use crate::operators::spread::spread;
use crate::operators::stages::Shelf;
use crate::report::Observer;
use crate::storage;
use crate::system;
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;
use timely::dataflow::operators::vec::ToStream;
use timely::dataflow::operators::{Concat, ConnectLoop, Feedback};

/// Activations that stay in memory, over all workers.
const RESIDENT_BYTES: usize = 256 << 20;

/// What to compare.
#[derive(Debug)]
pub struct Evaluation {
    /// The quantized checkpoint (any that can be read).
    pub model: PathBuf,
    /// The original.
    pub reference: PathBuf,
    /// Windows of one length.
    pub windows: Calibration,
    /// Worker threads.
    pub workers: usize,
    /// Where tensors are, and who works on them.
    pub placement: Placement,
}

/// What was measured; `evaluate --json` prints it.
#[derive(Clone, Debug, Serialize)]
pub struct Scores {
    /// exp of the mean −log p of each token given those before it in its window.
    pub perplexity: f64,
    /// The same of the reference.
    pub reference_perplexity: f64,
    /// Mean KL(reference ‖ model) a position, natural logarithm.
    pub kl_mean: f64,
    /// Its standard error over windows; absent with one window.
    pub kl_standard_error: Option<f64>,
    /// 99th percentile of the KL of single positions.
    pub kl_p99: f64,
    /// Share of positions at which both have the same most likely token.
    pub top1_agreement: f64,
    /// Positions compared.
    pub tokens: u64,
    /// Wall clock.
    pub elapsed_seconds: f64,
    /// Peak resident bytes of the process.
    pub peak_host_bytes: u64,
    /// Peak bytes on the device; 0 on a CPU.
    pub peak_device_bytes: u64,
}

struct Shared {
    models: [Source; 2],
    streams: [Stream; 2],
    windows: Calibration,
    rotary: [Vec<Arc<Rotary>>; 2],
    blocks: Shelf<LoadedBlock>,
    observer: Arc<dyn Observer>,
    halt: Arc<Halt>,
}

/// The positions of one window of a batch.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct WindowScore {
    /// Place among all windows.
    window: (usize, usize),
    kl: Vec<f64>,
    nll: f64,
    reference_nll: f64,
    top1: u64,
}

/// Compares the two.
///
/// # Errors
/// A checkpoint that cannot be read, or two that do not fit together.
pub fn evaluate(job: Evaluation, observer: &Arc<dyn Observer>, halt: &Arc<Halt>) -> Result<Scores> {
    let begin = Instant::now();
    let models = [
        Source::open(&job.model, job.placement.clone())?,
        Source::open(&job.reference, job.placement.clone())?,
    ];
    let [model, reference] = [&models[0].tower, &models[1].tower];
    for (what, ours, theirs) in [
        (
            "tokens in its vocabulary",
            model.spec.vocab_size,
            reference.spec.vocab_size,
        ),
        ("decoder layers", model.blocks(), reference.blocks()),
    ] {
        if ours != theirs {
            return Err(Error::invalid(
                job.model.display().to_string(),
                format!("has {ours} {what}, the reference {theirs}"),
                "compare a quantized checkpoint with the one it was made from",
            ));
        }
    }
    let length = job.windows.length_max();
    if length < 2 {
        return Err(Error::usage(
            "--text",
            "there is no window of at least two tokens",
            "give more text",
        ));
    }
    observer.phase(
        "evaluate",
        ((model.blocks() + 1) * job.windows.batches.len()) as u64,
    );
    let rotary = [model.rotary(length)?, reference.rotary(length)?];
    let scores: Arc<Mutex<Vec<WindowScore>>> = Arc::default();
    let shared = Arc::new(Shared {
        models,
        streams: [Stream::Quantized, Stream::Original],
        windows: job.windows,
        rotary,
        blocks: Shelf::default(),
        observer: Arc::clone(observer),
        halt: Arc::clone(halt),
    });
    let (for_workers, gathered) = (Arc::clone(&shared), Arc::clone(&scores));
    let workers = job.placement.workers(job.workers);
    let resident = RESIDENT_BYTES / workers;
    let on_device = job.placement.activation_bytes(None);
    let placement = job.placement.clone();
    run::on_workers(workers, halt, move |worker| {
        let folder = std::env::temp_dir();
        let mut store =
            ActivationStore::new(&folder, resident, Precision::F32).with_device(&placement, on_device);
        let (shared, gathered) = (Arc::clone(&for_workers), Arc::clone(&gathered));
        let windows: Vec<usize> = match worker.index() {
            0 => (0..shared.windows.batches.len()).collect(),
            _ => Vec::new(),
        };
        worker.dataflow_named("evaluate", |scope| {
            let (next, cycle) = scope.feedback(1);
            let positions = windows.to_stream(scope);
            let steps = spread(positions).concat(cycle);
            let halt = Arc::clone(&shared.halt);
            let (passed, scored) = carry(steps, halt, move |block, position| {
                let results = step(&shared, &mut store, block, position)?;
                shared.observer.advance(1);
                Ok(results)
            });
            passed.connect_loop(next);
            gather(scored, gathered);
        });
        Ok(())
    })?;
    drop(shared);
    let windows = Arc::into_inner(scores)
        .and_then(|scores| scores.into_inner().ok())
        .unwrap_or_default();
    let mut scores = summarize(windows)?;
    scores.elapsed_seconds = begin.elapsed().as_secs_f64();
    scores.peak_host_bytes = system::peak_host_bytes();
    scores.peak_device_bytes = job.placement.peak_bytes();
    Ok(scores)
}

fn step(
    shared: &Shared,
    store: &mut ActivationStore,
    block: usize,
    position: usize,
) -> Result<Vec<Result<usize, WindowScore>>> {
    let batch = &shared.windows.batches[position];
    let mut residuals = Vec::new();
    for (i, (source, &stream)) in shared.models.iter().zip(&shared.streams).enumerate() {
        let key = (position, stream, Slot::Residual);
        let residual = match block {
            0 => source.tower.embed(&batch.tokens)?,
            _ => store.get(key)?,
        };
        if block == source.tower.blocks() {
            residuals.push(residual);
            continue;
        }
        let loaded = shared.blocks.get((block * 2 + i) as u64, 4, || {
            source.load_block(block, &shared.rotary[i])
        })?;
        store.put(key, &source.forward(&loaded, &residual, batch.length)?)?;
    }
    match &residuals[..] {
        [model, reference] => {
            let windows = score(shared, position, model, reference)?;
            Ok(windows.into_iter().map(Err).collect())
        }
        _ => Ok(vec![Ok(position)]),
    }
}

/// Compares every position of a batch's windows but each last one, whose next token is not known.
fn score(shared: &Shared, position: usize, model: &Tensor, reference: &Tensor) -> Result<Vec<WindowScore>> {
    let batch = &shared.windows.batches[position];
    let [ours, theirs] = &shared.models;
    let length = batch.length;
    let mut windows = Vec::new();
    for (number, tokens) in batch.tokens.chunks_exact(length).enumerate() {
        let mut all: Vec<Divergence> = Vec::with_capacity(length - 1);
        for targets in tokens[1..].chunks(theirs.logits_rows()) {
            let begin = number * length + all.len();
            let logits = |source: &Source, residual: &Tensor| {
                source.logits(&residual.narrow(0, begin, targets.len())?)
            };
            all.extend(theirs.compare(&logits(theirs, reference)?, &logits(ours, model)?, targets)?);
        }
        windows.push(WindowScore {
            window: (position, number),
            kl: all.iter().map(|d| d.kl).collect(),
            nll: all.iter().map(|d| d.nll).sum(),
            reference_nll: all.iter().map(|d| d.reference_nll).sum(),
            top1: all.iter().map(|d| u64::from(d.top1_equal)).sum(),
        });
    }
    Ok(windows)
}

/// Sums in the order of the windows, so that the result does not depend on the number of workers.
fn summarize(mut windows: Vec<WindowScore>) -> Result<Scores> {
    windows.sort_by_key(|score| score.window);
    let mut kl: Vec<f64> = windows
        .iter()
        .flat_map(|score| score.kl.iter().copied())
        .collect();
    let tokens = kl.len() as f64;
    let sum = |value: fn(&WindowScore) -> f64| windows.iter().map(value).sum::<f64>();
    let kl_mean = kl.iter().sum::<f64>() / tokens;
    if !kl_mean.is_finite() {
        return Err(Error::invalid(
            "evaluation",
            "a model's logits are not finite",
            "the checkpoint is damaged, or overflows in f32",
        ));
    }
    let means: Vec<f64> = windows
        .iter()
        .map(|s| s.kl.iter().sum::<f64>() / s.kl.len() as f64)
        .collect();
    let count = means.len() as f64;
    let center = means.iter().sum::<f64>() / count;
    let variance = means.iter().map(|m| (m - center).powi(2)).sum::<f64>() / (count - 1.0);
    let top1 = windows.iter().map(|s| s.top1).sum::<u64>() as f64;
    let (nll, reference_nll) = (sum(|s| s.nll), sum(|s| s.reference_nll));
    kl.sort_by(f64::total_cmp);
    // Linear interpolation between order statistics, as numpy's and torch's default quantile.
    let at = 0.99 * (tokens - 1.0);
    let (low, high) = (kl[at.floor() as usize], kl[at.ceil() as usize]);
    Ok(Scores {
        perplexity: (nll / tokens).exp(),
        reference_perplexity: (reference_nll / tokens).exp(),
        kl_mean,
        kl_standard_error: (means.len() > 1).then(|| (variance / count).sqrt()),
        kl_p99: low + (high - low) * at.fract(),
        top1_agreement: top1 / tokens,
        tokens: kl.len() as u64,
        elapsed_seconds: 0.0,
        peak_host_bytes: 0,
        peak_device_bytes: 0,
    })
}

/// Writes the logits of `model` on `windows` as an f32 tensor `logits`, `[windows, length, vocabulary]`, in a safetensors file.
pub fn write_logits(model: &Path, windows: &Calibration, output: &Path) -> Result<()> {
    let source = Source::open(model, Device::Cpu)?;
    let length = windows.length_max();
    let rotary = source.tower.rotary(length)?;
    let tokens: Vec<u32> = windows
        .batches
        .iter()
        .flat_map(|batch| batch.tokens.iter().copied())
        .collect();
    let mut residual = source.tower.embed(&tokens)?;
    for block in 0..source.tower.blocks() {
        let loaded = source.load_block(block, &rotary)?;
        residual = source.forward(&loaded, &residual, length)?;
    }
    let logits = source.tower.logits(&residual)?;
    let values = logits.flatten_all()?.to_vec1::<f32>()?;
    let shape = vec![tokens.len() / length, length, source.tower.spec.vocab_size];
    let bytes = bytemuck::cast_slice(&values);
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, bytes);
    let file = view.and_then(|view| safetensors::serialize([("logits", view)], None));
    let file = file.map_err(|error| Error::invalid(output.display().to_string(), error.to_string(), ""))?;
    storage::write_whole(output, &file)
}
