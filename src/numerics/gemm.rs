//! A safe face for the `gemm` crate: strided views whose bounds are checked once a product.
//!
//! Products run on the calling thread: parallelism belongs to the dataflow's workers, and a product on one
//! thread gives the same bits whatever the number of workers.

/// Element types of [`product`].
pub trait Real: Copy + PartialEq + 'static {
    /// Additive neutral.
    const ZERO: Self;
    /// Multiplicative neutral.
    const ONE: Self;
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
}

/// A matrix in a slice: element (r, c) is `data[r * row_stride + c * column_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct View<'a, T> {
    data: &'a [T],
    shape: Strided,
}

/// As [`View`], to be written.
#[derive(Debug)]
pub struct ViewMut<'a, T> {
    data: &'a mut [T],
    shape: Strided,
}

#[derive(Clone, Copy, Debug)]
struct Strided {
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl Strided {
    /// Smallest length of a slice that holds every element.
    fn needed(self) -> usize {
        if self.rows == 0 || self.columns == 0 {
            return 0;
        }
        (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride + 1
    }
}

impl<'a, T> View<'a, T> {
    /// Row-major `[rows, columns]` with `row_stride` elements from row to row.
    ///
    /// # Panics
    /// `data` is too short.
    pub fn rows(data: &'a [T], rows: usize, columns: usize, row_stride: usize) -> Self {
        let shape = Strided {
            rows,
            columns,
            row_stride,
            column_stride: 1,
        };
        assert!(data.len() >= shape.needed(), "matrix view out of bounds");
        Self { data, shape }
    }

    /// Columns of the view.
    pub fn columns(self) -> usize {
        self.shape.columns
    }

    /// The transpose.
    pub fn transposed(self) -> Self {
        let s = self.shape;
        Self {
            data: self.data,
            shape: Strided {
                rows: s.columns,
                columns: s.rows,
                row_stride: s.column_stride,
                column_stride: s.row_stride,
            },
        }
    }
}

impl<'a, T> ViewMut<'a, T> {
    /// Row-major `[rows, columns]` with `row_stride` elements from row to row.
    ///
    /// # Panics
    /// `data` is too short, or rows overlap.
    pub fn rows(data: &'a mut [T], rows: usize, columns: usize, row_stride: usize) -> Self {
        let shape = Strided {
            rows,
            columns,
            row_stride,
            column_stride: 1,
        };
        assert!(rows < 2 || row_stride >= columns, "rows of an output overlap");
        assert!(data.len() >= shape.needed(), "matrix view out of bounds");
        Self { data, shape }
    }
}

/// `out = keep * out + scale * lhs · rhs`; with `keep` zero `out` is not read.
///
/// # Panics
/// The shapes do not fit together.
pub fn product<T: Real>(out: ViewMut<'_, T>, keep: T, lhs: View<'_, T>, rhs: View<'_, T>, scale: T) {
    let (o, l, r) = (out.shape, lhs.shape, rhs.shape);
    assert!(
        o.rows == l.rows && o.columns == r.columns && l.columns == r.rows,
        "product of {}x{} and {}x{} into {}x{}",
        l.rows,
        l.columns,
        r.rows,
        r.columns,
        o.rows,
        o.columns
    );
    if o.rows == 0 || o.columns == 0 {
        return;
    }
    // SAFETY: the views were checked to lie within their slices for all rows and columns, the output's rows do not overlap, and
    // the output is borrowed exclusively, so it aliases neither input.
    unsafe {
        gemm::gemm(
            o.rows,
            o.columns,
            l.columns,
            out.data.as_mut_ptr(),
            o.column_stride as isize,
            o.row_stride as isize,
            keep != T::ZERO,
            lhs.data.as_ptr(),
            l.column_stride as isize,
            l.row_stride as isize,
            rhs.data.as_ptr(),
            r.column_stride as isize,
            r.row_stride as isize,
            keep,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
