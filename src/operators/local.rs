//! What operators may touch besides their streams: state of the process ([`Shared`]) and of the worker ([`Local`]).

use super::accumulate::Sums;
use super::activations::{ActivationStore, Stream};
use super::experts::ExpertTokens;
use super::stages::Stages;
use crate::budget::{Budget, Grant};
use crate::calibration::{self, Batch, PROBE_TOKENS};
use crate::checkpoint::OutputWriter;
use crate::error::{Error, Result};
use crate::ledger::{LEDGER, Ledger, Record};
use crate::memory::Room;
use crate::model::{Rotary, SiteKind, Tower};
use crate::numerics::speed::Speed;
use crate::plan::{Fit, Plan, Work};
use crate::report::{Clock, Observer};
use crate::statistics::Product;
use std::cell::RefCell;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Stops a run: raised by the first error or by Ctrl-C, seen by every worker between two pieces of work.
#[derive(Debug, Default)]
pub struct Halt {
    raised: AtomicBool,
    reason: Mutex<Option<Error>>,
}

impl Halt {
    /// Asks all workers to stop at a safe point. The first reason counts.
    pub fn raise(&self, reason: Error) {
        if let Ok(mut kept) = self.reason.lock() {
            kept.get_or_insert(reason);
        }
        self.raised.store(true, Ordering::SeqCst);
    }

    /// Whether to stop.
    pub fn is_raised(&self) -> bool {
        self.raised.load(Ordering::SeqCst)
    }

    /// Why, once.
    pub fn take(&self) -> Option<Error> {
        self.reason.lock().ok().and_then(|mut reason| reason.take())
    }
}

/// The output of a run and what is already in it.
#[derive(Debug)]
pub struct Output {
    /// Shards, open for writing; `None` where statistics are all that is made.
    pub writer: Option<OutputWriter>,
    /// Durable facts.
    pub ledger: Mutex<Ledger>,
    /// Facts of earlier runs of the same command, and of this one.
    pub records: Mutex<Vec<Record>>,
    /// Steps that this run has written, from the first of the plan.
    written: AtomicU64,
}

impl Output {
    /// Opens or begins the ledger in `work` for the run `fingerprint`; there are no shards yet.
    ///
    /// # Errors
    /// The unfinished run in that folder is another one.
    pub fn open(work: &Path, fingerprint: &str) -> Result<Self> {
        let (ledger, records) = Ledger::open(&work.join(LEDGER), fingerprint)?;
        Ok(Self {
            writer: None,
            ledger: Mutex::new(ledger),
            records: Mutex::new(records),
            written: AtomicU64::new(0),
        })
    }

    /// The shards.
    pub fn writer(&self) -> Result<&OutputWriter> {
        self.writer
            .as_ref()
            .ok_or_else(|| Error::Worker("this run writes no checkpoint".into()))
    }

    /// Tells which of `blocks` an earlier run of the same command has done, and returns how many.
    pub fn resume(&self, blocks: usize, observer: &dyn Observer) -> usize {
        let done = self.blocks_done();
        if done > 0 {
            observer.note(&format!("continuing: {done} of {blocks} blocks are done"));
        }
        done
    }

    /// Notes that a step's tensors are in the shards: they can be read back.
    pub(super) fn note_written(&self, step: u64) {
        self.written.store(step + 1, Ordering::Release);
    }

    /// Whether the tensors of `step`, of the block `block`, are in the shards.
    pub(super) fn is_written(&self, step: u64, block: usize) -> bool {
        block < self.blocks_done() || step < self.written.load(Ordering::Acquire)
    }

    /// Notes a fact, durably. The data that it speaks of has to be synced before.
    pub fn note(&self, record: Record) -> Result<()> {
        let poisoned = || Error::Worker("a worker stopped while it wrote the ledger".into());
        self.ledger.lock().map_err(|_| poisoned())?.append(&record)?;
        self.records.lock().map_err(|_| poisoned())?.push(record);
        Ok(())
    }

    /// Blocks that are done, from the first.
    pub fn blocks_done(&self) -> usize {
        let count = |records: &Vec<Record>| {
            records
                .iter()
                .filter(|r| matches!(r, Record::Block { .. } | Record::Statistics { .. }))
                .count()
        };
        self.records.lock().map(|records| count(&records)).unwrap_or(0)
    }
}

/// Which forward passes run, and so what can be summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// The model with the blocks so far quantized.
    Quantized,
    /// That one, and the original beside it.
    Both,
    /// The model as it came, with these products.
    Original(&'static [Product]),
}

impl Pass {
    /// The streams; the inputs of the first are summed.
    pub fn streams(self) -> &'static [Stream] {
        match self {
            Self::Quantized => &[Stream::Quantized],
            Self::Both => &[Stream::Quantized, Stream::Original],
            Self::Original(_) => &[Stream::Original],
        }
    }

    /// What is summed of a site.
    pub fn products(self) -> &'static [Product] {
        match self {
            Self::Quantized => &[Product::Gram],
            Self::Both => &[Product::Gram, Product::Cross],
            Self::Original(products) => products,
        }
    }
}

