//! `keep`: adds a step's sums to those that the artifact holds and writes them; notes a finished block in the ledger, and lets the next
//! step begin.

use super::at_step_end;
use super::local::Local;
use super::records::{Go, Merged, Summed};
use crate::artifact::Artifact;
use crate::ledger::Record;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use timely::dataflow::StreamVec;
use timely::dataflow::operators::vec::Broadcast;

/// One [`Go`] a worker, until the last step is done.
pub fn keep<'scope>(
    merged: StreamVec<'scope, u64, Merged>,
    local: Rc<Local>,
    artifact: Arc<Artifact>,
    work: PathBuf,
) -> StreamVec<'scope, u64, Go> {
    let shared = Arc::clone(&local.shared);
    let peers = local.peers;
    let mut writer = None;
    let kept = at_step_end(
        merged,
        "keep",
        // A block's file is one worker's.
        move |merged| (merged.block % peers) as u64,
        local,
        move |step, mut merged: Vec<Merged>| {
            let (block, _) = shared.plan.step(step);
            let mut file = match writer.take() {
                Some(writer) => writer,
                None => artifact.block_writer(&work, block, shared.plan.block_sites(block))?,
            };
            merged.sort_by_key(|merged| merged.site);
            for Merged { site, statistics, .. } in merged {
                // A later part of a site that is summed already.
                let mut sums = match statistics {
                    None => continue,
                    Some(Summed::Host(sums)) => sums,
                    Some(Summed::Device(sums)) => sums.to_statistics(&shared.room(step))?,
                };
                if !artifact.header.blocks.is_empty() {
                    sums.merge(&artifact.site(block, site, &shared.room(step))?)?;
                }
                file.add(site, &sums)?;
            }
            if !shared.plan.ends_block(step) {
                writer = Some(file);
            } else {
                let file = file.finish()?;
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
