//! Scale refit and coordinate descent after the sweep: each step can only lower tr(E H_d Eᵀ), E = W* − Q. The Hessian is symmetric and
//! is read by panels of rows, each of them once a pass: what belongs to columns is taken from the rows of the same number.

use super::Grid;
use super::gemm::{View, ViewMut, product};
use super::panels::{PANEL_ROWS, Panels};
use super::scales::Scales;
use super::simd::vectorized;
use std::ops::Range;

/// Columns between two updates of the gradient by GEMM. A block never lies in two panels.
const DESCENT_BLOCK: usize = 64;
const _: () = assert!(PANEL_ROWS.is_multiple_of(DESCENT_BLOCK));

/// H_d, in original order.
#[derive(Clone, Copy)]
pub(super) struct Hessian<'a> {
    /// XᵀX, full panels.
    pub(super) gram: &'a Panels,
    /// What comes to its diagonal.
    pub(super) damping: &'a [f64],
}

impl Hessian<'_> {
    /// The rows of `of`, panel by panel: the panel and those of its rows.
    fn panels(self, of: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
        let width = self.gram.width();
        (of.start / PANEL_ROWS..of.end.div_ceil(PANEL_ROWS)).map(move |panel| {
            let first = panel * PANEL_ROWS;
            (
                panel,
                first.max(of.start)..(first + PANEL_ROWS).min(of.end).min(width),
            )
        })
    }
}

/// Improves `codes` (`[width, lanes]`, original order) and `scales` in place; returns the final tr(E H_d Eᵀ).
pub(super) fn refine(
    target: &[f64],
    codes: &mut [f64],
    scales: &mut Scales,
    hessian: Hessian<'_>,
    grid: Grid,
    rounds: usize,
) -> f64 {
    let width = hessian.gram.width();
    let lanes = target.len() / width;
    let mut state = State {
        lanes,
        width,
        hessian,
        grid,
        errors: vec![0.0; target.len()],
        gradient: vec![0.0; target.len()],
    };
    state.reset(target, codes, scales);
    for _ in 0..rounds {
        state.refit_scales(codes, scales);
        state.reset(target, codes, scales);
        state.descend(codes, scales);
    }
    state.errors.iter().zip(&state.gradient).map(|(e, g)| e * g).sum()
}

struct State<'a> {
    lanes: usize,
    width: usize,
    hessian: Hessian<'a>,
    grid: Grid,
    /// E, `[width, lanes]`
    errors: Vec<f64>,
    /// H_d E, `[width, lanes]`
    gradient: Vec<f64>,
}

