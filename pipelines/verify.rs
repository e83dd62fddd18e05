//! Reads an output back and holds it against its source; needs no dataflow.

use super::folder::{PROVENANCE, side_files};
use crate::checkpoint::{TensorView, digest, read_json};
use crate::error::{IoContext, Result};
use crate::model::{Coded, Tower};
use crate::numerics::Grid;
use candle_core::Device;
use serde::Serialize;
use sha2::Digest;
use std::collections::BTreeSet;
use std::path::Path;

/// What was checked and what did not hold.
#[derive(Clone, Debug, Serialize)]
pub struct Verification {
    /// Tensors that are byte-identical to the source's.
    pub copied: usize,
    /// Linears whose codes unpack.
    pub quantized: usize,
    /// Weights that the source has quantized, written as their values.
    pub dequantized: usize,
    /// Files beside the weights (tokenizer, processor, chat template, …) that are there, but are not the source's any more.
    pub changed_files: Vec<String>,
    /// SHA-256 over the tensors' bytes in name order.
    pub output_digest: String,
    /// Everything that does not hold.
    pub problems: Vec<String>,
}

/// Checks that every tensor of the source and of the output is accounted for: copied byte for byte, quantized, or dequantized where the source has
/// it quantized and the recipe leaves it alone; that codes unpack, linears that serving stacks fuse share a grid, no file beside the weights is missing, and
/// the digest is the recorded one.
///
/// # Errors
/// A directory that cannot be read at all.
pub fn verify(output: &Path, source: &Path) -> Result<Verification> {
    let original = Tower::open(source, Device::Cpu)?;
    let written = Tower::open(output, Device::Cpu)?;
    let checkpoint = &written.checkpoint;
    let mut found = Verification {
        copied: 0,
        quantized: 0,
        dequantized: 0,
        changed_files: Vec::new(),
        output_digest: String::new(),
        problems: Vec::new(),
    };
    let codes = check_codes(&written, &mut found);
    let coded = original.coded()?;
    let parts: BTreeSet<&str> = coded
        .iter()
        .flat_map(|coded| coded.parts.iter().map(String::as_str))
        .collect();
    let mut expected = codes.tensors;
    let mut weights: Vec<(&str, Option<&Coded>)> = coded
        .iter()
        .map(|coded| (coded.spec.name.as_str(), Some(coded)))
        .collect();
    let plain = original.checkpoint.names().filter(|name| !parts.contains(name));
    weights.extend(plain.map(|name| (name, None)));
    for (name, coded) in weights {
        let replaced = codes.replaced.contains(name);
        match (checkpoint.get(name), coded) {
            (None, _) if replaced => {}
            (Some(_), _) if replaced => found
                .problems
                .push(format!("{name} is there both quantized and plain")),
            (None, _) => found.problems.push(format!("{name} is missing")),
            (Some(tensor), Some(coded)) if is_dequantized(&original, coded, &tensor)? => {
                found.dequantized += 1;
            }
            (Some(tensor), None) if is_copy(&original, &tensor) => found.copied += 1,
            _ => found.problems.push(format!("{name} differs from the source")),
        }
        expected.insert(name.to_owned());
        original.checkpoint.release(name);
        checkpoint.release(name);
    }
    let strange = checkpoint.names().filter(|name| !expected.contains(*name));
    found
        .problems
        .extend(strange.map(|name| format!("{name} is in no source, and not of a linear's codes")));
    for name in side_files(&original)? {
        let [ours, theirs] = [output, source].map(|folder| folder.join(&name));
        let read = |path: &Path| std::fs::read(path).context("read", path);
        match ours.is_file() {
            false => found.problems.push(format!("{name} is missing")),
            true if read(&ours)? != read(&theirs)? => found.changed_files.push(name),
            true => {}
        }
    }
    let names: Vec<&str> = checkpoint.names().collect();
    found.output_digest = digest(&names, |name, hash| {
        hash.update(checkpoint.tensor(name)?.bytes);
        checkpoint.release(name);
        Ok(())
    })?;
    let provenance = output.join(PROVENANCE);
    if provenance.is_file() {
        let recorded = read_json(&provenance)?;
        if recorded.get("output_digest").and_then(|digest| digest.as_str()) != Some(&found.output_digest) {
            found
                .problems
                .push("the digest is not the one that quantflow.json records".into());
        }
    }
    Ok(found)
}

/// What stands in an output for linears of its source.
struct Codes {
    /// Source weights that are not there any more.
    replaced: BTreeSet<String>,
    /// The tensors that are there instead.
    tensors: BTreeSet<String>,
}

/// Unpacks all linears that have codes, and holds those against each other that are fused when served.
fn check_codes(written: &Tower, found: &mut Verification) -> Codes {
    let mut codes = Codes {
        replaced: BTreeSet::new(),
        tensors: BTreeSet::new(),
    };
    for block in 0..written.blocks() {
        for site in written.spec.sites(block) {
            let mut grids: Vec<(bool, Option<Grid>)> = Vec::new();
            for spec in written.spec.linears(block, site) {
                let name = written.linear_name(block, &spec);
                let weight = match written.codes(&name) {
                    Ok(weight) => weight,
                    Err(error) => {
                        found.problems.push(error.to_string());
                        continue;
                    }
                };
                grids.push((spec.fused.is_some(), weight.as_ref().map(|weight| weight.grid)));
                let Some(weight) = weight else { continue };
                found.quantized += 1;
                if (weight.rows, weight.columns) != (spec.rows, spec.columns) {
                    found
                        .problems
                        .push(format!("{name} has shape {} x {}", weight.rows, weight.columns));
                }
                let specs = written.reader().map(|reader| reader.specs(&name, &weight));
                codes
                    .tensors
                    .extend(specs.into_iter().flatten().map(|spec| spec.name));
                codes.replaced.insert(format!("{name}.weight"));
                if let Some(slice) = &spec.fused {
                    let tensor = format!("{}{}", written.block_prefix(block), slice.tensor);
                    codes.replaced.insert(tensor);
                }
            }
            let differ = |pair: &[(bool, Option<Grid>)]| pair[0].0 == pair[1].0 && pair[0].1 != pair[1].1;
            if grids.windows(2).any(differ) {
                found.problems.push(format!(
                    "block {block}: the linears at {site:?} are fused when served, but differ in scheme"
                ));
            }
        }
    }
    codes
}

/// Whether `tensor` is byte for byte the source's of that name.
fn is_copy(original: &Tower, tensor: &TensorView<'_>) -> bool {
    let source = original.checkpoint.get(tensor.name);
    source.is_some_and(|source| {
        source.bytes == tensor.bytes && source.shape == tensor.shape && source.dtype == tensor.dtype
    })
}

/// Whether `tensor` is what the source's quantized weight means.
fn is_dequantized(original: &Tower, coded: &Coded, tensor: &TensorView<'_>) -> Result<bool> {
    if (tensor.dtype, tensor.shape) != (coded.spec.dtype, &coded.spec.shape[..]) {
        return Ok(false);
    }
    let (mut rest, mut same) = (tensor.bytes, true);
    original.dequantize(coded, &mut |bytes| {
        let (piece, after) = rest.split_at(bytes.len().min(rest.len()));
        same &= piece == bytes;
        rest = after;
        Ok(())
    })?;
    Ok(same && rest.is_empty())
}
