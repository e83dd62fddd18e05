//! Large square matrices, cut into panels of rows: half of a symmetric or triangular one is not stored, and a kernel that
//! goes from panel to panel needs one or two of them at a time, so that the others may lie in scratch files.

use super::gemm::{View, ViewMut, product};
use crate::error::Result;
use crate::memory::{Region, Room, Values, ValuesMut};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Rows of a panel: small enough that little of the diagonal block's other half is computed in vain, large enough that the
/// GEMM runs at full speed (measured: 192 beats 128 and 256 at widths 576 and 1536).
pub const PANEL_ROWS: usize = 192;

/// Panels that are written together: the more, the less often a kernel reads the others from a file.
pub const PANELS_TOGETHER: usize = 4;

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

/// A matrix `[width, width]` in f64, a region a panel. Each guard that is alive keeps a panel resident.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Panels {
    width: usize,
    shape: Shape,
    panels: Vec<Region<f64>>,
}

impl Panels {
    /// A matrix whose panels are these, each row-major.
    ///
    /// # Panics
    /// They do not have the shape's lengths.
    pub fn new(width: usize, shape: Shape, panels: Vec<Region<f64>>) -> Self {
        let lengths = panel_rows(width).map(|rows| rows.len() * shape.columns(&rows, width).len());
        assert!(
            lengths.eq(panels.iter().map(Region::len)),
            "panels of another shape"
        );
        Self { width, shape, panels }
    }

    /// Fills a matrix row by row: `fill` is given a row and the stored part of it, zeros.
    ///
    /// # Errors
    /// `room` has none left.
    pub fn from_rows(
        width: usize,
        shape: Shape,
        room: &Room,
        mut fill: impl FnMut(usize, &mut [f64]),
    ) -> Result<Self> {
        let panels = panel_rows(width).map(|rows| {
            let columns = shape.columns(&rows, width).len();
            let mut region = room.zeros(rows.len() * columns)?;
            let mut values = region.write();
            for (row, values) in rows.zip(values.chunks_exact_mut(columns)) {
                fill(row, values);
            }
            drop(values);
            Ok(region)
        });
        Ok(Self::new(width, shape, panels.collect::<Result<_>>()?))
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
    pub fn panel(&self, panel: usize) -> Values<'_, f64> {
        self.panels[panel].read()
    }

