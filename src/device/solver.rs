//! The solvers of [`crate::numerics::solver`] where the weights are: the same steps, on all rows of a linear at a time. A matrix is
//! `[columns of the weight, lanes]` f64, a weight row a lane, and a kernel's thread has one lane; what is not done lane by lane is a
//! product. All is left-looking: before a block of columns one product brings what the columns before it feed to it.

use super::factor::Factor;
use super::hessian::Symmetric;
use super::matrix::{matrix_mut, product};
use super::panels::PANEL_ROWS;
use super::transfer::{Codes, Mark, download};
use super::{doubles, values, vector};
use crate::error::Result;
use crate::numerics::scales::{Scales, search};
use crate::numerics::solver::{GptqOptions, SolvedRows};
use crate::numerics::{Grid, QuantizedWeight, bits};
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Tensor};
use std::ops::Range;

/// Columns of a block. kernels/solver.cu keeps a block of a lane in shared memory.
const BLOCK: usize = 64;
const _: () = assert!(PANEL_ROWS.is_multiple_of(BLOCK), "a block lies in one panel");
/// Threads of a block's launches.
#[cfg(feature = "cuda")]
const BLOCK_THREADS: u32 = 64;
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
        let codes = &self.codes;
        let (rows, columns) = codes.sides()?;
        let tallies: Vec<f64> = download(&self.tallies, &self.made)?;
        let tally = |at: usize| tallies.iter().skip(at).step_by(3).sum::<f64>();
        Ok(SolvedRows {
            weight: QuantizedWeight {
                grid: codes.grid,
                rows,
                columns,
                codes: download(&codes.codes, &self.made)?,
                scales: download(&codes.scales, &self.made)?,
                zeros: download(&codes.zeros, &self.made)?,
            },
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
        let of = |values: &Tensor| values.narrow(0, rows.start, rows.len());
        Ok(Self {
            codes: Codes {
                grid: self.codes.grid,
                codes: of(&self.codes.codes)?,
                scales: of(&self.codes.scales)?,
                zeros: of(&self.codes.zeros)?,
            },
            tallies: of(&self.tallies)?,
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
        let by_row = |values: &Tensor, dtype: DType| values.t()?.to_dtype(dtype)?.contiguous();
        let groups = self.groups();
        let words = bits::words(self.width, self.grid.bits);
        let packed = Tensor::zeros((self.lanes, words), DType::U32, self.like.device())?;
        packed.inplace_op1(&Pack { problem: self, codes })?;
        Ok(Solved {
            codes: Codes {
                grid: self.grid,
                codes: packed,
                scales: by_row(&scales.narrow(0, 0, groups)?, DType::F32)?,
                zeros: by_row(&scales.narrow(0, groups, groups)?, DType::U8)?,
            },
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

/// Reads `[groups, lanes]` scales and zero points at a column.
struct Grids {
    values: Vec<f64>,
    lanes: usize,
    groups: usize,
    group: usize,
}

impl Grids {
    fn new(problem: Problem<'_>, scales: &Tensor) -> candle_core::Result<Self> {
        Ok(Self {
            values: doubles(scales)?,
            lanes: problem.lanes,
            groups: problem.groups(),
            group: problem.grid.group_size,
        })
    }

    /// Scale and zero point.
    fn at(&self, column: usize, lane: usize) -> (f64, f64) {
        let g = column / self.group;
        (
            self.values[g * self.lanes + lane],
            self.values[(self.groups + g) * self.lanes + lane],
        )
    }
}

#[cfg(feature = "cuda")]
mod launching {
    pub(super) use super::super::cuda::{Arg, SOLVER, Threads, kind, launch, pointer, pointer_at, u32_arg};
    pub(super) use candle_core::{CudaStorage, DType, Layout, Result};

    impl super::Problem<'_> {
        /// Runs a kernel on a state, whose address comes first, and the sizes last.
        pub(super) fn launch(
            self,
            name: &str,
            state: (&CudaStorage, &Layout),
            args: &[Arg],
            threads: Threads,
        ) -> Result<()> {
            let first = [pointer_at(state.0, state.1)?];
            let sizes = [
                u32_arg(self.width)?,
                u32_arg(self.lanes)?,
                u32_arg(self.grid.group_size)?,
                Arg::F64(self.max_code()),
            ];
            let args = [&first, args, &sizes].concat();
            launch(&state.0.device, SOLVER, name, threads, &args)
        }

        /// Threads whose lanes share memory.
        pub(super) fn block_threads(self) -> Threads {
            Threads {
                columns: self.lanes,
                rows: 1,
                block: super::BLOCK_THREADS,
            }
        }
    }

    /// The dtype of a grid's scales, as kernels name it.
    pub(super) fn scale_kind(grid: super::Grid) -> Result<Arg> {
        use crate::numerics::ScaleDtype;
        kind(match grid.scale_dtype {
            ScaleDtype::Bf16 => DType::BF16,
            ScaleDtype::F16 => DType::F16,
            ScaleDtype::F32 => DType::F32,
        })
    }
}

/// Fills scales and zero points: see [`search`].
struct Search<'a> {
    problem: Problem<'a>,
    target: &'a Tensor,
    importance: &'a Tensor,
}

impl InplaceOp1 for Search<'_> {
    fn name(&self) -> &'static str {
        "search"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (target, importance) = (doubles(self.target)?, doubles(self.importance)?);
        let Scales { scale, zero } = search(&target, self.problem.lanes, &importance, self.problem.grid);
        let out = matrix_mut(storage, layout)?;
        out[..scale.len()].copy_from_slice(&scale);
        out[scale.len()..].copy_from_slice(&zero);
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut launching::CudaStorage, layout: &Layout) -> launching::Result<()> {
        use launching::*;
        let args = [
            pointer(self.target)?,
            pointer(self.importance)?,
            Arg::U32(self.problem.grid.symmetric.into()),
            scale_kind(self.problem.grid)?,
        ];
        let threads = Threads::over(self.problem.lanes, self.problem.groups());
        self.problem.launch("search", (storage, layout), &args, threads)
    }
}

/// Fills codes and each lane's squared error, energy and clipped codes, `[width + 3, lanes]`.
struct RoundPlainly<'a> {
    problem: Problem<'a>,
    target: &'a Tensor,
    scales: &'a Tensor,
}

impl InplaceOp1 for RoundPlainly<'_> {
    fn name(&self) -> &'static str {
        "round_plainly"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let Problem { width, lanes, .. } = self.problem;
        let (target, grids) = (doubles(self.target)?, Grids::new(self.problem, self.scales)?);
        let out = matrix_mut(storage, layout)?;
        for lane in 0..lanes {
            let (mut error, mut energy, mut clipped) = (0.0, 0.0, 0.0);
            for column in 0..width {
                let w = target[column * lanes + lane];
                let (scale, zero) = grids.at(column, lane);
                let wanted = (w / scale + zero).round_ties_even();
                let code = wanted.clamp(0.0, self.problem.max_code());
                out[column * lanes + lane] = code;
                error += (w - (code - zero) * scale).powi(2);
                energy += w * w;
                clipped += f64::from(code != wanted);
            }
            for (row, value) in [error, energy, clipped].into_iter().enumerate() {
                out[(width + row) * lanes + lane] = value;
            }
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut launching::CudaStorage, layout: &Layout) -> launching::Result<()> {
        use launching::*;
        let args = [pointer(self.target)?, pointer(self.scales)?];
        let threads = Threads::over(self.problem.lanes, 1);
        self.problem
            .launch("round_plainly", (storage, layout), &args, threads)
    }
}

