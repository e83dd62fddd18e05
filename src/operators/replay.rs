//! `replay`: takes the batches through the blocks that an earlier run of the same command finished, with the weights that it committed,
//! so that the streams are where that run left them. The workers go from step to step together: no step's weights are read twice.

use super::activations::PROBE;
use super::at_step_end;
use super::forward::advance;
use super::local::Local;
use super::records::Go;
use crate::error::Error;
use std::rc::Rc;
use std::sync::Arc;
use timely::dataflow::StreamVec;
use timely::dataflow::operators::core::OkErr;
use timely::dataflow::operators::vec::Map;
use timely::dataflow::operators::{Concat, ConnectLoop, Feedback};

/// From a [`Go`] a worker at the first step to one at the first that is not done.
pub fn replay<'scope>(begin: StreamVec<'scope, u64, Go>, local: Rc<Local>) -> StreamVec<'scope, u64, Go> {
    let scope = begin.scope();
    let shared = &local.shared;
    let first = shared.plan.block_steps(shared.output.blocks_done()).start;
    let (next, cycle) = scope.feedback(1);
    let steps = begin.map(|Go| 0).concat(cycle);
    let (done, ahead) = steps.ok_err(move |step| if step < first { Ok(step) } else { Err(Go) });
    let own = local.index as u64;
    let carried = {
        let worker = Rc::clone(&local);
        at_step_end(
            done,
            "replay",
            move |_| own,
            Rc::clone(&local),
            move |step, own: Vec<u64>| {
                for &position in worker.batches.borrow().iter().chain([&PROBE]) {
                    if worker.shared.halt.is_raised() {
                        return Err(Error::Interrupted);
                    }
                    advance(&worker, step, position, false)?;
                }
                Ok(own)
            },
        )
    };
    let shared = Arc::clone(&local.shared);
    at_step_end(
        carried,
        "replayed",
        move |_| own,
        local,
        move |step, _: Vec<u64>| {
            // What carried the batches here has served, on every worker.
            let served = shared.plan.served(step);
            served.for_each(|served| shared.stages.forget(served));
            Ok(vec![step + 1])
        },
    )
    .connect_loop(next);
    ahead
}