    /// As [`Self::panel`], to be written.
    pub fn panel_mut(&mut self, panel: usize) -> ValuesMut<'_, f64> {
        self.panels[panel].write()
    }

    /// The panels before some that lie together, and those to be written.
    pub(super) fn before_and_at(
        &mut self,
        panels: Range<usize>,
    ) -> (&[Region<f64>], Vec<ValuesMut<'_, f64>>) {
        let (before, from) = self.panels.split_at_mut(panels.start);
        let own = from[..panels.len()].iter_mut();
        (before, own.map(Region::write).collect())
    }

    /// An element of a symmetric matrix, or one that is stored.
    pub fn at(&self, row: usize, column: usize) -> f64 {
        let (row, column) = match self.shape {
            Shape::Upper => (row.min(column), row.max(column)),
            Shape::Lower | Shape::Full => (row, column),
        };
        let (panel, within) = (row / PANEL_ROWS, row % PANEL_ROWS);
        let columns = self.columns(panel);
        self.panel(panel)[within * columns.len() + column - columns.start]
    }

    /// The diagonal.
    pub fn diagonal(&self) -> Vec<f64> {
        (0..self.width).map(|i| self.at(i, i)).collect()
    }

    /// A whole row of a symmetric or full matrix, into `row`.
    ///
    /// # Panics
    /// The matrix is lower triangular, or `row` does not have its width.
    pub fn copy_row(&self, index: usize, row: &mut [f64]) {
        assert!(self.shape != Shape::Lower && row.len() == self.width);
        let (panel, within) = (index / PANEL_ROWS, index % PANEL_ROWS);
        let columns = self.columns(panel);
        let stored = within * columns.len()..(within + 1) * columns.len();
        self.panels[panel].expect(stored.clone());
        row[columns].copy_from_slice(&self.panel(panel)[stored]);
        if self.shape == Shape::Upper {
            for above in 0..panel {
                let (rows, stored) = (self.rows(above), self.columns(above));
                let content = self.panel(above);
                let column = content[index - stored.start..].iter().step_by(stored.len());
                row[rows]
                    .iter_mut()
                    .zip(column)
                    .for_each(|(to, from)| *to = *from);
            }
        }
    }

    /// A symmetric matrix with both of its halves, in `room`. A panel goes as soon as its content is there, so that the peak in memory is
    /// hardly more than the result.
    ///
    /// # Errors
    /// `room` has none left.
    ///
    /// # Panics
    /// The matrix is lower triangular.
    pub fn into_full(mut self, room: &Room) -> Result<Self> {
        assert_ne!(self.shape, Shape::Lower);
        let width = self.width;
        if self.shape == Shape::Full {
            return Ok(self);
        }
        let mut full = Vec::with_capacity(self.count());
        // From the last on: a panel's content is needed by itself and by later ones.
        for first in (0..self.count()).step_by(PANELS_TOGETHER).rev() {
            let together = first..self.count().min(first + PANELS_TOGETHER);
            let regions = together
                .clone()
                .map(|panel| room.zeros(self.rows(panel).len() * width));
            let mut regions: Vec<Region<f64>> = regions.collect::<Result<_>>()?;
            let mut values: Vec<ValuesMut<'_, f64>> = regions.iter_mut().map(Region::write).collect();
            for earlier in 0..together.end {
                if earlier < first {
                    // A piece of each row, of which a file has one here and one there.
                    let (columns, last) = (self.columns(earlier), self.rows(together.end - 1).end);
                    for row in 0..self.rows(earlier).len() {
                        let row = row * columns.len();
                        let piece = self.rows(first).start..last;
                        let piece = row + piece.start - columns.start..row + piece.end - columns.start;
                        self.panels[earlier].expect(piece);
                    }
                }
                let content = self.panel(earlier);
                for (panel, values) in together.clone().zip(&mut values).filter(|(p, _)| *p >= earlier) {
                    self.mirror(&content, earlier, panel, values);
                }
            }
            drop(values);
            full.extend(regions.into_iter().rev());
            self.panels.truncate(first);
        }
        full.reverse();
        Ok(Self::new(width, Shape::Full, full))
    }

    /// What `content`, that of panel `earlier` of an upper matrix, says of the whole rows `values` of `panel`.
    fn mirror(&self, content: &[f64], earlier: usize, panel: usize, values: &mut [f64]) {
        let (above, columns, width) = (self.rows(earlier), self.columns(earlier), self.width);
        if earlier == panel {
            for (to, from) in (values.chunks_exact_mut(width)).zip(content.chunks_exact(columns.len())) {
                to[columns.clone()].copy_from_slice(from);
            }
            return;
        }
        for (row, values) in self.rows(panel).zip(values.chunks_exact_mut(width)) {
            let column = content[row - columns.start..].iter().step_by(columns.len());
            values[above.clone()]
                .iter_mut()
                .zip(column)
                .for_each(|(to, from)| *to = *from);
        }
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
        for panel in 0..self.count() {
            let (rows, columns) = (self.rows(panel), self.columns(panel));
            let content = self.panel(panel);
            let view = View::rows(&content, rows.len(), columns.len(), columns.len());
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
        fn a_symmetric_half_is_the_whole(width in 1usize..1100, rows in 1usize..4, seed in 0u64..1000, scratch in any::<bool>()) {
            let folder = tempfile::tempdir().unwrap();
            let room = match scratch {
                true => Room::Scratch(folder.path().into()),
                false => Room::Memory,
            };
            let value = |i: usize, j: usize| ((i * 31 + j * 31 + i * j + seed as usize) % 97) as f64 - 48.0;
            let half = Panels::from_rows(width, Shape::Upper, &room, |row, values| {
                let first = width - values.len();
                values.iter_mut().enumerate().for_each(|(k, v)| *v = value(row, first + k));
            }).unwrap();
            prop_assert_eq!(half.panels.iter().map(Region::len).sum::<usize>(), Shape::Upper.elements(width));
            let values: Vec<f64> = (0..rows * width).map(|k| value(k, 5)).collect();
            let out = half.symmetric_product(&values);
            let full = half.clone().into_full(&room).unwrap();
            let mut row_of = [vec![0.0; width], vec![0.0; width]];
            let diagonal = half.diagonal();
            for i in 0..width {
                prop_assert_eq!(diagonal[i], value(i, i));
                half.copy_row(i, &mut row_of[0]);
                full.copy_row(i, &mut row_of[1]);
                let expected: Vec<f64> = (0..width).map(|j| value(i, j)).collect();
                prop_assert_eq!(&row_of, &[expected.clone(), expected.clone()]);
                // An element alone brings a panel from its file: a few.
                for j in (i % 41..width).step_by(41) {
                    prop_assert_eq!([full.at(i, j), half.at(i, j)], [expected[j]; 2]);
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