/// Error feedback within the rows `begin..` of L, from the last to the first, in a state `[2 * width + 2, lanes]`: by original column targets, in
/// whose place codes come; by row of L errors; each lane's squared error and clipped codes. `carried`, `[rows, lanes]`, is what the columns
/// before feed to them, `lower` `[rows, rows]` their block of L.
struct Sweep<'a> {
    problem: Problem<'a>,
    carried: &'a Tensor,
    lower: &'a Tensor,
    scales: &'a Tensor,
    columns: &'a Tensor,
    begin: usize,
    rows: usize,
}

impl InplaceOp1 for Sweep<'_> {
    fn name(&self) -> &'static str {
        "sweep"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let Problem { width, lanes, .. } = self.problem;
        let (carried, lower) = (doubles(self.carried)?, doubles(self.lower)?);
        let (columns, grids) = (
            self.columns.to_vec1::<u32>()?,
            Grids::new(self.problem, self.scales)?,
        );
        let state = matrix_mut(storage, layout)?;
        for lane in 0..lanes {
            for i in (0..self.rows).rev() {
                let (row, column) = (self.begin + i, columns[self.begin + i] as usize);
                let later = (i + 1..self.rows)
                    .map(|j| state[(width + self.begin + j) * lanes + lane] * lower[j * self.rows + i]);
                let fed = later.fold(carried[i * lanes + lane], |sum, e| sum + e);
                let (w, pivot) = (state[column * lanes + lane], lower[i * self.rows + i]);
                let (scale, zero) = grids.at(column, lane);
                let t = w + fed / pivot;
                let wanted = (t / scale + zero).round_ties_even();
                let code = wanted.clamp(0.0, self.problem.max_code());
                let value = (code - zero) * scale;
                state[column * lanes + lane] = code;
                state[(width + row) * lanes + lane] = w - value;
                state[2 * width * lanes + lane] += ((t - value) * pivot).powi(2);
                state[(2 * width + 1) * lanes + lane] += f64::from(code != wanted);
            }
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut launching::CudaStorage, layout: &Layout) -> launching::Result<()> {
        use launching::*;
        let args = [
            pointer(self.carried)?,
            pointer(self.lower)?,
            pointer(self.scales)?,
            pointer(self.columns)?,
            u32_arg(self.begin)?,
            u32_arg(self.rows)?,
        ];
        let threads = self.problem.block_threads();
        self.problem.launch("sweep", (storage, layout), &args, threads)
    }
}

