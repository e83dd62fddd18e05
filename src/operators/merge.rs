//! `merge`: adds the workers' sums of a step, exactly, on the worker that owns its block.

use super::at_step_end;
use super::local::Local;
use super::records::{Merged, Partial};
use crate::statistics::SiteStatistics;
use std::rc::Rc;
use timely::dataflow::StreamVec;

/// One record a step: its complete statistics.
pub fn merge<'scope>(
    partials: StreamVec<'scope, u64, Partial>,
    local: Rc<Local>,
) -> StreamVec<'scope, u64, Merged> {
    let products = local.shared.pass.products();
    at_step_end(
        partials,
        "merge",
        |partial| partial.owner,
        local,
        move |_, partials: Vec<Partial>| {
            let Some(first) = partials.first() else {
                return Ok(Vec::new());
            };
            let mut total = SiteStatistics::new(first.exponents.as_ref().clone(), products);
            for partial in &partials {
                if let Some(panel) = &partial.panel {
                    total.merge(partial.tokens, panel)?;
                }
            }
            Ok(vec![Merged(total)])
        },
    )
}
