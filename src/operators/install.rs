//! `install`: committed linears replace the originals in the quantized model, and the next step begins.

use super::at_step_end;
use super::local::{Local, Shared};
use super::records::{Committed, Go};
use crate::error::Result;
use crate::model::Linear;
use crate::numerics::QuantizedWeight;
use std::rc::Rc;
use std::sync::Arc;
use timely::dataflow::StreamVec;

/// One [`Go`] a worker, until the last step is done.
pub fn install<'scope>(
    committed: StreamVec<'scope, u64, Committed>,
    local: Rc<Local>,
) -> StreamVec<'scope, u64, Go> {
    let shared = Arc::clone(&local.shared);
    let own = local.index as u64;
    at_step_end(
        committed,
        "install",
        move |_| own,
        local,
        move |step, mut committed: Vec<Committed>| {
            committed.sort_by_key(|linear| linear.linear);
            shared.stages.quantized(step, || {
                let weights = committed.iter().map(|linear| linear.quantized.as_deref());
                linears(&shared, step, weights)
            })?;
            Ok(if step + 1 < shared.plan.steps() {
                vec![Go]
            } else {
                Vec::new()
            })
        },
    )
}

/// A step's linears as the quantized model has them, read back from the output.
pub fn committed_linears(shared: &Shared, step: u64) -> Result<Vec<Linear>> {
    let plan = &shared.plan;
    let config = plan.format.quantization_config(&plan.layouts());
    let writer = shared.output.writer()?;
    let read = |name: &str| {
        let at = writer.layout().tensors().get(name)?;
        Some((at.spec.clone(), writer.read(name).ok()?.into()))
    };
    let weights: Vec<Option<QuantizedWeight>> = plan
        .step_linears(step)
        .iter()
        .map(|linear| {
            linear
                .grid
                .map(|_| plan.format.unpack(&linear.name, &config, &read))
                .transpose()
        })
        .collect::<Result<_>>()?;
    linears(shared, step, weights.iter().map(Option::as_ref))
}

/// `None` keeps the original weight.
fn linears<'a>(
    shared: &Shared,
    step: u64,
    weights: impl Iterator<Item = Option<&'a QuantizedWeight>>,
) -> Result<Vec<Linear>> {
    let tower = &shared.tower;
    let pairs = shared.plan.step_linears(step).iter().zip(weights);
    pairs
        .map(|(linear, weight)| match weight {
            None => tower.linear(linear.block, &linear.spec),
            Some(weight) => tower.quantized_linear(linear.block, &linear.spec, weight),
        })
        .collect()
}
