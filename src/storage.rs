//! The only module that creates, writes or renames files. Files appear whole: what is unfinished has another
//! name (`.partial`, a temporary), is synced, and is then renamed.
#![allow(clippy::disallowed_methods)] // this is the module that the ban points to

use crate::error::{Error, IoContext, Result};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Creates `path` and its parents.
pub fn create_folder(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).context("create the folder", path)
}

/// Removes a file or a folder with all it holds; one that does not exist is fine.
pub fn remove(path: &Path) -> Result<()> {
    let removed = match path.symlink_metadata() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => Err(error),
        Ok(meta) if meta.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
    };
    removed.context("remove", path)
}

/// Writes `bytes` to `path` through a sibling temporary file, synced and renamed.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    write_whole_with(path, |file| file.write_all(bytes))
}

/// As [`write_whole`], with the content written by `fill`.
pub fn write_whole_with(
    path: &Path,
    fill: impl FnOnce(&mut std::io::BufWriter<&File>) -> std::io::Result<()>,
) -> Result<()> {
    let folder = parent(path);
    let temporary = tempfile::Builder::new()
        .prefix(".quantflow-")
        .permissions(readable_by_all())
        .tempfile_in(folder)
        .context("create a file in", folder)?;
    let mut writer = std::io::BufWriter::new(temporary.as_file());
    fill(&mut writer)
        .and_then(|()| writer.flush())
        .context("write", path)?;
    drop(writer);
    temporary.as_file().sync_all().context("sync", path)?;
    temporary
        .persist(path)
        .map_err(|error| error.error)
        .context("rename a finished file to", path)?;
    sync_folder(folder)
}

/// Writes `value` as indented JSON with a final newline, whole.
pub fn write_json(path: &Path, value: &serde_json::Value) -> Result<()> {
    write_whole(path, format!("{value:#}\n").as_bytes())
}

/// Copies a file whole.
pub fn copy_whole(from: &Path, to: &Path) -> Result<()> {
    let mut source = File::open(from).context("read", from)?;
    write_whole_with(to, |target| std::io::copy(&mut source, target).map(drop))
}

/// Moves a file to another place of the same disk, at once, over what is there.
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).context("rename a finished file to", to)?;
    sync_folder(parent(to))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

fn readable_by_all() -> std::fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(0o644)
}

fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .context("sync the folder", folder)
}

/// A file that is written from its beginning to its end, and has its name only when it is whole. What an earlier run left unfinished is
/// overwritten.
#[derive(Debug)]
pub struct GrowingFile {
    file: std::io::BufWriter<File>,
    path: PathBuf,
}

impl GrowingFile {
    /// Creates it as `path`, or empties what is there.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).context("create", path)?;
        Ok(Self {
            file: std::io::BufWriter::new(file),
            path: path.to_owned(),
        })
    }

    /// Appends `bytes`. Not yet durable: see [`GrowingFile::finish`].
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).context("write", &self.path)
    }

    /// Gives the file its final name, on the same disk; it is then durable.
    pub fn finish(self, path: &Path) -> Result<()> {
        let file = self
            .file
            .into_inner()
            .map_err(std::io::IntoInnerError::into_error);
        file.and_then(|file| file.sync_all())
            .context("sync", &self.path)?;
        rename(&self.path, path)
    }
}

/// A file of known length whose parts are written in any order, under `{name}.partial` until it is finished.
#[derive(Debug)]
pub struct PartialFile {
    file: File,
    partial: PathBuf,
    path: PathBuf,
}

impl PartialFile {
    /// Opens `{path}.partial`, or `path` itself where an earlier run finished it, or creates it with `length` bytes reserved on the disk.
    ///
    /// # Errors
    /// The disk has no room for `length` bytes, the folder is not writable, or the file that is there has another length.
    pub fn open(path: &Path, length: u64) -> Result<Self> {
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let existing = if path.exists() { path } else { &partial };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(existing)
            .context("open", existing)?;
        let found = file.metadata().context("read", existing)?.len();
        if found == 0 {
            if let Err(error) = reserve(&file, length) {
                drop(file);
                remove(&partial)?;
                return Err(error).context("reserve space for", &partial);
            }
        } else if found != length {
            return Err(Error::invalid(
                existing.display().to_string(),
                format!("has {found} bytes, this run needs {length}"),
                "it is not from this run: choose another output folder or pass --fresh",
            ));
        }
        Ok(Self {
            file,
            partial,
            path: path.to_owned(),
        })
    }

