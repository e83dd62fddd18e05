//! Mathematics on slices: no timely, no files, no checkpoint names.

mod quantized;

pub use quantized::{Grid, QuantizedWeight, ScaleDtype};
