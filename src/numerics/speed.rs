//! What one thread of this machine does in a second, measured in a fraction of one: for predictions, never for decisions.

use super::gemm::{Real, View, ViewMut, product};
use super::solver::round_to_nearest;
use super::{Grid, ScaleDtype};
use std::time::Instant;

/// Width of the products that are timed: large enough for the kernels' full speed.
const WIDTH: usize = 512;
/// Products that are timed, after one that is not.
const REPEATS: usize = 8;
/// Rows whose scales are searched.
const ROWS: usize = 32;

/// Speeds of one thread.
#[derive(Clone, Copy, Debug)]
pub struct Speed {
    /// Operations of f32 products a second.
    pub single_flops: f64,
    /// Operations of f64 products a second.
    pub double_flops: f64,
    /// Weights whose scales are searched in a second.
    pub searched_weights: f64,
}

impl Speed {
    /// Of a core of 2020 with AVX2: where only shares of a whole are asked for.
    pub const TYPICAL: Self = Self {
        single_flops: 80e9,
        double_flops: 35e9,
        searched_weights: 40e6,
    };

    /// Measures, in about a tenth of a second.
    pub fn measure() -> Self {
        let grid = Grid {
            bits: 4,
            group_size: 64,
            symmetric: true,
            scale_dtype: ScaleDtype::Bf16,
        };
        let weights: Vec<f32> = (0..ROWS * WIDTH).map(|i| (i % 101) as f32 - 50.0).collect();
        let begin = Instant::now();
        round_to_nearest(&weights, WIDTH, grid);
        Self {
            searched_weights: (ROWS * WIDTH) as f64 / begin.elapsed().as_secs_f64(),
            single_flops: flops(1f32),
            double_flops: flops(1f64),
        }
    }
}

fn flops<T: Real>(one: T) -> f64 {
    let values = vec![one; WIDTH * WIDTH];
    let mut out = values.clone();
    let mut run = || {
        let view = View::rows(&values, WIDTH, WIDTH, WIDTH);
        let begin = Instant::now();
        product(
            ViewMut::rows(&mut out, WIDTH, WIDTH, WIDTH),
            T::ZERO,
            view,
            view,
            T::ONE,
        );
        begin.elapsed().as_secs_f64()
    };
    run();
    let seconds: f64 = (0..REPEATS).map(|_| run()).sum();
    (2 * WIDTH * WIDTH * WIDTH * REPEATS) as f64 / seconds
}
