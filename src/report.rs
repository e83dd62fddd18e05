//! What a run tells: a row a linear, progress as it happens, and where the time went.

use crate::error::Result;
use crate::system::thread_cpu;
use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// A linear whose relative error passes this is a warning: its outputs have lost more than half of their energy.
pub const RELATIVE_ERROR_MAX: f64 = 0.5;

/// One line of `quantization_report.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, Encode, Decode)]
pub struct Row {
    /// Module name.
    pub name: String,
    /// `W4 g128 symmetric`
    pub scheme: String,
    /// Calibration tokens that reached it; 0 for round-to-nearest.
    pub tokens: u64,
    /// Squared error of the outputs over the calibration tokens, as a share of the outputs' energy.
    pub relative_error: f64,
    /// The same, without damping, on statistics that were kept apart; `None` where none were.
    pub held_out_error: Option<f64>,
    /// Damping that was used, as a share of the mean diagonal; where it is chosen, the mean over the rows.
    pub damp_percent: f64,
    /// Share of codes at an end of the grid that clip their target.
    pub clip_rate: f64,
    /// Input channels that no calibration token woke.
    pub dead_columns: u64,
    /// What departs from the recipe, in words.
    pub fallback: Option<String>,
    /// CPU seconds of its solve.
    pub seconds: f64,
}

impl Row {
    /// Whether this row asks for a look: a fallback, or an error above [`RELATIVE_ERROR_MAX`].
    pub fn is_warning(&self) -> bool {
        self.fallback.is_some() || self.relative_error.is_nan() || self.relative_error > RELATIVE_ERROR_MAX
    }
}

/// Where a run's progress goes. Called from worker threads.
pub trait Observer: Send + Sync {
    /// A phase of `units` units begins.
    fn phase(&self, name: &str, units: u64);
    /// `units` more are done.
    fn advance(&self, units: u64);
    /// A linear is finished.
    fn linear(&self, row: &Row);
    /// Something the user should know.
    fn note(&self, text: &str);
}

/// An observer that tells nobody.
#[derive(Debug)]
pub struct Silent;

impl Observer for Silent {
    fn phase(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
    fn linear(&self, _: &Row) {}
    fn note(&self, _: &str) {}
}

/// Time by operator, over all workers: CPU time, or beside a device the wall clock's, in which an operator that needs a result waits for
/// what others asked of the device.
#[derive(Debug, Default)]
pub struct Clock {
    wall: bool,
    times: Mutex<BTreeMap<&'static str, Duration>>,
}

impl Clock {
    /// Books the wall clock's time.
    pub fn wall() -> Self {
        Self {
            wall: true,
            ..Self::default()
        }
    }

    /// Runs `work` and books its thread's time under `operator`.
    pub fn book<T>(&self, operator: &'static str, work: impl FnOnce() -> T) -> T {
        let begin = (Instant::now(), thread_cpu());
        let result = work();
        let spent = match self.wall {
            true => begin.0.elapsed(),
            false => thread_cpu().saturating_sub(begin.1),
        };
        if let Ok(mut times) = self.times.lock() {
            *times.entry(operator).or_default() += spent;
        }
        result
    }

    /// Seconds by operator.
    pub fn seconds(&self) -> BTreeMap<&'static str, f64> {
        let times = self.times.lock().map(|times| times.clone()).unwrap_or_default();
        times
            .into_iter()
            .map(|(name, time)| (name, time.as_secs_f64()))
            .collect()
    }
}

/// Rows as JSON lines.
pub fn to_json_lines(rows: &[Row]) -> Result<String> {
    let lines: Result<Vec<_>, _> = rows.iter().map(serde_json::to_string).collect();
    let lines = lines.map_err(|error| crate::error::Error::invalid("report", error.to_string(), ""))?;
    Ok(lines.into_iter().map(|line| line + "\n").collect())
}
