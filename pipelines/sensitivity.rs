//! What each part of a quantized checkpoint costs alone: the divergence of the original model with only that part quantized. Forward
//! passes alone, streamed block by block: weights are read once, whatever the number of parts.
//!
//! ```text
//! windows ─spread─► [ block 0 ─► block 1 ─► … ] ─► compare ─► gather
//!                     time = block; a window carries the original model's residual and one of each part
//!                     that lies in an earlier block; a block's own parts branch off the original there
//! ```

use super::run;
use crate::calibration::{Batch, Calibration};
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::model::{LinearSpec, LoadedBlock, Rotary, Source};
use crate::operators::Halt;
use crate::operators::activations::{ActivationStore, Key, Precision, Slot, Stream};
use crate::operators::carry::carry;
use crate::operators::gather::gather;
use crate::operators::spread::spread;
use crate::operators::stages::Shelf;
use crate::plan::MeasurementFit;
use crate::report::Observer;
use crate::system::release_free_memory;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use timely::dataflow::operators::vec::ToStream;
use timely::dataflow::operators::{Concat, ConnectLoop, Feedback};

/// What to measure.
#[derive(Debug)]
pub struct Measurement {
    /// The original checkpoint.
    pub reference: PathBuf,
    /// The quantized one.
    pub model: PathBuf,
    /// Linears, by decoder layer and full module name, that are quantized together; in rising order of layers.
    pub parts: Vec<(usize, BTreeSet<String>)>,
    /// Windows to measure on.
    pub windows: Calibration,
    /// Where residuals spill.
    pub scratch: PathBuf,
    /// Worker threads.
    pub workers: usize,
    /// The memory for it.
    pub fit: MeasurementFit,
    /// Where tensors are, and who works on them.
    pub placement: Placement,
    /// Budget on the device; `None` for what it has free.
    pub device_memory: Option<u64>,
}

/// One window: the sum of the KL over its positions, by part.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Cost {
    window: usize,
    positions: u64,
    kl: Vec<f64>,
}

struct Shared {
    reference: Source,
    model: Source,
    parts: Vec<(usize, BTreeSet<String>)>,
    windows: Vec<Batch>,
    rotary: Vec<Arc<Rotary>>,
    blocks: Shelf<LoadedBlock>,
    observer: Arc<dyn Observer>,
    halt: Arc<Halt>,
}

/// Mean KL(original ‖ original with the part quantized) a position, by part, and the number of positions: every one but each last one of
/// a window.
///
/// # Errors
/// A checkpoint that cannot be read, windows without a position, an interrupt.
pub fn measure(job: Measurement, observer: &Arc<dyn Observer>, halt: &Arc<Halt>) -> Result<(Vec<f64>, u64)> {
    let reference = Source::open(&job.reference, job.placement.clone())?;
    let length = job.windows.length_max();
    if length < 2 {
        return Err(Error::usage(
            "--tokens",
            "there is no window of at least two tokens to measure on",
            "give more text",
        ));
    }
    reference.tower.expect_length(length)?;
    let blocks = reference.tower.blocks();
    let passes: usize = job.parts.iter().map(|(block, _)| 1 + blocks - block).sum();
    observer.phase("measure", ((passes + blocks) * job.windows.batches.len()) as u64);
    let parts = job.parts.len();
    let shared = Arc::new(Shared {
        model: Source::open(&job.model, job.placement.clone())?,
        rotary: reference.tower.rotary(length)?,
        reference,
        parts: job.parts,
        windows: job.windows.batches,
        blocks: Shelf::default(),
        observer: Arc::clone(observer),
        halt: Arc::clone(halt),
    });
    let costs: Arc<Mutex<Vec<Cost>>> = Arc::default();
    let (for_workers, gathered) = (Arc::clone(&shared), Arc::clone(&costs));
    let (resident, scratch) = (job.fit.resident_bytes / job.workers, job.scratch);
    let (placement, on_device) = (
        job.placement.clone(),
        job.placement.activation_bytes(job.device_memory),
    );
    run::on_workers(job.workers, halt, move |worker| {
        let mut store =
            ActivationStore::new(&scratch, resident, Precision::F32).with_device(&placement, on_device);
        let (shared, gathered) = (Arc::clone(&for_workers), Arc::clone(&gathered));
        let windows: Vec<usize> = match worker.index() {
            0 => (0..shared.windows.len()).collect(),
            _ => Vec::new(),
        };
        worker.dataflow_named("sensitivity", |scope| {
            let (next, cycle) = scope.feedback(1);
            let steps = spread(windows.to_stream(scope)).concat(cycle);
            let halt = Arc::clone(&shared.halt);
            let (passed, compared) = carry(steps, halt, move |block, window| {
                advance(&shared, &mut store, block, window)
            });
            passed.connect_loop(next);
            gather(compared, gathered);
        });
        Ok(())
    })?;
    let costs = costs.lock().map(|mut costs| std::mem::take(&mut *costs));
    let mut costs = costs.map_err(|_| Error::Worker("it stopped while it compared".into()))?;
    // In order of the windows, so that sums do not depend on the number of workers.
    costs.sort_by_key(|cost| cost.window);
    let positions: u64 = costs.iter().map(|cost| cost.positions).sum();
    let mean = |part: usize| costs.iter().map(|cost| cost.kl[part]).sum::<f64>() / positions as f64;
    let means: Vec<f64> = (0..parts).map(mean).collect();
    match means.iter().all(|kl| kl.is_finite()) {
        true => Ok((means, positions)),
        false => Err(Error::invalid(
            job.reference.display().to_string(),
            "gives logits that are not finite",
            "the checkpoint is damaged, or overflows in f32",
        )),
    }
}