/// Shared by all workers of a process.
pub struct Shared {
    /// The source.
    pub tower: Tower,
    /// The work.
    pub plan: Plan,
    /// What runs of it, and how it fits into the memory.
    pub fit: Fit,
    /// The memory: whoever takes much of it asks.
    pub budget: Arc<Budget>,
    /// Where activations and matrices go that do not.
    pub scratch: Arc<Path>,
    /// Calibration batches.
    pub batches: Vec<Batch>,
    /// Which forward passes run.
    pub pass: Pass,
    /// The probe's tokens: one sequence.
    pub probe: Vec<u32>,
    /// Rotary tables for the longest sequence, the probe included.
    pub rotary: Vec<Arc<Rotary>>,
    /// Sums of the steps in work.
    pub sums: Sums,
    /// How many tokens the experts of the blocks in work were sent.
    pub experts: ExpertTokens,
    /// Weights of the steps in work.
    pub stages: Stages,
    /// The target.
    pub output: Output,
    /// Where progress goes.
    pub observer: Arc<dyn Observer>,
    /// Time by operator.
    pub clock: Clock,
    /// Stops the run.
    pub halt: Arc<Halt>,
}

impl Shared {
    /// A run of `plan` over no batches, by the quantized stream alone. `length` is that of the longest sequence.
    ///
    /// # Errors
    /// The model's rotary tables cannot be made.
    pub fn new(
        (tower, length): (Tower, usize),
        (plan, fit): (Plan, Fit),
        scratch: &Path,
        output: Output,
        observer: &Arc<dyn Observer>,
        halt: &Arc<Halt>,
    ) -> Result<Self> {
        let budget = Budget::new(fit.limit);
        let clock = match tower.placement().on_device {
            true => Clock::wall(),
            false => Clock::default(),
        };
        Ok(Self {
            rotary: tower.rotary(length.max(PROBE_TOKENS))?,
            probe: calibration::probe(tower.spec.vocab_size, PROBE_TOKENS),
            tower,
            plan,
            fit,
            scratch: scratch.into(),
            batches: Vec::new(),
            pass: Pass::Quantized,
            sums: Sums::default(),
            experts: ExpertTokens::default(),
            stages: Stages::new(Arc::clone(&budget)),
            budget,
            output,
            observer: Arc::clone(observer),
            clock,
            halt: Arc::clone(halt),
        })
    }

    /// Tells that the steps from `first` on begin.
    pub fn begin(&self, phase: &str, first: u64) {
        let seconds = (first..self.plan.steps()).map(|step| self.work(step).seconds());
        self.observer.phase(phase, units(seconds.sum()));
    }

    /// Tells that a `share` of a `part` of the work of `step` is done.
    pub fn advance(&self, step: u64, part: impl Fn(Work) -> f64, share: f64) {
        self.observer.advance(units(part(self.work(step)) * share));
    }

    fn work(&self, step: u64) -> Work {
        self.plan.work(&self.fit.load, Speed::TYPICAL, step)
    }

    /// Where the matrices of a step are made.
    pub fn room(&self, step: u64) -> Room {
        match self.fit.is_spilled(step) {
            true => Room::Scratch(Arc::clone(&self.scratch)),
            false => Room::Budget(Arc::clone(&self.budget)),
        }
    }

    /// Asks for so many panels of a step's matrices, if they lie in scratch files: no more of them is resident at a time.
    pub fn take_panels(&self, step: u64, panels: u64) -> Result<Grant> {
        match self.fit.is_spilled(step) {
            true => (self.budget).take("panels of matrices", panels * self.plan.panel_bytes(step)),
            false => Ok(Grant::default()),
        }
    }
}

/// What progress is counted in: nanoseconds of a typical core.
fn units(seconds: f64) -> u64 {
    (seconds * 1e9).round() as u64
}

/// One worker's own.
pub struct Local {
    /// The process's.
    pub shared: Arc<Shared>,
    /// This worker's index.
    pub index: usize,
    /// Workers in all processes.
    pub peers: usize,
    /// Activations of the batches that this worker holds.
    pub store: RefCell<ActivationStore>,
    /// Positions of those batches in [`Shared::batches`].
    pub batches: RefCell<Vec<usize>>,
}

impl Local {
    /// The worker that factors or keeps the sums of a site. A mixture's experts are dealt over all.
    pub fn owner(&self, block: usize, site: SiteKind) -> u64 {
        let turn = match site {
            SiteKind::ExpertDown(expert) => expert as usize,
            _ => 0,
        };
        ((block + turn) % self.peers) as u64
    }

    /// Tokens of a batch, all its sequences.
    pub fn tokens(&self, position: usize) -> &[u32] {
        match position {
            super::activations::PROBE => &self.shared.probe,
            position => &self.shared.batches[position].tokens,
        }
    }

    /// Tokens of one sequence of a batch.
    pub fn sequence_length(&self, position: usize) -> usize {
        match position {
            super::activations::PROBE => self.shared.probe.len(),
            position => self.shared.batches[position].length,
        }
    }

    /// Runs a piece of an operator's work and books its time; an error halts the run and gives `None`.
    pub fn run<T>(&self, operator: &'static str, work: impl FnOnce() -> Result<T>) -> Option<T> {
        if self.shared.halt.is_raised() {
            return None;
        }
        match self.shared.clock.book(operator, work) {
            Ok(value) => Some(value),
            Err(error) => {
                self.shared.halt.raise(error);
                None
            }
        }
    }
}
