//! Exact second-order statistics of one site: fixed-point sums that add, and retract, to the bit, in any order.
//!
//! A float Hessian depends on the order of its additions. Here each batch's product `P = XᵀX` (one f32 GEMM, the
//! same bits for the same batch) is scaled by `2^(s_i + s_j)`, rounded and added into 64-bit integers; integer addition is associative
//! and commutative, so one worker or many, in any arrival order, have the same sums. The exponents `s` come from a
//! fixed probe sequence, not from the data. This module knows neither timely nor models.

mod exponents;
mod gram;

pub use exponents::Exponents;
#[cfg(feature = "cuda")]
pub(crate) use gram::SUM_BITS;
pub use gram::{Accumulator, Panel, Product, SiteProducts, SiteStatistics};
pub(crate) use gram::{add_row, add_sums, too_large};
