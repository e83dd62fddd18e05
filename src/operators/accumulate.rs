//! `accumulate`: sums each batch's products exactly; when the frontier says that a step's last batch is in, sends this
//! worker's sums to the step's owner.

use super::local::Local;
use super::records::{Partial, SiteInput};
use crate::error::{Error, Result};
use crate::statistics::{Exponents, SiteStatistics};
use candle_core::Tensor;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use timely::container::CapacityContainerBuilder;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::{Capability, Operator};

/// See the module. The probe comes first at each step and fixes the exponents.
pub fn accumulate<'scope>(
    inputs: StreamVec<'scope, u64, SiteInput>,
    local: Rc<Local>,
) -> StreamVec<'scope, u64, Partial> {
    inputs.unary_frontier::<CapacityContainerBuilder<Vec<Partial>>, _, _, _>(
        Pipeline,
        "accumulate",
        move |_, _| {
            let mut steps: BTreeMap<u64, (Capability<u64>, Option<SiteStatistics>)> = BTreeMap::new();
            move |(input, frontier), output| {
                input.for_each_stamp(|capability, data| {
                    let Some(capability) = capability.retain_least(output.output_index()) else {
                        return;
                    };
                    let step = *capability.time();
                    let (_, statistics) = steps.entry(step).or_insert((capability, None));
                    for record in data.flat_map(|container| container.drain(..)) {
                        local.run("accumulate", || add(&local, step, statistics, &record));
                    }
                });
                while let Some(entry) = steps
                    .first_entry()
                    .filter(|entry| !frontier.less_equal(entry.key()))
                {
                    let (step, (capability, statistics)) = entry.remove_entry();
                    let Some(statistics) = statistics else { continue };
                    let owner = local.owner(step);
                    let (mut tokens, untouched) = (statistics.tokens(), statistics.is_untouched());
                    let exponents = Arc::new(statistics.exponents().clone());
                    let panels = statistics.into_panels();
                    let panels: Vec<_> = if untouched {
                        vec![None]
                    } else {
                        panels.into_iter().map(Some).collect()
                    };
                    let partial = |panel| Partial {
                        owner,
                        tokens: std::mem::take(&mut tokens),
                        exponents: Arc::clone(&exponents),
                        panel,
                    };
                    output
                        .session(&capability)
                        .give_iterator(panels.into_iter().map(partial));
                }
            }
        },
    )
}

fn add(local: &Local, step: u64, statistics: &mut Option<SiteStatistics>, record: &SiteInput) -> Result<()> {
    let x = values(&record.x)?;
    if record.probe {
        let exponents = Exponents::from_probe(&x, record.x.dim(1)?);
        *statistics = Some(SiteStatistics::new(exponents, local.shared.pass.products()));
        return Ok(());
    }
    let Some(statistics) = statistics else {
        return Err(Error::Worker("a batch came before the probe".into()));
    };
    // The sums of a step without a linear to quantize would serve nothing.
    if !local.shared.plan.is_active(step) {
        return Ok(());
    }
    let original = record.original.as_ref().map(values).transpose()?;
    let added = match record.held_out {
        true => statistics.add_held_out(&x, record.multiplicity),
        false => statistics.add(&x, original.as_deref(), record.multiplicity),
    };
    added.map_err(|error| {
        let (block, site) = local.shared.plan.step(step);
        Error::invalid(
            format!("block {block}, input of {site:?}"),
            error.to_string(),
            error.hint().unwrap_or_default(),
        )
    })
}

fn values(x: &Tensor) -> Result<Vec<f32>> {
    Ok(x.flatten_all()?.to_vec1::<f32>()?)
}
