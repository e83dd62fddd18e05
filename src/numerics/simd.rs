//! Loops for the auto-vectoriser, compiled for the widest instructions that the machine turns out to have.

/// Owned by a [`vectorized!`] body, so that its closure can be called only once. A closure that could be called again is called
/// through a shim that is not inlined, and then keeps the baseline's narrow instructions (seen in profiles: 128-bit loops and calls of `rint`).
pub(crate) struct Once;

/// Runs a block of loops through [`pulp::Arch`]; its value is the block's.
macro_rules! vectorized {
    ($body:block) => {{
        let once = $crate::numerics::simd::Once;
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || {
                let _called = once;
                $body
            },
        )
    }};
}
pub(crate) use vectorized;

/// Names the widest instructions that the kernels find here. Machines with the same name round alike; others sum in another order.
pub fn arithmetic() -> String {
    #[cfg(target_arch = "x86_64")]
    let level = match (pulp::x86::V4::try_new(), pulp::x86::V3::try_new()) {
        (Some(_), _) => "avx512",
        (None, Some(_)) => "avx2",
        (None, None) => "baseline",
    };
    #[cfg(not(target_arch = "x86_64"))]
    let level = "baseline";
    format!("{} {level} f32", std::env::consts::ARCH)
}
