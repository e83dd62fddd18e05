//! The command line: what was typed becomes a job for a pipeline; what comes back becomes text or JSON. Logs and progress go to
//! stderr, results to stdout. Exit codes: 0 fine, 1 failed, 2 usage, 3 finished with warnings under `--strict`.
#![allow(clippy::print_stdout)] // results go to stdout

mod allocation;
mod arguments;
mod demo;
mod evaluate;
mod inputs;
mod inspect;
mod plan;
mod progress;
mod quantize;
mod statistics;
mod sweep;
mod text;

use crate::error::{Error, Result};
use crate::operators::Halt;
use arguments::{Cli, Command};
use clap::Parser;
use std::process::ExitCode;
use std::sync::Arc;

/// Finished, but something in the report passed its threshold or a check did not hold.
const EXIT_WARNINGS: u8 = 3;

/// How a command ended that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Fine,
    Warnings,
}

/// Parses the arguments, runs the command, prints errors with their hints.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = tracing_subscriber::EnvFilter::try_new(cli.log.as_deref().unwrap_or("warn"));
    let filter = match (&cli.log, filter) {
        (None, _) => tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into()),
        (Some(_), Ok(filter)) => filter,
        (Some(text), Err(error)) => {
            eprintln!("error: --log {text}: {error}\n\nhint: try --log info, or --log quantflow=debug");
            return ExitCode::from(2);
        }
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    match run(cli) {
        Ok(Outcome::Fine) => ExitCode::SUCCESS,
        Ok(Outcome::Warnings) => ExitCode::from(EXIT_WARNINGS),
        Err(error) => {
            eprintln!("error: {error}");
            if let Some(hint) = error.hint() {
                eprintln!("\nhint: {hint}");
            }
            ExitCode::from(if matches!(error, Error::Usage { .. }) {
                2
            } else {
                1
            })
        }
    }
}

fn run(cli: Cli) -> Result<Outcome> {
    let halt = Arc::new(Halt::default());
    let on_interrupt = Arc::clone(&halt);
    // The first Ctrl-C stops at a safe point, the second at once.
    let handler = ctrlc::set_handler(move || {
        if on_interrupt.is_raised() {
            std::process::exit(130);
        }
        eprintln!("stopping at a safe point; press Ctrl-C again to stop at once");
        on_interrupt.raise(Error::Interrupted);
    });
    if let Err(error) = handler {
        tracing::warn!(%error, "Ctrl-C will stop the run at once");
    }
    match cli.command {
        Command::Quantize(arguments) => quantize::run(&arguments, &halt),
        Command::Plan(arguments) => plan::run(&arguments),
        Command::Statistics(command) => statistics::run(&command, &halt),
        Command::Solve(arguments) => quantize::solve(&arguments, &halt),
        Command::Sweep(arguments) => sweep::run(&arguments, &halt),
        Command::Evaluate(arguments) => evaluate::run(&arguments, &halt),
        Command::Verify(arguments) => inspect::verify(&arguments),
        Command::Inspect(arguments) => inspect::run(&arguments),
        Command::Logits(arguments) => evaluate::logits(&arguments),
        Command::Demo(arguments) => demo::run(&arguments, &halt),
    }
}

/// A result as one JSON object on stdout.
fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value);
    println!(
        "{}",
        text.map_err(|error| Error::invalid("report", error.to_string(), ""))?
    );
    Ok(())
}
