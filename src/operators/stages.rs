//! Weights of the steps in work, shared by the workers of a process: the originals, loaded when first asked for, and the quantized
//! ones, installed when committed. A step's weights are dropped two steps later.

use crate::error::{Error, Result};
use crate::model::{Block, Linear, Tower};
use crate::plan::Plan;
use crate::model::Rotary;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// Steps whose weights are kept: the one that is solved and the one before it, which the forward pass uses.
const STEPS_KEPT: u64 = 2;

type Loaded<T> = Arc<Mutex<Option<Arc<T>>>>;

/// See the module.
#[derive(Debug, Default)]
pub struct Stages {
    original: Mutex<BTreeMap<u64, Loaded<Vec<Linear>>>>,
    quantized: Mutex<BTreeMap<u64, Loaded<Vec<Linear>>>>,
    blocks: Mutex<BTreeMap<u64, Loaded<Block>>>,
}

impl Stages {
    /// The original linears of a step, in f32.
    pub fn original(&self, step: u64, plan: &Plan, tower: &Tower) -> Result<Arc<Vec<Linear>>> {
        get(&self.original, step, STEPS_KEPT, || {
            let (block, site) = plan.step(step);
            tower.linears(block, site)
        })
    }

    /// The linears of a step as the quantized model has them; `load` makes them for the first worker that asks.
    pub fn quantized(&self, step: u64, load: impl FnOnce() -> Result<Vec<Linear>>) -> Result<Arc<Vec<Linear>>> {
        get(&self.quantized, step, STEPS_KEPT, load)
    }

    /// Norms and options of a block.
    pub fn block(&self, block: usize, tower: &Tower, rotary: &[Arc<Rotary>]) -> Result<Arc<Block>> {
        get(&self.blocks, block as u64, STEPS_KEPT, || tower.block(block, rotary))
    }

    /// Forgets everything, after a replay.
    pub fn clear(&self) {
        for map in [&self.original, &self.quantized] {
            if let Ok(mut map) = map.lock() {
                map.clear();
            }
        }
    }
}

fn get<T>(
    map: &Mutex<BTreeMap<u64, Loaded<T>>>,
    key: u64,
    kept: u64,
    load: impl FnOnce() -> Result<T>,
) -> Result<Arc<T>> {
    let poisoned = || Error::Worker("a worker stopped while it loaded weights".into());
    let cell = {
        let mut map = map.lock().map_err(|_| poisoned())?;
        map.retain(|&older, _| older + kept > key);
        Arc::clone(map.entry(key).or_default())
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
