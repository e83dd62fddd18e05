//! Large square matrices, cut into panels of rows: half of a symmetric or triangular one is not stored, and a kernel that
//! goes from panel to panel needs one or two of them at a time.

use super::gemm::{View, ViewMut, product};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Rows of a panel: small enough that little of the diagonal block's other half is computed in vain, large enough that the
/// GEMM runs at full speed (measured: 192 beats 128 and 256 at widths 576 and 1536).
pub const PANEL_ROWS: usize = 192;

/// Which columns a panel holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Shape {
    /// From its first row's on: a symmetric matrix, the diagonal blocks whole.
    Upper,
    /// Up to its last row's: a lower triangular matrix, the diagonal blocks with their zeros.
    Lower,
    /// All.
    Full,
}

impl Shape {
    /// The columns of a panel with these rows.
    pub fn columns(self, rows: &Range<usize>, width: usize) -> Range<usize> {
        match self {
            Self::Upper => rows.start..width,
            Self::Lower => 0..rows.end,
            Self::Full => 0..width,
        }
    }

    /// Elements that are stored of a matrix of this width.
    pub fn elements(self, width: usize) -> usize {
        panel_rows(width)
            .map(|rows| rows.len() * self.columns(&rows, width).len())
            .sum()
    }
}

/// The rows of each panel.
pub fn panel_rows(width: usize) -> impl Iterator<Item = Range<usize>> {
    (0..width)
        .step_by(PANEL_ROWS)
        .map(move |first| first..width.min(first + PANEL_ROWS))
}

/// A matrix `[width, width]` in f64.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Panels {
    width: usize,
    shape: Shape,
    panels: Vec<Vec<f64>>,
}

impl Panels {
    /// A matrix whose panels are these, each row-major.
    ///
    /// # Panics
    /// They do not have the shape's lengths.
    pub fn new(width: usize, shape: Shape, panels: Vec<Vec<f64>>) -> Self {
        let lengths = panel_rows(width).map(|rows| rows.len() * shape.columns(&rows, width).len());
        assert!(lengths.eq(panels.iter().map(Vec::len)), "panels of another shape");
        Self { width, shape, panels }
    }

    /// Fills a matrix by row and column.
    pub fn from_fn(width: usize, shape: Shape, value: impl Fn(usize, usize) -> f64) -> Self {
        let panel = |rows: Range<usize>| {
            let columns = shape.columns(&rows, width);
            // Grown step by step, it would leave holes behind.
            let mut values = Vec::with_capacity(rows.len() * columns.len());
            for row in rows {
                values.extend(columns.clone().map(|column| value(row, column)));
            }
            values
        };
        Self::new(width, shape, panel_rows(width).map(panel).collect())
    }

    /// Rows and columns.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Number of panels.
    pub fn count(&self) -> usize {
        self.panels.len()
    }

    /// Rows of a panel.
    pub fn rows(&self, panel: usize) -> Range<usize> {
        panel * PANEL_ROWS..self.width.min((panel + 1) * PANEL_ROWS)
    }

    /// Columns of a panel.
    pub fn columns(&self, panel: usize) -> Range<usize> {
        self.shape.columns(&self.rows(panel), self.width)
    }

    /// A panel, row-major over its columns.
    pub fn panel(&self, panel: usize) -> &[f64] {
        &self.panels[panel]
    }

    /// As [`Self::panel`], to be written.
    pub fn panel_mut(&mut self, panel: usize) -> &mut [f64] {
        &mut self.panels[panel]
    }

    /// The panels before one, and that one to be written.
    pub(super) fn before_and_at(&mut self, panel: usize) -> (&[Vec<f64>], &mut [f64]) {
        let (before, from) = self.panels.split_at_mut(panel);
        (before, &mut from[0])
    }

    /// An element of a symmetric matrix, or one that is stored.
    pub fn at(&self, row: usize, column: usize) -> f64 {
        let (row, column) = match self.shape {
            Shape::Upper => (row.min(column), row.max(column)),
            Shape::Lower | Shape::Full => (row, column),
        };
        let (panel, within) = (row / PANEL_ROWS, row % PANEL_ROWS);
        let columns = self.columns(panel);
        self.panels[panel][within * columns.len() + column - columns.start]
    }

    /// The diagonal.
    pub fn diagonal(&self) -> Vec<f64> {
        (0..self.width).map(|i| self.at(i, i)).collect()
    }

    /// The whole matrix, row-major; a symmetric one on both sides.
    pub fn to_square(&self) -> Vec<f64> {
        let width = self.width;
        let mut square = vec![0.0; width * width];
        for panel in 0..self.count() {
            let columns = self.columns(panel);
            for (row, values) in self
                .rows(panel)
                .zip(self.panels[panel].chunks_exact(columns.len()))
            {
                square[row * width..][columns.clone()].copy_from_slice(values);
                if self.shape == Shape::Upper {
                    for (column, &value) in columns.clone().zip(values).skip(row - columns.start) {
                        square[column * width + row] = value;
                    }
                }
            }
        }
        square
    }

    /// `values · self` for `values [rows, width]`, row-major, and a symmetric matrix.
    ///
    /// # Panics
    /// The matrix is not [`Shape::Upper`].
    pub fn symmetric_product(&self, values: &[f64]) -> Vec<f64> {
        assert_eq!(self.shape, Shape::Upper);
        let width = self.width;
        let count = values.len() / width;
        let mut out = vec![0.0; values.len()];
        for (panel, content) in self.panels.iter().enumerate() {
            let (rows, columns) = (self.rows(panel), self.columns(panel));
            let view = View::rows(content, rows.len(), columns.len(), columns.len());
            product(
                ViewMut::rows(&mut out[columns.start..], count, columns.len(), width),
                1.0,
                View::rows(&values[rows.start..], count, rows.len(), width),
                view,
                1.0,
            );
            // The mirror image of what is beyond the diagonal block.
            let beyond = rows.end..width;
            if beyond.is_empty() {
                continue;
            }
            product(
                ViewMut::rows(&mut out[rows.start..], count, rows.len(), width),
                1.0,
                View::rows(&values[beyond.start..], count, beyond.len(), width),
                View::rows(&content[rows.len()..], rows.len(), beyond.len(), columns.len()).transposed(),
                1.0,
            );
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]
        #[test]
        fn a_symmetric_half_is_the_whole(width in 1usize..500, rows in 1usize..4, seed in 0u64..1000) {
            let value = |i: usize, j: usize| ((i * 31 + j * 31 + i * j + seed as usize) % 97) as f64 - 48.0;
            let half = Panels::from_fn(width, Shape::Upper, value);
            let square = half.to_square();
            prop_assert_eq!(half.panels.iter().map(Vec::len).sum::<usize>(), Shape::Upper.elements(width));
            let values: Vec<f64> = (0..rows * width).map(|k| value(k, 5)).collect();
            let out = half.symmetric_product(&values);
            for i in 0..width {
                prop_assert_eq!(half.diagonal()[i], value(i, i));
                for j in 0..width {
                    prop_assert_eq!(square[i * width + j], value(i, j));
                    prop_assert_eq!(half.at(i, j), value(i, j));
                }
                for row in 0..rows {
                    // Whole numbers: the sums are exact.
                    let expected: f64 = (0..width).map(|k| values[row * width + k] * value(k, i)).sum();
                    prop_assert_eq!(out[row * width + i], expected);
                }
            }
        }
    }
}
