//! `kept`: which linears of an output are still what a changed recipe wants: wanted keys joined with held ones.

use differential_dataflow::VecCollection;
use differential_dataflow::input::InputSession;
use std::collections::BTreeSet;

/// A linear's name, and the digest of everything that decides its codes.
pub type Solved = (String, String);

/// What is both wanted and held.
fn join<'scope>(
    wanted: VecCollection<'scope, u64, Solved, isize>,
    held: VecCollection<'scope, u64, Solved, isize>,
) -> VecCollection<'scope, u64, Solved, isize> {
    wanted
        .map(|solved| (solved, ()))
        .semijoin(held.distinct())
        .map(|(solved, ())| solved)
}

/// Names whose wanted key is the one that is held.
pub fn kept(wanted: Vec<Solved>, held: Vec<Solved>) -> BTreeSet<String> {
    let (send, receive) = std::sync::mpsc::channel();
    timely::execute_directly(move |worker| {
        let (mut wants, mut holds) = (InputSession::<u64, Solved, isize>::new(), InputSession::new());
        worker.dataflow(|scope| {
            join(wants.to_collection(scope), holds.to_collection(scope)).inspect(move |(solved, _, _)| {
                // The receiver outlives the dataflow.
                let _ = send.send(solved.0.clone());
            });
        });
        wanted.into_iter().for_each(|solved| wants.insert(solved));
        held.into_iter().for_each(|solved| holds.insert(solved));
    });
    receive.into_iter().collect()
}
