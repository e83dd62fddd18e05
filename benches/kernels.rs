//! Where a run's CPU time goes, kernel by kernel, at SmolLM2's shapes. Read ratios within one run: `gemm` is the machine's own
//! ceiling, measured beside the rest.
#![allow(missing_docs)] // criterion's macros define undocumented functions

use candle_core::{DType, Device, Tensor};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use quantflow::memory::Room;
use quantflow::model::{Linear, Weight};
use quantflow::numerics::attention::{AttentionShape, attention};
use quantflow::numerics::elementwise::{silu_gate, softmax};
use quantflow::numerics::factor::{ColumnOrder, Factor, Factoring, shift};
use quantflow::numerics::gemm::{View, ViewMut, product};
use quantflow::numerics::routing::{RoutingRule, Scoring, route};
use quantflow::numerics::solver::{GptqOptions, gptq, round_to_nearest};
use quantflow::numerics::{Grid, ScaleDtype};
use quantflow::statistics::{Accumulator, Exponents, Product, SiteStatistics};
use std::hint::black_box;
use std::sync::Arc;

const TOKENS: usize = 512;

fn random(n: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn kernels(c: &mut Criterion) {
    for width in [576, 1536] {
        let mut group = c.benchmark_group(format!("width {width}"));
        let flop = 2 * TOKENS * width * width;
        group.throughput(Throughput::Elements(flop as u64));
        let (x, other) = (random(TOKENS * width), random(TOKENS * width));
        let mut out = vec![0f32; width * width];
        let view = |x| View::rows(x, TOKENS, width, width);
        group.bench_function("gemm", |b| {
            b.iter(|| {
                product(
                    ViewMut::rows(&mut out, width, width, width),
                    0.0,
                    view(&x).transposed(),
                    view(&x),
                    1.0,
                )
            });
        });
        let sums = |products| {
            let exponents = Exponents::from_probe(&x, width);
            Accumulator::from(SiteStatistics::new(exponents, products, &Room::Memory).unwrap())
        };
        let gram = sums(&[Product::Gram]);
        group.bench_function("exact gram", |b| b.iter(|| gram.add(black_box(&x), None, 1)));
        let both = sums(&[Product::Gram, Product::Cross]);
        group.bench_function("exact gram and cross", |b| {
            b.iter(|| both.add(black_box(&x), Some(&other), 1))
        });

        let products = both.finish().unwrap().into_products();
        let gram = products.gram.unwrap();
        let shift = products.cross.map(|cross| Arc::new(shift(cross, &gram)));
        let gram = Arc::new(gram.into_full(&Room::Memory).unwrap());
        let factored = |threads| {
            let how = Factoring {
                damp_percent: 0.01,
                column_order: ColumnOrder::Static,
                room: &Room::Memory,
                threads,
            };
            Factor::new("bench", &gram, shift.clone(), how).unwrap()
        };
        group.bench_function("factor", |b| b.iter(|| factored(1)));
        group.bench_function("factor, 2 threads", |b| b.iter(|| factored(2)));
        let factor = factored(1).with_gram(Arc::clone(&gram));
        let rows = random(128 * width);
        let grid = Grid {
            bits: 4,
            group_size: 64,
            symmetric: true,
            scale_dtype: ScaleDtype::Bf16,
        };
        for (name, match_original, refine_rounds) in [
            ("solve", 0.0, 0),
            ("solve, matched", 0.5, 0),
            ("solve, refined", 0.5, 2),
        ] {
            let options = GptqOptions {
                match_original,
                refine_rounds,
            };
            group.bench_function(format!("{name}, 128 rows"), |b| {
                b.iter(|| gptq(&rows, &factor, grid, options))
            });
        }
        group.finish();
    }
    let shape = AttentionShape {
        length: TOKENS,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        value_dim: 64,
        scale: 0.125,
        softcap: None,
        window: None,
    };
    let (q, k, v) = (random(TOKENS * 576), random(TOKENS * 192), random(TOKENS * 192));
    c.bench_function("attention 9 heads of 64", |b| {
        b.iter(|| attention(&q, &k, &v, None, shape))
    });
    let (gate, up) = (random(TOKENS * 1536), random(TOKENS * 1536));
    c.bench_function("silu gate", |b| {
        b.iter_batched_ref(
            || gate.clone(),
            |gate| silu_gate(gate, &up),
            criterion::BatchSize::LargeInput,
        );
    });
}

/// The same work with matrices in memory and in scratch files, at a width that fits: what it costs to have them there. The kernels read
/// panels in the same order at any width, so the ratio is that of larger ones as long as the disk keeps up.
fn rooms(c: &mut Criterion) {
    let width = 4096;
    let x = random(TOKENS * width);
    let rows = random(128 * width);
    let folder = tempfile::tempdir().unwrap();
    let grid = Grid {
        bits: 4,
        group_size: 128,
        symmetric: true,
        scale_dtype: ScaleDtype::Bf16,
    };
    for (name, room) in [
        ("memory", Room::Memory),
        ("scratch files", Room::Scratch(folder.path().into())),
    ] {
        let mut group = c.benchmark_group(format!("width {width}, {name}"));
        let exponents = Exponents::from_probe(&x, width);
        let sums = SiteStatistics::new(exponents, &[Product::Gram], &room).unwrap();
        let sums = Accumulator::from(sums);
        group.bench_function("exact gram", |b| b.iter(|| sums.add(black_box(&x), None, 1)));
        let gram = sums.finish().unwrap().into_products().gram.unwrap();
        let gram = Arc::new(gram.into_full(&room).unwrap());
        let factored = || {
            let how = Factoring {
                damp_percent: 0.01,
                column_order: ColumnOrder::Static,
                room: &room,
                threads: 2,
            };
            Factor::new("bench", &gram, None, how).unwrap()
        };
        group.bench_function("factor, 2 threads", |b| b.iter(factored));
        let factor = factored().with_gram(Arc::clone(&gram));
        for refine_rounds in [0, 2] {
            let options = GptqOptions {
                match_original: 0.0,
                refine_rounds,
            };
            group.bench_function(
                format!("solve, {refine_rounds} rounds of refinement, 128 rows"),
                |b| b.iter(|| gptq(&rows, &factor, grid, options)),
            );
        }
        group.finish();
    }
}

/// Where 2,048 tokens go among 128 experts, beside the scores alone.
fn routing(c: &mut Criterion) {
    let rule = RoutingRule {
        experts: 128,
        experts_per_token: 8,
        scoring: Scoring::Softmax,
        normalize: true,
        scale: 1.0,
        groups: None,
    };
    let logits = random(2048 * rule.experts);
    let mut group = c.benchmark_group("8 of 128 experts, 2,048 tokens");
    group.bench_function("scores", |b| {
        b.iter(|| {
            let mut scores = black_box(&logits).clone();
            let rows = scores.chunks_exact_mut(rule.experts);
            rows.for_each(|row| softmax(row, 1.0, None, None));
            scores
        });
    });
    group.bench_function("route", |b| b.iter(|| route(black_box(&logits), None, rule)));
    let routing = route(&logits, None, rule);
    group.bench_function("dispatch", |b| b.iter(|| routing.dispatch(rule.experts)));
    group.finish();
}

/// A linear's products by how narrow its weight is held: what widening it costs, for a batch and for few tokens. A worker has one
/// core, and candle, which multiplies whole weights, takes all there are: compare with RAYON_NUM_THREADS=1.
fn linears(c: &mut Criterion) {
    let width = 4096;
    let whole = random(width * width);
    let matrix = |values: &[f32], rows| Tensor::from_slice(values, (rows, width), &Device::Cpu).unwrap();
    let halves = matrix(&whole, width).to_dtype(DType::BF16).unwrap();
    let codes = |bits| {
        let grid = Grid {
            bits,
            group_size: 128,
            symmetric: true,
            scale_dtype: ScaleDtype::Bf16,
        };
        Weight::Codes(Arc::new(round_to_nearest(&whole, width, grid).weight))
    };
    let weights = [
        ("f32", Weight::Whole(matrix(&whole, width))),
        ("bf16", Weight::Halves(halves)),
        ("8 bits", codes(8)),
        ("4 bits", codes(4)),
        ("3 bits", codes(3)),
    ];
    for tokens in [8, TOKENS] {
        let mut group = c.benchmark_group(format!("linear of {width}, {tokens} tokens"));
        let x = matrix(&whole[..tokens * width], tokens);
        for (name, weight) in &weights {
            let linear = Linear {
                weight: weight.clone(),
                bias: None,
            };
            group.bench_function(*name, |b| b.iter(|| linear.forward(black_box(&x)).unwrap()));
        }
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).measurement_time(std::time::Duration::from_secs(2));
    targets = kernels, linears, rooms, routing
}
criterion_main!(benches);
