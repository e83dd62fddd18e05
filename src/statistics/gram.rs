//! `XᵀX`, `X̃ᵀX` and `Σx` of a site as 64-bit integers, in panels of rows.

use super::Exponents;
use crate::error::{Error, Result};
use crate::memory::{Region, Room};
use crate::numerics::gemm::{View, ViewMut, product};
use crate::numerics::panels::{PANEL_ROWS, Panels, Shape, panel_rows};
use crate::numerics::simd::vectorized;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::Mutex;

/// Adding 1.5 · 2^52 to an f64 below 2^51 leaves its rounded integer in the low bits of the sum.
const ROUND: f64 = 6_755_399_441_055_744.0;
/// Largest scaled product of one batch.
const BATCH_SUM_MAX: f64 = (1u64 << 51) as f64;

/// A sum `Σ x_j` has the scale `2^(s_j + SUM_BITS)`: a token then adds about 2^22, as to a product's diagonal.
pub(crate) const SUM_BITS: f64 = 11.0;

/// Which product a panel belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Product {
    /// `XᵀX`: symmetric, so a panel holds the columns from its first row on.
    Gram,
    /// `X̃ᵀX`, X̃ the same input in the original model: panels hold all columns.
    Cross,
    /// `Σx`: one row.
    Sum,
    /// As [`Product::Gram`], over the batches that are kept apart to measure on.
    HeldOut,
}

/// Rows `first_row..` of a product.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Panel {
    /// The product.
    pub product: Product,
    /// First row.
    pub first_row: usize,
    /// `[rows, columns]`, row-major; columns begin at `first_row` for the symmetric ones, else at 0.
    pub sums: Region<i64>,
}

impl Product {
    /// Shape of its panels; `None` for [`Product::Sum`], which has one row.
    pub fn shape(self) -> Option<Shape> {
        match self {
            Self::Gram | Self::HeldOut => Some(Shape::Upper),
            Self::Cross => Some(Shape::Full),
            Self::Sum => None,
        }
    }

    /// Rows and columns of its panels at a site with `width` channels.
    pub fn panels(self, width: usize) -> Vec<(Range<usize>, Range<usize>)> {
        match self.shape() {
            None => vec![(0..1, 0..width)],
            Some(shape) => panel_rows(width)
                .map(|rows| (rows.clone(), shape.columns(&rows, width)))
                .collect(),
        }
    }
}

/// The statistics of one site over some batches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SiteStatistics {
    exponents: Exponents,
    tokens: i64,
    panels: Vec<Panel>,
}

/// The products of a site in f64.
#[derive(Clone, Debug)]
pub struct SiteProducts {
    /// XᵀX, upper panels.
    pub gram: Option<Panels>,
    /// X̃ᵀX, full panels.
    pub cross: Option<Panels>,
    /// As `gram`, over the batches that are kept apart.
    pub held_out: Option<Panels>,
}

/// Sums that the workers of a process add to at the same time. They are exact, so no order matters.
#[derive(Debug)]
pub struct Accumulator {
    exponents: Exponents,
    tokens: Mutex<i64>,
    panels: Vec<(Product, usize, Mutex<Region<i64>>)>,
}

impl SiteStatistics {
    /// Zero sums of these products, in `room`.
    ///
    /// # Errors
    /// `room` has none left.
    pub fn new(exponents: Exponents, products: &[Product], room: &Room) -> Result<Self> {
        Self::from_panels(exponents, products, 0, room, |_, _, _| Ok(()))
    }

    /// Sums that were kept: `fill` is given each panel's product, rows and place.
    ///
    /// # Errors
    /// Those of `fill`; `room` has none left.
    pub fn from_panels(
        exponents: Exponents,
        products: &[Product],
        tokens: i64,
        room: &Room,
        mut fill: impl FnMut(Product, &Range<usize>, &mut [i64]) -> Result<()>,
    ) -> Result<Self> {
        let width = exponents.width();
        let mut panels = Vec::new();
        for &product in products {
            for (rows, columns) in product.panels(width) {
                let mut sums = room.zeros(rows.len() * columns.len())?;
                fill(product, &rows, &mut sums.write())?;
                panels.push(Panel {
                    product,
                    first_row: rows.start,
                    sums,
                });
            }
        }
        Ok(Self {
            panels,
            exponents,
            tokens,
        })
    }

    /// Channels.
    pub fn width(&self) -> usize {
        self.exponents.width()
    }

    /// Tokens that were added, less those that were taken away.
    pub fn tokens(&self) -> i64 {
        self.tokens
    }

