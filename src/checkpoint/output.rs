//! Writing: every output tensor's name, dtype and shape is known before the first code is chosen, so the shards' headers are
//! written first and each tensor goes straight to its final place when its block ends. There is no save phase.

use super::Checkpoint;
use crate::error::{Error, Result};
use crate::formats::TensorSpec;
use crate::storage::{self, PartialFile};
use rayon::prelude::*;
use safetensors::tensor::{Metadata, TensorInfo};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// Bytes read at a time for the output's digest.
const DIGEST_CHUNK_BYTES: usize = 4 << 20;

/// Where a tensor lies in the output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Index of the shard.
    pub shard: usize,
    /// First byte within the shard's file.
    pub offset: u64,
    /// Name, dtype, shape.
    pub spec: TensorSpec,
}

/// All output tensors, assigned to shards.
#[derive(Clone, Debug)]
pub struct OutputLayout {
    files: Vec<String>,
    headers: Vec<Vec<u8>>,
    lengths: Vec<u64>,
    tensors: BTreeMap<String, Placement>,
}

impl OutputLayout {
    /// Fills shards of at most `shard_bytes_max` bytes of tensor data in the order of `specs`; a larger tensor has a shard of its own.
    ///
    /// # Errors
    /// Two tensors of one name.
    pub fn new(specs: &[TensorSpec], shard_bytes_max: u64) -> Result<Self> {
        let mut groups: Vec<Vec<&TensorSpec>> = vec![Vec::new()];
        let mut filled = 0;
        for spec in specs {
            let bytes = spec.byte_len() as u64;
            if filled > 0 && filled + bytes > shard_bytes_max {
                groups.push(Vec::new());
                filled = 0;
            }
            filled += bytes;
            if let Some(group) = groups.last_mut() {
                group.push(spec);
            }
        }
        let count = groups.len();
        let mut layout = Self {
            files: Vec::new(),
            headers: Vec::new(),
            lengths: Vec::new(),
            tensors: BTreeMap::new(),
        };
        for (shard, mut group) in groups.into_iter().enumerate() {
            layout.files.push(if count == 1 {
                "model.safetensors".into()
            } else {
                format!("model-{:05}-of-{count:05}.safetensors", shard + 1)
            });
            // Widest dtype first, as the safetensors library does: every tensor is then aligned to its element.
            group.sort_by_key(|spec| std::cmp::Reverse(spec.dtype.bitsize()));
            layout.place(shard, &group)?;
        }
        Ok(layout)
    }

    fn place(&mut self, shard: usize, group: &[&TensorSpec]) -> Result<()> {
        let file = &self.files[shard];
        let header = header(file, group)?;
        let mut end = header.len();
        for spec in group {
            let placement = Placement {
                shard,
                offset: end as u64,
                spec: (*spec).clone(),
            };
            end += spec.byte_len();
            if self.tensors.insert(spec.name.clone(), placement).is_some() {
                return Err(Error::invalid(
                    file,
                    format!("tensor {} would be written twice", spec.name),
                    "",
                ));
            }
        }
        self.lengths.push(end as u64);
        self.headers.push(header);
        Ok(())
    }

    /// Shard file names, in order.
    pub fn files(&self) -> &[String] {
        &self.files
    }

    /// All tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, Placement> {
        &self.tensors
    }

    /// Bytes of all shards, headers included.
    pub fn byte_len(&self) -> u64 {
        self.lengths.iter().sum()
    }

    /// The content of `model.safetensors.index.json`, or `None` for a single shard.
    fn index(&self) -> Option<serde_json::Value> {
        let weight_map: BTreeMap<&str, &str> = self
            .tensors
            .iter()
            .map(|(name, at)| (name.as_str(), self.files[at.shard].as_str()))
            .collect();
        let total: usize = self.tensors.values().map(|at| at.spec.byte_len()).sum();
        (self.files.len() > 1)
            .then(|| serde_json::json!({"metadata": {"total_size": total}, "weight_map": weight_map}))
    }
}

/// The header of a safetensors file that holds these tensors, one after the other. `file` is for the error alone.
pub(crate) fn header(file: &str, specs: &[&TensorSpec]) -> Result<Vec<u8>> {
    let mut infos = Vec::with_capacity(specs.len());
    let mut end = 0;
    for spec in specs {
        let begin = end;
        end += spec.byte_len();
        let info = TensorInfo {
            dtype: spec.dtype,
            shape: spec.shape.clone(),
            data_offsets: (begin, end),
        };
        infos.push((spec.name.clone(), info));
    }
    let bad = |problem: String| Error::invalid(file, problem, "");
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(format), infos).map_err(|error| bad(error.to_string()))?;
    let mut json = serde_json::to_vec(&metadata).map_err(|error| bad(error.to_string()))?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend(json);
    Ok(header)
}