impl Shared {
    /// Where a window's residual is kept: the original's, or that of a part.
    fn key(&self, window: usize, part: Option<usize>) -> Key {
        let stride = self.parts.len() + 1;
        let position = window * stride + part.map_or(0, |part| part + 1);
        (position, Stream::Original, Slot::Residual)
    }

    /// One more forward pass is done; the next may begin.
    fn tick(&self) -> Result<()> {
        self.observer.advance(1);
        match self.halt.is_raised() {
            true => Err(Error::Interrupted),
            false => Ok(()),
        }
    }
}

/// Takes a window through a block, in the original model and with each part; after the last block, compares.
fn advance(
    shared: &Shared,
    store: &mut ActivationStore,
    block: usize,
    window: usize,
) -> Result<Vec<Result<usize, Cost>>> {
    let (source, batch) = (&shared.reference, &shared.windows[window]);
    let residual = match block {
        0 => source.tower.embed(&batch.tokens)?,
        _ => store.get(shared.key(window, None))?,
    };
    if block == source.tower.blocks() {
        return Ok(vec![Err(costs(shared, store, window, &residual)?)]);
    }
    let load = |source: &Source, slot: usize| {
        let key = (block * 2 + slot) as u64;
        shared.blocks.get(key, 4, || {
            // Of the blocks that went.
            release_free_memory();
            source.load_block(block, &shared.rotary)
        })
    };
    let original = load(source, 0)?;
    for (part, (own, names)) in shared.parts.iter().enumerate() {
        let key = shared.key(window, Some(part));
        let passed = match (*own).cmp(&block) {
            std::cmp::Ordering::Greater => break,
            std::cmp::Ordering::Less => source.forward(&original, &store.get(key)?, batch.length)?,
            std::cmp::Ordering::Equal => {
                let quantized = load(&shared.model, 1)?;
                let linear = |spec: &LinearSpec| match names.contains(&source.tower.linear_name(block, spec))
                {
                    true => shared.model.linear_of(&quantized, spec),
                    false => source.linear_of(&original, spec),
                };
                original.block.forward(&residual, batch.length, &linear)?
            }
        };
        store.put(key, &passed)?;
        shared.tick()?;
    }
    store.put(
        shared.key(window, None),
        &source.forward(&original, &residual, batch.length)?,
    )?;
    shared.tick()?;
    Ok(vec![Ok(window)])
}

/// The divergences of a window, of which every residual has passed the last block.
fn costs(shared: &Shared, store: &ActivationStore, window: usize, original: &Tensor) -> Result<Cost> {
    let (source, batch) = (&shared.reference, &shared.windows[window]);
    let rows_max = source.logits_rows();
    let mut cost = Cost {
        window,
        positions: 0,
        kl: vec![0.0; shared.parts.len()],
    };
    // The last token of a sequence has no next one.
    let last = batch.length - 1;
    for sequence in 0..batch.sequences {
        for begin in (0..last).step_by(rows_max) {
            let rows = rows_max.min(last - begin);
            let first = sequence * batch.length + begin;
            let targets = &batch.tokens[first + 1..][..rows];
            let logits = |residual: &Tensor| source.logits(&residual.narrow(0, first, rows)?);
            let reference = logits(original)?;
            cost.positions += rows as u64;
            for (part, sum) in cost.kl.iter_mut().enumerate() {
                let model = logits(&store.get(shared.key(window, Some(part)))?)?;
                let positions = source.compare(&reference, &model, targets)?;
                *sum += positions.iter().map(|position| position.kl).sum::<f64>();
                if begin + rows == last && sequence + 1 == batch.sequences {
                    shared.tick()?;
                }
            }
        }
    }
    Ok(cost)
}