    /// The sums, a product after the other, by first row.
    pub fn panels(&self) -> &[Panel] {
        &self.panels
    }

    /// Columns of one of these panels.
    pub fn columns(&self, panel: &Panel) -> usize {
        self.width() - first_column(panel.product, panel.first_row)
    }

    /// The exponents.
    pub fn exponents(&self) -> &Exponents {
        &self.exponents
    }

    /// Adds another's sums.
    ///
    /// # Errors
    /// A sum leaves 64 bits; exponents or panels differ.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        if self.exponents != other.exponents {
            return Err(Error::invalid(
                "statistics",
                "the fixed-point exponents differ: the probe gave other activations",
                "these sums are of another model, or of a machine whose kernels round otherwise",
            ));
        }
        let place = |panel: &Panel| (panel.product, panel.first_row, panel.sums.len());
        for (own, panel) in self.panels.iter_mut().zip(&other.panels) {
            if place(own) != place(panel) {
                return Err(misfit(panel.first_row));
            }
            for (sum, &more) in own.sums.write().iter_mut().zip(&*panel.sums.read()) {
                *sum = sum.checked_add(more).ok_or_else(|| overflow(panel.first_row))?;
            }
        }
        self.tokens += other.tokens;
        Ok(())
    }

    /// The products in f64, in the place of the sums; [`Product::Sum`] is dropped.
    pub fn into_products(self) -> SiteProducts {
        let width = self.width();
        let inverse: Vec<f64> = self.exponents.scales().iter().map(|s| s.recip()).collect();
        let mut products = std::collections::BTreeMap::<Product, Vec<Region<f64>>>::new();
        for panel in self.panels {
            let Some(shape) = panel.product.shape() else {
                continue;
            };
            let (product, first_row) = (panel.product, panel.first_row);
            let values = to_f64(panel, &inverse, shape == Shape::Upper);
            let panels = products.entry(product).or_default();
            debug_assert_eq!(panels.len(), first_row / PANEL_ROWS);
            panels.push(values);
        }
        let mut take = |product: Product| {
            let panels = products.remove(&product)?;
            Some(Panels::new(width, product.shape()?, panels))
        };
        SiteProducts {
            gram: take(Product::Gram),
            cross: take(Product::Cross),
            held_out: take(Product::HeldOut),
        }
    }
}

/// A panel in f64, in the same place; `mirrored`: the upper half of its diagonal block counts for both.
fn to_f64(panel: Panel, inverse: &[f64], mirrored: bool) -> Region<f64> {
    let begin = first_column(panel.product, panel.first_row);
    let columns = inverse.len() - begin;
    let mut region = panel.sums;
    let mut sums = region.write();
    let rows = sums.len() / columns;
    for (row, sums) in sums.chunks_exact_mut(columns).enumerate() {
        let scale = inverse[panel.first_row + row];
        for (sum, other) in sums.iter_mut().zip(&inverse[begin..]) {
            *sum = (*sum as f64 * scale * other).to_bits() as i64;
        }
    }
    if mirrored {
        for row in 1..rows {
            for column in 0..row {
                sums[row * columns + column] = sums[column * columns + row];
            }
        }
    }
    drop(sums);
    region.cast()
}

impl From<SiteStatistics> for Accumulator {
    fn from(sums: SiteStatistics) -> Self {
        Self {
            exponents: sums.exponents,
            tokens: Mutex::new(sums.tokens),
            panels: (sums.panels.into_iter())
                .map(|panel| (panel.product, panel.first_row, Mutex::new(panel.sums)))
                .collect(),
        }
    }
}

impl Accumulator {
    /// Adds a batch `multiplicity` times (below zero: takes it away): `x` and, where cross products are kept, the original model's
    /// `original`, both `[tokens, width]`. The same batch has the same rounded products, so what is taken away leaves no trace.
    ///
    /// # Errors
    /// An input that is not finite or too large for the fixed point, by channel. The sums are then unusable.
    ///
    /// # Panics
    /// The slices have different lengths, or `original` is missing or superfluous.
    pub fn add(&self, x: &[f32], original: Option<&[f32]>, multiplicity: i64) -> Result<()> {
        self.add_to(|product| product != Product::HeldOut, x, original, multiplicity)?;
        *self.tokens.lock().map_err(|_| poisoned())? +=
            (x.len() / self.exponents.width()) as i64 * multiplicity;
        Ok(())
    }

    /// As [`Self::add`], to [`Product::HeldOut`] alone.
    ///
    /// # Errors
    /// As [`Self::add`].
    pub fn add_held_out(&self, x: &[f32], multiplicity: i64) -> Result<()> {
        self.add_to(|product| product == Product::HeldOut, x, None, multiplicity)
    }

