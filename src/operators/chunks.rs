//! The rows of a step's linears in chunks of fixed size, dealt over the workers, one chunk an activation: the pattern of those operators
//! that look at weights with a factor at hand.

use super::local::Local;
use super::records::Factored;
use crate::device::solver::rows_at_a_time;
use crate::error::{Error, Result};
use crate::model::{Linear, Weight};
use crate::plan::{CHUNK_ROWS, PlannedLinear};
use candle_core::Tensor;
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;
use timely::container::CapacityContainerBuilder;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::{Capability, Operator};

/// Rows of one linear.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// Step of the plan.
    pub step: u64,
    /// Position of the linear in the plan.
    pub linear: usize,
    /// Position of the chunk within the linear.
    pub chunk: usize,
    /// Factors of the linear's input.
    pub factored: Factored,
}

impl Chunk {
    /// Its rows of the linear.
    pub fn rows(&self, local: &Local) -> Range<usize> {
        let planned = &local.shared.plan.linears[self.linear];
        let height = chunk_rows(local, planned);
        let first = self.chunk * height;
        first..planned.rows.min(first + height)
    }

    /// Its part of the rows that are chosen codes for in this step.
    fn share(&self, local: &Local) -> f64 {
        let solved = |linear: &&PlannedLinear| linear.to_solve().is_some();
        let linears = local.shared.plan.step_linears(self.step).iter();
        let rows: usize = linears.filter(solved).map(|linear| linear.rows).sum();
        match local.shared.plan.linears[self.linear].to_solve() {
            Some(_) => self.rows(local).len() as f64 / rows as f64,
            None => 0.0,
        }
    }

    /// Its original weights, `[rows, columns]`, on the device where the linear is whole.
    ///
    /// # Errors
    /// They cannot be read, or are not there.
    pub fn tensor(&self, local: &Local) -> Result<Tensor> {
        let rows = self.rows(local);
        match &self.linear(local)?.weight {
            Weight::Whole(weight) => Ok(weight.narrow(0, rows.start, rows.len())?),
            _ => Err(Error::Worker("these weights are not on a device".into())),
        }
    }

    /// Its original weights in memory, in f32, row-major.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn weights(&self, local: &Local) -> Result<Vec<f32>> {
        Ok(self.linear(local)?.weight.rows(self.rows(local))?)
    }

    fn linear(&self, local: &Local) -> Result<Linear> {
        let shared = &local.shared;
        let planned = &shared.plan.linears[self.linear];
        let originals = shared.stages.original(self.step, &shared.plan, &shared.tower)?;
        Ok(originals[planned.slot].clone())
    }
}

/// Rows of a chunk: what fits a core's caches, or all that a device has room for.
fn chunk_rows(local: &Local, linear: &PlannedLinear) -> usize {
    match local.shared.tower.placement().on_device {
        true => rows_at_a_time(linear.columns),
        false => CHUNK_ROWS,
    }
}

/// What `work` makes of the chunks that fall to this worker. An error halts the run.
pub fn by_chunk<'scope, T: Clone + 'static>(
    factors: StreamVec<'scope, u64, Factored>,
    name: &'static str,
    local: Rc<Local>,
    mut work: impl FnMut(&Local, Chunk) -> Result<T> + 'static,
) -> StreamVec<'scope, u64, T> {
    let scope = factors.scope();
    factors.unary::<CapacityContainerBuilder<Vec<T>>, _, _, _>(Pipeline, name, move |_, info| {
        let again = scope.worker().activator_for(info.address);
        let mut queue: VecDeque<(Capability<u64>, Chunk)> = VecDeque::new();
        move |input, output| {
            input.for_each_stamp(|capability, data| {
                let Some(capability) = capability.retain_least(output.output_index()) else {
                    return;
                };
                let step = *capability.time();
                for factored in data.flat_map(|container| container.drain(..)) {
                    let linears = local.shared.plan.step_linears(step).iter();
                    let chunks = linears.flat_map(|linear| {
                        (0..linear.rows.div_ceil(chunk_rows(&local, linear)))
                            .map(move |chunk| (linear, chunk))
                    });
                    let own = chunks.enumerate().filter(|(i, (linear, _))| {
                        i % local.peers == local.index && factored.site.is_none_or(|site| site == linear.site)
                    });
                    queue.extend(own.map(|(_, (linear, chunk))| {
                        let chunk = Chunk {
                            step,
                            linear: linear.index,
                            chunk,
                            factored: factored.clone(),
                        };
                        (capability.clone(), chunk)
                    }));
                }
            });
            if let Some((capability, chunk)) = queue.pop_front() {
                let made = local.run(name, || {
                    let shared = &local.shared;
                    let planned = &shared.plan.linears[chunk.linear];
                    let _work = (
                        (shared.budget).take("a chunk of weights", shared.plan.chunk_bytes(planned))?,
                        shared.take_panels(chunk.step, 1)?,
                    );
                    let (step, share) = (chunk.step, chunk.share(&local));
                    let made = work(&local, chunk)?;
                    shared.advance(step, |work| work.solve, share);
                    Ok(made)
                });
                match made {
                    Some(made) => output.session(&capability).give(made),
                    None => queue.clear(),
                }
                if !queue.is_empty() {
                    again.activate();
                }
            }
        }
    })
}
