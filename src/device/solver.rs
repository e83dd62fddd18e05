//! The solvers of [`crate::numerics::solver`] where the weights are: the same steps, on all rows of a linear at a time. A matrix is
//! `[columns of the weight, lanes]` f64, a weight row a lane, and a kernel's thread has one lane; what is not done lane by lane is a
//! product. All is left-looking: before a block of columns one product brings what the columns before it feed to it.

mod steps;

use self::steps::{Descend, Refit, RoundPlainly, Search, Sweep};
use super::codes::Codes;
use super::factor::Factor;
use super::hessian::Symmetric;
use super::matrix::product;
use super::panels::PANEL_ROWS;
use super::transfer::{Mark, download};
use super::{doubles, vector};
use crate::error::Result;
use crate::numerics::Grid;
use crate::numerics::solver::{GptqOptions, SolvedRows};
use candle_core::{DType, Tensor};
use std::ops::Range;

/// Columns of a block. kernels/solver.cu keeps a block of a lane in shared memory.
const BLOCK: usize = 64;
const _: () = assert!(PANEL_ROWS.is_multiple_of(BLOCK), "a block lies in one panel");
/// Bytes of one matrix `[width, lanes]`; some of them are in memory at a time.
const MATRIX_BYTES: usize = 256 << 20;
/// Columns of a weight that are turned into lanes at a time.
const LANE_COLUMNS: usize = 1024;

/// How many rows of a linear with `width` columns are solved at a time.
pub fn rows_at_a_time(width: usize) -> usize {
    (MATRIX_BYTES / (8 * width)).next_multiple_of(64)
}

/// As [`crate::numerics::solver::round_to_nearest`], for `weights` `[rows, width]`.
///
/// # Errors
/// The device has no memory left.
pub fn round_to_nearest(weights: &Tensor, grid: Grid) -> Result<Solved> {
    let problem = Problem::new(weights, grid)?;
    let importance = Tensor::ones(problem.width, DType::F64, weights.device())?;
    let (state, scales) = problem.round(&lanes_of(weights)?, &importance)?;
    let tallies = state.narrow(0, problem.width, 3)?.t()?;
    problem.solved(&state.narrow(0, 0, problem.width)?, &scales, tallies)
}

/// As [`crate::numerics::predict::predicted_loss`], for `weights` `[rows, width]`.
///
/// # Errors
/// The device has no memory left.
pub fn predicted_loss(weights: &Tensor, importance: &Tensor, grid: Grid) -> Result<f64> {
    let problem = Problem::new(weights, grid)?;
    let target = lanes_of(weights)?;
    let (state, scales) = problem.round(&target, importance)?;
    let errors = problem.errors(&target, &state.narrow(0, 0, problem.width)?, &scales)?;
    total(&errors.sqr()?.broadcast_mul(&importance.unsqueeze(1)?)?.sum(0)?)
}

/// As [`crate::numerics::solver::gptq`], for `weights` `[rows, width]`.
///
/// # Errors
/// The device has no memory left.
pub fn gptq(weights: &Tensor, factor: &Factor, grid: Grid, options: GptqOptions) -> Result<Solved> {
    let problem = Problem::new(weights, grid)?;
    // In one matrix with what the sweep makes, so that codes come in the place of targets.
    let state = problem.state(2 * problem.width + 2)?;
    let target = state.narrow(0, 0, problem.width)?;
    fill_lanes(&target, weights)?;
    if let Some(moved) = factor.target(&target, options.match_original)? {
        state.slice_set(&moved, 0, 0)?;
    }
    let scales = problem.search(&target, &factor.importance()?)?;
    let energies = problem.energies(&target, factor)?;
    let refined = match &factor.gram {
        Some(gram) if options.refine_rounds > 0 => Some((gram, target.force_contiguous()?)),
        _ => None,
    };
    problem.sweep(&state, factor, &scales)?;
    let clipped = state.get(2 * problem.width + 1)?.force_contiguous()?;
    let (codes, errors) = match refined {
        None => (target, state.get(2 * problem.width)?),
        Some((gram, original)) => {
            let damping = vector(&factor.damped.damping, weights)?;
            let hessian = Hessian { gram, damping };
            // The codes alone hold the state now, until there are others.
            drop(state);
            problem.refine(&original, target, &scales, &hessian, options.refine_rounds)?
        }
    };
    let tallies = Tensor::stack(&[errors, energies, clipped], 1)?;
    problem.solved(&codes, &scales, tallies)
}