/// The output shards of a run, open for writing.
#[derive(Debug)]
pub struct OutputWriter {
    folder: PathBuf,
    layout: OutputLayout,
    files: Vec<PartialFile>,
}

impl OutputWriter {
    /// Opens the shards of an unfinished run in `folder`, or creates them with their headers and all their bytes reserved.
    pub fn open(folder: &Path, layout: OutputLayout) -> Result<Self> {
        storage::create_folder(folder)?;
        let mut files = Vec::new();
        for ((name, header), &length) in layout.files.iter().zip(&layout.headers).zip(&layout.lengths) {
            let file = PartialFile::open(&folder.join(name), length)?;
            file.write_at(header, 0)?;
            files.push(file);
        }
        Ok(Self {
            folder: folder.to_owned(),
            layout,
            files,
        })
    }

    /// The layout that is written.
    pub fn layout(&self) -> &OutputLayout {
        &self.layout
    }

    /// Writes one tensor to its place.
    ///
    /// # Errors
    /// The layout has no such tensor, or `bytes` is not its length.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let at = self.placement(name)?;
        expect_length(at, bytes.len())?;
        self.files[at.shard].write_at(bytes, at.offset)
    }

    /// Copies a tensor from `source`, byte for byte.
    ///
    /// # Errors
    /// As [`Self::write`]; `source` has no such tensor.
    pub fn copy(&self, name: &str, source: &Checkpoint) -> Result<()> {
        self.write_pieces(name, |write| source.stream(name, write))
    }

    /// Writes one tensor to its place in pieces, from its first byte to its last, as `make` hands them over.
    ///
    /// # Errors
    /// As [`Self::write`]; `make` fails.
    pub fn write_pieces(
        &self,
        name: &str,
        make: impl FnOnce(&mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>,
    ) -> Result<()> {
        let at = self.placement(name)?;
        let mut length = 0;
        make(&mut |bytes| {
            let offset = at.offset + length as u64;
            length += bytes.len();
            if length > at.spec.byte_len() {
                return expect_length(at, length);
            }
            self.files[at.shard].write_at(bytes, offset)
        })?;
        expect_length(at, length)
    }

    /// Reads back a tensor that was written.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let at = self.placement(name)?;
        self.files[at.shard].read_at(at.spec.byte_len(), at.offset)
    }

    fn placement(&self, name: &str) -> Result<&Placement> {
        self.layout.tensors.get(name).ok_or_else(|| {
            Error::invalid(
                name,
                "is not in the output's layout",
                "this is a bug in quantflow: please report it",
            )
        })
    }

    /// Makes all that was written durable.
    pub fn sync(&self) -> Result<()> {
        self.files.iter().try_for_each(PartialFile::sync)
    }

    /// [`digest`] of the output. Read from the files, not from memory.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn digest(&self) -> Result<String> {
        let tensors: Vec<&Placement> = self.layout.tensors.values().collect();
        digest(&tensors, |at, hash| {
            let length = at.spec.byte_len();
            for begin in (0..length).step_by(DIGEST_CHUNK_BYTES) {
                let chunk = DIGEST_CHUNK_BYTES.min(length - begin);
                hash.update(self.files[at.shard].read_at(chunk, at.offset + begin as u64)?);
            }
            Ok(())
        })
    }

    /// Writes the index and gives every shard its final name.
    pub fn finish(self) -> Result<()> {
        for file in self.files {
            file.finish()?;
        }
        match self.layout.index() {
            Some(index) => storage::write_json(&self.folder.join("model.safetensors.index.json"), &index),
            None => Ok(()),
        }
    }
}

fn expect_length(at: &Placement, length: usize) -> Result<()> {
    match length == at.spec.byte_len() {
        true => Ok(()),
        false => Err(Error::invalid(
            &at.spec.name,
            format!("{length} bytes to write, {} planned", at.spec.byte_len()),
            "this is a bug in quantflow: please report it",
        )),
    }
}

/// The digest of an output, as hex digits: SHA-256 over the SHA-256 of each tensor's bytes, in the order of their names, so that tensors are read
/// side by side. `read` hands over the bytes of one.
///
/// # Errors
/// Those of `read`.
pub fn digest<T: Sync>(tensors: &[T], read: impl Fn(&T, &mut Sha256) -> Result<()> + Sync) -> Result<String> {
    let digests = tensors.par_iter().map(|tensor| {
        let mut hash = Sha256::new();
        read(tensor, &mut hash)?;
        Ok(hash.finalize())
    });
    let digests: Vec<_> = digests.collect::<Result<_>>()?;
    Ok(hex(&Sha256::digest(digests.concat())))
}

/// Lower-case hex digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
