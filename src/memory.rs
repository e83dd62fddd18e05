//! Where large matrices lie: in memory, or in scratch files whose pages are resident only while they are used. Knows neither
//! what a matrix means nor who decides; the plan decides, by step. Both are mapped, not allocated: what is dropped goes back to the
//! system at once, where an allocator would keep it for what never comes (seen: a fifth of a peak).

use crate::budget::{Budget, Grant};
use crate::error::{IoContext, Result};
use crate::storage::ScratchMap;
use bytemuck::{Pod, cast_slice, cast_slice_mut};
use memmap2::{MmapMut, MmapOptions};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::ops::{Deref, DerefMut, Range};
use std::path::Path;
use std::sync::Arc;

/// Smaller regions are not worth a mapping.
const MAPPED_BYTES_MIN: usize = 64 << 10;

/// Where new regions are made.
#[derive(Clone, Debug)]
pub enum Room {
    /// Resident, whatever they take.
    Memory,
    /// Resident, within a budget.
    Budget(Arc<Budget>),
    /// In nameless files in this folder.
    Scratch(Arc<Path>),
}

impl Room {
    /// A region of `length` zeros.
    ///
    /// # Errors
    /// The disk, the budget, or the system has no room for it.
    pub fn zeros<T: Pod>(&self, length: usize) -> Result<Region<T>> {
        let bytes = length * size_of::<T>();
        let grant = match self {
            Self::Budget(budget) => budget.take("matrices", bytes as u64)?,
            Self::Memory | Self::Scratch(_) => Grant::default(),
        };
        let place = match self {
            Self::Scratch(folder) => Place::Scratch(ScratchMap::create(folder, bytes)?, length),
            _ if bytes < MAPPED_BYTES_MIN => Place::Memory(vec![T::zeroed(); length]),
            _ => {
                // Resident at once: whoever asks the budget next is told of them.
                let map = MmapOptions::new().len(bytes).populate().map_anon();
                let map = map.context("map memory for", Path::new("large matrices"))?;
                Place::Mapped(map, length)
            }
        };
        Ok(Region(place, grant))
    }
}

/// A fixed number of values. Those in a scratch file are resident from the first touch through a guard until that guard goes; so a
/// kernel that works through a matrix region by region needs the memory of those that it holds.
#[derive(Debug)]
pub struct Region<T>(Place<T>, Grant);

#[derive(Debug)]
enum Place<T> {
    Memory(Vec<T>),
    /// And how many values.
    Mapped(MmapMut, usize),
    /// And how many values.
    Scratch(ScratchMap, usize),
}

impl<T: Pod> Region<T> {
    /// How many values.
    pub fn len(&self) -> usize {
        match &self.0 {
            Place::Memory(values) => values.len(),
            Place::Mapped(_, length) | Place::Scratch(_, length) => *length,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values.
    pub fn read(&self) -> Values<'_, T> {
        Values(self)
    }

    /// The values, to be written.
    pub fn write(&mut self) -> ValuesMut<'_, T> {
        ValuesMut(self)
    }

    /// Has the system bring these values from a scratch file before they are touched: for pieces that lie apart, between which it would
    /// else read ahead.
    pub fn expect(&self, values: Range<usize>) {
        if let Place::Scratch(map, _) = &self.0 {
            map.expect(values.start * size_of::<T>()..values.end * size_of::<T>());
        }
    }

    /// The same bits as values of another type.
    ///
    /// # Panics
    /// The types have different sizes.
    pub fn cast<U: Pod>(self) -> Region<U> {
        assert_eq!(size_of::<T>(), size_of::<U>());
        let place = match self.0 {
            Place::Memory(values) => Place::Memory(bytemuck::allocation::cast_vec(values)),
            Place::Mapped(map, length) => Place::Mapped(map, length),
            Place::Scratch(map, length) => Place::Scratch(map, length),
        };
        Region(place, self.1)
    }

    fn values(&self) -> &[T] {
        match &self.0 {
            Place::Memory(values) => values,
            Place::Mapped(map, length) => &cast_slice(map)[..*length],
            Place::Scratch(map, length) => &cast_slice(map.bytes())[..*length],
        }
    }

    fn release(&self) {
        if let Place::Scratch(map, _) = &self.0 {
            map.release();
        }
    }
}

impl<T> From<Vec<T>> for Region<T> {
    fn from(values: Vec<T>) -> Self {
        Self(Place::Memory(values), Grant::default())
    }
}

/// A copy is in memory.
impl<T: Pod> Clone for Region<T> {
    fn clone(&self) -> Self {
        self.read().to_vec().into()
    }
}

impl<T: Pod + PartialEq> PartialEq for Region<T> {
    fn eq(&self, other: &Self) -> bool {
        *self.read() == *other.read()
    }
}

impl<T: Pod + Eq> Eq for Region<T> {}

impl<T: Pod + Serialize> Serialize for Region<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        self.read().serialize(serializer)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Region<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        Vec::deserialize(deserializer).map(Self::from)
    }
}

/// A region's values, resident while this lives.
#[derive(Debug)]
pub struct Values<'a, T: Pod>(&'a Region<T>);

impl<T: Pod> Deref for Values<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        self.0.values()
    }
}

impl<T: Pod> Drop for Values<'_, T> {
    fn drop(&mut self) {
        self.0.release();
    }
}

/// As [`Values`], to be written.
#[derive(Debug)]
pub struct ValuesMut<'a, T: Pod>(&'a mut Region<T>);

impl<T: Pod> Deref for ValuesMut<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        self.0.values()
    }
}

impl<T: Pod> DerefMut for ValuesMut<'_, T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match &mut self.0.0 {
            Place::Memory(values) => values,
            Place::Mapped(map, length) => &mut cast_slice_mut(map)[..*length],
            Place::Scratch(map, length) => &mut cast_slice_mut(map.bytes_mut())[..*length],
        }
    }
}

impl<T: Pod> Drop for ValuesMut<'_, T> {
    fn drop(&mut self) {
        self.0.release();
    }
}
