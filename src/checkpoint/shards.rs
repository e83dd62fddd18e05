//! Reading: shards are memory-mapped, their headers and the index checked against hostile content.

use crate::error::{Error, IoContext, Result};
use crate::formats::TensorSpec;
use memmap2::{Advice, Mmap, UncheckedAdvice};
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

/// Largest `config.json` or index that is read: the index of a 1 T parameter MoE checkpoint has about 10 MB.
const JSON_BYTES_MAX: u64 = 256 << 20;
/// Most tensors in a checkpoint; published ones stay under 200,000.
const TENSORS_MAX: usize = 4_000_000;
/// Most dimensions of a tensor.
const RANK_MAX: usize = 8;
/// Most shards: published checkpoints stay under 500.
const SHARDS_MAX: usize = 10_000;
/// Bytes of a tensor that [`Checkpoint::stream`] hands over at a time: a multiple of every element's size.
const STREAM_BYTES: usize = 4 << 20;
/// Bytes of a tensor that its digest looks at, at its beginning, middle and end.
const DIGEST_SAMPLE_BYTES: usize = 4096;
/// Where a page is touched, Linux maps what it has of the aligned block of so many bytes around it.
const MAPPED_TOGETHER: usize = 64 << 10;

/// An opened checkpoint directory.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    config: serde_json::Value,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Mmap,
}

#[derive(Debug)]
struct Entry {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Within the shard's file.
    bytes: Range<usize>,
}

/// A tensor as it lies in the memory map.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Full name.
    pub name: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Row-major shape.
    pub shape: &'a [usize],
    /// Little-endian data. Touching it reads from the disk.
    pub bytes: &'a [u8],
}

impl Checkpoint {
    /// Opens a directory with `config.json` and either `model.safetensors.index.json` and its shards, or `*.safetensors`.
    ///
    /// # Errors
    /// Whatever is missing, truncated, overlapping or outside the directory, by file and tensor.
    pub fn open(folder: &Path) -> Result<Self> {
        let config = folder.join("config.json");
        if !config.exists() {
            return Err(Error::invalid(
                folder.display().to_string(),
                match folder.is_dir() {
                    true => "has no config.json",
                    false => "is not a directory",
                },
                "give a Hugging Face checkpoint directory: one with config.json and *.safetensors",
            ));
        }
        let config = read_json(&config)?;
        let index_path = folder.join("model.safetensors.index.json");
        let (files, index) = if index_path.exists() {
            let index = read_index(&index_path)?;
            let mut files: Vec<String> = index.values().cloned().collect();
            files.sort();
            files.dedup();
            (files, Some(index))
        } else {
            (list_shards(folder)?, None)
        };
        if files.len() > SHARDS_MAX {
            return Err(Error::invalid(
                folder.display().to_string(),
                format!("has {} shards, more than {SHARDS_MAX}", files.len()),
                "",
            ));
        }
        let mut checkpoint = Self {
            folder: folder.to_owned(),
            config,
            shards: Vec::new(),
            tensors: BTreeMap::new(),
        };
        for file in &files {
            checkpoint.add_shard(&folder.join(file))?;
        }
        if let Some(index) = index {
            checkpoint.check_index(&index_path, &index)?;
        }
        if checkpoint.tensors.is_empty() {
            return Err(Error::invalid(
                folder.display().to_string(),
                "holds no tensors",
                "",
            ));
        }
        Ok(checkpoint)
    }

