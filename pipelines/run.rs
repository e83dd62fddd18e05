//! Runs a graph on the workers of one process, and turns whatever goes wrong on a worker into one error.

use crate::error::{Error, Result};
use crate::operators::activations::{ActivationStore, Precision};
use crate::operators::{Halt, Local, Shared};
use crate::storage;
use safetensors::Dtype;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use timely::container::CapacityContainerBuilder;
use timely::dataflow::{InputHandle, ProbeHandle};
use timely::worker::Worker;

/// Longest sleep of an idle worker: it looks at the halt flag so often.
pub const PARK: Duration = Duration::from_millis(100);

/// Runs `build` on `workers` worker threads and steps them until their dataflows are done or the run halts.
///
/// Kernels run on the worker's own thread.
///
/// # Errors
/// The reason of the halt, or a panic of a worker, by its message.
pub fn on_workers<B>(workers: usize, halt: &Arc<Halt>, build: B) -> Result<()>
where
    B: Fn(&mut Worker) -> Result<()> + Send + Sync + 'static,
{
    let flag = Arc::clone(halt);
    let body = move |worker: &mut Worker| {
        // A pool of one thread, the worker's own: kernels that use rayon then stay on it.
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(1)
            .use_current_thread()
            .build();
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            build(worker)?;
            while worker.has_dataflows() && !flag.is_raised() {
                worker.step_or_park(Some(PARK));
            }
            Ok::<(), Error>(())
        }));
        match outcome {
            Ok(Ok(())) => {}
            Ok(Err(error)) => flag.raise(error),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
                flag.raise(Error::Worker(text.unwrap_or_else(|| "it panicked".into())));
            }
        }
        if flag.is_raised() {
            for dataflow in worker.installed_dataflows() {
                worker.drop_dataflow(dataflow);
            }
        }
        drop(pool);
    };
    let guards = timely::execute(timely::Config::process(workers), body).map_err(Error::Worker)?;
    let joined = catch_unwind(AssertUnwindSafe(|| {
        guards.join().into_iter().all(|result| result.is_ok())
    }));
    if let Some(reason) = halt.take() {
        return Err(reason);
    }
    match joined {
        Ok(true) => Ok(()),
        _ => Err(Error::Worker("it panicked".into())),
    }
}

/// As [`on_workers`], on those that the plan counts with, each with its [`Local`] and its share of the resident activations.
pub fn with_locals<B>(shared: &Arc<Shared>, build: B) -> Result<()>
where
    B: Fn(&mut Worker, &Rc<Local>) + Send + Sync + 'static,
{
    let workers = shared.fit.load.workers;
    storage::create_folder(&shared.scratch)?;
    let budget = &shared.budget;
    let _taken = (
        budget.take(
            "the program and the source's readers",
            shared.plan.process_bytes(workers),
        )?,
        budget.take("activations", shared.fit.resident_activation_bytes)?,
    );
    let resident = shared.fit.resident_activation_bytes as usize / workers;
    let precision = match shared.tower.weight_dtype() {
        Dtype::BF16 => Precision::Bf16,
        Dtype::F16 => Precision::F16,
        _ => Precision::F32,
    };
    let device_bytes = shared.fit.device_activation_bytes as usize / workers;
    let for_workers = Arc::clone(shared);
    on_workers(workers, &shared.halt, move |worker| {
        let local = Rc::new(Local {
            shared: Arc::clone(&for_workers),
            index: worker.index(),
            peers: worker.peers(),
            store: RefCell::new(
                ActivationStore::new(&for_workers.scratch, resident, precision)
                    .with_device(for_workers.tower.placement(), device_bytes),
            ),
            batches: RefCell::default(),
        });
        build(worker, &local);
        Ok(())
    })
}

/// Sends `record` at every step that is not done, on every worker, with at most `in_flight` steps on their way to `probe`.
pub fn feed<D: Clone + 'static>(
    worker: &mut Worker,
    local: &Local,
    mut input: InputHandle<u64, CapacityContainerBuilder<Vec<D>>>,
    probe: &ProbeHandle<u64>,
    in_flight: u64,
    record: &D,
) {
    let shared = &local.shared;
    let first = shared.plan.block_steps(shared.output.blocks_done()).start;
    for step in first..shared.plan.steps() {
        input.advance_to(step);
        while probe.less_than(&(step + 1).saturating_sub(in_flight)) && !shared.halt.is_raised() {
            worker.step_or_park(Some(PARK));
        }
        if shared.halt.is_raised() {
            return;
        }
        input.send(record.clone());
    }
}