    /// Writes `bytes` at `offset`. Not yet durable: see [`PartialFile::sync`].
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.file
            .write_all_at(bytes, offset)
            .context("write", &self.partial)
    }

    /// Reads `length` bytes at `offset`.
    pub fn read_at(&self, length: usize, offset: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.file
            .read_exact_at(&mut bytes, offset)
            .context("read", &self.partial)?;
        Ok(bytes)
    }

    /// Makes everything written so far durable.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().context("sync", &self.partial)
    }

    /// Gives the file its final name.
    pub fn finish(self) -> Result<()> {
        self.file.sync_all().context("sync", &self.partial)?;
        if self.partial.exists() {
            return rename(&self.partial, &self.path);
        }
        sync_folder(parent(&self.path))
    }
}

/// An append-only file whose every append is durable when it returns.
#[derive(Debug)]
pub struct AppendFile {
    file: File,
    path: PathBuf,
}

impl AppendFile {
    /// Opens or creates `path`, cut to its first `keep` bytes.
    pub fn open(path: &Path, keep: u64) -> Result<Self> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)
            .context("open", path)?;
        file.set_len(keep).context("truncate", path)?;
        let mut opened = Self {
            file,
            path: path.to_owned(),
        };
        std::io::Seek::seek(&mut opened.file, std::io::SeekFrom::End(0)).context("seek", path)?;
        sync_folder(parent(path))?;
        Ok(opened)
    }

    /// Appends `bytes` and waits until they are on the disk.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file
            .write_all(bytes)
            .and_then(|()| self.file.sync_data())
            .context("append to", &self.path)
    }
}

/// A nameless file for data that may be lost: it goes with the process, however that ends.
#[derive(Debug)]
pub struct ScratchFile {
    file: File,
    folder: PathBuf,
}

impl ScratchFile {
    /// Creates it in `folder`, which has to exist.
    pub fn create(folder: &Path) -> Result<Self> {
        let file = tempfile::tempfile_in(folder).context("create a scratch file in", folder)?;
        Ok(Self {
            file,
            folder: folder.to_owned(),
        })
    }

    /// Writes `bytes` at `offset`.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.file
            .write_all_at(bytes, offset)
            .context("write to the scratch file in", &self.folder)
    }

    /// Fills `bytes` from `offset`.
    pub fn read_at(&self, bytes: &mut [u8], offset: u64) -> Result<()> {
        self.file
            .read_exact_at(bytes, offset)
            .context("read from the scratch file in", &self.folder)
    }
}

/// Bytes in a nameless file of their own, mapped into memory: they may leave it and come back. They go with the process.
#[derive(Debug)]
pub struct ScratchMap(memmap2::MmapMut);

impl ScratchMap {
    /// `length` zeros in `folder`, which has to exist.
    ///
    /// # Errors
    /// The disk has no room for them.
    pub fn create(folder: &Path, length: usize) -> Result<Self> {
        let context = "make room for large matrices (see --scratch) in";
        let file = tempfile::tempfile_in(folder).context(context, folder)?;
        reserve(&file, length as u64).context(context, folder)?;
        // SAFETY: the file has no name, so that nobody else can cut or write it, and its bytes are reserved.
        let map = unsafe { memmap2::MmapMut::map_mut(&file) }.context(context, folder)?;
        Ok(Self(map))
    }

    /// The bytes, page-aligned.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }

    /// Asks for these bytes soon, and for no others, as reading ahead would.
    pub fn expect(&self, bytes: std::ops::Range<usize>) {
        // A refusal costs time, not content.
        let _ = self
            .0
            .advise_range(memmap2::Advice::WillNeed, bytes.start, bytes.len());
    }

    /// Takes the pages out of resident memory; the file keeps what they hold, and a touch brings them back.
    pub fn release(&self) {
        // SAFETY: pages of a shared mapping of a file are read again from it: no value that a reference sees changes.
        // A refusal costs memory, not content.
        let _ = unsafe { self.0.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
    }
}

/// Makes an empty file `length` bytes long and reserves them: a full disk is an error now rather than in the middle of the run.
fn reserve(file: &File, length: u64) -> std::io::Result<()> {
    match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, length) {
        Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(length),
        other => Ok(other?),
    }
}

/// A lock on a folder: held while the value lives, released by the system however the process ends.
#[derive(Debug)]
pub struct FolderLock {
    _file: File,
}

impl FolderLock {
    /// Locks `folder` through the file `name` in it.
    ///
    /// # Errors
    /// Another process holds it.
    pub fn acquire(folder: &Path, name: &str) -> Result<Self> {
        let path = folder.join(name);
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .context("open", &path)?;
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { _file: file }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::invalid(
                folder.display().to_string(),
                "another quantflow process is writing here",
                "wait for it, or choose another output folder",
            )),
            Err(error) => Err(std::io::Error::from(error)).context("lock", &path),
        }
    }
}
