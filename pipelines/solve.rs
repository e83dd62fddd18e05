//! From a statistics artifact to a quantized checkpoint: no calibration text, no forward pass.
//!
//! ```text
//! steps ─gated by a probe─► load ─► factor ─broadcast─► solve ─by linear─► pack ─► commit ─► output shards, ledger
//! ```
//! A step is loaded and factored by the worker that owns its block, while the others work on other blocks; its rows are solved by all.

use super::run::feed;
use crate::artifact::Artifact;
use crate::operators::Local;
use crate::operators::commit::commit;
use crate::operators::factor::factor;
use crate::operators::load::load;
use crate::operators::pack::pack;
use crate::operators::records::Go;
use crate::operators::solve::solve;
use std::rc::Rc;
use std::sync::Arc;
use timely::container::CapacityContainerBuilder;
use timely::dataflow::operators::{Input, Probe};
use timely::dataflow::{InputHandle, ProbeHandle};
use timely::worker::Worker;

/// Steps in flight: while one is solved, the next is loaded and factored.
const STEPS_IN_FLIGHT: u64 = 2;

/// Builds the graph on a worker and drives its source until the last step is committed or the run halts.
pub fn run(worker: &mut Worker, local: &Rc<Local>, artifact: &Arc<Artifact>) {
    let mut input: InputHandle<u64, CapacityContainerBuilder<Vec<Go>>> = InputHandle::new();
    let probe = ProbeHandle::new();
    worker.dataflow_named("solve", |scope| {
        let steps = scope.input_from(&mut input);
        let sums = load(steps, Rc::clone(local), Arc::clone(artifact));
        let factors = factor(sums, Rc::clone(local));
        let chunks = solve(factors, Rc::clone(local));
        let packed = pack(chunks, Rc::clone(local));
        commit(packed, Rc::clone(local)).probe_with(&probe);
    });
    feed(worker, local, input, &probe, STEPS_IN_FLIGHT, &Go);
}
