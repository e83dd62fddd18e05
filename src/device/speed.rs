//! What a device does in a second, as [`crate::numerics::speed`] of a thread.

use super::matrix::product;
use super::solver::round_to_nearest;
use crate::error::Result;
use crate::numerics::speed::Speed;
use crate::numerics::{Grid, ScaleDtype};
use candle_core::{DType, Device, Tensor};
use std::time::Instant;

/// Width of the products that are timed, and rows of the search.
const WIDTH: usize = 2048;
/// What is timed, after one that is not.
const REPEATS: usize = 8;

/// Measures, in a fraction of a second. Products are those of `precision`.
///
/// # Errors
/// The device fails.
pub fn measure(device: &Device, precision: DType) -> Result<Speed> {
    let ones = Tensor::ones((WIDTH, WIDTH), DType::F64, device)?;
    let flops = |dtype: DType| -> Result<f64> {
        let matrix = ones.to_dtype(dtype)?;
        let seconds = time(|| {
            let first = product(&matrix, &matrix)?.get(0)?.get(0)?;
            first.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            Ok(())
        })?;
        Ok((2 * WIDTH * WIDTH * WIDTH) as f64 / seconds)
    };
    let grid = Grid {
        bits: 4,
        group_size: 64,
        symmetric: true,
        scale_dtype: ScaleDtype::Bf16,
    };
    let searching = time(|| round_to_nearest(&ones, grid).map(drop))?;
    Ok(Speed {
        single_flops: flops(precision)?,
        double_flops: flops(DType::F64)?,
        searched_weights: (WIDTH * WIDTH) as f64 / searching,
    })
}

/// Seconds of `work`, which ends with a result on the host.
fn time(work: impl Fn() -> Result<()>) -> Result<f64> {
    work()?;
    let begin = Instant::now();
    for _ in 0..REPEATS {
        work()?;
    }
    Ok(begin.elapsed().as_secs_f64() / REPEATS as f64)
}
