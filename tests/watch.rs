//! An observer that keeps what a run tells, and stops it after some of it, as Ctrl-C would.

use quantflow::error::Error;
use quantflow::operators::Halt;
use quantflow::report::{Observer, Row};
use std::sync::{Arc, Mutex, MutexGuard};

/// What a run has told.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) phases: Vec<Phase>,
    /// Of all phases.
    pub(crate) pieces: usize,
    pub(crate) linears: usize,
    pub(crate) notes: Vec<String>,
}

#[derive(Debug)]
pub(crate) struct Phase {
    pub(crate) name: String,
    pub(crate) units: u64,
    pub(crate) done: u64,
    pub(crate) pieces: u64,
}

pub(crate) struct Watch {
    seen: Mutex<Seen>,
    stop: Box<dyn Fn(&Seen) -> bool + Send + Sync>,
    halt: Arc<Halt>,
}

impl Watch {
    /// Stops the run once `stop` says so.
    pub(crate) fn until(stop: impl Fn(&Seen) -> bool + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            seen: Mutex::default(),
            stop: Box::new(stop),
            halt: Arc::default(),
        })
    }

    pub(crate) fn to_the_end() -> Arc<Self> {
        Self::until(|_| false)
    }

    /// Runs `work` under watch.
    pub(crate) fn over<T>(self: &Arc<Self>, work: impl FnOnce(&Arc<dyn Observer>, &Arc<Halt>) -> T) -> T {
        let observer: Arc<dyn Observer> = Arc::<Self>::clone(self);
        work(&observer, &self.halt)
    }

    pub(crate) fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap()
    }

    /// The work of a phase was told whole, to the rounding of its pieces.
    pub(crate) fn assert_all_told(&self, name: &str) {
        let seen = self.seen();
        let phase = seen.phases.iter().find(|phase| phase.name == name);
        let phase = phase.unwrap_or_else(|| panic!("no phase {name}: {seen:?}"));
        assert!(phase.units > 1000 && phase.pieces > 4, "{phase:?}");
        assert!(phase.units.abs_diff(phase.done) <= phase.pieces, "{phase:?}");
    }

    fn see(&self, change: impl FnOnce(&mut Seen)) {
        let mut seen = self.seen();
        change(&mut seen);
        if (self.stop)(&seen) {
            self.halt.raise(Error::Interrupted);
        }
    }
}

impl Observer for Watch {
    fn phase(&self, name: &str, units: u64) {
        let phase = Phase {
            name: name.into(),
            units,
            done: 0,
            pieces: 0,
        };
        self.see(|seen| seen.phases.push(phase));
    }

    fn advance(&self, units: u64) {
        self.see(|seen| {
            let phase = seen.phases.last_mut().expect("a phase begins first");
            phase.done += units;
            phase.pieces += 1;
            seen.pieces += 1;
        });
    }

    fn note(&self, note: &str) {
        self.see(|seen| seen.notes.push(note.into()));
    }

    fn linear(&self, _: &Row) {
        self.see(|seen| seen.linears += 1);
    }
}
