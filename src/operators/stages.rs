//! Weights of the steps in work, shared by the workers of a process: the originals, loaded when first asked for, and the quantized
//! ones, installed when committed. A step's weights are dropped as soon as nobody needs them.

use crate::budget::{Budget, Grant};
use crate::error::{Error, Result};
use crate::model::{Block, Linear, Rotary, Tower};
use crate::plan::Plan;
use crate::report::release_free_memory;
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

/// The linears of a step.
#[derive(Debug)]
pub struct Weights {
    linears: Vec<Linear>,
    /// Of what they take in memory.
    _bytes: Grant,
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

    /// The original linears of a step, in f32.
    pub fn original(&self, step: u64, plan: &Plan, tower: &Tower) -> Result<Arc<Weights>> {
        self.original.get(step, STEPS_KEPT, || {
            self.weights(step, plan, tower, || {
                let linears = plan.step_linears(step).iter();
                linears
                    .map(|linear| tower.linear(linear.block, &linear.spec))
                    .collect()
            })
        })
    }

    /// The linears of a step as the quantized model has them; `load` makes them for the first worker that asks.
    pub fn quantized(
        &self,
        step: u64,
        plan: &Plan,
        tower: &Tower,
        load: impl FnOnce() -> Result<Vec<Linear>>,
    ) -> Result<Arc<Weights>> {
        self.quantized
            .get(step, STEPS_KEPT, || self.weights(step, plan, tower, load))
    }

    fn weights(
        &self,
        step: u64,
        plan: &Plan,
        tower: &Tower,
        load: impl FnOnce() -> Result<Vec<Linear>>,
    ) -> Result<Weights> {
        let bytes = self.budget.take("weights", plan.weight_bytes(step))?;
        Ok(Weights {
            linears: load()?,
            // On a device they have left the memory.
            _bytes: match tower.placement().on_device {
                true => Grant::default(),
                false => bytes,
            },
        })
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
