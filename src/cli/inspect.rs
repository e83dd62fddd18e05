//! `inspect` and `verify`.

use super::arguments::{InspectArguments, VerifyArguments};
use super::text::bytes;
use super::{Outcome, print_json};
use crate::artifact::HEADER;
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::formats::{Reader, quantization_config};
use crate::ledger::{LEDGER, Ledger, Record};
use crate::model::families;
use crate::pipelines::folder::WORK_FOLDER;
use crate::pipelines::verify::verify as check;

pub(super) fn verify(arguments: &VerifyArguments) -> Result<Outcome> {
    let report = check(&arguments.output, &arguments.source)?;
    if arguments.json {
        print_json(&report)?;
    } else {
        println!(
            "{} tensors copied byte for byte, {} linears unpack to valid codes",
            report.copied, report.quantized
        );
        if report.dequantized > 0 {
            println!(
                "{} weights are the values of what the source has quantized",
                report.dequantized
            );
        }
        for name in &report.changed_files {
            println!("{name} is not the source's: somebody has changed it");
        }
        println!("output digest {}", report.output_digest);
        report
            .problems
            .iter()
            .for_each(|problem| println!("PROBLEM: {problem}"));
        if report.problems.is_empty() {
            println!("all checks hold");
        }
    }
    Ok(if report.problems.is_empty() {
        Outcome::Fine
    } else {
        Outcome::Warnings
    })
}

pub(super) fn run(arguments: &InspectArguments) -> Result<Outcome> {
    if arguments.path.join(HEADER).is_file() {
        return super::statistics::inspect(arguments);
    }
    let work = arguments.path.join(WORK_FOLDER);
    if work.is_dir() && !arguments.path.join("config.json").exists() {
        let done = Ledger::peek(&work.join(LEDGER))?;
        let blocks = done
            .iter()
            .filter(|record| matches!(record, Record::Block { .. }))
            .count();
        if arguments.json {
            print_json(&serde_json::json!({"kind": "unfinished run", "blocks_done": blocks}))?;
        } else {
            println!("an unfinished run: {blocks} blocks are done; repeat its command to continue it");
        }
        return Ok(Outcome::Fine);
    }
    let checkpoint = Checkpoint::open(&arguments.path)?;
    let spec = families::parse(checkpoint.config())?;
    let quantization = quantization_config(checkpoint.config());
    let method = quantization
        .and_then(|q| q.get("quant_method"))
        .and_then(|m| m.as_str());
    let reader = quantization.map(Reader::new);
    let scheme = reader.as_ref().map(|reader| match reader {
        Ok(reader) => reader.describe(),
        Err(error) => error.to_string(),
    });
    let holds = |reader: &Reader| {
        let specs = checkpoint.names().filter_map(|name| checkpoint.spec(name));
        specs.filter(|spec| reader.weight_name(spec).is_some()).count()
    };
    let weights = reader.and_then(Result::ok).map_or(0, |reader| holds(&reader));
    let tensors = checkpoint.names().count();
    if arguments.json {
        print_json(&serde_json::json!({
            "kind": "checkpoint", "architecture": spec.architecture, "blocks": spec.layers.len(),
            "hidden_size": spec.hidden_size, "vocab_size": spec.vocab_size, "tensors": tensors,
            "bytes": checkpoint.byte_len(), "quantization": method,
            "quantization_scheme": scheme, "quantized_weights": weights,
        }))?;
    } else {
        println!(
            "{}: {} blocks of width {}, vocabulary {}",
            spec.architecture,
            spec.layers.len(),
            spec.hidden_size,
            spec.vocab_size
        );
        println!("{tensors} tensors, {}", bytes(checkpoint.byte_len()));
        match scheme {
            Some(scheme) => println!("quantized: {scheme}; {weights} weights"),
            None => println!("not quantized"),
        }
    }
    Ok(Outcome::Fine)
}