    /// A single safetensors file, without a config.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_file(path: &Path) -> Result<Self> {
        let mut checkpoint = Self {
            folder: path.parent().unwrap_or(Path::new(".")).to_owned(),
            config: serde_json::Value::Null,
            shards: Vec::new(),
            tensors: BTreeMap::new(),
        };
        checkpoint.add_shard(path)?;
        Ok(checkpoint)
    }

    /// SHA-256, in hex, over config, names, dtypes, shapes and a sample of every tensor: all weights would take minutes to hash, and
    /// no training leaves every tensor's beginning, middle and end as they were.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(self.config.to_string());
        for name in self.names() {
            let Some(tensor) = self.get(name) else { continue };
            hash.update(format!("{name} {:?} {:?}\n", tensor.dtype, tensor.shape));
            let last = tensor.bytes.len().saturating_sub(DIGEST_SAMPLE_BYTES);
            for begin in [0, last / 2, last] {
                let end = tensor.bytes.len().min(begin + DIGEST_SAMPLE_BYTES);
                hash.update(&tensor.bytes[begin..end]);
            }
            self.release(name);
        }
        super::hex(&hash.finalize())
    }

    fn add_shard(&mut self, path: &Path) -> Result<()> {
        let subject = || path.display().to_string();
        let file = File::open(path).context("open", path)?;
        if file.metadata().context("read", path)?.len() == 0 {
            return Err(truncated(path, "the file is empty"));
        }
        // SAFETY: the map is read-only; a file that another process truncates while it is mapped raises SIGBUS,
        // which every memory-mapped reader accepts (as the safetensors library does).
        let map = unsafe { Mmap::map(&file) }.context("map", path)?;
        // Checks header size, that every tensor's length fits dtype and shape, and that data is without gap or overlap.
        let (header, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|error| truncated(path, &format!("is not a valid safetensors file ({error})")))?;
        let data = header + 8;
        let shard = self.shards.len();
        for (name, info) in metadata.tensors() {
            let (begin, end) = info.data_offsets;
            let bytes = begin
                .checked_add(data)
                .zip(end.checked_add(data))
                .map(|(begin, end)| begin..end)
                .filter(|range| range.start <= range.end && range.end <= map.len())
                .ok_or_else(|| truncated(path, &format!("tensor {name} ends beyond the file")))?;
            if info.shape.len() > RANK_MAX || name.is_empty() || name.contains('\0') {
                return Err(Error::invalid(
                    subject(),
                    format!(
                        "tensor {name:?} has an unusable name or {} dimensions",
                        info.shape.len()
                    ),
                    "",
                ));
            }
            let entry = Entry {
                shard,
                dtype: info.dtype,
                shape: info.shape.clone(),
                bytes,
            };
            if let Some(earlier) = self.tensors.insert(name.clone(), entry) {
                let other = self.shards.get(earlier.shard).map_or(path, |shard| &shard.path);
                return Err(Error::invalid(
                    subject(),
                    format!("tensor {name} is also in {}", other.display()),
                    "remove the shards of another checkpoint from the directory",
                ));
            }
        }
        if self.tensors.len() > TENSORS_MAX {
            return Err(Error::invalid(subject(), "too many tensors", ""));
        }
        self.shards.push(Shard {
            path: path.to_owned(),
            map,
        });
        Ok(())
    }

    fn check_index(&self, path: &Path, index: &BTreeMap<String, String>) -> Result<()> {
        for (name, file) in index {
            let found = self.tensors.get(name).is_some_and(|entry| {
                self.shards[entry.shard]
                    .path
                    .file_name()
                    .is_some_and(|have| have == file.as_str())
            });
            if !found {
                return Err(Error::invalid(
                    path.display().to_string(),
                    format!("says that {name} is in {file}, which does not hold it"),
                    "download the checkpoint again",
                ));
            }
        }
        Ok(())
    }

    /// The directory.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// `config.json`
    pub fn config(&self) -> &serde_json::Value {
        &self.config
    }

    /// All tensor names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// A tensor by name, or `None`.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let (name, entry) = self.tensors.get_key_value(name)?;
        Some(TensorView {
            name,
            dtype: entry.dtype,
            shape: &entry.shape,
            bytes: &self.shards[entry.shard].map[entry.bytes.clone()],
        })
    }

    /// A tensor by name.
    ///
    /// # Errors
    /// There is none.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        self.get(name).ok_or_else(|| self.missing(name))
    }

    fn missing(&self, name: &str) -> Error {
        Error::invalid(
            self.folder.display().to_string(),
            format!("has no tensor {name}"),
            "the checkpoint is incomplete, or its config.json describes another model",
        )
    }

    /// Name, dtype and shape, without touching the data.
    pub fn spec(&self, name: &str) -> Option<TensorSpec> {
        self.tensors.get(name).map(|entry| TensorSpec {
            name: name.to_owned(),
            dtype: entry.dtype,
            shape: entry.shape.clone(),
        })
    }

    /// Asks the system to read a tensor's pages ahead.
    pub fn prefetch(&self, name: &str) {
        if let Some(entry) = self.tensors.get(name) {
            let map = &self.shards[entry.shard].map;
            // Advice is advice: a refusal costs speed, not correctness.
            let _ = map.advise_range(Advice::WillNeed, entry.bytes.start, entry.bytes.len());
        }
    }

    /// Hands a tensor's bytes over in pieces of 4 MiB, whose pages leave resident memory at once: a tensor that is
    /// read this way is never whole in memory.
    ///
    /// # Errors
    /// There is no such tensor, or `visit` fails.
    pub fn stream(&self, name: &str, mut visit: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        self.tensor(name)?;
        let Some(entry) = self.tensors.get(name) else {
            return Ok(());
        };
        let map = &self.shards[entry.shard].map;
        for begin in entry.bytes.clone().step_by(STREAM_BYTES) {
            let range = begin..entry.bytes.end.min(begin + STREAM_BYTES);
            visit(&map[range.clone()])?;
            release(map, range);
        }
        Ok(())
    }

    /// Copies the bytes of some rows of a matrix. They are read, not mapped: where rows lie apart, more would be mapped than copied.
    ///
    /// # Errors
    /// There is no such tensor, or no such row, or the file cannot be read.
    pub fn rows(&self, name: &str, rows: &[u32]) -> Result<Vec<u8>> {
        let entry = self.tensors.get(name).ok_or_else(|| self.missing(name))?;
        let path = &self.shards[entry.shard].path;
        let file = File::open(path).context("open", path)?;
        let height = entry.shape.first().copied().unwrap_or(0);
        let row_bytes = entry.bytes.len() / height.max(1);
        let mut bytes = vec![0; rows.len() * row_bytes];
        let pairs = rows.par_iter().zip(bytes.par_chunks_exact_mut(row_bytes.max(1)));
        pairs.try_for_each(|(&row, bytes)| {
            if row as usize >= height {
                return Err(Error::invalid(name, format!("has {height} rows"), ""));
            }
            let begin = entry.bytes.start + row as usize * row_bytes;
            file.read_exact_at(bytes, begin as u64).context("read", path)
        })?;
        Ok(bytes)
    }

    /// Takes a tensor's pages out of resident memory (they stay in the page cache).
    pub fn release(&self, name: &str) {
        if let Some(entry) = self.tensors.get(name) {
            release(&self.shards[entry.shard].map, entry.bytes.clone());
        }
    }

    /// Bytes of all tensors.
    pub fn byte_len(&self) -> u64 {
        self.tensors.values().map(|entry| entry.bytes.len() as u64).sum()
    }

    /// Files of the directory that are not weights: config, tokenizer, processor, chat template, …; names only, sorted.
    pub fn side_files(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.folder).context("list", &self.folder)? {
            let entry = entry.context("list", &self.folder)?;
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            let weights = [
                ".safetensors",
                ".index.json",
                ".bin",
                ".pt",
                ".pth",
                ".gguf",
                ".h5",
                ".msgpack",
                ".onnx",
            ];
            let kept = [
                ".json",
                ".jinja",
                ".txt",
                ".model",
                ".tiktoken",
                ".py",
                ".md",
                ".yaml",
            ];
            let plain = entry.path().is_file() && !name.starts_with('.');
            let licence =
                name.to_ascii_uppercase().starts_with("LICEN") || name.eq_ignore_ascii_case("NOTICE");
            if plain
                && !weights.iter().any(|ending| name.ends_with(ending))
                && (licence || kept.iter().any(|ending| name.ends_with(ending)))
            {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }
}

