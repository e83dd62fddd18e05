//! Large matrices where the tensors are: as in [`crate::numerics::panels`], in panels of more rows that lie in one tensor, one after the other.

use super::vector;
use crate::error::Result;
use crate::numerics::panels::{self, Shape};
use candle_core::{DType, Device, Tensor};
use std::ops::Range;

/// Rows of a panel: enough for fast products, few enough for little below the diagonal. Whole panels of an artifact, whose diagonal blocks
/// are kept with both halves.
pub(crate) const PANEL_ROWS: usize = 5 * panels::PANEL_ROWS;

/// The rows of each panel of a matrix.
fn panel_rows(rows: usize) -> impl DoubleEndedIterator<Item = Range<usize>> {
    (0..rows)
        .step_by(PANEL_ROWS)
        .map(move |first| first..rows.min(first + PANEL_ROWS))
}

/// Elements that are stored of a matrix of this width.
pub(crate) fn elements(width: usize, shape: Shape) -> usize {
    panel_rows(width)
        .map(|rows| rows.len() * shape.columns(&rows, width).len())
        .sum()
}

/// A matrix `[rows, width]`.
#[derive(Clone, Debug)]
pub struct Panels {
    rows: usize,
    width: usize,
    shape: Shape,
    /// Panel after panel, each row-major.
    values: Tensor,
}

impl Panels {
    /// Zeros, `[width, width]`; without a shape one row.
    pub(super) fn zeros(width: usize, shape: Option<Shape>, dtype: DType, device: &Device) -> Result<Self> {
        let (rows, count) = match shape {
            None => (1, width),
            Some(shape) => (width, elements(width, shape)),
        };
        Ok(Self {
            rows,
            width,
            shape: shape.unwrap_or(Shape::Full),
            values: Tensor::zeros(count, dtype, device)?,
        })
    }

    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// All that is stored.
    pub(super) fn values(&self) -> &Tensor {
        &self.values
    }

    /// The rows of each panel.
    pub(super) fn panel_rows(&self) -> impl DoubleEndedIterator<Item = Range<usize>> + use<> {
        panel_rows(self.rows)
    }

    /// The columns that the panel with these rows has.
    pub(super) fn columns(&self, rows: &Range<usize>) -> Range<usize> {
        self.shape.columns(rows, self.width)
    }

    /// The panel with these rows: a part of [`Self::values`].
    pub(super) fn panel(&self, rows: &Range<usize>) -> Result<Tensor> {
        let (begin, columns) = (self.offset(rows.start), self.columns(rows).len());
        let panel = self.values.narrow(0, begin, rows.len() * columns)?;
        Ok(panel.reshape((rows.len(), columns))?)
    }

    /// Some rows of one panel, with the columns that it has.
    pub(super) fn rows(&self, rows: &Range<usize>) -> Result<Tensor> {
        let first = rows.start - rows.start % PANEL_ROWS;
        let panel = self.panel(&(first..self.rows.min(first + PANEL_ROWS)))?;
        Ok(panel.narrow(0, rows.start - first, rows.len())?)
    }

    /// Where in [`Self::values`] the diagonal is, u32.
    pub(super) fn diagonal(&self) -> Result<Tensor> {
        let places = self.panel_rows().flat_map(|rows| {
            let (begin, columns) = (self.offset(rows.start), self.columns(&rows));
            let first = begin + rows.start - columns.start;
            (0..rows.len()).map(move |row| (first + row * (columns.len() + 1)) as u32)
        });
        Ok(vector(&places.collect::<Vec<_>>(), &self.values)?)
    }

    /// Where in [`Self::values`] an element is that is stored.
    pub(super) fn place(&self, row: usize, column: usize) -> usize {
        let first = row - row % PANEL_ROWS;
        let columns = self.columns(&(first..self.rows.min(first + PANEL_ROWS)));
        self.offset(first) + (row - first) * columns.len() + column - columns.start
    }

    fn offset(&self, row: usize) -> usize {
        let before = panel_rows(self.rows).take_while(|rows| rows.end <= row);
        before.map(|rows| rows.len() * self.columns(&rows).len()).sum()
    }
}