    fn add_to(
        &self,
        wanted: impl Fn(Product) -> bool,
        x: &[f32],
        original: Option<&[f32]>,
        multiplicity: i64,
    ) -> Result<()> {
        let width = self.exponents.width();
        let tokens = x.len() / width;
        let scales = self.exponents.scales();
        let sign = multiplicity.signum() as f64;
        let mut buffer = vec![0f32; PANEL_ROWS.min(width) * width];
        for &(kind, first, ref sums) in self.panels.iter().filter(|panel| wanted(panel.0)) {
            let lock = || sums.lock().map_err(|_| poisoned());
            let left = match kind {
                Product::Sum => {
                    let mut sums = lock()?;
                    for _ in 0..multiplicity.unsigned_abs() {
                        add_sums(&mut sums.write(), x, &scales, sign)?;
                    }
                    continue;
                }
                Product::Gram | Product::HeldOut => x,
                Product::Cross => original.expect("cross products need the original's input"),
            };
            assert_eq!(left.len(), x.len());
            let column = first_column(kind, first);
            let rows = PANEL_ROWS.min(width - first);
            let columns = width - column;
            product(
                ViewMut::rows(&mut buffer, rows, columns, columns),
                0.0,
                View::rows(&left[first..], tokens, rows, width).transposed(),
                View::rows(&x[column..], tokens, columns, width),
                1.0,
            );
            // Only the addition needs the panel for itself.
            let mut sums = lock()?;
            let mut sums = sums.write();
            for row in 0..rows {
                let sums = &mut sums[row * columns..][..columns];
                let products = &buffer[row * columns..][..columns];
                for _ in 0..multiplicity.unsigned_abs() {
                    if !add_row(sums, products, sign * scales[first + row], &scales[column..]) {
                        return Err(overflow(first + row));
                    }
                }
            }
        }
        Ok(())
    }

    /// The sums.
    ///
    /// # Errors
    /// A worker panicked while it added.
    pub fn finish(self) -> Result<SiteStatistics> {
        let panels = self.panels.into_iter();
        Ok(SiteStatistics {
            exponents: self.exponents,
            tokens: self.tokens.into_inner().map_err(|_| poisoned())?,
            panels: panels
                .map(|(product, first_row, sums)| {
                    Ok(Panel {
                        product,
                        first_row,
                        sums: sums.into_inner().map_err(|_| poisoned())?,
                    })
                })
                .collect::<Result<_>>()?,
        })
    }
}

fn first_column(product: Product, first_row: usize) -> usize {
    match product.shape() {
        Some(Shape::Upper) => first_row,
        _ => 0,
    }
}

fn poisoned() -> Error {
    Error::Worker("a worker stopped while it added to the sums".into())
}

fn misfit(first_row: usize) -> Error {
    Error::invalid(
        "statistics",
        format!("have no panel of this shape at row {first_row}"),
        "the parts are of different sites",
    )
}

fn overflow(channel: usize) -> Error {
    too_large(format!("channel {channel}"))
}

/// `what` cannot be summed.
pub(crate) fn too_large(what: impl Into<String>) -> Error {
    Error::invalid(
        what,
        "its activations are not finite, or too large for the fixed-point sums",
        "check that the checkpoint gives finite logits; an outlier of more than 8,000 times the probe's energy in every token is not supported",
    )
}

/// `sums[j] += sign * round(Σ_t x[t, j] * 2^(s_j + SUM_BITS))`
pub(crate) fn add_sums(sums: &mut [i64], x: &[f32], scales: &[f64], sign: f64) -> Result<()> {
    let mut totals = vec![0f64; scales.len()];
    for row in x.chunks_exact(scales.len()) {
        totals
            .iter_mut()
            .zip(row)
            .for_each(|(total, &v)| *total += f64::from(v));
    }
    for (channel, (sum, (total, scale))) in sums.iter_mut().zip(totals.iter().zip(scales)).enumerate() {
        let value = total * scale * SUM_BITS.exp2();
        let rounded = (value.abs() < BATCH_SUM_MAX).then(|| (sign * value).round_ties_even() as i64);
        *sum = rounded
            .and_then(|rounded| sum.checked_add(rounded))
            .ok_or_else(|| overflow(channel))?;
    }
    Ok(())
}

