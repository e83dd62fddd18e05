//! The solver's steps that are done lane by lane, each by its definition and by a kernel of kernels/solver.cu.

use super::Problem;
use crate::device::doubles;
use crate::device::matrix::matrix_mut;
use crate::numerics::Grid;
use crate::numerics::scales::{Scales, search};
use candle_core::{CpuStorage, InplaceOp1, Layout, Tensor};

/// Threads of a block's launches.
#[cfg(feature = "cuda")]
const BLOCK_THREADS: u32 = 64;

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
    pub(super) use crate::device::cuda::{Arg, SOLVER, Threads, kind, launch, pointer, pointer_at, u32_arg};
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
pub(super) struct Search<'a> {
    pub(super) problem: Problem<'a>,
    pub(super) target: &'a Tensor,
    pub(super) importance: &'a Tensor,
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
pub(super) struct RoundPlainly<'a> {
    pub(super) problem: Problem<'a>,
    pub(super) target: &'a Tensor,
    pub(super) scales: &'a Tensor,
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
pub(super) struct Sweep<'a> {
    pub(super) problem: Problem<'a>,
    pub(super) carried: &'a Tensor,
    pub(super) lower: &'a Tensor,
    pub(super) scales: &'a Tensor,
    pub(super) columns: &'a Tensor,
    pub(super) begin: usize,
    pub(super) rows: usize,
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
pub(super) struct Descend<'a> {
    pub(super) problem: Problem<'a>,
    pub(super) gradient: &'a Tensor,
    pub(super) gram: &'a Tensor,
    pub(super) damping: &'a Tensor,
    pub(super) scales: &'a Tensor,
    pub(super) begin: usize,
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

/// One Newton step of a group's scales, `[lanes]`, kept where it lowers the error once it is rounded.
pub(super) struct Refit<'a> {
    pub(super) slope: &'a Tensor,
    pub(super) curvature: &'a Tensor,
    pub(super) grid: Grid,
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
