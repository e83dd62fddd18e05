//! Exact sums, and the matrices that are made of them.

use super::{Arg, number, of, run, to};
use crate::reference::random;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20))]
    #[test]
    fn products_are_rounded_scaled_and_added(
        rows in 1usize..6, columns in 1usize..70, count in -3i64..4, seed in 0u64..1000,
    ) {
        let mut random = random(seed);
        let product: Vec<f32> = (0..rows * columns).map(|_| (random() * 1e4) as f32).collect();
        let scales: Vec<f64> = (0..rows + columns).map(|_| (random() * 8.0).round().exp2()).collect();
        let before: Vec<i64> = (0..rows * columns).map(|i| i as i64 * 1000 - 500).collect();
        let (mut sums, mut bad) = (before.clone(), [0u32]);
        let args = [
            to(&mut sums), of(&product), of(&scales[..rows]), of(&scales[rows..]), number(columns), Arg::I64(count), to(&mut bad),
        ];
        run("add_rounded", (columns, rows), 32, &args);
        for (i, (sum, before)) in sums.iter().zip(before).enumerate() {
            let (row, column) = (i / columns, i % columns);
            let added = (f64::from(product[i]) * (scales[row] * scales[rows + column])).round_ties_even();
            prop_assert_eq!(*sum, before + count * added as i64);
        }
        prop_assert_eq!(bad, [0]);
    }

    #[test]
    fn columns_are_summed_in_double(tokens in 1usize..40, columns in 1usize..70, count in -3i64..4, seed in 0u64..1000) {
        let mut random = random(seed);
        let x: Vec<f32> = (0..tokens * columns).map(|_| random() as f32).collect();
        let scales: Vec<f64> = (0..columns).map(|_| (20.0 + random() * 8.0).exp2()).collect();
        let (mut sums, mut bad) = (vec![7i64; columns], [0u32]);
        let args = [to(&mut sums), of(&x), of(&scales), number(tokens), number(columns), Arg::I64(count), to(&mut bad)];
        run("add_columns", (columns, 1), 32, &args);
        for (column, sum) in sums.into_iter().enumerate() {
            let total: f64 = x.iter().skip(column).step_by(columns).map(|&v| f64::from(v)).sum();
            prop_assert_eq!(sum, 7 + count * (total * scales[column]).round_ties_even() as i64);
        }
        prop_assert_eq!(bad, [0]);
    }

    /// In panels of every height, the last of them lower than the others.
    #[test]
    fn matrices_are_those_of_the_sums(width in 1usize..70, panel in 1usize..80, seed in 0u64..1000) {
        let mut random = random(seed);
        let mut integers = || -> Vec<i64> { (0..width * width).map(|_| (random() * 1e6) as i64).collect() };
        let (square, cross) = (integers(), integers());
        // Which elements panels have, row by row from the column of their first row on.
        let stored: Vec<(usize, usize)> = (0..width)
            .flat_map(|row| (row - row % panel..width).map(move |column| (row, column)))
            .collect();
        let sums: Vec<i64> = stored.iter().map(|&(row, column)| square[row * width + column]).collect();
        let inverse: Vec<f64> = (0..width).map(|i| f64::from(-(i as i32 % 7)).exp2()).collect();
        let order: Vec<u32> = (0..width).map(|i| ((i * 7 + 3) % width) as u32).collect();
        let diagonal: Vec<f64> = (0..width).map(|i| i as f64 + 0.5).collect();
        let symmetric = |a: usize, b: usize| square[a.min(b) * width + a.max(b)] as f64 * inverse[a] * inverse[b];
        let sides = [number(width), number(panel)];

        let mut out = vec![-1.0; sums.len()];
        let args = [to(&mut out), of(&sums), of(&inverse), of(&order), of(&diagonal)];
        run("ordered", (width, width), 32, &[&args[..], &sides].concat());
        for (value, &(row, column)) in out.iter().zip(&stored) {
            let (a, b) = (order[row] as usize, order[column] as usize);
            prop_assert_eq!(*value, match row.cmp(&column) {
                std::cmp::Ordering::Less => symmetric(a, b),
                std::cmp::Ordering::Equal => diagonal[a],
                std::cmp::Ordering::Greater => -1.0,
            });
        }

        let first = seed as usize % width;
        let size = (width - first) * width;
        let (mut whole, mut shift) = (vec![-1.0; size], vec![-1.0; size]);
        let args = [to(&mut whole), of(&sums), of(&inverse), number(first)];
        run("whole_rows", (width, width - first), 32, &[&args[..], &sides].concat());
        let args = [to(&mut shift), of(&sums), of(&inverse), of(&cross), number(first)];
        run("shift_rows", (width, width - first), 32, &[&args[..], &sides].concat());
        for i in 0..size {
            let (row, column) = (first + i / width, i % width);
            prop_assert_eq!(whole[i], symmetric(row, column));
            let m = cross[row * width + column] as f64 * inverse[row] * inverse[column];
            prop_assert_eq!(shift[i], m - symmetric(row, column));
        }
        let lanes = 3;
        let values: Vec<f64> = (0..width * lanes).map(|i| i as f64).collect();
        let mut rows = vec![0.0; width * lanes];
        let args = [to(&mut rows), of(&values), of(&order), number(lanes), Arg::U64((width * lanes) as u64)];
        run("select_rows", (width * lanes, 1), 32, &args);
        for (i, value) in rows.into_iter().enumerate() {
            prop_assert_eq!(value, values[order[i / lanes] as usize * lanes + i % lanes]);
        }
    }
}

#[test]
fn what_cannot_be_summed_is_told() {
    let sum = |product: f32, before: i64| {
        let (mut sums, mut bad, one, products) = ([0, before], [0u32], [1.0, 1.0], [0.0, product]);
        let args = [
            to(&mut sums),
            of(&products),
            of(&one),
            of(&one),
            number(1),
            Arg::I64(1),
            to(&mut bad),
        ];
        run("add_rounded", (1, 2), 32, &args);
        bad[0]
    };
    assert_eq!([sum(1.0, 0), sum(2f32.powi(50), 0)], [0, 0]);
    for (product, before) in [
        (f32::NAN, 0),
        (f32::INFINITY, 0),
        (2f32.powi(51), 0),
        (1.0, i64::MAX),
        (-1.0, i64::MIN),
    ] {
        assert_eq!(sum(product, before), 2, "{product} to {before}");
    }
}
