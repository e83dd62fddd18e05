//! `commit`: puts a step's linears into the output; the end of a block is made durable and noted in the ledger.

use super::activations::Stream;
use super::at_step_end;
use super::behind::Behind;
use super::local::{Local, Shared};
use super::pack::packed;
use super::records::{Committed, Content, PackedLinear};
use crate::error::{Error, Result};
use crate::ledger::Record;
use crate::report::{Clock, Row};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use timely::dataflow::StreamVec;
use timely::dataflow::operators::vec::Broadcast;

/// Threads behind a run on a device. One packs and writes, and is at most a step late; the other has the disk keep what a block has written, at
/// most a block late.
struct Writing {
    write: Behind,
    sync: Arc<Behind>,
}

impl Writing {
    fn new(shared: &Shared) -> Self {
        Self {
            write: Behind::new(&shared.halt),
            sync: Arc::new(Behind::new(&shared.halt)),
        }
    }
}

/// Runs on one worker of each output folder. One record a linear and worker. What is on a device is packed and written behind the run.
pub fn commit<'scope>(
    packed: StreamVec<'scope, u64, PackedLinear>,
    local: Rc<Local>,
) -> StreamVec<'scope, u64, Committed> {
    let shared = Arc::clone(&local.shared);
    let rows: Arc<Mutex<Vec<Row>>> = Arc::default();
    let behind = (shared.tower.placement().on_device).then(|| Writing::new(&shared));
    let committed = at_step_end(
        packed,
        "commit",
        |_| 0,
        local,
        move |step, mut linears: Vec<PackedLinear>| {
            linears.sort_by_key(|linear| linear.linear);
            let mut contents = Vec::with_capacity(linears.len());
            let mut committed = Vec::with_capacity(linears.len());
            for linear in linears {
                contents.push((linear.linear, linear.content));
                committed.push(Committed {
                    linear: linear.linear,
                    quantized: linear.quantized,
                    bytes: linear.bytes,
                });
            }
            let writing = {
                let (shared, rows) = (Arc::clone(&shared), Arc::clone(&rows));
                let sync = behind.as_ref().map(|behind| Arc::clone(&behind.sync));
                move || write(&shared, step, contents, &rows, sync.as_deref())
            };
            match &behind {
                Some(behind) => behind.write.run(writing)?,
                None => writing()?,
            }
            if !shared.pass.streams().contains(&Stream::Original) {
                shared.stages.forget_original(step);
            }
            Ok(committed)
        },
    );
    committed.broadcast()
}

/// Writes a step's linears; `rows` has those of the block so far. A block that is whole is made durable, where there is a thread for it by `sync`, and
/// noted.
fn write(
    shared: &Arc<Shared>,
    step: u64,
    contents: Vec<(usize, Content)>,
    rows: &Mutex<Vec<Row>>,
    sync: Option<&Behind>,
) -> Result<()> {
    let mut rows = rows
        .lock()
        .map_err(|_| Error::Worker("a thread stopped while it wrote".into()))?;
    let writer = shared.output.writer()?;
    // What is done behind the run is booked by itself.
    let clock = sync.map(|_| &shared.clock);
    for (linear, content) in contents {
        let planned = &shared.plan.linears[linear];
        let (content, _codes) = match content {
            Content::Packed(packed) => (packed, None),
            Content::Solved(chunks) => {
                let made = booked(clock, "pack, behind", || packed(shared, planned, chunks))?;
                made.map(|(_, packed, codes)| (packed, codes)).unzip()
            }
        };
        let Some(packed) = content else { continue };
        booked(clock, "write, behind", || {
            let tensors = shared.plan.tensors(planned);
            let mut pairs = tensors.iter().zip(&packed.tensors);
            pairs.try_for_each(|(spec, bytes)| writer.write(&spec.name, bytes))
        })?;
        shared.observer.linear(&packed.row);
        rows.push(packed.row);
    }
    shared.output.note_written(step);
    if !shared.plan.ends_block(step) {
        return Ok(());
    }
    let (block, rows) = (shared.plan.step(step).0 as u64, std::mem::take(&mut *rows));
    match sync {
        None => note(shared, block, rows),
        Some(sync) => {
            let shared = Arc::clone(shared);
            sync.run(move || shared.clock.book("sync, behind", || note(&shared, block, rows)))
        }
    }
}

/// Makes a block durable, and then the note that it is.
fn note(shared: &Shared, block: u64, rows: Vec<Row>) -> Result<()> {
    shared.output.writer()?.sync()?;
    shared.output.note(Record::Block { block, rows })
}

fn booked<T>(clock: Option<&Clock>, what: &'static str, work: impl FnOnce() -> T) -> T {
    match clock {
        Some(clock) => clock.book(what, work),
        None => work(),
    }
}
