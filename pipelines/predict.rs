//! From a statistics artifact to what each linear would lose at each bit width: no sweep, no forward pass, no output.
//!
//! ```text
//! steps ─gated by a probe─► load ─► factor ─broadcast─► predict ─► gather
//! ```

use super::job::Job;
use super::run::{self, feed};
use crate::artifact::Artifact;
use crate::calibration::PROBE_TOKENS;
use crate::error::{Error, Result};
use crate::operators::factor::factor;
use crate::operators::gather::gather;
use crate::operators::load::load;
use crate::operators::local::Output;
use crate::operators::predict::predict;
use crate::operators::records::{Go, PredictedChunk};
use crate::operators::{Halt, Local, Shared};
use crate::report::Observer;
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use timely::container::CapacityContainerBuilder;
use timely::dataflow::operators::{Input, Probe};
use timely::dataflow::{InputHandle, ProbeHandle};
use timely::worker::Worker;

/// Steps in flight: while one is looked at, the next is loaded and factored.
const STEPS_IN_FLIGHT: u64 = 2;

type Gathered = Arc<Mutex<Vec<PredictedChunk>>>;

/// Builds the graph on a worker and drives its source until the last step is done or the run halts.
fn build(
    worker: &mut Worker,
    local: &Rc<Local>,
    artifact: &Arc<Artifact>,
    widths: &[u32],
    gathered: Gathered,
) {
    let mut input: InputHandle<u64, CapacityContainerBuilder<Vec<Go>>> = InputHandle::new();
    let probe = ProbeHandle::new();
    worker.dataflow_named("predict", |scope| {
        let steps = scope.input_from(&mut input);
        let sums = load(steps, Rc::clone(local), Arc::clone(artifact));
        let factors = factor(sums, Rc::clone(local));
        let predicted = predict(factors, Rc::clone(local), widths.to_vec()).probe_with(&probe);
        gather(predicted, gathered);
    });
    feed(worker, local, input, &probe, STEPS_IN_FLIGHT, &Go);
}

/// What each linear of `job`'s plan would lose at each of `widths`, by position in the plan; all zero for those that are left alone.
/// `work` is a folder of the run's own.
///
/// # Errors
/// Sums that are missing or cannot be factored, an interrupt.
pub fn losses(
    job: &Job,
    artifact: &Arc<Artifact>,
    widths: &[u32],
    work: &Path,
    observer: &Arc<dyn Observer>,
    halt: &Arc<Halt>,
) -> Result<Vec<Vec<f64>>> {
    let (tower, plan) = job.plan()?;
    let fit = job.fit(&plan)?;
    let linears = plan.linears.len();
    let scratch = job.scratch.as_deref().unwrap_or(work);
    let output = Output::open(work, "predict")?;
    let shared = Shared::new(
        (tower, PROBE_TOKENS),
        (plan, fit),
        scratch,
        output,
        observer,
        halt,
    )?;
    let shared = Arc::new(shared);
    shared.begin("predict", 0);
    let gathered = Gathered::default();
    let (artifact, asked, for_workers) = (Arc::clone(artifact), widths.to_vec(), Arc::clone(&gathered));
    run::with_locals(&shared, move |worker, local| {
        build(worker, local, &artifact, &asked, Arc::clone(&for_workers));
    })?;
    let gathered = gathered.lock().map(|mut chunks| std::mem::take(&mut *chunks));
    let mut chunks = gathered.map_err(|_| Error::Worker("it stopped while it gathered losses".into()))?;
    // In order of rows, so that sums do not depend on the number of workers.
    chunks.sort_by_key(|chunk| (chunk.linear, chunk.first_row));
    let mut losses = vec![vec![0.0; widths.len()]; linears];
    for chunk in chunks {
        for (sum, loss) in losses[chunk.linear].iter_mut().zip(chunk.losses) {
            *sum += loss;
        }
    }
    Ok(losses)
}
