//! Matrices within tensors, and their product: f64 in f64, everything else summed in f32, 16-bit values without rounding their products.

use super::operands::Operands;
use super::row_stride;
use crate::numerics::gemm::{ViewMut, product as multiply};
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, InplaceOp1, InplaceOp3, Layout, Result, Shape, Tensor, bail,
};
use std::borrow::Cow;

/// `lhs · rhs` for `[m, k]` and `[k, n]`, or for a batch `[b, ..]` of each. The rows or the columns of each have to be contiguous. The result
/// is f64 for f64, and f32 for f32, bf16 and f16.
///
/// # Errors
/// Shapes or dtypes do not fit.
pub fn product(lhs: &Tensor, rhs: &Tensor) -> Result<Tensor> {
    lhs.apply_op2_no_bwd(rhs, &Product)
}

/// [`product`] of two matrices that is summed in f32, written to `out`, `[m, n]` f32, which may be a part of a tensor.
///
/// # Errors
/// Shapes or dtypes do not fit.
pub fn product_to(out: &Tensor, lhs: &Tensor, rhs: &Tensor) -> Result<()> {
    out.inplace_op3(lhs, rhs, &ProductTo)
}

/// The values of a product's inputs on the CPU, which have one dtype, in that in which it is summed.
fn widened<'a>(lhs: &'a CpuStorage, rhs: &'a CpuStorage) -> Result<[Cow<'a, [f32]>; 2]> {
    Ok(match (lhs, rhs) {
        (CpuStorage::F32(a), CpuStorage::F32(b)) => [a.into(), b.into()],
        (CpuStorage::BF16(a), CpuStorage::BF16(b)) => [a, b].map(|x| x.iter().map(|v| v.to_f32()).collect()),
        (CpuStorage::F16(a), CpuStorage::F16(b)) => [a, b].map(|x| x.iter().map(|v| v.to_f32()).collect()),
        _ => bail!("no product of these dtypes"),
    })
}

struct Product;

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "product"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let operands = Operands::new(l1, l2)?;
        let out = match (s1, s2) {
            (CpuStorage::F64(a), CpuStorage::F64(b)) => CpuStorage::F64(operands.multiply(a, b)),
            (a, b) => {
                let [a, b] = widened(a, b)?;
                CpuStorage::F32(operands.multiply(&a, &b))
            }
        };
        Ok((out, operands.shape(l1)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &candle_core::CudaStorage,
        l1: &Layout,
        s2: &candle_core::CudaStorage,
        l2: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let operands = Operands::new(l1, l2)?;
        let out = super::cuda::product((s1, l1), (s2, l2), operands)?;
        Ok((out, operands.shape(l1)))
    }
}

struct ProductTo;

impl ProductTo {
    fn operands(out: &Layout, lhs: &Layout, rhs: &Layout) -> Result<Operands> {
        let operands = Operands::new(lhs, rhs)?;
        match out.dims() == [operands.rows(), operands.columns()] {
            true => Ok(operands),
            false => bail!("{:?} does not hold this product", out.shape()),
        }
    }
}

impl InplaceOp3 for ProductTo {
    fn name(&self) -> &'static str {
        "product_to"
    }

    fn cpu_fwd(
        &self,
        s1: &mut CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<()> {
        let operands = Self::operands(l1, l2, l3)?;
        let (CpuStorage::F32(out), Some((begin, end))) = (s1, l1.contiguous_offsets()) else {
            bail!("this operation needs contiguous f32 tensors");
        };
        let [lhs, rhs] = widened(s2, s3)?;
        operands.multiply_to(&mut out[begin..end], &lhs, &rhs);
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &mut candle_core::CudaStorage,
        l1: &Layout,
        s2: &candle_core::CudaStorage,
        l2: &Layout,
        s3: &candle_core::CudaStorage,
        l3: &Layout,
    ) -> Result<()> {
        let operands = Self::operands(l1, l2, l3)?;
        super::cuda::product_to((s1, l1), (s2, l2), (s3, l3), operands)
    }
}

