//! The byte budget of a run, at run time: whoever takes much memory asks here before, and gives back what it drops. The plan predicts
//! what will be asked for, so a refusal means that the plan was wrong: the run then stops, before the machine has to stop it.

use crate::error::{Error, Result};
use crate::system::{release_free_memory, resident_host_bytes};
use std::sync::{Arc, Mutex};

/// The last part of so many of a limit is close to it.
const LAST_PART: u64 = 8;

/// Resident bytes that a run may have, and those that it has.
#[derive(Debug)]
pub struct Budget {
    limit: u64,
    used: Mutex<Used>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Used {
    now: u64,
    peak: u64,
}

impl Budget {
    /// `limit` bytes, none of them taken.
    pub fn new(limit: u64) -> Arc<Self> {
        let used = Mutex::default();
        Arc::new(Self { limit, used })
    }

    /// Takes `bytes`, until the last copy of what is returned goes. `what` they are for is told where there are too few. What the allocator
    /// has kept of memory that went goes back to the system where both would not be within the limit, or close to it: others have taken bytes
    /// that they have not touched yet.
    ///
    /// # Errors
    /// Fewer are left.
    pub fn take(self: &Arc<Self>, what: &str, bytes: u64) -> Result<Grant> {
        let mut used = self.used.lock().map_err(|_| poisoned())?;
        let now = used.now.saturating_add(bytes);
        if now > self.limit {
            return Err(Error::usage(
                "--memory",
                format!(
                    "{what} need {bytes} bytes, and of the {} of the budget {} are taken: the plan predicted too little",
                    self.limit, used.now
                ),
                "repeat the command with a larger --memory: finished blocks are kept. This is a bug in quantflow: please report it",
            ));
        }
        used.now = now;
        used.peak = used.peak.max(now);
        drop(used);
        if resident_host_bytes().saturating_add(bytes) > self.limit - self.limit / LAST_PART {
            release_free_memory();
        }
        Ok(Grant(Some(Arc::new(Taken {
            budget: Arc::clone(self),
            bytes,
        }))))
    }

    /// The most bytes that were taken at the same time.
    pub fn peak(&self) -> u64 {
        self.used.lock().map_or(0, |used| used.peak)
    }
}

/// Bytes of a [`Budget`], taken until the last copy of this goes; or none.
#[derive(Clone, Debug, Default)]
pub struct Grant(#[expect(dead_code, reason = "it is held for its end")] Option<Arc<Taken>>);

#[derive(Debug)]
struct Taken {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let Ok(mut used) = self.budget.used.lock() {
            used.now -= self.bytes;
        }
    }
}

fn poisoned() -> Error {
    Error::Worker("a worker stopped while it asked for memory".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dropped_can_be_taken_again() {
        let budget = Budget::new(10);
        let six = budget.take("sums", 6).unwrap();
        let copy = six.clone();
        let error = budget.take("weights", 5).unwrap_err().to_string();
        assert!(
            error.contains("weights need 5 bytes") && error.contains("6 are taken"),
            "{error}"
        );
        let four = budget.take("codes", 4).unwrap();
        drop(six);
        assert!(budget.take("weights", 1).is_err(), "a copy is alive");
        drop((copy, four));
        assert!(budget.take("weights", 10).is_ok());
        assert!(budget.take("weights", u64::MAX).is_err());
        assert_eq!(budget.peak(), 10);
    }

    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[test]
    fn what_the_allocator_keeps_goes_before_the_limit_is_passed() {
        // Too small for mappings of their own, and the last one stays, so that what is free is not at the end.
        let blocks: Vec<Vec<u8>> = (0..4096).map(|_| vec![1; 64 << 10]).collect();
        let all: u64 = 256 << 20;
        let last = blocks.into_iter().next_back();
        let kept = resident_host_bytes();
        let within = Budget::new(u64::MAX).take("sums", 1);
        assert!(resident_host_bytes() + all / 4 > kept, "nothing had to go");
        let beyond = Budget::new(kept).take("sums", all);
        assert!(resident_host_bytes() + all / 2 < kept);
        drop((within, beyond, last));
    }
}
