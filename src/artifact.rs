//! The statistics artifact: a directory that holds the exact sums of a model over a set of documents. It can be added to, taken
//! from and merged, to the byte; any number of recipes are solved from it with no forward pass.
//!
//! ```text
//! statistics.json                          what was summed: model, documents, batches; names the files below
//! block-00003-90ab12cd34ef5678.safetensors     sums of decoder layer 3, named by their digest
//! ```
//! `statistics.json` is the only commit point: block files have new names when their content is new, and old ones go when the new
//! `statistics.json` is in place. Whatever breaks off before that leaves the artifact as it was.

mod block;

pub use block::BlockWriter;

use crate::calibration::{ContentId, Placed};
use crate::checkpoint::{Checkpoint, hex, read_json};
use crate::error::{Error, IoContext, Result};
use crate::memory::Room;
use crate::model::SiteKind;
use crate::statistics::{Exponents, Product, SiteStatistics};
use crate::storage;
use bytemuck::allocation::pod_collect_to_vec;
use rayon::prelude::*;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The way out of files that do not hold what they should.
pub const DAMAGED: &str = "the artifact is damaged: collect the statistics anew";

/// Name of the header.
pub const HEADER: &str = "statistics.json";
/// Version of the layout.
const VERSION: u32 = 1;
/// [`Header::prefix`] where the inputs are those of the original model.
pub const FULL_PRECISION: &str = "full-precision";

/// What decides whether sums may be added to each other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// Digest of the checkpoint.
    pub model: String,
    /// Digest of its tokenizer, if it has one.
    pub tokenizer: Option<String>,
    /// Which model the inputs come from.
    pub prefix: String,
    /// Processor features that the kernels used: others may round otherwise, and what they take away would leave a trace.
    pub arithmetic: String,
    /// Tokens of the probe that fixed the exponents.
    pub probe_tokens: usize,
    /// Share of the batches that are kept apart, to measure on.
    pub held_out: f64,
    /// Whether each expert's sums are over all tokens.
    #[serde(default)]
    pub all_experts: bool,
}

impl Origin {
    /// Whether batches are kept apart.
    pub fn holds_out(&self) -> bool {
        self.held_out > 0.0
    }

    /// Products that are kept of each site.
    pub fn products(&self) -> &'static [Product] {
        match self.holds_out() {
            true => &[Product::Gram, Product::Sum, Product::HeldOut],
            false => &[Product::Gram, Product::Sum],
        }
    }
}

/// A batch that was summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// How often.
    pub multiplicity: u64,
    /// Its tokens.
    pub tokens: u64,
}

/// The content of `statistics.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// Version of the layout.
    pub version: u32,
    /// What the sums are of.
    pub origin: Origin,
    /// Documents behind the batches.
    pub documents: Vec<Placed>,
    /// Batches that were summed.
    pub batches: BTreeMap<ContentId, Held>,
    /// File of each decoder layer; none before the first batch.
    pub blocks: Vec<String>,
}

impl Header {
    /// No sums at all.
    pub fn new(origin: Origin) -> Self {
        Self {
            version: VERSION,
            origin,
            documents: Vec::new(),
            batches: BTreeMap::new(),
            blocks: Vec::new(),
        }
    }

    /// SHA-256 over the batch ids and the sums, in hex: equal for equal artifacts, however they came about.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for (id, held) in &self.batches {
            hash.update(format!("{id} {}\n", held.multiplicity));
        }
        for file in &self.blocks {
            hash.update(format!("{file}\n"));
        }
        hex(&hash.finalize())
    }

    /// Tokens that were summed.
    pub fn tokens(&self) -> u64 {
        self.batches
            .values()
            .map(|held| held.multiplicity * held.tokens)
            .sum()
    }

    /// How often batches were summed, all together.
    pub fn batch_count(&self) -> u64 {
        self.batches.values().map(|held| held.multiplicity).sum()
    }

    /// Tokens that were summed and not kept apart.
    pub fn calibration_tokens(&self) -> u64 {
        let used = self
            .batches
            .iter()
            .filter(|(id, _)| !id.is_held_out(self.origin.held_out));
        used.map(|(_, held)| held.multiplicity * held.tokens).sum()
    }

    /// Checks that these are sums of the model with digest `model`: any machine may solve from them.
    ///
    /// # Errors
    /// They are of another one.
    pub fn expect_model(&self, subject: &str, model: &str) -> Result<()> {
        match self.origin.model == model {
            true => Ok(()),
            false => Err(Error::invalid(
                subject,
                format!(
                    "holds statistics of another model ({:.16}, this one is {model:.16})",
                    self.origin.model
                ),
                "give the checkpoint that they were collected from, or collect them anew",
            )),
        }
    }

    /// Checks that sums of `other` may be added to these.
    ///
    /// # Errors
    /// What differs, by name.
    pub fn expect(&self, subject: &str, other: &Origin) -> Result<()> {
        let own = &self.origin;
        let none = String::from("none");
        let tokenizer = |origin: &Origin| origin.tokenizer.as_ref().unwrap_or(&none).clone();
        let checks = [
            ("model", own.model.clone(), other.model.clone()),
            ("tokenizer", tokenizer(own), tokenizer(other)),
            ("prefix", own.prefix.clone(), other.prefix.clone()),
            ("arithmetic", own.arithmetic.clone(), other.arithmetic.clone()),
            (
                "probe",
                own.probe_tokens.to_string(),
                other.probe_tokens.to_string(),
            ),
            (
                "held-out share",
                own.held_out.to_string(),
                other.held_out.to_string(),
            ),
            (
                "value of --all-experts",
                own.all_experts.to_string(),
                other.all_experts.to_string(),
            ),
        ];
        for (what, own, other) in checks {
            if own != other {
                return Err(Error::invalid(
                    subject,
                    format!("was made with another {what} ({own:.16} here, {other:.16} there)"),
                    "statistics add up only for the same model, tokenizer and kind of processor (--device); collect them anew",
                ));
            }
        }
        Ok(())
    }
}

