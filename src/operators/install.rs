//! `install`: committed linears replace the originals in the quantized model, and the next step begins.

use super::at_step_end;
use super::local::{Local, Shared};
use super::records::{Committed, Go, Quantized};
use super::stages::Held;
use crate::budget::Grant;
use crate::error::{Error, Result};
use crate::plan::PlannedLinear;
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
                let pairs = shared.plan.step_linears(step).iter().zip(committed);
                pairs
                    .map(|(linear, Committed { quantized, bytes, .. })| {
                        installed(&shared, linear, quantized, bytes)
                    })
                    .collect()
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
pub fn committed_linears(shared: &Shared, step: u64) -> Result<Vec<Held>> {
    let plan = &shared.plan;
    if !shared.output.is_written(step, plan.step(step).0) {
        let problem = format!("the weights of step {step} were asked for before they were written");
        return Err(Error::Worker(problem));
    }
    let config = plan.format.quantization_config(&plan.layouts());
    let writer = shared.output.writer()?;
    let read = |name: &str| {
        let at = writer.layout().tensors().get(name)?;
        Some((at.spec.clone(), writer.read(name).ok()?.into()))
    };
    let linears = plan.step_linears(step).iter();
    linears
        .map(|linear| {
            let _packed = (shared.budget).take("packed tensors", plan.packed_bytes(linear))?;
            let codes = (shared.budget).take("codes", plan.code_bytes(linear, linear.rows))?;
            let weight = linear
                .grid
                .map(|_| plan.format.unpack(&linear.name, &config, &read))
                .transpose()?;
            let weight = weight.map(|weight| Quantized::Codes(Arc::new(weight)));
            installed(shared, linear, weight, codes)
        })
        .collect()
}

/// `None` keeps the original weight.
fn installed(
    shared: &Shared,
    linear: &PlannedLinear,
    weight: Option<Quantized>,
    codes: Grant,
) -> Result<Held> {
    let (stages, plan, tower) = (&shared.stages, &shared.plan, &shared.tower);
    match weight {
        None => stages.load(linear, plan, tower),
        Some(weight) => stages.install(linear, weight, codes, plan, tower),
    }
}
