//! The loss of a linear before it is solved: what its scales alone decide.

use super::Grid;
use super::scales::search;
use super::solver::transposed;

/// `Σ importance[c] (w − Q(w))²` over `weights` (`[rows, columns]`, row-major), Q to nearest on the scales that the search finds.
///
/// With the factor's R_ii² as `importance` it predicts ‖(W − Q) R‖² of the swept codes: error feedback moves a column's target, and what
/// is left of it is rounding on the same grid (Babai's bound). No sweep, so its cost is that of the scale search.
///
/// # Panics
/// The lengths do not fit, or the group size does not divide the columns.
pub fn predicted_loss(weights: &[f32], importance: &[f64], grid: Grid) -> f64 {
    let columns = importance.len();
    let lanes = weights.len() / columns;
    let target = transposed(weights, columns);
    let scales = search(&target, lanes, importance, grid);
    let max_code = f64::from(grid.max_code());
    let mut loss = 0.0;
    for (column, (values, importance)) in target.chunks_exact(lanes).zip(importance).enumerate() {
        let group = column / grid.group_size * lanes;
        for (lane, &w) in values.iter().enumerate() {
            let (scale, zero) = (scales.scale[group + lane], scales.zero[group + lane]);
            let code = (w / scale + zero).round_ties_even().clamp(0.0, max_code);
            loss += importance * (w - (code - zero) * scale).powi(2);
        }
    }
    loss
}