/// Coordinate descent within the columns `begin..`, in a state `[2 * width, lanes]` in original order: codes, and by how much the values
/// moved. `gradient` is `[rows, lanes]`, `gram` these rows of XᵀX, `[rows, width]`.
struct Descend<'a> {
    problem: Problem<'a>,
    gradient: &'a Tensor,
    gram: &'a Tensor,
    damping: &'a Tensor,
    scales: &'a Tensor,
    begin: usize,
}

impl InplaceOp1 for Descend<'_> {
    fn name(&self) -> &'static str {
        "descend"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let Problem { width, lanes, .. } = self.problem;
        let (gradient, damping) = (doubles(self.gradient)?, doubles(self.damping)?);
        let gram = doubles(self.gram)?;
        let grids = Grids::new(self.problem, self.scales)?;
        let state = matrix_mut(storage, layout)?;
        for lane in 0..lanes {
            for i in 0..self.gram.dim(0)? {
                let column = self.begin + i;
                let earlier =
                    (0..i).map(|k| state[(width + self.begin + k) * lanes + lane] * gram[k * width + column]);
                let slope = earlier.fold(gradient[i * lanes + lane], |slope, moved| slope - moved);
                let (scale, zero) = grids.at(column, lane);
                let code = &mut state[column * lanes + lane];
                let curvature = gram[i * width + column] + damping[column];
                let wanted = (*code - zero) * scale + slope / curvature;
                let next = (wanted / scale + zero).round_ties_even();
                let next = next.clamp(0.0, self.problem.max_code());
                let step = (next - *code) * scale;
                *code = next;
                state[(width + column) * lanes + lane] = step;
            }
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut launching::CudaStorage, layout: &Layout) -> launching::Result<()> {
        use launching::*;
        let args = [
            pointer(self.gradient)?,
            pointer(self.gram)?,
            pointer(self.damping)?,
            pointer(self.scales)?,
            u32_arg(self.begin)?,
            u32_arg(self.gram.dim(0)?)?,
        ];
        let threads = self.problem.block_threads();
        self.problem.launch("descend", (storage, layout), &args, threads)
    }
}

/// Fills words, `[lanes, words]` u32, with codes, `[width, lanes]`.
struct Pack<'a> {
    problem: Problem<'a>,
    codes: &'a Tensor,
}

impl InplaceOp1 for Pack<'_> {
    fn name(&self) -> &'static str {
        "pack"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
        let codes: Vec<u8> = values(&self.codes.t()?.to_dtype(DType::U8)?)?;
        *storage = CpuStorage::U32(bits::pack_rows(
            &codes,
            self.problem.width,
            self.problem.grid.bits,
        ));
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut launching::CudaStorage, layout: &Layout) -> launching::Result<()> {
        use launching::*;
        let (lanes, words) = layout.shape().dims2()?;
        let args = [
            pointer_at(storage, layout)?,
            pointer(self.codes)?,
            u32_arg(words)?,
            Arg::U32(self.problem.grid.bits),
            u32_arg(self.problem.width)?,
            u32_arg(lanes)?,
        ];
        launch(
            &storage.device,
            SOLVER,
            "pack",
            Threads::over(lanes, words),
            &args,
        )
    }
}

/// One Newton step of a group's scales, `[lanes]`, kept where it lowers the error once it is rounded.
struct Refit<'a> {
    slope: &'a Tensor,
    curvature: &'a Tensor,
    grid: Grid,
}

impl InplaceOp1 for Refit<'_> {
    fn name(&self) -> &'static str {
        "refit"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (slope, curvature) = (doubles(self.slope)?, doubles(self.curvature)?);
        let (CpuStorage::F64(values), Some((begin, end))) = (storage, layout.contiguous_offsets()) else {
            candle_core::bail!("refit takes contiguous f64 scales");
        };
        let steps = slope.iter().zip(&curvature);
        for (scale, (slope, curvature)) in values[begin..end].iter_mut().zip(steps) {
            let wanted = *scale + slope / curvature;
            if *curvature > 0.0 && wanted > 0.0 {
                let next = self.grid.scale_dtype.round(wanted);
                let step = next - *scale;
                if step * (curvature * step - 2.0 * slope) < 0.0 {
                    *scale = next;
                }
            }
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut launching::CudaStorage, layout: &Layout) -> launching::Result<()> {
        use launching::*;
        let lanes = layout.shape().elem_count();
        let args = [
            pointer_at(storage, layout)?,
            pointer(self.slope)?,
            pointer(self.curvature)?,
            u32_arg(lanes)?,
            scale_kind(self.grid)?,
        ];
        launch(&storage.device, SOLVER, "refit", Threads::over(lanes, 1), &args)
    }
}