/// `out -= lhs · rhs` in f64, where all three are parts of one storage: `out` has whole rows, behind both others.
///
/// # Errors
/// Shapes, dtypes or places do not fit.
pub(super) fn subtract_product(out: &Tensor, lhs: &Tensor, rhs: &Tensor) -> Result<()> {
    let operands = Operands::new(lhs.layout(), rhs.layout())?;
    if out.dims2()? != (operands.rows(), operands.columns()) {
        bail!(
            "no difference of {:?} and a product of another shape",
            out.shape()
        );
    }
    out.inplace_op1(&SubtractProduct(operands))
}

struct SubtractProduct(Operands);

impl InplaceOp1 for SubtractProduct {
    fn name(&self) -> &'static str {
        "subtract_product"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let Operands { lhs, rhs, .. } = self.0;
        let (CpuStorage::F64(values), Some((begin, end))) = (storage, layout.contiguous_offsets()) else {
            bail!("subtract_product takes f64 matrices");
        };
        let (before, out) = values[..end].split_at_mut(begin);
        let (rows, columns) = (self.0.rows(), self.0.columns());
        multiply(
            ViewMut::rows(out, rows, columns, columns),
            1.0,
            lhs.view(before, 0),
            rhs.view(before, 0),
            -1.0,
        );
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut candle_core::CudaStorage, layout: &Layout) -> Result<()> {
        super::cuda::subtract_product(storage, layout, self.0)
    }
}

/// The rows `indices`, u32, of an f64 matrix `[rows, lanes]`. candle has it for other dtypes.
///
/// # Errors
/// Shapes or dtypes do not fit.
pub(super) fn select_rows(matrix: &Tensor, indices: &Tensor) -> Result<Tensor> {
    matrix.apply_op1_no_bwd(&SelectRows(indices))
}

struct SelectRows<'a>(&'a Tensor);

impl CustomOp1 for SelectRows<'_> {
    fn name(&self) -> &'static str {
        "select_rows"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, lanes) = layout.shape().dims2()?;
        let indices = self.0.to_vec1::<u32>()?;
        let (CpuStorage::F64(values), Some((begin, end))) = (storage, layout.contiguous_offsets()) else {
            bail!("select_rows takes a contiguous f64 matrix");
        };
        let rows: Vec<&[f64]> = values[begin..end].chunks_exact(lanes).collect();
        let selected = indices.iter().flat_map(|&index| rows[index as usize]).copied();
        Ok((CpuStorage::F64(selected.collect()), (indices.len(), lanes).into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        storage: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        use super::cuda::{Arg, MATRICES, Threads, launch, pointer, pointer_at, u32_arg, wrapped};
        let ((_, lanes), rows) = (layout.shape().dims2()?, self.0.elem_count());
        let count = rows * lanes;
        let out = wrapped::<f64>(&storage.device, count)?;
        let args = [
            pointer_at(&out, &Layout::contiguous(count))?,
            pointer_at(storage, layout)?,
            pointer(self.0)?,
            u32_arg(lanes)?,
            Arg::U64(count as u64),
        ];
        launch(
            &storage.device,
            MATRICES,
            "select_rows",
            Threads::over(count, 1),
            &args,
        )?;
        Ok((out, (rows, lanes).into()))
    }
}

