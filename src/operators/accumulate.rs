//! `accumulate`: adds each batch's products to the step's exact sums, which the workers of a process share; when the frontier
//! says that no worker has a batch of the step left, the step's owner hands the sums on.

use super::activations::with_values;
use super::local::{Local, Shared};
use super::records::{Inputs, Merged, SiteInput, Summed};
use crate::budget::Grant;
use crate::device;
use crate::error::{Error, Result};
use crate::model::SiteKind;
use crate::statistics::{Accumulator, Exponents, SiteStatistics};
use candle_core::Tensor;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use timely::container::CapacityContainerBuilder;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::{Capability, Operator};

/// Sums of the steps in work, shared by the workers of a process.
#[derive(Debug, Default)]
pub struct Sums(Mutex<BTreeMap<Of, Arc<Adding>>>);

/// Sums of a site that are added to, where the activations are.
#[derive(Debug)]
enum Adding {
    Host {
        sums: Accumulator,
        /// Of the panels in memory, where the others lie in files.
        _panels: Grant,
    },
    Device(device::sums::Sums),
}

impl Adding {
    /// Zero sums, with exponents from the probe's input `x`.
    fn new(local: &Local, step: u64, x: &Tensor) -> Result<Self> {
        let shared = &local.shared;
        let width = x.dim(1)?;
        let exponents = with_values(x, |values| Exponents::from_probe(values, width))?;
        let products = shared.pass.products();
        let tower = &shared.tower;
        Ok(match tower.placement().on_device {
            true => Self::Device(device::sums::Sums::new(
                exponents,
                products,
                tower.precision(),
                x.device(),
            )?),
            false => {
                // Each worker adds to one panel at a time.
                let _panels = shared.take_panels(step, local.peers as u64)?;
                let sums = SiteStatistics::new(exponents, products, &shared.room(step))?.into();
                Self::Host { sums, _panels }
            }
        })
    }

    fn add(&self, record: &Inputs, input: &SiteInput) -> Result<()> {
        let (original, times) = (input.original.as_ref(), record.multiplicity);
        match (self, record.held_out) {
            (Self::Host { sums, .. }, true) => with_values(&input.x, |x| sums.add_held_out(x, times))?,
            (Self::Host { sums, .. }, false) => with_values(&input.x, |x| match original {
                Some(original) => with_values(original, |original| sums.add(x, Some(original), times))?,
                None => sums.add(x, None, times),
            })?,
            (Self::Device(sums), true) => sums.add_held_out(&input.x, times),
            (Self::Device(sums), false) => sums.add(&input.x, original, times),
        }
    }

    fn finish(self) -> Result<Summed> {
        match self {
            Self::Host { sums, .. } => Ok(Summed::Host(sums.finish()?)),
            Self::Device(sums) => {
                sums.check()?;
                Ok(Summed::Device(Arc::new(sums)))
            }
        }
    }
}

/// Step and site.
type Of = (u64, SiteKind);

impl Sums {
    fn begin(&self, of: Of, new: impl FnOnce() -> Result<Adding>) -> Result<()> {
        let mut sums = self.0.lock().map_err(|_| poisoned())?;
        if let Entry::Vacant(place) = sums.entry(of) {
            place.insert(Arc::new(new()?));
        }
        Ok(())
    }

    fn get(&self, of: Of) -> Result<Arc<Adding>> {
        let sums = self.0.lock().map_err(|_| poisoned())?;
        let sums = sums.get(&of).cloned();
        sums.ok_or_else(|| Error::Worker("a batch came before the probe".into()))
    }

    /// Sums to which nobody adds any more: every batch has reached the step.
    fn take(&self, of: Of) -> Result<Summed> {
        let sums = self.0.lock().map_err(|_| poisoned())?.remove(&of);
        sums.and_then(Arc::into_inner)
            .ok_or_else(|| Error::Worker("a step ended before its sums were complete".into()))?
            .finish()
    }
}

/// One record a site of each step, on the worker that owns it: its complete statistics. The probe comes first at each step and fixes the exponents.
pub fn accumulate<'scope>(
    inputs: StreamVec<'scope, u64, Inputs>,
    local: Rc<Local>,
) -> StreamVec<'scope, u64, Merged> {
    inputs.unary_frontier::<CapacityContainerBuilder<Vec<Merged>>, _, _, _>(
        Pipeline,
        "accumulate",
        move |_, _| {
            let mut steps: BTreeMap<u64, Capability<u64>> = BTreeMap::new();
            move |(input, frontier), output| {
                input.for_each_stamp(|capability, data| {
                    let Some(capability) = capability.retain_least(output.output_index()) else {
                        return;
                    };
                    let step = *capability.time();
                    for record in data.flat_map(|container| container.drain(..)) {
                        local.run("accumulate", || add(&local, step, &record));
                    }
                    steps.entry(step).or_insert(capability);
                });
                while let Some(entry) = steps
                    .first_entry()
                    .filter(|entry| !frontier.less_equal(entry.key()))
                {
                    let (step, capability) = entry.remove_entry();
                    let plan = &local.shared.plan;
                    let (block, first) = plan.step(step);
                    let owned = |site: SiteKind| local.owner(block, site) == local.index as u64;
                    if owned(first) {
                        let shared = &local.shared;
                        if shared.tower.placement().on_device {
                            // The device is still busy with the batches: meanwhile it copies what will be solved.
                            local.run("upload", || {
                                let weights = shared.stages.original(step, plan, &shared.tower);
                                weights.map(drop)
                            });
                        }
                        // What carried the batches here has served.
                        plan.served(step).for_each(|served| shared.stages.forget(served));
                    }
                    local.run("accumulate", || empty_pools(&local.shared));
                    for site in plan.step_sites(step).iter().copied().filter(|site| owned(*site)) {
                        let summed = plan.leads(step) && plan.is_summed(block, site);
                        let take = || summed.then(|| local.shared.sums.take((step, site))).transpose();
                        if let Some(statistics) = local.run("accumulate", take) {
                            output.session(&capability).give(Merged {
                                block,
                                site,
                                statistics,
                            });
                        }
                    }
                }
            }
        },
    )
}

fn add(local: &Local, step: u64, record: &Inputs) -> Result<()> {
    let (block, _) = local.shared.plan.step(step);
    if record.probe {
        empty_pools(&local.shared)?;
    }
    // The sums of a site without a linear to quantize would serve nothing.
    let mut summed = (record.sites.iter()).filter(|input| local.shared.plan.is_summed(block, input.site));
    summed.try_for_each(|input| add_site(local, step, record, input))
}

fn add_site(local: &Local, step: u64, record: &Inputs, input: &SiteInput) -> Result<()> {
    let shared = &local.shared;
    if record.probe {
        return (shared.sums).begin((step, input.site), || Adding::new(local, step, &input.x));
    }
    let sums = shared.sums.get((step, input.site))?;
    sums.add(record, input).map_err(|error| {
        let ((block, _), site) = (shared.plan.step(step), input.site);
        Error::invalid(
            format!("block {block}, input of {site:?}"),
            error.to_string(),
            error.hint().unwrap_or_default(),
        )
    })
}

/// Once before a step's sums are made, and once before it is solved, when the device is waited for anyway: what it holds free lies in pieces.
fn empty_pools(shared: &Shared) -> Result<()> {
    shared.tower.placement().empty_pools(shared.fit.pool_bytes())
}

fn poisoned() -> Error {
    Error::Worker("a worker stopped while it summed".into())
}
