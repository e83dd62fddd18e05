//! Progress on stderr: a bar a phase on a terminal, plain lines otherwise.

use crate::report::{Observer, Row};
use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use std::fmt::Write;
use std::io::IsTerminal;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Plain lines come at most so often.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

struct Progress {
    bar: ProgressBar,
    terminal: bool,
    rows: bool,
    last_line: Mutex<(Instant, String)>,
}

/// An observer for a person; `rows` prints each linear as it finishes.
pub(super) fn observer(rows: bool) -> Arc<dyn Observer> {
    let terminal = std::io::stderr().is_terminal();
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::hidden());
    if terminal {
        bar.set_draw_target(ProgressDrawTarget::stderr());
    }
    if let Ok(style) =
        ProgressStyle::with_template("{msg:>9} {wide_bar} {percent:>3}%  {elapsed_precise}, {left} left")
    {
        let left = |state: &ProgressState, text: &mut dyn Write| {
            let left = left(state.elapsed(), state.fraction().into());
            // Text that cannot be written is not shown.
            let _ = write!(text, "{}", HumanDuration(left));
        };
        bar.set_style(style.with_key("left", left));
    }
    Arc::new(Progress {
        bar,
        terminal,
        rows,
        last_line: Mutex::new((Instant::now(), String::new())),
    })
}

/// What is left after `elapsed`, if all goes as what is `done` of 1 went: pieces of work are too few and too different for the rate of the
/// last ones to tell.
fn left(elapsed: Duration, done: f64) -> Duration {
    let left = elapsed.as_secs_f64() * (1.0 - done).max(0.0) / done;
    Duration::try_from_secs_f64(left).unwrap_or_default()
}

impl Progress {
    fn line(&self, text: &str) {
        if self.terminal {
            self.bar.suspend(|| eprintln!("{text}"));
        } else {
            eprintln!("{text}");
        }
    }
}

impl Observer for Progress {
    fn phase(&self, name: &str, units: u64) {
        self.bar.reset();
        self.bar.set_length(units);
        self.bar.set_message(name.to_owned());
        if let Ok(mut last) = self.last_line.lock() {
            *last = (Instant::now(), name.to_owned());
        }
        if name == "finish" && self.terminal {
            self.bar.finish_and_clear();
        }
    }

    fn advance(&self, units: u64) {
        self.bar.inc(units);
        if self.terminal {
            return;
        }
        if let Ok(mut last) = self.last_line.lock()
            && last.0.elapsed() >= LINE_INTERVAL
        {
            last.0 = Instant::now();
            let done = self.bar.position() as f64 / self.bar.length().unwrap_or(0).max(1) as f64;
            let left = HumanDuration(left(self.bar.elapsed(), done));
            eprintln!("{}: {:.0} %, about {left} left", last.1, 100.0 * done);
        }
    }

    fn linear(&self, row: &Row) {
        tracing::info!(name = row.name, error = row.relative_error, "quantized");
        if self.rows || row.is_warning() {
            let fallback = row
                .fallback
                .as_ref()
                .map(|text| format!("  [{text}]"))
                .unwrap_or_default();
            self.line(&format!(
                "{:<48} {:<18} error {:.2e}{fallback}",
                row.name, row.scheme, row.relative_error
            ));
        }
    }

    fn note(&self, text: &str) {
        self.line(text);
    }
}