/// The values of an f64 matrix on the CPU, to be written.
pub(super) fn matrix_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f64]> {
    let stride = row_stride(layout)?;
    let (rows, columns) = layout.shape().dims2()?;
    match storage {
        CpuStorage::F64(values) if stride == columns => {
            Ok(&mut values[layout.start_offset()..][..rows * columns])
        }
        _ => bail!("this operation needs a contiguous f64 matrix"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        /// Parts of matrices, transposed or not, one or a batch, in each dtype: whole numbers, so that every sum is exact.
        #[test]
        fn matches_the_definition(
            m in 1usize..9, k in 1usize..9, n in 1usize..9, b in 1usize..4, turned in any::<[bool; 2]>(), batched in any::<bool>(),
            dtype in prop::sample::select(vec![DType::F64, DType::F32, DType::BF16, DType::F16]),
        ) {
            let tensor = |rows: usize, columns: usize, turned: bool, seed: usize| {
                let (r, c) = if turned { (columns, rows) } else { (rows, columns) };
                let values: Vec<f64> = (0..b * (r + 2) * (c + 3)).map(|i| ((i * 7 + seed * 5) % 11) as f64 - 5.0).collect();
                let whole = Tensor::from_vec(values, (b, r + 2, c + 3), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
                let part = whole.narrow(1, 1, r).unwrap().narrow(2, 2, c).unwrap();
                let part = if turned { part.transpose(1, 2).unwrap() } else { part };
                if batched { part } else { part.get(0).unwrap() }
            };
            let (lhs, rhs) = (tensor(m, k, turned[0], 1), tensor(k, n, turned[1], 2));
            let out = product(&lhs, &rhs).unwrap();
            prop_assert_eq!(out.dtype(), if dtype == DType::F64 { DType::F64 } else { DType::F32 });
            let of = |t: &Tensor| t.to_dtype(DType::F64).unwrap().contiguous().unwrap();
            let expected = of(&lhs).matmul(&of(&rhs)).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
            prop_assert_eq!(of(&out).flatten_all().unwrap().to_vec1::<f64>().unwrap(), expected);
            if matches!(dtype, DType::BF16 | DType::F16) {
                prop_assert!(product(&lhs, &rhs.to_dtype(DType::F32).unwrap()).is_err());
            }
            if !batched {
                // Into the middle of a tensor, and nothing else of it.
                let into = Tensor::full(7f64, (m + 2, n), &Device::Cpu).unwrap().to_dtype(out.dtype()).unwrap();
                if dtype != DType::F64 {
                    product_to(&into.narrow(0, 1, m).unwrap(), &lhs, &rhs).unwrap();
                    prop_assert_eq!(of(&into.narrow(0, 1, m).unwrap()).to_vec2::<f64>().unwrap(), of(&out).to_vec2::<f64>().unwrap());
                    for row in [0, m + 1] {
                        prop_assert_eq!(of(&into).get(row).unwrap().to_vec1::<f64>().unwrap(), vec![7.0; n]);
                    }
                }
                prop_assert!(product_to(&into, &lhs, &rhs).is_err());
            }
        }

        /// As the factorization has it: two parts of a matrix, one turned, and a matrix behind it.
        #[test]
        fn a_product_is_subtracted_in_place(m in 1usize..9, k in 1usize..9, n in 1usize..9) {
            let values: Vec<f64> = (0..k * (m + n) + m * n).map(|i| ((i * 7) % 11) as f64 - 5.0).collect();
            let whole = Tensor::from_vec(values, k * (m + n) + m * n, &Device::Cpu).unwrap();
            let both = whole.narrow(0, 0, k * (m + n)).unwrap().reshape((k, m + n)).unwrap();
            let (lhs, rhs) = (both.narrow(1, 0, m).unwrap().t().unwrap(), both.narrow(1, m, n).unwrap());
            let out = whole.narrow(0, k * (m + n), m * n).unwrap().reshape((m, n)).unwrap();
            let expected = (&out - product(&lhs, &rhs).unwrap()).unwrap().to_vec2::<f64>().unwrap();
            let before = both.to_vec2::<f64>().unwrap();
            subtract_product(&out, &lhs, &rhs).unwrap();
            prop_assert_eq!(out.to_vec2::<f64>().unwrap(), expected);
            prop_assert_eq!(both.to_vec2::<f64>().unwrap(), before);
            prop_assert!(subtract_product(&out, &rhs.t().unwrap(), &rhs).is_err() || m == n);
        }
    }
}
