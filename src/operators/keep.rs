//! `keep`: adds a block's sums to those that the artifact holds, writes them, notes it in the ledger, and lets the next step begin.

use super::at_step_end;
use super::local::Local;
use super::records::{Go, Merged};
use crate::artifact::Artifact;
use crate::ledger::Record;
use std::rc::Rc;
use std::sync::Arc;
use timely::dataflow::StreamVec;
use timely::dataflow::operators::vec::Broadcast;

/// One [`Go`] a worker, until the last step is done.
pub fn keep<'scope>(
    merged: StreamVec<'scope, u64, Merged>,
    local: Rc<Local>,
    artifact: Arc<Artifact>,
) -> StreamVec<'scope, u64, Go> {
    let shared = Arc::clone(&local.shared);
    let own = local.index as u64;
    let mut block_sums = Vec::new();
    let kept = at_step_end(
        merged,
        "keep",
        // It is where its block is merged.
        move |_| own,
        local,
        move |step, merged: Vec<Merged>| {
            let (block, site) = shared.plan.step(step);
            for Merged(mut sums) in merged {
                if !artifact.header.blocks.is_empty() {
                    sums.merge(&artifact.site(block, site, &shared.room(step))?)?;
                }
                block_sums.push(sums);
            }
            if shared.plan.ends_block(step) {
                let file = artifact.write_block(block, &std::mem::take(&mut block_sums))?;
                shared.output.note(Record::Statistics {
                    block: block as u64,
                    file,
                })?;
            }
            Ok(if step + 1 < shared.plan.steps() {
                vec![Go]
            } else {
                Vec::new()
            })
        },
    );
    kept.broadcast()
}
