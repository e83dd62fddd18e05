//! `gather`: the end of a graph whose results are small: all of them on one worker, in any order.

use std::sync::{Arc, Mutex};
use timely::ExchangeData;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Exchange;
use timely::dataflow::operators::Operator;

/// Appends every record to `gathered`, on worker 0.
pub fn gather<D: ExchangeData>(records: StreamVec<'_, u64, D>, gathered: Arc<Mutex<Vec<D>>>) {
    let to_first = Exchange::new(|_: &D| 0);
    records.sink(to_first, "gather", move |(input, _)| {
        input.for_each_stamp(|_, data| {
            if let Ok(mut gathered) = gathered.lock() {
                data.for_each(|container| gathered.append(container));
            }
        });
    });
}
