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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// What the pieces did, and why the run halted.
    fn worked_off(pieces: Vec<Box<dyn FnOnce() -> Result<u32> + Send>>) -> (Vec<u32>, Option<Error>) {
        let (halt, done) = (Arc::new(Halt::default()), Arc::new(Mutex::new(Vec::new())));
        let behind = Behind::new(&halt);
        for piece in pieces {
            let done = Arc::clone(&done);
            let work = move || {
                let made = piece()?;
                done.lock().map(|mut done| done.push(made)).ok();
                Ok(())
            };
            behind.run(work).unwrap();
        }
        drop(behind);
        let done = done.lock().unwrap().clone();
        (done, halt.take())
    }

    #[test]
    fn pieces_are_done_in_order_before_it_is_gone() {
        let pieces = (0..20).map(|i| -> Box<dyn FnOnce() -> Result<u32> + Send> { Box::new(move || Ok(i)) });
        let (done, reason) = worked_off(pieces.collect());
        assert_eq!(done, (0..20).collect::<Vec<_>>());
        assert!(reason.is_none());
    }

    #[test]
    fn a_piece_that_fails_halts_the_run_and_later_ones_are_left() {
        let fails: [Box<dyn FnOnce() -> Result<u32> + Send>; 2] = [
            Box::new(|| Err(Error::Worker("the disk is full".into()))),
            Box::new(|| panic!("the disk is full")),
        ];
        for fails in fails {
            let (done, reason) = worked_off(vec![Box::new(|| Ok(1)), fails, Box::new(|| Ok(2))]);
            assert_eq!(done, [1]);
            assert!(matches!(reason, Some(Error::Worker(_))));
        }
    }
}
