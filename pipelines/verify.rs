//! Reads an output back and holds it against its source; needs no dataflow.

use super::quantize::PROVENANCE;
use crate::checkpoint::{Checkpoint, hex, read_json};
use crate::error::Result;
use crate::model::Source;
use crate::numerics::Grid;
use candle_core::Device;
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::path::Path;

/// What was checked and what did not hold.
#[derive(Clone, Debug, Serialize)]
pub struct Verification {
    /// Tensors that are byte-identical to the source's.
    pub copied: usize,
    /// Linears whose codes unpack.
    pub quantized: usize,
    /// SHA-256 over the tensors' bytes in name order.
    pub output_digest: String,
    /// Everything that does not hold.
    pub problems: Vec<String>,
}

/// Checks that every source tensor is accounted for, copies are byte-identical, codes unpack, linears that serving stacks fuse
/// share a grid, and the digest is the recorded one.
///
/// # Errors
/// A directory that cannot be read at all.
pub fn verify(output: &Path, source: &Path) -> Result<Verification> {
    let original = Checkpoint::open(source)?;
    let written = Source::open(output, Device::Cpu)?;
    let checkpoint = &written.tower.checkpoint;
    let mut found = Verification {
        copied: 0,
        quantized: 0,
        output_digest: String::new(),
        problems: Vec::new(),
    };
    let mut replaced = BTreeSet::new();
    for block in 0..written.tower.blocks() {
        for site in written.tower.spec.sites(block) {
            let mut grids: Vec<(bool, Option<Grid>)> = Vec::new();
            for spec in written.tower.spec.linears(block, site) {
                let name = written.tower.linear_name(block, &spec);
                let routed = spec.fused.is_some();
                if written.tower.has_plain(block, &spec) {
                    grids.push((routed, None));
                    continue;
                }
                match written.quantized_weight(&name) {
                    Ok(weight) => {
                        grids.push((routed, weight.as_ref().map(|weight| weight.grid)));
                        if let Some(weight) = weight {
                            found.quantized += 1;
                            if (weight.rows, weight.columns) != (spec.rows, spec.columns) {
                                found
                                    .problems
                                    .push(format!("{name} has shape {} x {}", weight.rows, weight.columns));
                            }
                            replaced.insert(format!("{name}.weight"));
                            if let Some(slice) = &spec.fused {
                                let tensor = format!("{}{}", written.tower.block_prefix(block), slice.tensor);
                                replaced.insert(tensor);
                            }
                        }
                    }
                    Err(error) => found.problems.push(error.to_string()),
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
    for name in original.names() {
        let replaced = replaced.contains(name);
        match (original.get(name), checkpoint.get(name)) {
            (_, None) if replaced => {}
            (_, Some(_)) if replaced => found
                .problems
                .push(format!("{name} is there both quantized and plain")),
            (_, None) => found.problems.push(format!("{name} is missing")),
            (Some(a), Some(b)) if a.bytes == b.bytes && a.shape == b.shape && a.dtype == b.dtype => {
                found.copied += 1
            }
            _ => found.problems.push(format!("{name} differs from the source")),
        }
        original.release(name);
        checkpoint.release(name);
    }
    let mut hash = Sha256::new();
    for name in checkpoint.names() {
        hash.update(checkpoint.tensor(name)?.bytes);
        checkpoint.release(name);
    }
    found.output_digest = hex(&hash.finalize());
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
