//! Causal grouped-query attention on the CPU, blocked over queries: no [heads, T, T] tensor is ever in memory.

use super::elementwise::softmax;
use super::gemm::{View, ViewMut, product};

/// Query rows that are scored at a time: 128 × 2048 scores in f32 are 1 MiB.
const QUERY_BLOCK: usize = 128;

/// Shapes and options of an attention call.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Tokens of a sequence; the inputs hold a whole number of sequences.
    pub length: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a query or key head.
    pub head_dim: usize,
    /// Width of a value head, and of the output's.
    pub value_dim: usize,
    /// Factor on q·k.
    pub scale: f32,
    /// scores = cap * tanh(scores / cap)
    pub softcap: Option<f32>,
    /// A query sees itself and the `window - 1` tokens before it.
    pub window: Option<usize>,
}

/// softmax(q kᵀ · scale) v, causal within each sequence.
///
/// `q` is `[tokens, heads * head_dim]`, `k` is `[tokens, kv_heads * head_dim]`, `v` is `[tokens, kv_heads * value_dim]`, row-major; the
/// result is `[tokens, heads * value_dim]`. `sinks`, one a head, take part in the softmax as a key without a value (gpt-oss).
///
/// # Panics
/// The slices do not have these shapes.
pub fn attention(q: &[f32], k: &[f32], v: &[f32], sinks: Option<&[f32]>, shape: AttentionShape) -> Vec<f32> {
    let AttentionShape {
        length,
        heads,
        kv_heads,
        head_dim,
        value_dim,
        ..
    } = shape;
    let (q_width, k_width) = (heads * head_dim, kv_heads * head_dim);
    let (v_width, out_width) = (kv_heads * value_dim, heads * value_dim);
    let tokens = q.len() / q_width;
    assert!(tokens.is_multiple_of(length) && heads.is_multiple_of(kv_heads));
    assert!(q.len() == tokens * q_width && k.len() == tokens * k_width && v.len() == tokens * v_width);
    assert!(sinks.is_none_or(|sinks| sinks.len() == heads));
    let mut out = vec![0f32; tokens * out_width];
    let mut scores = vec![0f32; QUERY_BLOCK.min(length) * length];
    for first in (0..tokens).step_by(length) {
        for head in 0..heads {
            let kv_head = head / (heads / kv_heads);
            let sink = sinks.map(|sinks| sinks[head]);
            for begin in (0..length).step_by(QUERY_BLOCK) {
                let rows = QUERY_BLOCK.min(length - begin);
                let low = shape
                    .window
                    .map_or(0, |window| (begin + 1).saturating_sub(window));
                let keys = begin + rows - low;
                let at = (first + begin) * q_width + head * head_dim;
                let k_at = (first + low) * k_width + kv_head * head_dim;
                product(
                    ViewMut::rows(&mut scores, rows, keys, keys),
                    0.0,
                    View::rows(&q[at..], rows, head_dim, q_width),
                    View::rows(&k[k_at..], keys, head_dim, k_width).transposed(),
                    1.0,
                );
                for (i, row) in scores[..rows * keys].chunks_exact_mut(keys).enumerate() {
                    let query = begin + i;
                    let seen_from = shape
                        .window
                        .map_or(0, |window| (query + 1).saturating_sub(window))
                        - low;
                    let seen_to = query + 1 - low;
                    softmax(&mut row[seen_from..seen_to], shape.scale, shape.softcap, sink);
                    row[..seen_from].fill(0.0);
                    row[seen_to..].fill(0.0);
                }
                let v_at = (first + low) * v_width + kv_head * value_dim;
                let out_at = (first + begin) * out_width + head * value_dim;
                product(
                    ViewMut::rows(&mut out[out_at..], rows, value_dim, out_width),
                    0.0,
                    View::rows(&scores, rows, keys, keys),
                    View::rows(&v[v_at..], keys, value_dim, v_width),
                    1.0,
                );
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, in f64.
    fn reference(q: &[f32], k: &[f32], v: &[f32], sinks: Option<&[f32]>, s: AttentionShape) -> Vec<f64> {
        let (q_width, kv_width) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        let (v_width, out_width) = (s.kv_heads * s.value_dim, s.heads * s.value_dim);
        let mut out = vec![0.0; q.len() / q_width * out_width];
        for row in 0..q.len() / q_width {
            let (start, query) = (row / s.length * s.length, row % s.length);
            for h in 0..s.heads {
                let kv = h / (s.heads / s.kv_heads);
                let seen: Vec<usize> = (0..=query)
                    .filter(|key| s.window.is_none_or(|w| query - key < w))
                    .collect();
                let weights: Vec<f64> = seen
                    .iter()
                    .map(|key| {
                        let dot: f64 = (0..s.head_dim)
                            .map(|d| {
                                f64::from(q[row * q_width + h * s.head_dim + d])
                                    * f64::from(k[(start + key) * kv_width + kv * s.head_dim + d])
                            })
                            .sum();
                        let score = dot * f64::from(s.scale);
                        s.softcap
                            .map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                            .exp()
                    })
                    .collect();
                let sink = sinks.map_or(0.0, |sinks| f64::from(sinks[h]).exp());
                let total: f64 = weights.iter().sum::<f64>() + sink;
                for d in 0..s.value_dim {
                    out[row * out_width + h * s.value_dim + d] = seen
                        .iter()
                        .zip(&weights)
                        .map(|(key, w)| {
                            w / total * f64::from(v[(start + key) * v_width + kv * s.value_dim + d])
                        })
                        .sum();
                }
            }
        }
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn matches_the_definition(
            length in 1usize..300, sequences in 1usize..3, kv_heads in 1usize..3, group in 1usize..3,
            window in proptest::option::of(1usize..200), cap in proptest::option::of(5f32..50.0), seed in 0u64..1000,
            value_dim in 4usize..10, sunk in any::<bool>(),
        ) {
            let head_dim = 8;
            let shape = AttentionShape {
                length, heads: kv_heads * group, kv_heads, head_dim, value_dim, scale: 0.6, softcap: cap, window,
            };
            let mut state = seed;
            let mut random = |n: usize| -> Vec<f32> {
                (0..n).map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
                }).collect()
            };
            let tokens = length * sequences;
            let (q, k, v) = (random(tokens * shape.heads * 8), random(tokens * kv_heads * 8), random(tokens * kv_heads * value_dim));
            let sinks = random(shape.heads);
            let sinks = sunk.then_some(&sinks[..]);
            let ours = attention(&q, &k, &v, sinks, shape);
            for (a, b) in ours.iter().zip(reference(&q, &k, &v, sinks, shape)) {
                prop_assert!((f64::from(*a) - b).abs() < 1e-5, "{a} != {b}");
            }
        }
    }
}
