//! Work that a run does not wait for: a thread does one piece after the other.

use super::local::Halt;
use crate::error::{Error, Result};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

type Work = Box<dyn FnOnce() -> Result<()> + Send>;

/// The thread. Where a piece fails, the run halts, and later ones are left undone. Dropped, it finishes what it was given.
#[derive(Debug)]
pub(super) struct Behind {
    work: Option<SyncSender<Work>>,
    thread: Option<JoinHandle<()>>,
}

impl Behind {
    pub(super) fn new(halt: &Arc<Halt>) -> Self {
        let halt = Arc::clone(halt);
        // A piece that is handed over is begun at once: one is under way, and one waits at most, with whoever has it.
        let (work, given) = sync_channel::<Work>(0);
        let thread = std::thread::spawn(move || {
            let mut failed = false;
            for piece in given {
                if failed {
                    continue;
                }
                let outcome = catch_unwind(AssertUnwindSafe(piece));
                if let Err(error) = outcome.unwrap_or_else(|_| Err(Error::Worker("it panicked".into()))) {
                    failed = true;
                    halt.raise(error);
                }
            }
        });
        Self {
            work: Some(work),
            thread: Some(thread),
        }
    }

    /// Hands a piece over; waits until the one before is done.
    ///
    /// # Errors
    /// The thread is gone.
    pub(super) fn run(&self, piece: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
        let sent = self.work.as_ref().map(|work| work.send(Box::new(piece)));
        match sent {
            Some(Ok(())) => Ok(()),
            _ => Err(Error::Worker("the thread that writes has stopped".into())),
        }
    }
}

impl Drop for Behind {
    fn drop(&mut self) {
        drop(self.work.take());
        if let Some(thread) = self.thread.take() {
            // A panic of it was caught, and has halted the run.
            drop(thread.join());
        }
    }
}