/// An opened artifact.
#[derive(Clone, Debug)]
pub struct Artifact {
    folder: PathBuf,
    /// What it holds.
    pub header: Header,
}

impl Artifact {
    /// Opens the artifact in `folder`.
    ///
    /// # Errors
    /// There is none, or its header is damaged or of another version.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(HEADER);
        if !path.is_file() {
            return Err(Error::invalid(
                folder.display().to_string(),
                format!("holds no {HEADER}"),
                "make an artifact with: quantflow statistics collect MODEL -o DIR --calibration TEXT",
            ));
        }
        let header: Header = serde_json::from_value(read_json(&path).map_err(as_damaged)?)
            .map_err(|error| damaged(&path, &error.to_string()))?;
        if header.version != VERSION {
            return Err(Error::invalid(
                path.display().to_string(),
                format!("has version {}, this quantflow reads {VERSION}", header.version),
                "collect the statistics anew",
            ));
        }
        for file in &header.blocks {
            let plain = Path::new(file)
                .file_name()
                .is_some_and(|name| name == file.as_str());
            if !plain || !folder.join(file).is_file() {
                return Err(damaged(
                    &path,
                    &format!("names {file:?}, which is not in the folder"),
                ));
            }
        }
        Ok(Self {
            folder: folder.to_owned(),
            header,
        })
    }

    /// An artifact that is not yet on the disk.
    pub fn new(folder: &Path, header: Header) -> Self {
        Self {
            folder: folder.to_owned(),
            header,
        }
    }

    /// The directory.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Reads the sums of a site, into `room`.
    ///
    /// # Errors
    /// The block's file is missing, damaged or of another model.
    pub fn site(&self, block: usize, site: SiteKind, room: &Room) -> Result<SiteStatistics> {
        let (path, tensors) = self.block(block)?;
        let bytes = |name: &str, dtype: Dtype| bytes(&path, &tensors, name, dtype);
        let exponents: Vec<i32> = pod_collect_to_vec(bytes(&tensor_name(site, "exponents"), Dtype::I32)?);
        if exponents.is_empty() {
            return Err(damaged(&path, "has a site without channels"));
        }
        let tokens = i64::try_from(tokens(&path, &tensors, site)?)
            .map_err(|_| damaged(&path, "has more tokens than there can be"))?;
        SiteStatistics::from_panels(
            Exponents::from_values(exponents),
            self.header.origin.products(),
            tokens,
            room,
            |product, rows, sums| {
                let name = panel_name(site, product, rows.start);
                let (bytes, sums) = (bytes(&name, Dtype::I64)?, bytemuck::cast_slice_mut(sums));
                if bytes.len() != sums.len() {
                    return Err(damaged(&path, &format!("{name} has another length")));
                }
                sums.copy_from_slice(bytes);
                tensors.release(&name);
                Ok(())
            },
        )
    }

    /// Checks that every block file has the content that its name promises.
    ///
    /// # Errors
    /// One has not.
    pub fn verify(&self) -> Result<()> {
        let check = |(block, file): (usize, &String)| {
            let path = self.folder.join(file);
            let mut hash = Sha256::new();
            let mut content = std::fs::File::open(&path).context("read", &path)?;
            std::io::copy(&mut content, &mut hash).context("read", &path)?;
            match *file == file_name(block, &hash.finalize()) {
                true => Ok(()),
                false => Err(damaged(&path, "does not have the content that its name promises")),
            }
        };
        self.header.blocks.par_iter().enumerate().try_for_each(check)
    }

    /// The sites of a block, in the order in which its file has them, with their widths.
    ///
    /// # Errors
    /// The block's file is missing or damaged.
    pub fn sites(&self, block: usize) -> Result<Vec<(SiteKind, usize)>> {
        let (path, tensors) = self.block(block)?;
        let mut sites = Vec::new();
        for name in tensors.names().filter(|name| name.ends_with(".exponents")) {
            let site = site_of(name).ok_or_else(|| damaged(&path, &format!("has no site for {name}")))?;
            sites.push((site, tensors.tensor(name)?.shape.iter().product()));
        }
        // The shared expert comes after the routed ones.
        sites.sort_by_key(|&(site, _)| (site == SiteKind::Down, site));
        Ok(sites)
    }

    /// Tokens behind the sums of some sites of a block.
    ///
    /// # Errors
    /// As [`Self::site`].
    pub fn tokens(&self, block: usize, sites: impl Iterator<Item = SiteKind>) -> Result<Vec<u64>> {
        let (path, tensors) = self.block(block)?;
        sites.map(|site| tokens(&path, &tensors, site)).collect()
    }

    /// The file of a block.
    fn block(&self, block: usize) -> Result<(PathBuf, Checkpoint)> {
        let file = self.header.blocks.get(block).ok_or_else(|| {
            Error::invalid(
                self.folder.display().to_string(),
                format!("has no statistics of block {block}"),
                "it is empty, or of a model with fewer blocks",
            )
        })?;
        let path = self.folder.join(file);
        let tensors = Checkpoint::open_file(&path).map_err(as_damaged)?;
        Ok((path, tensors))
    }

    /// Begins a block's file; until it is finished it lies in the folder `work`, and the artifact does not hold it until [`Self::commit`].
    ///
    /// # Errors
    /// The file cannot be created.
    pub fn block_writer(
        &self,
        work: &Path,
        block: usize,
        sites: Vec<(SiteKind, usize)>,
    ) -> Result<BlockWriter> {
        BlockWriter::create(&self.folder, work, block, sites, self.header.origin.products())
    }

    /// Makes `header` the artifact's content, at once, and removes the block files that it does not name.
    pub fn commit(&mut self, header: Header) -> Result<()> {
        let json =
            serde_json::to_value(&header).map_err(|error| Error::invalid(HEADER, error.to_string(), ""))?;
        storage::write_json(&self.folder.join(HEADER), &json)?;
        self.header = header;
        for entry in std::fs::read_dir(&self.folder).context("list", &self.folder)? {
            let name = entry.context("list", &self.folder)?.file_name();
            if let Some(name) = name.to_str().filter(|name| name.starts_with("block-"))
                && !self.header.blocks.iter().any(|file| file == name)
            {
                storage::remove(&self.folder.join(name))?;
            }
        }
        Ok(())
    }
}

