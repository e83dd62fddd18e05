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