/// As [`crate::numerics::solver::output_error`], for `weights` `[rows, width]`.
///
/// # Errors
/// The device has no memory left.
pub fn output_error(weights: &Tensor, solved: &Solved, hessian: &Symmetric) -> Result<(f64, f64)> {
    let undamped = Tensor::zeros(weights.dim(1)?, DType::F64, weights.device())?;
    let energy = |lanes: &Tensor| total(&(hessian.damped_times(lanes, &undamped)? * lanes)?.sum(0)?);
    let whole = lanes_of(weights)?;
    let values = solved.dequantize(DType::F32)?;
    Ok((energy(&(&whole - lanes_of(&values)?)?)?, energy(&whole)?))
}

/// Codes of some rows and what the report tells of them, where they were chosen: nobody has waited for them.
#[derive(Clone, Debug)]
pub struct Solved {
    codes: Codes,
    /// Squared error, energy and clipped codes of each row, `[rows, 3]` f64.
    tallies: Tensor,
    made: Mark,
}

impl Solved {
    /// On the host. Waits for the solution, not for what was asked of the device after it, on whatever thread.
    ///
    /// # Errors
    /// The device fails.
    pub fn to_rows(&self) -> Result<SolvedRows> {
        let tallies: Vec<f64> = download(&self.tallies, &self.made)?;
        let tally = |at: usize| tallies.iter().skip(at).step_by(3).sum::<f64>();
        Ok(SolvedRows {
            weight: self.codes.to_host(&self.made)?,
            error: tally(0),
            energy: tally(1),
            clipped: tally(2) as u64,
        })
    }

    /// Some of its rows, where they are.
    ///
    /// # Errors
    /// It has no such rows.
    pub fn rows(&self, rows: Range<usize>) -> Result<Self> {
        Ok(Self {
            codes: self.codes.rows(&rows)?,
            tallies: self.tallies.narrow(0, rows.start, rows.len())?,
            made: self.made.clone(),
        })
    }

    /// The values that the codes mean, `[rows, columns]` of `dtype`.
    ///
    /// # Errors
    /// The device has no memory left.
    pub fn dequantize(&self, dtype: DType) -> Result<Tensor> {
        Ok(self.codes.dequantize(dtype)?)
    }
}

/// What all steps know of the linear.
#[derive(Clone, Copy)]
struct Problem<'a> {
    width: usize,
    lanes: usize,
    grid: Grid,
    like: &'a Tensor,
}

/// H_d, in original order.
struct Hessian<'a> {
    gram: &'a Symmetric,
    damping: Tensor,
}

impl Hessian<'_> {
    /// `H_d · values`, for `[width, lanes]`.
    fn times(&self, values: &Tensor) -> Result<Tensor> {
        self.gram.damped_times(values, &self.damping)
    }
}

impl<'a> Problem<'a> {
    fn new(weights: &'a Tensor, grid: Grid) -> Result<Self> {
        let (lanes, width) = weights.dims2()?;
        Ok(Self {
            width,
            lanes,
            grid,
            like: weights,
        })
    }

    fn groups(self) -> usize {
        self.width / self.grid.group_size
    }

    fn max_code(self) -> f64 {
        f64::from(self.grid.max_code())
    }

    fn state(self, rows: usize) -> Result<Tensor> {
        Ok(Tensor::zeros((rows, self.lanes), DType::F64, self.like.device())?)
    }

    /// Scales, then zero points: `[2 * groups, lanes]`.
    fn search(self, target: &Tensor, importance: &Tensor) -> Result<Tensor> {
        let scales = self.state(2 * self.groups())?;
        scales.inplace_op1(&Search {
            problem: self,
            target,
            importance,
        })?;
        Ok(scales)
    }

