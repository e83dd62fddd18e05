//! `--average-bits` of `solve` and `quantize`.

use super::arguments::{AllocationArguments, QuantizeArguments, SolveArguments, WindowArguments};
use super::inputs::{calibrate, windows};
use crate::calibration::Calibration;
use crate::error::{Error, Result};
use crate::pipelines::allocate::{Allocation, From, RECIPE, SENSITIVITY, Wanted, sample};
use crate::pipelines::job::Summary;
use serde::Serialize;
use std::collections::BTreeMap;

/// Tokens of a window that is measured on, at most.
const LENGTH_MAX: usize = 512;

/// What `--json` prints of a run that chose widths.
#[derive(Serialize)]
pub(super) struct Told<'a> {
    #[serde(flatten)]
    pub summary: &'a Summary,
    pub allocation: &'a Allocation,
}

/// What `solve` is asked to choose: windows come from flags of its own.
pub(super) fn while_solving(arguments: &SolveArguments) -> Result<Option<Wanted>> {
    wanted(&arguments.allocation, || {
        let given = WindowArguments {
            text: arguments.text.clone(),
            tokens: arguments.tokens.clone(),
            length: arguments.length,
            windows: None,
        };
        let found = windows(&arguments.model, &given)?;
        found.ok_or_else(|| {
            Error::usage(
                "--average-bits",
                "needs text to measure on what the linears cost",
                format!("give --text FILE or --tokens FILE.npy, or an earlier output's {SENSITIVITY} as --sensitivity"),
            )
        })
    })
}

/// What `quantize` is asked to choose: it measures on its calibration.
pub(super) fn while_quantizing(arguments: &QuantizeArguments) -> Result<Option<Wanted>> {
    if arguments.allocation.average_bits.is_some() && !arguments.collects() {
        return Err(Error::usage(
            "--average-bits",
            "needs statistics of the original model, by which the widths are chosen",
            format!(
                "add --activations independent; its {RECIPE} then serves sequential runs, too, as --recipe"
            ),
        ));
    }
    wanted(&arguments.allocation, || {
        let found = calibrate(&arguments.calibration, &arguments.model)?;
        let length = found.length_max().min(LENGTH_MAX);
        let tokens: Vec<u32> = (found.batches.iter())
            .flat_map(|batch| batch.tokens.chunks_exact(batch.length.max(1)))
            .filter(|sequence| sequence.len() >= length)
            .flat_map(|sequence| sequence[..length].iter().copied())
            .collect();
        Ok(Calibration {
            batches: crate::calibration::batches(&tokens, length),
            usage: found.usage,
        })
    })
}

fn wanted(
    arguments: &AllocationArguments,
    windows: impl FnOnce() -> Result<Calibration>,
) -> Result<Option<Wanted>> {
    let Some(average_bits) = arguments.average_bits else {
        return Ok(None);
    };
    if arguments.windows == 0 {
        return Err(Error::usage("--windows", "must be at least 1", ""));
    }
    let measured = match &arguments.sensitivity {
        Some(file) => From::File(file.clone()),
        None => From::Windows(sample(&windows()?, arguments.windows)),
    };
    Ok(Some(Wanted {
        average_bits,
        measured,
    }))
}

/// The widths as a table, a row a decoder layer.
pub(super) fn print(chosen: &Allocation) {
    println!(
        "\n{:.3} bits a weight on average, {:.3} with scales; by layer:",
        chosen.average_bits, chosen.effective_bits
    );
    let mut rows: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    for unit in &chosen.units {
        let leaf = |name: &String| name.rsplit('.').next().unwrap_or_default().replace("_proj", "");
        let mut names: Vec<String> = unit.linears.iter().map(leaf).collect();
        names.sort();
        names.dedup();
        let cell = format!("{} W{}", names.join(","), unit.bits);
        rows.entry(unit.block).or_default().push(cell);
    }
    for (block, cells) in rows {
        println!("  {block:>4}  {}", cells.join("   "));
    }
    println!(
        "  estimated KL {:.4}, from {} positions; kept: {RECIPE} (for --recipe), {SENSITIVITY} (for other averages)",
        chosen.predicted_kl, chosen.positions
    );
}