fn file_name(block: usize, digest: &[u8]) -> String {
    format!("block-{block:05}-{:.16}.safetensors", hex(digest))
}

fn tensor_name(site: SiteKind, what: &str) -> String {
    match site {
        SiteKind::ExpertDown(expert) => format!("expertdown.{expert}.{what}").to_lowercase(),
        site => format!("{site:?}.{what}").to_lowercase(),
    }
}

/// The site of a tensor.
fn site_of(name: &str) -> Option<SiteKind> {
    use SiteKind::{Down, ExpertDown, GateUp, KvB, O, QB, Qkv};
    if let Some(rest) = name.strip_prefix("expertdown.") {
        return rest.split('.').next()?.parse().ok().map(ExpertDown);
    }
    let of = |site: &SiteKind| name.starts_with(&tensor_name(*site, ""));
    [Qkv, QB, KvB, O, GateUp, Down].into_iter().find(of)
}

fn bytes<'a>(path: &Path, tensors: &'a Checkpoint, name: &str, dtype: Dtype) -> Result<&'a [u8]> {
    let tensor = tensors.tensor(name).map_err(as_damaged)?;
    match tensor.dtype == dtype {
        true => Ok(tensor.bytes),
        false => Err(damaged(path, &format!("{name} is {:?}", tensor.dtype))),
    }
}

fn tokens(path: &Path, tensors: &Checkpoint, site: SiteKind) -> Result<u64> {
    let tokens: Vec<u64> =
        pod_collect_to_vec(bytes(path, tensors, &tensor_name(site, "tokens"), Dtype::U64)?);
    Ok(tokens.first().copied().unwrap_or(0))
}

fn panel_name(site: SiteKind, product: Product, first_row: usize) -> String {
    tensor_name(site, &format!("{product:?}.{first_row}"))
}

fn damaged(path: &Path, problem: &str) -> Error {
    Error::invalid(path.display().to_string(), problem, DAMAGED)
}

/// What is wrong with a file that, unlike a checkpoint's, nobody can download again.
fn as_damaged(error: Error) -> Error {
    match error {
        Error::Invalid { subject, problem, .. } => Error::invalid(subject, problem, DAMAGED),
        other => other,
    }
}
