//! `sweep`.

use super::arguments::SweepArguments;
use super::inputs::windows;
use super::{Outcome, print_json, progress};
use crate::artifact::Artifact;
use crate::error::{IoContext, Result};
use crate::operators::Halt;
use crate::pipelines::job::Job;
use crate::pipelines::sweep::{Sweep, Tried, sweep};
use crate::recipe::Recipe;
use std::sync::Arc;

pub(super) fn run(arguments: &SweepArguments, halt: &Arc<Halt>) -> Result<Outcome> {
    let artifact = Artifact::open(&arguments.statistics)?;
    let mut recipe = Recipe::find(&arguments.recipe)?;
    recipe.match_original = 0.0;
    recipe.group_fallback |= arguments.group_fallback;
    // Outputs that nobody asked for lie in a folder that goes when this function ends, however it ends.
    let scratch = arguments
        .resources
        .scratch
        .clone()
        .unwrap_or_else(std::env::temp_dir);
    let temporary = tempfile::tempdir_in(&scratch).context("create a folder in", &scratch)?;
    let output = arguments
        .output
        .clone()
        .unwrap_or_else(|| temporary.path().to_owned());
    let job = Sweep {
        base: Job {
            statistics: Some(Arc::new(artifact)),
            placement: arguments.resources.placement()?,
            workers: arguments.resources.workers()?,
            device_memory: arguments.resources.device_memory,
            memory: arguments.resources.memory,
            scratch: arguments.resources.scratch.clone(),
            ..Job::new(arguments.model.clone(), output, recipe)
        },
        bits: arguments.bits.clone(),
        group_sizes: arguments.group_size.clone(),
        windows: windows(&arguments.model, &arguments.windows)?,
        keep: arguments.output.is_some(),
    };
    if !arguments.json {
        println!(
            "{:>4} {:>6} {:>10} {:>10} {:>10} {:>10} {:>8} {:>8} {:>10}",
            "bits", "group", "bits/wt", "MB", "error", "held-out", "seconds", "KL", "perplexity"
        );
    }
    let tried = sweep(&job, &progress::observer(false), halt, |row| {
        if !arguments.json {
            print(row);
        }
    })?;
    if arguments.json {
        print_json(&serde_json::json!({ "schemes": tried }))?;
    }
    Ok(Outcome::Fine)
}

fn print(row: &Tried) {
    let optional =
        |value: Option<f64>, digits: usize| value.map_or("-".into(), |value| format!("{value:.digits$}"));
    println!(
        "{:>4} {:>6} {:>10.3} {:>10.1} {:>10.5} {:>10} {:>8.1} {:>8} {:>10}{}",
        row.bits,
        match row.group_size {
            0 => "row".into(),
            size => size.to_string(),
        },
        row.effective_bits,
        row.output_bytes as f64 / 1e6,
        row.relative_error_mean,
        optional(row.held_out_error_mean, 5),
        row.solve_seconds,
        optional(row.scores.as_ref().map(|scores| scores.kl_mean), 4),
        optional(row.scores.as_ref().map(|scores| scores.perplexity), 2),
        match row.fallbacks {
            0 => String::new(),
            count => format!("  {count} warnings"),
        },
    );
}