/// Releases the pages of `range`, and those that came with them: of many tensors that would be much.
fn release(map: &Mmap, range: Range<usize>) {
    let begin = range.start / MAPPED_TOGETHER * MAPPED_TOGETHER;
    let end = map.len().min(range.end.next_multiple_of(MAPPED_TOGETHER));
    // SAFETY: the map is a read-only view of a file: dropped pages are read again when touched.
    let _ = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, begin, end - begin) };
}

/// Reads a JSON file of bounded size.
pub(crate) fn read_json(path: &Path) -> Result<serde_json::Value> {
    let length = std::fs::metadata(path).context("read", path)?.len();
    if length > JSON_BYTES_MAX {
        return Err(Error::invalid(
            path.display().to_string(),
            format!("has {length} bytes, more than {JSON_BYTES_MAX}"),
            "",
        ));
    }
    let text = std::fs::read(path).context("read", path)?;
    serde_json::from_slice(&text).map_err(|error| {
        Error::invalid(
            path.display().to_string(),
            format!("is not valid JSON: {error}"),
            "download the file again",
        )
    })
}

fn truncated(path: &Path, problem: &str) -> Error {
    Error::invalid(
        path.display().to_string(),
        problem,
        "the file is damaged or its download was cut short: download it again",
    )
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let index = read_json(path)?;
    let bad = |problem: String| Error::invalid(path.display().to_string(), problem, "");
    let map = index
        .get("weight_map")
        .and_then(|map| map.as_object())
        .ok_or_else(|| bad("has no weight_map".into()))?;
    map.iter()
        .map(|(name, file)| {
            let file = file
                .as_str()
                .ok_or_else(|| bad(format!("weight_map of {name} is not a file name")))?;
            let mut parts = Path::new(file).components();
            let plain = matches!(parts.next(), Some(Component::Normal(_))) && parts.next().is_none();
            if plain && file.ends_with(".safetensors") {
                Ok((name.clone(), file.to_owned()))
            } else {
                Err(bad(format!(
                    "weight_map of {name} names {file:?}, which is not a .safetensors file of this directory"
                )))
            }
        })
        .collect()
}

fn list_shards(folder: &Path) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).context("list", folder)? {
        let name = entry.context("list", folder)?.file_name();
        if let Some(name) = name
            .to_str()
            .filter(|name| name.ends_with(".safetensors") && !name.starts_with('.'))
        {
            files.push(name.to_owned());
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(Error::invalid(
            folder.display().to_string(),
            "holds no *.safetensors file",
            "convert the checkpoint to safetensors first (transformers: save_pretrained)",
        ));
    }
    // Some publishers ship a consolidated copy beside the shards.
    if files.iter().any(|file| file == "model.safetensors") {
        files.retain(|file| file == "model.safetensors");
    }
    Ok(files)
}