impl State<'_> {
    fn reset(&mut self, target: &[f64], codes: &[f64], scales: &Scales) {
        let lanes = self.lanes;
        for c in 0..self.width {
            let g = c / self.grid.group_size * lanes;
            for lane in 0..lanes {
                let at = c * lanes + lane;
                self.errors[at] = target[at] - (codes[at] - scales.zero[g + lane]) * scales.scale[g + lane];
            }
        }
        for (panel, rows) in self.hessian.panels(0..self.width) {
            let gradient = &mut self.gradient[rows.start * lanes..rows.end * lanes];
            product(
                ViewMut::rows(gradient, rows.len(), lanes, lanes),
                0.0,
                View::rows(
                    &self.hessian.gram.panel(panel),
                    rows.len(),
                    self.width,
                    self.width,
                ),
                View::rows(&self.errors, self.width, lanes, lanes),
                1.0,
            );
            let errors = self.errors[rows.start * lanes..].chunks_exact(lanes);
            let damped = self.hessian.damping[rows].iter().zip(errors);
            for (gradient, (damping, errors)) in gradient.chunks_exact_mut(lanes).zip(damped) {
                gradient
                    .iter_mut()
                    .zip(errors)
                    .for_each(|(g, e)| *g += damping * e);
            }
        }
    }

    /// Δs = (c · γ_g) / (cᵀ H_gg c) for each lane and group, c the centred codes of the group. Groups are refitted from
    /// one gradient, each step halved in effect by later ones; a group whose step is not an improvement keeps its scale.
    fn refit_scales(&mut self, codes: &[f64], scales: &mut Scales) {
        let (lanes, group) = (self.lanes, self.grid.group_size);
        let mut centred = vec![0.0; group * lanes];
        let mut curved = vec![0.0; group * lanes];
        for g in 0..self.width / group {
            let begin = g * group;
            for i in 0..group {
                for lane in 0..lanes {
                    centred[i * lanes + lane] =
                        codes[(begin + i) * lanes + lane] - scales.zero[g * lanes + lane];
                }
            }
            for (panel, rows) in self.hessian.panels(begin..begin + group) {
                let content = self.hessian.gram.panel(panel);
                let curved = &mut curved[(rows.start - begin) * lanes..(rows.end - begin) * lanes];
                product(
                    ViewMut::rows(curved, rows.len(), lanes, lanes),
                    0.0,
                    View::rows(
                        &content[(rows.start - panel * PANEL_ROWS) * self.width + begin..],
                        rows.len(),
                        group,
                        self.width,
                    ),
                    View::rows(&centred, group, lanes, lanes),
                    1.0,
                );
            }
            for (i, damping) in self.hessian.damping[begin..begin + group].iter().enumerate() {
                for lane in 0..lanes {
                    curved[i * lanes + lane] += damping * centred[i * lanes + lane];
                }
            }
            let mut change = vec![0.0; lanes];
            for (lane, change) in change.iter_mut().enumerate() {
                let column = |values: &[f64]| -> f64 {
                    (0..group)
                        .map(|i| values[i * lanes + lane] * centred[i * lanes + lane])
                        .sum()
                };
                let (slope, curvature) = (column(&self.gradient[begin * lanes..]), column(&curved));
                if curvature > 0.0 {
                    let old = scales.scale[g * lanes + lane];
                    let new = old + slope / curvature;
                    if new > 0.0 {
                        let new = self.grid.scale_dtype.round(new);
                        let step = new - old;
                        // Rounded, the step must still lower the error: -2 slope Δ + curvature Δ².
                        if step * (curvature * step - 2.0 * slope) < 0.0 {
                            scales.scale[g * lanes + lane] = new;
                            *change = step;
                        }
                    }
                }
            }
            self.shift_group(begin, &centred, &change);
        }
    }

    /// The gradient and errors after the scales of the group at `begin` moved by `change`.
    fn shift_group(&mut self, begin: usize, centred: &[f64], change: &[f64]) {
        let (lanes, group) = (self.lanes, self.grid.group_size);
        let moved: Vec<f64> = centred
            .chunks_exact(lanes)
            .flat_map(|row| row.iter().zip(change).map(|(c, d)| c * d))
            .collect();
        for (error, m) in self.errors[begin * lanes..].iter_mut().zip(&moved) {
            *error -= m;
        }
        for (panel, rows) in self.hessian.panels(begin..begin + group) {
            let content = self.hessian.gram.panel(panel);
            let from = &content[(rows.start - panel * PANEL_ROWS) * self.width..];
            let moved = &moved[(rows.start - begin) * lanes..];
            product(
                ViewMut::rows(&mut self.gradient, self.width, lanes, lanes),
                1.0,
                View::rows(from, rows.len(), self.width, self.width).transposed(),
                View::rows(moved, rows.len(), lanes, lanes),
                -1.0,
            );
        }
        let gradient = self.gradient[begin * lanes..].chunks_exact_mut(lanes);
        for ((gradient, moved), damping) in gradient
            .zip(moved.chunks_exact(lanes))
            .zip(&self.hessian.damping[begin..])
        {
            gradient
                .iter_mut()
                .zip(moved)
                .for_each(|(g, m)| *g -= damping * m);
        }
    }

    /// One pass of coordinate descent: each code moves to the grid point nearest to its conditional minimum.
    fn descend(&mut self, codes: &mut [f64], scales: &Scales) {
        let lanes = self.lanes;
        let max_code = f64::from(self.grid.max_code());
        let mut moved = vec![0.0; DESCENT_BLOCK * lanes];
        for begin in (0..self.width).step_by(DESCENT_BLOCK) {
            let block = DESCENT_BLOCK.min(self.width - begin);
            let panel = begin / PANEL_ROWS;
            let content = self.hessian.gram.panel(panel);
            let rows = &content[(begin - panel * PANEL_ROWS) * self.width..];
            let mut damped = [0.0; DESCENT_BLOCK];
            for i in 0..block {
                let column = begin + i;
                let g = column / self.grid.group_size * lanes;
                let (scale, zero) = (&scales.scale[g..][..lanes], &scales.zero[g..][..lanes]);
                let row = &mut damped[..block];
                row.copy_from_slice(&rows[i * self.width + begin..][..block]);
                row[i] += self.hessian.damping[column];
                let inverse = row[i].recip();
                let codes = &mut codes[column * lanes..][..lanes];
                let moved = &mut moved[i * lanes..][..lanes];
                let (mine, gradient) = (column * lanes, &mut self.gradient[..]);
                let errors = &mut self.errors[mine..][..lanes];
                vectorized!({
                    for lane in 0..lanes {
                        let value = (codes[lane] - zero[lane]) * scale[lane];
                        let wanted = value + gradient[mine + lane] * inverse;
                        let code = (wanted / scale[lane] + zero[lane])
                            .round_ties_even()
                            .max(0.0)
                            .min(max_code);
                        let step = (code - codes[lane]) * scale[lane];
                        codes[lane] = code;
                        errors[lane] -= step;
                        moved[lane] = step;
                    }
                    // The rest of the block sees the move now, the other blocks after it.
                    for (k, &h) in row.iter().enumerate() {
                        for (value, &m) in gradient[(begin + k) * lanes..][..lanes]
                            .iter_mut()
                            .zip(moved.iter())
                        {
                            *value -= h * m;
                        }
                    }
                });
            }
            let others = [(0, begin), (begin + block, self.width - begin - block)];
            for (first, count) in others.into_iter().filter(|(_, count)| *count > 0) {
                product(
                    ViewMut::rows(&mut self.gradient[first * lanes..], count, lanes, lanes),
                    1.0,
                    View::rows(&rows[first..], block, count, self.width).transposed(),
                    View::rows(&moved, block, lanes, lanes),
                    -1.0,
                );
            }
        }
    }
}
