//! `groups`: which documents are packed together, as a differential collection. A document that comes or goes changes its own group
//! and no other; one that stands in several places is used once, at the first.

use crate::calibration::Placed;
use differential_dataflow::VecCollection;
use differential_dataflow::input::InputSession;
use std::collections::BTreeMap;

/// Documents in, groups of documents in order of their rows out.
pub fn groups<'scope>(
    documents: VecCollection<'scope, u64, Placed, isize>,
) -> VecCollection<'scope, u64, Vec<Placed>, isize> {
    let exact = documents.clone().filter(|document| document.exact);
    let once = documents
        .filter(|document| !document.exact)
        .map(|document| (document.id, document))
        .reduce(|_, places, first| first.extend(places.first().map(|(place, _)| (**place, 1))))
        .map(|(_, document)| document);
    once.concat(exact)
        .map(|document| (document.group(), document))
        .reduce(|_, members, group| {
            group.push((members.iter().map(|(member, _)| **member).collect::<Vec<_>>(), 1));
        })
        .map(|(_, members)| members)
}

/// The groups that come (1) and go (-1) when `changes` come to `before`, in order.
pub fn changed_groups(before: Vec<Placed>, changes: Vec<(Placed, isize)>) -> Vec<(Vec<Placed>, isize)> {
    let (send, receive) = std::sync::mpsc::channel();
    timely::execute_directly(move |worker| {
        let mut input = InputSession::<u64, Placed, isize>::new();
        worker.dataflow(|scope| {
            groups(input.to_collection(scope))
                .consolidate()
                .inspect(move |(group, time, diff)| {
                    if *time > 0 {
                        // The receiver outlives the dataflow.
                        let _ = send.send((group.clone(), *diff));
                    }
                });
        });
        before.into_iter().for_each(|document| input.insert(document));
        input.advance_to(1);
        changes
            .into_iter()
            .for_each(|(document, diff)| input.update(document, diff));
    });
    let mut changed: BTreeMap<Vec<Placed>, isize> = BTreeMap::new();
    for (group, diff) in receive {
        *changed.entry(group).or_default() += diff;
    }
    changed.into_iter().filter(|(_, diff)| *diff != 0).collect()
}