    /// To nearest: a state as [`RoundPlainly`] fills it, and the scales.
    fn round(self, target: &Tensor, importance: &Tensor) -> Result<(Tensor, Tensor)> {
        let scales = self.search(target, importance)?;
        let state = self.state(self.width + 3)?;
        state.inplace_op1(&RoundPlainly {
            problem: self,
            target,
            scales: &scales,
        })?;
        Ok((state, scales))
    }

    /// `values` of a grid's codes, a group after the other: `[groups, group, lanes]`.
    fn centred(self, codes: &Tensor, scales: &Tensor) -> Result<Tensor> {
        let zeros = scales.narrow(0, self.groups(), self.groups())?.unsqueeze(1)?;
        let codes = codes.reshape((self.groups(), self.grid.group_size, self.lanes))?;
        Ok(codes.broadcast_sub(&zeros)?)
    }

    /// `target − Q`, `[width, lanes]`.
    fn errors(self, target: &Tensor, codes: &Tensor, scales: &Tensor) -> Result<Tensor> {
        let scale = scales.narrow(0, 0, self.groups())?.unsqueeze(1)?;
        let values = self.centred(codes, scales)?.broadcast_mul(&scale)?;
        Ok((target - values.reshape((self.width, self.lanes))?)?)
    }

    /// Codes in the place of targets: see [`Sweep`].
    fn sweep(self, state: &Tensor, factor: &Factor, scales: &Tensor) -> Result<()> {
        let width = self.width;
        for begin in (0..width).step_by(BLOCK).rev() {
            let (end, upper) = (width.min(begin + BLOCK), &factor.damped.triangle);
            // The rows of U are columns of L, from the first row of their panel on.
            let strip = upper.rows(&(begin..end))?;
            let from = |row: usize, count| strip.narrow(1, strip.dim(1)? - (width - row), count);
            let carried = match width - end {
                0 => self.state(end - begin)?,
                done => product(&from(end, done)?, &state.narrow(0, width + end, done)?)?,
            };
            state.inplace_op1(&Sweep {
                problem: self,
                carried: &carried,
                lower: &from(begin, end - begin)?.t()?.force_contiguous()?,
                scales,
                columns: &factor.columns,
                begin,
                rows: end - begin,
            })?;
        }
        Ok(())
    }

    /// Each lane's output energy, ‖U target‖², f64. As on the CPU, single precision is enough for what decides no code.
    fn energies(self, target: &Tensor, factor: &Factor) -> Result<Tensor> {
        let target = target.to_dtype(DType::F32)?.index_select(&factor.columns, 0)?;
        let mut energies = Tensor::zeros(self.lanes, DType::F32, self.like.device())?;
        let upper = &factor.damped.triangle;
        for rows in upper.panel_rows() {
            let panel = upper.panel(&rows)?.to_dtype(DType::F32)?;
            let outputs = product(&panel, &target.narrow(0, rows.start, panel.dim(1)?)?)?;
            energies = (energies + outputs.sqr()?.sum(0)?)?;
        }
        Ok(energies.to_dtype(DType::F64)?)
    }

    /// As [`crate::numerics`]' refinement: changes `scales` in place; returns codes and each lane's part of tr(E H_d Eᵀ).
    fn refine(
        self,
        target: &Tensor,
        codes: Tensor,
        scales: &Tensor,
        hessian: &Hessian<'_>,
        rounds: usize,
    ) -> Result<(Tensor, Tensor)> {
        let mut codes = codes;
        let gradient = |codes: &Tensor| hessian.times(&self.errors(target, codes, scales)?);
        for _ in 0..rounds {
            self.refit_scales(&codes, scales, hessian, &gradient(&codes)?)?;
            codes = self.descend(&codes, scales, hessian, &gradient(&codes)?)?;
        }
        let errors = self.errors(target, &codes, scales)?;
        let errors = (hessian.times(&errors)? * errors)?.sum(0)?;
        Ok((codes, errors))
    }

