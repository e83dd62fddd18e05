//! `commit`: puts a step's linears into the output; the end of a block is made durable and noted in the ledger.

use super::activations::Stream;
use super::at_step_end;
use super::local::Local;
use super::records::{Committed, PackedLinear};
use crate::ledger::Record;
use std::rc::Rc;
use std::sync::Arc;
use timely::dataflow::StreamVec;
use timely::dataflow::operators::vec::Broadcast;

/// Runs on one worker of each output folder. One record a linear and worker.
pub fn commit<'scope>(
    packed: StreamVec<'scope, u64, PackedLinear>,
    local: Rc<Local>,
) -> StreamVec<'scope, u64, Committed> {
    let shared = Arc::clone(&local.shared);
    let mut rows = Vec::new();
    let committed = at_step_end(
        packed,
        "commit",
        |_| 0,
        local,
        move |step, mut packed: Vec<PackedLinear>| {
            packed.sort_by_key(|linear| linear.linear);
            for linear in &packed {
                let planned = &shared.plan.linears[linear.linear];
                for (spec, bytes) in shared.plan.tensors(planned).iter().zip(&linear.tensors) {
                    shared.output.writer()?.write(&spec.name, bytes)?;
                }
                if let Some(row) = &linear.row {
                    shared.observer.linear(row);
                    rows.push(row.clone());
                }
            }
            if !shared.pass.streams().contains(&Stream::Original) {
                shared.stages.forget_original(step);
            }
            if shared.plan.ends_block(step) {
                shared.output.writer()?.sync()?;
                let rows = std::mem::take(&mut rows);
                shared.output.note(Record::Block {
                    block: shared.plan.step(step).0 as u64,
                    rows,
                })?;
            }
            let committed = packed.into_iter().map(|linear| Committed {
                linear: linear.linear,
                quantized: linear.quantized,
                bytes: linear.bytes,
            });
            Ok(committed.collect())
        },
    );
    committed.broadcast()
}
