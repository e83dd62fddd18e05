//! The activation store: what lies between two stages, per batch and stream. On the device, where there is one, up to a budget, then in
//! memory up to another, in a scratch file beyond that.

use crate::device::parking::{Parked, Parking};
use crate::device::{Placement, values};
use crate::error::{Error, Result};
use crate::numerics::halves;
use crate::storage::ScratchFile;
use bytemuck::{cast_slice, cast_slice_mut};
use candle_core::{DType, Device, Storage, Tensor};
use half::{bf16, f16};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Which model an activation belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stream {
    /// The model with the blocks so far quantized.
    Quantized,
    /// The model as it came.
    Original,
}

/// What is kept of a batch between stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Slot {
    /// The residual stream, in f32.
    Residual,
    /// The next site's input, in the model's own dtype: a 16-bit model computes it in 16 bits at run time, too.
    SiteInput,
    /// What latent attention compressed, in the model's own dtype.
    Latents,
    /// The sum of the outputs of a mixture's experts so far, in f32.
    Mixture,
}

/// Whose activation: batch position (the probe has [`PROBE`]), stream, slot.
pub type Key = (usize, Stream, Slot);

/// Batch position of the probe.
pub const PROBE: usize = usize::MAX;

/// How [`Slot::SiteInput`] and [`Slot::Latents`] are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// bfloat16
    Bf16,
    /// IEEE half precision
    F16,
    /// IEEE single precision
    F32,
}

impl Precision {
    fn bytes(self) -> usize {
        self.dtype().size_in_bytes()
    }

    fn dtype(self) -> DType {
        match self {
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
            Self::F32 => DType::F32,
        }
    }
}

#[derive(Debug)]
struct Entry {
    rows: usize,
    columns: usize,
    precision: Precision,
    place: Place,
}

#[derive(Debug)]
enum Place {
    /// Where the model runs, if not in memory.
    Device(Tensor),
    /// In memory that a device copies to and from.
    Parked(Parked),
    Resident(Vec<u8>),
    /// Offset in the scratch file.
    Spilled(u64),
}

/// Bytes in use, and how many there may be.
#[derive(Clone, Copy, Debug)]
struct Used {
    bytes: usize,
    most: usize,
}

impl Used {
    fn none_of(most: usize) -> Self {
        Self { bytes: 0, most }
    }

    /// Takes `bytes`, where there is room.
    fn take(&mut self, bytes: usize) -> bool {
        let fits = self.bytes + bytes <= self.most;
        self.bytes += if fits { bytes } else { 0 };
        fits
    }
}

/// A worker's activations.
#[derive(Debug)]
pub struct ActivationStore {
    entries: BTreeMap<Key, Entry>,
    /// Room in the scratch file of entries that were spilled once, by key: it is used again.
    rooms: BTreeMap<Key, (u64, usize)>,
    resident: Used,
    on_device: Used,
    /// In the place of `resident`, beside a device.
    parking: Option<Parking>,
    device: Device,
    site_precision: Precision,
    folder: PathBuf,
    scratch: Option<ScratchFile>,
    scratch_end: u64,
}

impl ActivationStore {
    /// A store that keeps at most `resident_max` bytes in memory and the rest in a nameless file in `folder`.
    pub fn new(folder: &Path, resident_max: usize, site_precision: Precision) -> Self {
        Self {
            entries: BTreeMap::new(),
            rooms: BTreeMap::new(),
            resident: Used::none_of(resident_max),
            on_device: Used::none_of(0),
            parking: None,
            device: Device::Cpu,
            site_precision,
            folder: folder.to_owned(),
            scratch: None,
            scratch_end: 0,
        }
    }

    /// Keeps at most `most` bytes where the model runs, if that is a device, before any in memory.
    pub fn with_device(mut self, placement: &Placement, most: usize) -> Self {
        if placement.on_device {
            self.device = placement.device.clone();
            self.parking = Some(Parking::new(&self.device, self.resident.most));
            self.on_device = Used::none_of(most);
        }
        self
    }

    /// Keeps `value`, `[rows, columns]` f32, under `key`, in place of what was there.
    pub fn put(&mut self, key: Key, value: &Tensor) -> Result<()> {
        self.forget(key);
        let (rows, columns) = value.dims2()?;
        let precision = match key.2 {
            Slot::Residual | Slot::Mixture => Precision::F32,
            Slot::SiteInput | Slot::Latents => self.site_precision,
        };
        let place = match (
            &mut self.parking,
            self.on_device.take(rows * columns * precision.bytes()),
        ) {
            (_, true) => Place::Device(value.to_dtype(precision.dtype())?),
            (Some(parking), false) => match parking.park(&value.to_dtype(precision.dtype())?)? {
                Some(parked) => Place::Parked(parked),
                None => Place::Spilled(self.spill(key, &bytes_of(value, precision)?)?),
            },
            (None, false) => {
                let bytes = bytes_of(value, precision)?;
                match self.resident.take(bytes.len()) {
                    true => Place::Resident(bytes),
                    false => Place::Spilled(self.spill(key, &bytes)?),
                }
            }
        };
        let entry = Entry {
            rows,
            columns,
            precision,
            place,
        };
        self.entries.insert(key, entry);
        Ok(())
    }

