//! Mathematics on slices: no timely, no files, no checkpoint names.

pub mod attention;
pub mod bits;
pub mod divergence;
pub mod elementwise;
pub mod factor;
pub mod fp8;
pub mod gemm;
pub mod halves;
pub mod knapsack;
pub mod panels;
pub mod predict;
mod quantized;
mod refine;
pub mod routing;
pub mod scales;
pub(crate) mod simd;
pub mod solver;
pub mod speed;

pub use simd::arithmetic;

pub use quantized::{Grid, QuantizedWeight, ScaleDtype};