    /// A group after the other, each seeing what the groups before it moved.
    fn refit_scales(
        self,
        codes: &Tensor,
        scales: &Tensor,
        hessian: &Hessian<'_>,
        gradient: &Tensor,
    ) -> Result<()> {
        let group = self.grid.group_size;
        let centred = self.centred(codes, scales)?;
        let moved = self.state(self.width)?;
        for g in 0..self.groups() {
            let begin = g * group;
            let rows = hessian.gram.rows(begin..begin + group)?;
            let slope = self.less_moved(&gradient.narrow(0, begin, group)?, &rows, &moved, begin)?;
            let centred = centred.get(g)?;
            let damping = hessian.damping.narrow(0, begin, group)?.unsqueeze(1)?;
            let curved = product(&rows.narrow(1, begin, group)?, &centred)?;
            let curved = (curved + centred.broadcast_mul(&damping)?)?;
            let scale = scales.get(g)?;
            let before = scale.force_contiguous()?;
            scale.inplace_op1(&Refit {
                slope: &(slope * &centred)?.sum(0)?,
                curvature: &(curved * &centred)?.sum(0)?,
                grid: self.grid,
            })?;
            let change = centred.broadcast_mul(&(scale - before)?.unsqueeze(0)?)?;
            moved.slice_set(&change, 0, begin)?;
        }
        Ok(())
    }

    /// One pass of coordinate descent.
    fn descend(
        self,
        codes: &Tensor,
        scales: &Tensor,
        hessian: &Hessian<'_>,
        gradient: &Tensor,
    ) -> Result<Tensor> {
        let width = self.width;
        // Codes, and by how much the values moved.
        let state = self.state(2 * width)?;
        state.slice_set(&codes.contiguous()?, 0, 0)?;
        for begin in (0..width).step_by(BLOCK) {
            let rows = BLOCK.min(width - begin);
            let moved = state.narrow(0, width, width)?;
            let gram = hessian.gram.rows(begin..begin + rows)?;
            let slope = self.less_moved(&gradient.narrow(0, begin, rows)?, &gram, &moved, begin)?;
            state.inplace_op1(&Descend {
                problem: self,
                gradient: &slope,
                gram: &gram,
                damping: &hessian.damping,
                scales,
                begin,
            })?;
        }
        Ok(state.narrow(0, 0, width)?)
    }

    /// The gradient at the columns `begin..`, after the columns before them moved: their `rows` of the Hessian see it.
    fn less_moved(self, gradient: &Tensor, rows: &Tensor, moved: &Tensor, begin: usize) -> Result<Tensor> {
        Ok(match begin {
            0 => gradient.clone(),
            _ => (gradient - product(&rows.narrow(1, 0, begin)?, &moved.narrow(0, 0, begin)?)?)?,
        })
    }

    /// Codes `[width, lanes]`, scales and zero points, by row of the weight.
    fn solved(self, codes: &Tensor, scales: &Tensor, tallies: Tensor) -> Result<Solved> {
        Ok(Solved {
            codes: Codes::from_lanes(self.grid, codes, scales)?,
            tallies: tallies.force_contiguous()?,
            made: Mark::new(self.like.device())?,
        })
    }
}

/// `[rows, width]` → `[width, rows]` f64
fn lanes_of(weights: &Tensor) -> Result<Tensor> {
    let (lanes, width) = weights.dims2()?;
    let out = Tensor::zeros((width, lanes), DType::F64, weights.device())?;
    fill_lanes(&out, weights)?;
    Ok(out)
}

/// [`lanes_of`] in `out`, some columns at a time.
fn fill_lanes(out: &Tensor, weights: &Tensor) -> Result<()> {
    let width = weights.dim(1)?;
    for first in (0..width).step_by(LANE_COLUMNS) {
        let columns = weights.narrow(1, first, LANE_COLUMNS.min(width - first))?;
        let lanes = columns.t()?.to_dtype(DType::F64)?.contiguous()?;
        out.slice_set(&lanes, 0, first)?;
    }
    Ok(())
}

/// The sum of a vector, in its order.
fn total(values: &Tensor) -> Result<f64> {
    Ok(doubles(&values.to_dtype(DType::F64)?)?.into_iter().sum())
}
