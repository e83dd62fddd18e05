//! The rows of a step's linears in the plan's chunks, dealt over the workers, one chunk an activation: the pattern of those operators
//! that look at weights with a factor at hand.

use super::local::Local;
use super::records::Factored;
use crate::error::{Error, Result};
use crate::model::{Linear, Weight};
use crate::plan::{self, Part};
use candle_core::Tensor;
use std::collections::VecDeque;
use std::rc::Rc;
use timely::container::CapacityContainerBuilder;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::{Capability, Operator};

/// Rows of a step, and what they are worked on with.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// Step of the plan.
    pub step: u64,
    /// Factors of the rows' input.
    pub factored: Factored,
    /// The rows.
    pub planned: plan::Chunk,
}

impl Chunk {
    /// Its part of the rows that are chosen codes for in this step.
    fn share(&self, local: &Local) -> f64 {
        let plan = &local.shared.plan;
        let is_solved = |linear: usize| plan.linears[linear].to_solve().is_some();
        let linears = plan.step_linears(self.step).iter();
        let rows: usize = (linears.filter(|linear| is_solved(linear.index)))
            .map(|linear| linear.rows)
            .sum();
        let own = self.planned.parts.iter().filter(|part| is_solved(part.linear));
        own.map(|part| part.rows.len() as f64 / rows as f64).sum()
    }

    /// The original weights of a part, `[rows, columns]`, on the device where the linear is whole.
    ///
    /// # Errors
    /// They cannot be read, or are not there.
    pub fn tensor(&self, local: &Local, part: &Part) -> Result<Tensor> {
        match &self.linear(local, part)?.weight {
            Weight::Whole(weight) => Ok(weight.narrow(0, part.rows.start, part.rows.len())?),
            _ => Err(Error::Worker("these weights are not on a device".into())),
        }
    }

    /// Those of all parts, one after the other.
    ///
    /// # Errors
    /// As [`Self::tensor`].
    pub fn joined(&self, local: &Local) -> Result<Tensor> {
        let parts = self.planned.parts.iter().map(|part| self.tensor(local, part));
        match &parts.collect::<Result<Vec<_>>>()?[..] {
            [part] => Ok(part.clone()),
            parts => Ok(Tensor::cat(parts, 0)?),
        }
    }

    /// The original weights of a part in memory, in f32, row-major.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn weights(&self, local: &Local, part: &Part) -> Result<Vec<f32>> {
        Ok(self.linear(local, part)?.weight.rows(part.rows.clone())?)
    }

    fn linear(&self, local: &Local, part: &Part) -> Result<Linear> {
        let shared = &local.shared;
        let planned = &shared.plan.linears[part.linear];
        let originals = shared.stages.original(self.step, &shared.plan, &shared.tower)?;
        Ok(originals[planned.slot].clone())
    }
}

/// What `work` makes of the parts of the chunks that fall to this worker. An error halts the run.
pub fn by_chunk<'scope, T: Clone + 'static>(
    factors: StreamVec<'scope, u64, Factored>,
    name: &'static str,
    local: Rc<Local>,
    mut work: impl FnMut(&Local, Chunk) -> Result<Vec<T>> + 'static,
) -> StreamVec<'scope, u64, T> {
    let scope = factors.scope();
    factors.unary::<CapacityContainerBuilder<Vec<T>>, _, _, _>(Pipeline, name, move |_, info| {
        let again = scope.worker().activator_for(info.address);
        let mut queue: VecDeque<(Capability<u64>, Chunk)> = VecDeque::new();
        // Of the step in work: a mixture's has many records.
        let mut planned = (u64::MAX, Vec::new());
        move |input, output| {
            input.for_each_stamp(|capability, data| {
                let Some(capability) = capability.retain_least(output.output_index()) else {
                    return;
                };
                let step = *capability.time();
                if planned.0 != step {
                    planned = (step, local.shared.plan.chunks(step));
                }
                for factored in data.flat_map(|container| container.drain(..)) {
                    let own = planned.1.iter().enumerate().filter(|(i, chunk)| {
                        i % local.peers == local.index && factored.site.is_none_or(|site| site == chunk.site)
                    });
                    queue.extend(own.map(|(_, planned)| {
                        let (factored, planned) = (factored.clone(), planned.clone());
                        let chunk = Chunk {
                            step,
                            factored,
                            planned,
                        };
                        (capability.clone(), chunk)
                    }));
                }
            });
            if let Some((capability, chunk)) = queue.pop_front() {
                let made = local.run(name, || {
                    let shared = &local.shared;
                    let bytes = |part: &Part| shared.plan.chunk_bytes(&shared.plan.linears[part.linear]);
                    let _work = (
                        (shared.budget)
                            .take("a chunk of weights", chunk.planned.parts.iter().map(bytes).sum())?,
                        shared.take_panels(chunk.step, 1)?,
                    );
                    let (step, share) = (chunk.step, chunk.share(&local));
                    let made = work(&local, chunk)?;
                    shared.advance(step, |work| work.solve, share);
                    Ok(made)
                });
                match made {
                    Some(made) => output.session(&capability).give_iterator(made.into_iter()),
                    None => queue.clear(),
                }
                if !queue.is_empty() {
                    again.activate();
                }
            }
        }
    })
}
