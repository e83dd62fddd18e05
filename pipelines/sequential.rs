//! The sequential graph: statistics of each site come from a prefix that is already quantized.
//!
//! ```text
//! batches ──exchange──► embed ─► replay (what is done)
//!                             ┌────┘ Go
//!   ┌──── time = step, a position in the plan ───────────────────────────────┐
//!   │                         ▼                                              │
//!   │  ┌──────────────────► concat ─► forward ─► accumulate ─[frontier]─┐    │
//!   │  │                                      sums, on the block's owner │    │
//!   │  │                                                  factor ◄───────┘    │
//!   │  │                                                     │ broadcast      │
//!   │  └─ step + 1 ◄─ install ◄─broadcast─ commit ◄─ pack ◄─by linear─ solve │
//!   │                                        │                               │
//!   └────────────────────────────────────────┼───────────────────────────────┘
//!                                            ▼
//!                          output shards, synced ─► ledger
//! ```
//! A step ends when the frontier passes it: nobody counts batches.

use crate::calibration::Batch;
use crate::operators::Local;
use crate::operators::accumulate::accumulate;
use crate::operators::commit::commit;
use crate::operators::embed::embed;
use crate::operators::factor::factor;
use crate::operators::forward::forward;
use crate::operators::install::install;
use crate::operators::pack::pack;
use crate::operators::replay::replay;
use crate::operators::solve::solve;
use std::rc::Rc;
use timely::dataflow::operators::vec::ToStream;
use timely::dataflow::operators::{Concat, ConnectLoop, Feedback};
use timely::worker::Worker;

/// Builds the graph on a worker. `order` is the order in which worker 0 announces the batches: any gives the same output.
pub fn build(worker: &mut Worker, local: &Rc<Local>, order: &[usize]) {
    let announce = |&position: &usize| {
        let batch: &Batch = &local.shared.batches[position];
        (batch.index as u64, position)
    };
    let batches: Vec<(u64, usize)> = match local.index {
        0 => order.iter().map(announce).collect(),
        _ => Vec::new(),
    };
    let local = || Rc::clone(local);
    worker.dataflow_named("sequential", |scope| {
        let (next, cycle) = scope.feedback(1);
        let begun = replay(embed(batches.to_stream(scope), local()), local());
        let steps = begun.concat(cycle);
        let inputs = forward(steps, local());
        let sums = accumulate(inputs, local());
        let factors = factor(sums, local());
        let chunks = solve(factors, local());
        let packed = pack(chunks, local());
        let committed = commit(packed, local());
        install(committed, local()).connect_loop(next);
    });
}
