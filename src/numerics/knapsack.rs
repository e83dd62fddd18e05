//! A choice for each unit, of the smallest loss within a budget: the multiple-choice knapsack.

/// States kept of a unit at most: beyond, sizes are counted in coarser grains.
const STATES_MAX: u64 = 1 << 17;

/// One of a unit's choices.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// What it takes of the budget.
    pub size: u64,
    /// What it costs; finite.
    pub loss: f64,
}

/// What the units chosen so far take beyond their smallest choices, and lose.
#[derive(Clone, Copy)]
struct State {
    size: u64,
    loss: f64,
    /// Position of the state before, and of the unit's choice.
    from: (u32, u32),
}

/// The position of each unit's choice: no other with sizes of at most `budget` together has a smaller sum of losses; of those with
/// equal losses, it is the smallest. `None` where even the smallest choices do not fit, or a unit has none.
///
/// Exact by dynamic programming over states that no other dominates (Nemhauser and Ullmann, "Discrete Dynamic Programming and Capital
/// Allocation", 1969). Sizes are counted in their greatest common divisor; where that leaves more than 2^17 sizes, they are rounded up
/// to coarser grains: the budget still holds, and what could be left of it is less than a grain a unit.
pub fn choose(units: &[Vec<Choice>], budget: u64) -> Option<Vec<usize>> {
    let smallest: Vec<u64> = units
        .iter()
        .map(|choices| choices.iter().map(|choice| choice.size).min())
        .collect::<Option<_>>()?;
    let room = budget.checked_sub(smallest.iter().sum())?;
    let extras = || {
        let pairs = units.iter().zip(&smallest);
        pairs.flat_map(|(choices, least)| choices.iter().map(move |choice| choice.size - least))
    };
    let grain = extras().fold(0, gcd).max(room.div_ceil(STATES_MAX)).max(1);
    let room = room / grain;
    let start = State {
        size: 0,
        loss: 0.0,
        from: (0, 0),
    };
    let mut lists = vec![vec![start]];
    for (choices, least) in units.iter().zip(&smallest) {
        let before = lists.last()?;
        let mut states = Vec::with_capacity(before.len() * choices.len());
        for (at, state) in before.iter().enumerate() {
            for (position, choice) in choices.iter().enumerate() {
                let size = state.size + (choice.size - least).div_ceil(grain);
                if size <= room {
                    states.push(State {
                        size,
                        loss: state.loss + choice.loss,
                        from: (at as u32, position as u32),
                    });
                }
            }
        }
        states.sort_by(|a, b| a.size.cmp(&b.size).then(a.loss.total_cmp(&b.loss)));
        let mut best = f64::INFINITY;
        states.retain(|state| {
            let better = state.loss < best;
            best = best.min(state.loss);
            better
        });
        lists.push(states);
    }
    // The last state has the smallest loss; from it the choices are read backwards.
    let mut at = lists.last()?.len().checked_sub(1)?;
    let mut chosen = vec![0; units.len()];
    for (chosen, states) in chosen.iter_mut().zip(&lists[1..]).rev() {
        let (before, position) = states[at].from;
        *chosen = position as usize;
        at = before as usize;
    }
    Some(chosen)
}

fn gcd(a: u64, b: u64) -> u64 {
    match b {
        0 => a,
        b => gcd(b, a % b),
    }
}
