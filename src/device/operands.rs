//! Where matrices lie within tensors, and the sides of their products.

use crate::numerics::gemm::{Real, View, ViewMut, product as multiply};
use candle_core::{Layout, Result, Shape, bail};

/// Where a matrix lies in a storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Matrix {
    pub(crate) offset: usize,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    row_stride: usize,
    column_stride: usize,
    pub(crate) batch_stride: usize,
}

impl Matrix {
    fn new(layout: &Layout) -> Result<(usize, Self)> {
        let (dims, stride) = (layout.dims(), layout.stride());
        let (batch, batch_stride, at) = match dims.len() {
            2 => (1, 0, 0),
            3 => (dims[0], stride[0], 1),
            other => bail!("a product of tensors with {other} dimensions"),
        };
        let matrix = Self {
            offset: layout.start_offset(),
            rows: dims[at],
            columns: dims[at + 1],
            row_stride: stride[at],
            column_stride: stride[at + 1],
            batch_stride,
        };
        if !matrix.is_transposed() || matrix.row_stride == 1 || matrix.rows < 2 {
            return Ok((batch, matrix));
        }
        bail!("neither rows nor columns of {layout:?} are contiguous")
    }

    /// Its columns are contiguous, not its rows.
    pub(crate) fn is_transposed(self) -> bool {
        self.column_stride != 1 && self.columns > 1
    }

    /// Elements from one contiguous row, or column, to the next.
    pub(crate) fn leading(self) -> usize {
        match self.is_transposed() {
            true => self.column_stride.max(self.rows),
            false => self.row_stride.max(self.columns),
        }
    }

    pub(super) fn view<T>(self, data: &[T], batch: usize) -> View<'_, T> {
        let data = &data[self.offset + batch * self.batch_stride..];
        match self.is_transposed() {
            true => View::rows(data, self.columns, self.rows, self.leading()).transposed(),
            false => View::rows(data, self.rows, self.columns, self.leading()),
        }
    }
}

/// The sides of a product.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operands {
    pub(crate) batch: usize,
    pub(crate) lhs: Matrix,
    pub(crate) rhs: Matrix,
}

impl Operands {
    pub(super) fn new(lhs: &Layout, rhs: &Layout) -> Result<Self> {
        let ((batch, a), (batches, b)) = (Matrix::new(lhs)?, Matrix::new(rhs)?);
        if batch != batches || a.columns != b.rows || lhs.dims().len() != rhs.dims().len() {
            bail!("no product of {:?} and {:?}", lhs.shape(), rhs.shape());
        }
        Ok(Self {
            batch,
            lhs: a,
            rhs: b,
        })
    }

    pub(crate) fn rows(self) -> usize {
        self.lhs.rows
    }

    pub(crate) fn columns(self) -> usize {
        self.rhs.columns
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn inner(self) -> usize {
        self.lhs.columns
    }

    pub(super) fn shape(self, layout: &Layout) -> Shape {
        match layout.dims().len() {
            2 => (self.rows(), self.columns()).into(),
            _ => (self.batch, self.rows(), self.columns()).into(),
        }
    }

    pub(super) fn multiply<T: Real>(self, lhs: &[T], rhs: &[T]) -> Vec<T> {
        let mut out = vec![T::ZERO; self.batch * self.rows() * self.columns()];
        self.multiply_to(&mut out, lhs, rhs);
        out
    }

    pub(super) fn multiply_to<T: Real>(self, out: &mut [T], lhs: &[T], rhs: &[T]) {
        let (rows, columns) = (self.rows(), self.columns());
        if out.is_empty() {
            return;
        }
        for (batch, out) in out.chunks_exact_mut(rows * columns).enumerate() {
            let (lhs, rhs) = (self.lhs.view(lhs, batch), self.rhs.view(rhs, batch));
            multiply(
                ViewMut::rows(out, rows, columns, columns),
                T::ZERO,
                lhs,
                rhs,
                T::ONE,
            );
        }
    }
}
