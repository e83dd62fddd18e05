//! Programs over tensors, for work that is done where tensors are: products, attention, exact sums, factors, codes. A program is written
//! once. What candle has not is an operation with two sides, a plain one for the CPU, which defines it, and a CUDA one, which launches
//! a kernel of `kernels/`. So every program runs, and is tested, without a device.
//!
//! On the CPU quantflow itself uses [`crate::numerics`] instead, whose kernels are made for caches, threads and scratch files.

pub mod attention;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub mod divergence;
pub mod factor;
pub mod matrix;
mod placement;
pub mod solver;
pub mod speed;
pub mod sums;
pub mod weights;

pub use placement::{DeviceChoice, Placement};

use candle_core::{Result, Tensor, bail};

/// The values of a contiguous f64 tensor on the CPU, for the plain side of an operation.
fn doubles(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.flatten_all()?.to_vec1()
}

/// A vector on the device of another tensor.
fn vector<T: candle_core::WithDType>(values: &[T], like: &Tensor) -> Result<Tensor> {
    Tensor::from_slice(values, values.len(), like.device())
}

/// Elements of one row to the next, of a part of a matrix whose rows are contiguous.
fn row_stride(layout: &candle_core::Layout) -> Result<usize> {
    match (layout.dims(), layout.stride()) {
        ([_, columns], [stride, 1]) if stride >= columns => Ok(*stride),
        _ => bail!("this operation needs contiguous rows"),
    }
}
