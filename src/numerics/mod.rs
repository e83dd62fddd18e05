//! Mathematics on slices: no timely, no files, no checkpoint names.

pub mod attention;
pub mod elementwise;
pub mod gemm;
mod quantized;

pub use quantized::{Grid, QuantizedWeight, ScaleDtype};
