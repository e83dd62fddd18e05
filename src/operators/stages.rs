//! Weights of the steps in work, shared by the workers of a process: the originals, loaded when first asked for, and the quantized
//! ones, installed when committed. A step's weights are dropped as soon as nobody needs them.

use super::records::Quantized;
use crate::budget::{Budget, Grant};
use crate::error::{Error, Result};
use crate::model::{Block, Linear, Rotary, Tower, Weight};
use crate::plan::{Plan, PlannedLinear};
use crate::system::release_free_memory;
use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::{Arc, Mutex};

/// Steps whose weights are kept: the one that is solved and the one before it, which the forward pass uses.
const STEPS_KEPT: u64 = 2;

/// Values by step, made by whoever asks first while the others wait.
#[derive(Debug)]
pub struct Shelf<T>(Mutex<BTreeMap<u64, Cell<T>>>);

type Cell<T> = Arc<Mutex<Option<Arc<T>>>>;

impl<T> Default for Shelf<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Shelf<T> {
    /// The value of `key`; those of keys `kept` or more below it are dropped.
    pub fn get(&self, key: u64, kept: u64, load: impl FnOnce() -> Result<T>) -> Result<Arc<T>> {
        let poisoned = || Error::Worker("a worker stopped while it loaded weights".into());
        let cell = {
            let mut values = self.0.lock().map_err(|_| poisoned())?;
            values.retain(|&older, _| older + kept > key);
            Arc::clone(values.entry(key).or_default())
        };
        // Only this key's lock is held while loading: other steps go on.
        let mut cell = cell.lock().map_err(|_| poisoned())?;
        if let Some(value) = &*cell {
            return Ok(Arc::clone(value));
        }
        let value = Arc::new(load()?);
        *cell = Some(Arc::clone(&value));
        Ok(value)
    }

    /// Drops the value of `key`.
    fn forget(&self, key: u64) {
        if let Ok(mut values) = self.0.lock() {
            values.remove(&key);
        }
    }
}

/// A linear, and its bytes in memory for as long as it is held.
pub type Held = (Linear, Grant);

/// The linears of a step.
#[derive(Debug)]
pub struct Weights {
    linears: Vec<Linear>,
    _bytes: Vec<Grant>,
}

impl From<Vec<Held>> for Weights {
    fn from(held: Vec<Held>) -> Self {
        let (linears, _bytes) = held.into_iter().unzip();
        Self { linears, _bytes }
    }
}

impl Deref for Weights {
    type Target = [Linear];

    fn deref(&self) -> &[Linear] {
        &self.linears
    }
}

/// See the module.
#[derive(Debug)]
pub struct Stages {
    budget: Arc<Budget>,
    original: Shelf<Weights>,
    quantized: Shelf<Weights>,
    blocks: Shelf<Block>,
}

impl Stages {
    /// No weights; those that will be loaded are asked of `budget`.
    pub fn new(budget: Arc<Budget>) -> Self {
        Self {
            budget,
            original: Shelf::default(),
            quantized: Shelf::default(),
            blocks: Shelf::default(),
        }
    }

    /// The original linears of a step.
    pub fn original(&self, step: u64, plan: &Plan, tower: &Tower) -> Result<Arc<Weights>> {
        self.original.get(step, STEPS_KEPT, || {
            let linears = plan.step_linears(step).iter();
            let held: Result<Vec<Held>> = linears.map(|linear| self.load(linear, plan, tower)).collect();
            Ok(held?.into())
        })
    }

    /// An original linear.
    pub fn load(&self, linear: &PlannedLinear, plan: &Plan, tower: &Tower) -> Result<Held> {
        let bytes = self.budget.take("weights", plan.original_bytes(linear))?;
        let loaded = tower.linear(linear.block, &linear.spec)?;
        Ok((loaded, kept(bytes, tower)))
    }

    /// A quantized linear; `codes` are the bytes of its codes.
    pub fn install(
        &self,
        linear: &PlannedLinear,
        weight: Quantized,
        codes: Grant,
        plan: &Plan,
        tower: &Tower,
    ) -> Result<Held> {
        let _on_its_way = match &weight {
            Quantized::Codes(_) if tower.placement().on_device => {
                self.budget.take("weights", plan.original_bytes(linear))?
            }
            _ => Grant::default(),
        };
        let weight = match weight {
            Quantized::Codes(codes) => tower.quantized_weight(codes)?,
            Quantized::Values(values) => Weight::Whole(values),
        };
        let quantized = tower.quantized_linear(linear.block, &linear.spec, weight)?;
        Ok((quantized, kept(codes, tower)))
    }

    /// The linears of a step as the quantized model has them; `load` makes them for the first worker that asks.
    pub fn quantized(&self, step: u64, load: impl FnOnce() -> Result<Vec<Held>>) -> Result<Arc<Weights>> {
        self.quantized.get(step, STEPS_KEPT, || Ok(load()?.into()))
    }

    /// Drops the weights of a step that every batch has passed, and gives the memory back.
    pub fn forget(&self, step: u64) {
        self.quantized.forget(step);
        self.forget_original(step);
    }

    /// Drops the originals of a step that is solved, where no original stream runs, and gives the memory back.
    pub fn forget_original(&self, step: u64) {
        self.original.forget(step);
        release_free_memory();
    }

    /// Norms and options of a block.
    pub fn block(&self, block: usize, tower: &Tower, rotary: &[Arc<Rotary>]) -> Result<Arc<Block>> {
        self.blocks
            .get(block as u64, STEPS_KEPT, || tower.block(block, rotary))
    }
}

/// What a linear holds of `bytes`: those on a device have left the memory.
fn kept(bytes: Grant, tower: &Tower) -> Grant {
    match tower.placement().on_device {
        true => Grant::default(),
        false => bytes,
    }
}