    fn spill(&mut self, key: Key, bytes: &[u8]) -> Result<u64> {
        let scratch = match &mut self.scratch {
            Some(scratch) => scratch,
            none => none.insert(ScratchFile::create(&self.folder)?),
        };
        let offset = match self.rooms.get(&key) {
            Some(&(offset, room)) if room >= bytes.len() => offset,
            _ => {
                let offset = self.scratch_end;
                self.scratch_end += bytes.len() as u64;
                self.rooms.insert(key, (offset, bytes.len()));
                offset
            }
        };
        scratch.write_at(bytes, offset)?;
        Ok(offset)
    }

    /// What was kept under `key`, in f32; a site's input that is on the device as its linears take it.
    ///
    /// # Errors
    /// Nothing was, or the scratch file cannot be read.
    pub fn get(&self, key: Key) -> Result<Tensor> {
        self.find(key)?.ok_or_else(|| {
            Error::invalid(
                format!("activation {key:?}"),
                "is not in the store",
                "this is a bug in quantflow: please report it",
            )
        })
    }

    /// As [`Self::get`]; `None` where nothing was kept.
    pub fn find(&self, key: Key) -> Result<Option<Tensor>> {
        let Some(entry) = self.entries.get(&key) else {
            return Ok(None);
        };
        let count = entry.rows * entry.columns;
        let as_taken = |value: Tensor| match key.2 {
            Slot::SiteInput => Ok(Some(value)),
            _ => Ok(Some(value.to_dtype(DType::F32)?)),
        };
        let read;
        let bytes: &[u8] = match (&entry.place, &self.scratch) {
            (Place::Device(value), _) => return as_taken(value.clone()),
            (Place::Parked(parked), _) => return as_taken(parked.tensor()?),
            (Place::Resident(bytes), _) => bytes,
            (Place::Spilled(offset), Some(scratch)) => {
                let mut buffer = vec![0; count * entry.precision.bytes()];
                scratch.read_at(&mut buffer, *offset)?;
                read = buffer;
                &read
            }
            (Place::Spilled(_), None) => return Ok(None),
        };
        let mut values = vec![0f32; count];
        match entry.precision {
            Precision::F32 => cast_slice_mut(&mut values).copy_from_slice(bytes),
            Precision::Bf16 => halves::widen::<bf16>(bytes, &mut values),
            Precision::F16 => halves::widen::<f16>(bytes, &mut values),
        }
        Ok(Some(Tensor::from_vec(
            values,
            (entry.rows, entry.columns),
            &self.device,
        )?))
    }

    /// As [`Self::find`], and forgets it.
    pub fn take(&mut self, key: Key) -> Result<Option<Tensor>> {
        let found = self.find(key)?;
        self.forget(key);
        Ok(found)
    }

    fn forget(&mut self, key: Key) {
        match self.entries.remove(&key).map(|entry| entry.place) {
            Some(Place::Device(value)) => {
                self.on_device.bytes -= value.elem_count() * value.dtype().size_in_bytes();
            }
            Some(Place::Parked(parked)) => {
                if let Some(parking) = &mut self.parking {
                    parking.leave(parked);
                }
            }
            Some(Place::Resident(bytes)) => self.resident.bytes -= bytes.len(),
            Some(Place::Spilled(_)) | None => {}
        }
    }
}

/// As the store keeps them.
fn bytes_of(value: &Tensor, precision: Precision) -> Result<Vec<u8>> {
    with_values(value, |values| match precision {
        Precision::F32 => cast_slice(values).to_vec(),
        Precision::Bf16 => halves::narrow::<bf16>(values),
        Precision::F16 => halves::narrow::<f16>(values),
    })
}

/// Reads the values of a tensor in f32, row-major, where they are; of one on a device, a copy.
pub(super) fn with_values<T>(tensor: &Tensor, read: impl FnOnce(&[f32]) -> T) -> Result<T> {
    if !tensor.device().is_cpu() {
        return Ok(read(&values::<f32>(&tensor.to_dtype(DType::F32)?)?));
    }
    let tensor = tensor.to_dtype(DType::F32)?.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(values), Some((begin, end))) => Ok(read(&values.as_slice()?[begin..end])),
        _ => Err(Error::Worker("an activation is not in memory".into())),
    }
}