/// `sums[j] += round(products[j] · row_scale · scales[j])`; false if a value was not finite, too large, or a sum overflowed.
pub(crate) fn add_row(sums: &mut [i64], products: &[f32], row_scale: f64, scales: &[f64]) -> bool {
    assert!(sums.len() == products.len() && sums.len() == scales.len());
    vectorized!({
        let mut bad = 0i64;
        for ((sum, &p), &scale) in sums.iter_mut().zip(products).zip(scales) {
            let value = f64::from(p) * (row_scale * scale);
            // What is not below the limit is too large, NaN included.
            let fits = value.abs() < BATCH_SUM_MAX;
            bad |= i64::from(fits) - 1;
            let rounded = ((value + ROUND).to_bits() as i64).wrapping_sub(ROUND.to_bits() as i64);
            let next = sum.wrapping_add(rounded);
            // Overflow: both operands have the sign that the result has not.
            bad |= ((*sum ^ next) & (rounded ^ next)) >> 63;
            *sum = next;
        }
        bad == 0
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PRODUCTS: [Product; 3] = [Product::Gram, Product::Cross, Product::Sum];

    fn random(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_add(1);
        (0..n)
            .map(|i| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * (1.0 + (i % 7) as f32)
            })
            .collect()
    }

    type Batch = (Vec<f32>, Vec<f32>);

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn sums_are_the_f64_sums_and_merge_in_any_order(width in 1usize..420, tokens in 1usize..40, seed in 0u64..1000) {
            let batches: Vec<_> = (0..3).map(|b| (random(tokens * width, seed * 7 + b), random(tokens * width, seed * 11 + b + 99))).collect();
            let exponents = Exponents::from_probe(&random(64 * width, 5), width);
            let folder = tempfile::tempdir().unwrap();
            let scratch = Room::Scratch(folder.path().into());
            let sum = |parts: &[&[usize]], room: &Room| {
                let mut total = SiteStatistics::new(exponents.clone(), &PRODUCTS, room).unwrap();
                for part in parts {
                    let own = Accumulator::from(SiteStatistics::new(exponents.clone(), &PRODUCTS, room).unwrap());
                    std::thread::scope(|scope| {
                        for &b in *part {
                            let (own, batch) = (&own, &batches[b]);
                            scope.spawn(move || own.add(&batch.0, Some(&batch.1), 1).unwrap());
                        }
                    });
                    total.merge(&own.finish().unwrap()).unwrap();
                }
                total
            };
            let one = sum(&[&[0, 1, 2]], &Room::Memory);
            prop_assert_eq!(&one, &sum(&[&[2], &[0, 1]], &scratch));
            prop_assert_eq!(&one, &sum(&[&[1], &[2], &[0]], &Room::Memory));
            prop_assert_eq!(one.tokens(), 3 * tokens as i64);
            // Twice added and once taken away is once added.
            let twice = Accumulator::from(one.clone());
            for multiplicity in [2, -2] {
                twice.add(&batches[1].0, Some(&batches[1].1), multiplicity).unwrap();
            }
            prop_assert_eq!(&twice.finish().unwrap(), &one);
            let scales = one.exponents.scales();
            let sums = one.panels.last().unwrap().sums.read().to_vec();
            for j in 0..width {
                let expected: f64 = batches.iter().flat_map(|b| b.0[j..].iter().step_by(width)).map(|&v| f64::from(v)).sum();
                prop_assert!((sums[j] as f64 / scales[j] / 2048.0 - expected).abs() < 1e-3);
            }
            let products = one.into_products();
            let (gram, cross) = (products.gram.unwrap(), products.cross.unwrap());
            for i in 0..width {
                for j in 0..width {
                    let dot = |left: fn(&Batch) -> &Vec<f32>| -> f64 {
                        batches.iter().map(|b| (0..tokens).map(|t| f64::from(left(b)[t * width + i]) * f64::from(b.0[t * width + j])).sum::<f64>()).sum()
                    };
                    // f32 accumulation over 40 tokens of values up to 7, and half a unit of the fixed point a batch.
                    prop_assert!((gram.at(i, j) - dot(|b| &b.0)).abs() < 1e-3);
                    prop_assert!((cross.at(i, j) - dot(|b| &b.1)).abs() < 1e-3);
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_summed_is_an_error() {
        let exponents = Exponents::from_probe(&[1.0; 8], 2);
        for bad in [f32::NAN, f32::INFINITY, 1e30] {
            let statistics = Accumulator::from(
                SiteStatistics::new(exponents.clone(), &[Product::Gram], &Room::Memory).unwrap(),
            );
            assert!(statistics.add(&[1.0, bad], None, 1).is_err(), "{bad}");
        }
        let mut sums = [i64::MAX - 5];
        assert!(!add_row(&mut sums, &[10.0], 1.0, &[1.0]));
    }
}
