//! Programs over tensors, for work that is done where tensors are: products, attention, exact sums, factors, codes. A program is written
//! once. What candle has not is an operation with two sides, a plain one for the CPU, which defines it, and a CUDA one, which launches
//! a kernel of `kernels/`. So every program runs, and is tested, without a device.
//!
//! On the CPU quantflow itself uses [`crate::numerics`] instead, whose kernels are made for caches, threads and scratch files.

pub mod attention;
pub mod codes;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub mod divergence;
pub mod factor;
pub mod hessian;
pub mod matrix;
pub(crate) mod operands;
pub(crate) mod panels;
pub mod parking;
#[cfg(feature = "cuda")]
mod pinned;
mod placement;
pub mod solver;
pub mod speed;
pub mod sums;
pub mod transfer;

pub use placement::{DeviceChoice, Placement};

use candle_core::{Result, Tensor, WithDType, bail};

/// Parked tensors that are on their way to the host, and still on the device, at a time.
pub(crate) const LEAVING: usize = 2;
/// Parked tensors that come back before they are used: those of two batches, while the one before them is computed.
pub(crate) const AHEAD: usize = 4;

/// The values of a tensor, row-major. Of a part of a matrix on a device that part alone comes to the host: candle copies all of it.
pub(crate) fn values<T: WithDType>(tensor: &Tensor) -> Result<Vec<T>> {
    let flat = tensor.flatten_all()?;
    match tensor.device().is_cpu() {
        true => flat.to_vec1(),
        false => flat.force_contiguous()?.to_vec1(),
    }
}

/// [`values`] of an f64 tensor.
fn doubles(tensor: &Tensor) -> Result<Vec<f64>> {
    values(tensor)
}

/// A vector on the device of another tensor.
fn vector<T: WithDType>(values: &[T], like: &Tensor) -> Result<Tensor> {
    Tensor::from_slice(values, values.len(), like.device())
}

/// Elements of one row to the next, of a part of a matrix whose rows are contiguous.
fn row_stride(layout: &candle_core::Layout) -> Result<usize> {
    match (layout.dims(), layout.stride()) {
        ([_, columns], [stride, 1]) if stride >= columns => Ok(*stride),
        _ => bail!("this operation needs contiguous rows"),
    }
}
