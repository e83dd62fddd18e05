//! Linears whose weights are held as narrow as they are stored, against the definition in f64.

use crate::formats;
use crate::reference::random;
use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use quantflow::model::{Linear, Tower, Weight, panel_rows};
use quantflow::numerics::fp8::{Float8Matrix, e4m3};
use quantflow::numerics::{Grid, ScaleDtype};
use std::path::Path;
use std::sync::Arc;

/// Of the sum of the products' sizes: an f32 sum of up to 9,000 of them.
const SINGLE: f64 = 1e-5;

/// A weight with random content, and a copy that is whole.
fn weight(kind: usize, rows: usize, columns: usize, seed: u64) -> (Weight, Vec<f32>) {
    let mut random = random(seed);
    let cpu = &Device::Cpu;
    if kind == 2 {
        let grid = Grid {
            bits: 4,
            group_size: columns / 2,
            symmetric: false,
            scale_dtype: ScaleDtype::F32,
        };
        let weight = formats::weight(grid, rows, columns, seed as u32);
        let codes = weight.unpacked();
        let value = |i: usize| {
            let group = i / grid.group_size;
            (f32::from(codes[i]) - f32::from(weight.zeros[group])) * weight.scales[group]
        };
        let values = (0..rows * columns).map(value).collect();
        return (Weight::Codes(Arc::new(weight)), values);
    }
    if kind == 3 {
        // Neither blocks nor their number divide the sides.
        let block = [16, 7];
        let across = columns.div_ceil(block[1]);
        let mut code = || (random() * 1e6).abs() as u32 % 126;
        let codes: Vec<u8> = (0..rows * columns)
            .map(|i| code() as u8 | (i as u8 % 2) << 7)
            .collect();
        let scales: Vec<f32> = (0..rows.div_ceil(block[0]) * across)
            .map(|i| 0.01 + 0.001 * (i % 7) as f32)
            .collect();
        let value =
            |i: usize| e4m3(codes[i]) * scales[i / columns / block[0] * across + i % columns / block[1]];
        let values = (0..codes.len()).map(value).collect();
        let weight = Float8Matrix {
            codes,
            columns,
            scales,
            block,
        };
        return (Weight::Floats(Arc::new(weight)), values);
    }
    let values: Vec<f32> = (0..rows * columns).map(|_| random() as f32).collect();
    let dtype = [DType::BF16, DType::F16][kind];
    let halves = Tensor::from_vec(values, (rows, columns), cpu)
        .unwrap()
        .to_dtype(dtype)
        .unwrap();
    let whole = halves.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
    (Weight::Halves(halves), whole.to_vec1().unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_narrow_weight_gives_the_products_of_its_values(
        kind in 0usize..4, rows in 1usize..300, wide in any::<bool>(), tokens in 1usize..9, biased in any::<bool>(), seed in any::<u64>(),
    ) {
        let columns = if wide { 9_000 } else { 48 };
        let (narrow, values) = weight(kind, rows, columns, seed);
        prop_assert_eq!(&narrow.rows(0..rows).unwrap(), &values);
        let some = rows / 3..rows;
        prop_assert_eq!(&narrow.rows(some.clone()).unwrap()[..], &values[some.start * columns..]);

        let mut random = random(!seed);
        let mut tensor = |sides: &[usize]| {
            let values: Vec<f32> = (0..sides.iter().product()).map(|_| random() as f32).collect();
            (Tensor::from_slice(&values, sides, &Device::Cpu).unwrap(), values)
        };
        let (x, inputs) = tensor(&[tokens + 1, columns]);
        let (bias, offsets) = tensor(&[rows]);
        let linear = Linear { weight: narrow, bias: biased.then_some(bias) };
        // Not all of a tensor, as an expert's tokens are not.
        let y = linear.forward(&x.narrow(0, 1, tokens).unwrap()).unwrap().to_vec2::<f32>().unwrap();
        for (token, outputs) in y.iter().enumerate() {
            let x = &inputs[(token + 1) * columns..][..columns];
            for (row, &ours) in outputs.iter().enumerate() {
                let products = x.iter().zip(&values[row * columns..]).map(|(&x, &w)| f64::from(x) * f64::from(w));
                let size: f64 = products.clone().map(f64::abs).sum();
                let sum = products.sum::<f64>() + if biased { f64::from(offsets[row]) } else { 0.0 };
                prop_assert!((f64::from(ours) - sum).abs() <= SINGLE * (size + 1.0), "token {token}, row {row}: {ours}, {sum}");
            }
        }
    }
}

#[test]
fn the_test_of_products_crosses_panels() {
    assert!(panel_rows(9_000) < 200 && panel_rows(48) > 300);
}

#[test]
fn an_input_of_another_width_is_refused() {
    let (narrow, _) = weight(2, 4, 48, 1);
    let linear = Linear {
        weight: narrow,
        bias: None,
    };
    let x = Tensor::zeros((2, 40), DType::F32, &Device::Cpu).unwrap();
    assert!(linear.forward(&x).is_err());
}

#[test]
fn headers_tell_what_a_linear_takes() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let mut folders = vec![fixtures.join("tiny-vl/model")];
    let families = std::fs::read_dir(fixtures.join("families")).unwrap();
    folders.extend(
        families
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.is_dir()),
    );
    let mut kinds = [0; 4];
    for folder in folders {
        let tower = Tower::open(&folder, Device::Cpu).unwrap();
        for block in 0..tower.blocks() {
            let sites = tower.spec.sites(block);
            for linear in sites.into_iter().flat_map(|site| tower.spec.linears(block, site)) {
                let bytes = match tower.linear(block, &linear).unwrap().weight {
                    Weight::Whole(weight) => (0, weight.elem_count() * 4),
                    Weight::Halves(weight) => (1, weight.elem_count() * 2),
                    Weight::Codes(weight) => (
                        2,
                        weight.codes.len() * 4 + weight.scales.len() * 4 + weight.zeros.len(),
                    ),
                    Weight::Floats(weight) => (3, weight.codes.len() + weight.scales.len() * 4),
                };
                kinds[bytes.0] += 1;
                assert_eq!(
                    bytes.1,
                    tower.linear_bytes(block, &linear).unwrap(),
                    "{folder:?}, {block}, {}",
                    linear.name
                );
            }
        }
    }
    assert!(kinds.iter().all(|&count| count > 0), "{kinds:?}");
}
