//! Round-to-nearest: no calibration, no forward pass, all steps at once behind a small window.
//!
//! ```text
//! steps ─gated by a probe─► solve ─by linear─► pack ─► commit ─► output shards, ledger
//! ```

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
    let first = (local.shared.output.blocks_done() * crate::model::SiteKind::ALL.len()) as u64;
    let halted = || local.shared.halt.is_raised();
    for step in first..local.shared.plan.steps() {
        input.advance_to(step);
        // Every worker solves its share of every step.
        input.send(Factored {
            factor: None,
            tokens: 0,
        });
        input.advance_to(step + 1);
        while probe.less_than(&(step + 1).saturating_sub(STEPS_IN_FLIGHT)) && !halted() {
            worker.step_or_park(Some(super::run::PARK));
        }
        if halted() {
            return;
        }
    }
}
