//! Round-to-nearest: no calibration, no forward pass, all steps at once behind a small window.
//!
//! ```text
//! steps ─gated by a probe─► solve ─by linear─► pack ─► commit ─► output shards, ledger
//! ```

use super::run::feed;
use crate::operators::Local;
use crate::operators::commit::commit;
use crate::operators::pack::pack;
use crate::operators::records::Factored;
use crate::operators::solve::solve;
use std::rc::Rc;
use timely::container::CapacityContainerBuilder;
use timely::dataflow::operators::{Input, Probe};
use timely::dataflow::{InputHandle, ProbeHandle};
use timely::worker::Worker;

/// Steps in flight: enough to keep every worker busy, few enough that their weights fit.
const STEPS_IN_FLIGHT: u64 = 2;

/// Builds the graph on a worker and drives its source until the last step is committed or the run halts.
pub fn run(worker: &mut Worker, local: &Rc<Local>) {
    let mut input: InputHandle<u64, CapacityContainerBuilder<Vec<Factored>>> = InputHandle::new();
    let probe = ProbeHandle::new();
    worker.dataflow_named("data_free", |scope| {
        let steps = scope.input_from(&mut input);
        let chunks = solve(steps, Rc::clone(local));
        let packed = pack(chunks, Rc::clone(local));
        commit(packed, Rc::clone(local)).probe_with(&probe);
    });
    feed(
        worker,
        local,
        input,
        &probe,
        STEPS_IN_FLIGHT,
        &Factored::default(),
    );
}
