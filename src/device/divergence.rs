//! How far one model's next-token distribution is from another's, where the logits are.

use super::vector;
use crate::numerics::divergence::Divergence;
use candle_core::{DType, Result, Tensor, bail};

/// As [`crate::numerics::divergence::compare`], for logits `[positions, vocabulary]`, a target each.
///
/// # Errors
/// Shapes do not fit, a target is outside, or the device has no memory left.
pub fn compare(reference: &Tensor, model: &Tensor, targets: &[u32]) -> Result<Vec<Divergence>> {
    let (_, vocabulary) = reference.dims2()?;
    if let Some(target) = targets.iter().find(|target| **target as usize >= vocabulary) {
        bail!("token {target} is outside a vocabulary of {vocabulary}");
    }
    let targets = vector(targets, reference)?.unsqueeze(1)?;
    let of_target =
        |logs: &Tensor| -> Result<Vec<f64>> { logs.gather(&targets, 1)?.neg()?.squeeze(1)?.to_vec1() };
    let (r, m) = (log_probabilities(reference)?, log_probabilities(model)?);
    let kl: Vec<f64> = (r.exp()? * (&r - &m)?)?.sum(1)?.to_vec1()?;
    let (reference_nll, nll) = (of_target(&r)?, of_target(&m)?);
    let top = |logits: &Tensor| logits.argmax(1)?.to_vec1::<u32>();
    let tops: Vec<bool> = (top(reference)?.iter().zip(top(model)?))
        .map(|(ours, theirs)| *ours == theirs)
        .collect();
    let positions = kl.into_iter().zip(reference_nll).zip(nll).zip(tops);
    let divergences = positions.map(|(((kl, reference_nll), nll), top1_equal)| Divergence {
        kl: kl.max(0.0),
        reference_nll,
        nll,
        top1_equal,
    });
    Ok(divergences.collect())
}

/// In f64: what two models differ by is small beside their logits.
fn log_probabilities(logits: &Tensor) -> Result<Tensor> {
    let logits = logits.to_dtype(DType::F64)?;
    let shifted = logits.broadcast_sub(&logits.max_keepdim(1)?)?;
    shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(1)?.log()?)
}
