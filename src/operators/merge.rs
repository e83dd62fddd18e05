//! `merge`: adds the workers' sums of a step, exactly, on the step's owner.

use super::at_step_end;
use super::local::Local;
use super::records::{Merged, Partial};
use crate::statistics::{Product, SiteStatistics};
use std::rc::Rc;
use timely::dataflow::StreamVec;

/// One record a step: its complete statistics.
pub fn merge<'scope>(
    partials: StreamVec<'scope, u64, Partial>,
    local: Rc<Local>,
) -> StreamVec<'scope, u64, Merged> {
    at_step_end(
        partials,
        "merge",
        |partial| partial.owner,
        local,
        |_, partials: Vec<Partial>| {
            let cross = |p: &Partial| {
                p.panel
                    .as_ref()
                    .is_some_and(|panel| panel.product == Product::Cross)
            };
            let cross = partials.iter().any(cross);
            let Some(first) = partials.first() else {
                return Ok(Vec::new());
            };
            let mut total = SiteStatistics::new(first.exponents.as_ref().clone(), cross);
            for partial in &partials {
                if let Some(panel) = &partial.panel {
                    total.merge(partial.tokens, panel)?;
                }
            }
            drop(partials);
            Ok(vec![Merged {
                gram: total.to_f64(Product::Gram).unwrap_or_default(),
                cross: total.to_f64(Product::Cross),
                tokens: total.tokens(),
            }])
        },
    )
}
