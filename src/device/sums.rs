//! A site's exact sums, `XᵀX` and its like as 64-bit integers, where the activations are. They are the integers of
//! [`crate::statistics`]: what a batch adds is rounded in the same way, so that it can be taken away, and they become an artifact's
//! sums and are made of them.

use super::matrix::product;
use super::panels::Panels;
#[cfg(feature = "cuda")]
use super::vector;
use crate::error::{Error, Result};
use crate::memory::Room;
use crate::statistics::{Exponents, Product, SiteStatistics, add_row, add_sums, too_large};
use candle_core::{CpuStorage, DType, Device, InplaceOp2, Layout, Tensor, bail};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, Ordering};

/// A batch's rounded products are below 2^51, so many of them fit into 64 bits.
const MULTIPLICITY_MAX: i64 = 1 << 11;

/// Sums of one site over some batches, i64; products have the shapes of [`Product::shape`].
#[derive(Debug)]
pub struct Sums {
    exponents: Exponents,
    scales: Tensor,
    precision: DType,
    tokens: AtomicI64,
    products: BTreeMap<Product, Panels>,
    /// 1 more than a row that could not be summed, on a device; 0: none.
    bad: Tensor,
}

impl Sums {
    /// Zero sums of these products. Inputs are rounded to `precision`, the dtype in which the linears take them.
    ///
    /// # Errors
    /// The device has no memory left.
    pub fn new(
        exponents: Exponents,
        products: &[Product],
        precision: DType,
        device: &Device,
    ) -> Result<Self> {
        let zeros = |&product: &Product| {
            let panels = Panels::zeros(exponents.width(), product.shape(), DType::I64, device)?;
            Ok((product, panels))
        };
        Ok(Self {
            scales: Tensor::new(exponents.scales(), device)?,
            products: products.iter().map(zeros).collect::<Result<_>>()?,
            bad: Tensor::zeros(1, DType::U32, device)?,
            tokens: AtomicI64::new(0),
            exponents,
            precision,
        })
    }

    /// Sums that were kept.
    ///
    /// # Errors
    /// The device has no memory left.
    pub fn from_statistics(statistics: &SiteStatistics, precision: DType, device: &Device) -> Result<Self> {
        let mut products: Vec<Product> = statistics.panels().iter().map(|panel| panel.product).collect();
        products.dedup();
        let sums = Self::new(statistics.exponents().clone(), &products, precision, device)?;
        sums.tokens.store(statistics.tokens(), Ordering::Relaxed);
        for panel in statistics.panels() {
            let columns = statistics.columns(panel);
            let values = panel.sums.read();
            let rows = values.len() / columns;
            let values = Tensor::from_slice(&values, (rows, columns), device)?;
            let into = sums.products[&panel.product].rows(&(panel.first_row..panel.first_row + rows))?;
            into.slice_set(&values, 1, into.dim(1)? - columns)?;
        }
        Ok(sums)
    }

    /// Channels.
    pub fn width(&self) -> usize {
        self.exponents.width()
    }

    /// Tokens that were added, less those that were taken away.
    pub fn tokens(&self) -> i64 {
        self.tokens.load(Ordering::Relaxed)
    }

    /// The sums of a product, where it is summed.
    pub fn product(&self, product: Product) -> Option<&Panels> {
        self.products.get(&product)
    }

    /// `2^-s_i`, f64: what a sum is multiplied by for its row, and for its column.
    pub(super) fn inverse_scales(&self) -> Result<Tensor> {
        Ok(self.scales.recip()?)
    }

    /// As [`crate::statistics::Accumulator::add`], for `[tokens, width]` tensors.
    ///
    /// # Errors
    /// An input that is not finite or too large; on a device [`Self::check`] tells of it.
    pub fn add(&self, x: &Tensor, original: Option<&Tensor>, multiplicity: i64) -> Result<()> {
        for product in self
            .products
            .keys()
            .filter(|product| **product != Product::HeldOut)
        {
            let left = match (product, original) {
                (Product::Cross, Some(original)) => original,
                (Product::Cross, None) => {
                    return Err(Error::Worker("cross products need the original's input".into()));
                }
                _ => x,
            };
            self.add_to(*product, left, x, multiplicity)?;
        }
        self.tokens
            .fetch_add(x.dim(0)? as i64 * multiplicity, Ordering::Relaxed);
        Ok(())
    }

    /// As [`crate::statistics::Accumulator::add_held_out`].
    ///
    /// # Errors
    /// As [`Self::add`].
    pub fn add_held_out(&self, x: &Tensor, multiplicity: i64) -> Result<()> {
        self.add_to(Product::HeldOut, x, x, multiplicity)
    }

    fn add_to(&self, kind: Product, left: &Tensor, x: &Tensor, multiplicity: i64) -> Result<()> {
        if multiplicity.abs() > MULTIPLICITY_MAX {
            return Err(Error::Worker(format!("a batch counts {multiplicity} times")));
        }
        let Some(sums) = self.products.get(&kind) else {
            return Ok(());
        };
        let rounded = x.to_dtype(self.precision)?;
        if kind == Product::Sum {
            let x = rounded.to_dtype(DType::F32)?.contiguous()?;
            return Ok(sums.values().inplace_op2(
                &x,
                &AddColumns {
                    sums: self,
                    count: multiplicity,
                },
            )?);
        }
        let left = match kind {
            Product::Cross => left.to_dtype(self.precision)?,
            _ => rounded.clone(),
        };
        for rows in sums.panel_rows() {
            let columns = sums.columns(&rows);
            let panel = product(
                &left.narrow(1, rows.start, rows.len())?.t()?,
                &rounded.narrow(1, columns.start, columns.len())?,
            )?;
            let add = AddRounded {
                sums: self,
                first_row: rows.start,
                first_column: columns.start,
                count: multiplicity,
            };
            sums.panel(&rows)?.inplace_op2(&panel, &add)?;
        }
        Ok(())
    }

    /// Whether all inputs could be summed; waits for the device.
    ///
    /// # Errors
    /// One was not finite, or too large for the fixed point.
    pub fn check(&self) -> Result<()> {
        match self.bad.to_vec1::<u32>()?[0] {
            0 => Ok(()),
            _ => Err(too_large("a channel")),
        }
    }

    /// The same sums as an artifact keeps them.
    ///
    /// # Errors
    /// `room` has none left, or the device fails.
    pub fn to_statistics(&self, room: &Room) -> Result<SiteStatistics> {
        let products: Vec<Product> = self.products.keys().copied().collect();
        SiteStatistics::from_panels(
            self.exponents.clone(),
            &products,
            self.tokens(),
            room,
            |product, rows, values| {
                let from = self.products[&product].rows(rows)?;
                let columns = values.len() / rows.len();
                let panel = from.narrow(1, from.dim(1)? - columns, columns)?;
                values.copy_from_slice(&super::values(&panel)?);
                Ok(())
            },
        )
    }
}

/// `sums += count * round(product * scale of the row * scale of the column)`, for a panel of the sums.
struct AddRounded<'a> {
    sums: &'a Sums,
    first_row: usize,
    first_column: usize,
    count: i64,
}

impl InplaceOp2 for AddRounded<'_> {
    fn name(&self) -> &'static str {
        "add_rounded"
    }

    fn cpu_fwd(
        &self,
        s1: &mut CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> candle_core::Result<()> {
        let scales = self.sums.exponents.scales();
        let (CpuStorage::I64(sums), CpuStorage::F32(product)) = (s1, s2) else {
            bail!("add_rounded takes i64 sums and an f32 product");
        };
        let (Some(own), Some(added)) = (l1.contiguous_offsets(), l2.contiguous_offsets()) else {
            bail!("add_rounded takes whole panels");
        };
        let columns = l1.dim(1)?;
        let rows = sums[own.0..own.1].chunks_exact_mut(columns);
        let products = product[added.0..added.1].chunks_exact(columns);
        for (row, (sums, product)) in rows.zip(products).enumerate() {
            let channel = self.first_row + row;
            let scale = self.count.signum() as f64 * scales[channel];
            for _ in 0..self.count.unsigned_abs() {
                if !add_row(sums, product, scale, &scales[self.first_column..][..columns]) {
                    bail!(
                        "the sums of channel {channel} overflow: its activations are not finite, or too large"
                    );
                }
            }
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &mut candle_core::CudaStorage,
        l1: &Layout,
        s2: &candle_core::CudaStorage,
        l2: &Layout,
    ) -> candle_core::Result<()> {
        use super::cuda::{Arg, SUMS, Threads, launch, pointer, pointer_at, u32_arg};
        let (rows, columns) = l1.shape().dims2()?;
        let scales = |first: usize, count: usize| pointer(&self.sums.scales.narrow(0, first, count)?);
        let args = [
            pointer_at(s1, l1)?,
            pointer_at(s2, l2)?,
            scales(self.first_row, rows)?,
            scales(self.first_column, columns)?,
            u32_arg(columns)?,
            Arg::I64(self.count),
            pointer(&self.sums.bad)?,
        ];
        launch(
            &s1.device,
            SUMS,
            "add_rounded",
            Threads::over(columns, rows),
            &args,
        )
    }
}

/// `sums[c] += count * round(Σ_t x[t, c] * 2^(s_c + SUM_BITS))`
struct AddColumns<'a> {
    sums: &'a Sums,
    count: i64,
}

#[cfg(feature = "cuda")]
impl AddColumns<'_> {
    fn scales(&self) -> Vec<f64> {
        let scales = self.sums.exponents.scales().into_iter();
        scales
            .map(|scale| scale * crate::statistics::SUM_BITS.exp2())
            .collect()
    }
}

impl InplaceOp2 for AddColumns<'_> {
    fn name(&self) -> &'static str {
        "add_columns"
    }

    fn cpu_fwd(
        &self,
        s1: &mut CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> candle_core::Result<()> {
        let (CpuStorage::I64(sums), CpuStorage::F32(x), (Some((from, to)), Some((begin, end)))) =
            (s1, s2, (l1.contiguous_offsets(), l2.contiguous_offsets()))
        else {
            bail!("add_columns takes i64 sums and f32 inputs");
        };
        for _ in 0..self.count.unsigned_abs() {
            let sign = self.count.signum() as f64;
            add_sums(
                &mut sums[from..to],
                &x[begin..end],
                &self.sums.exponents.scales(),
                sign,
            )
            .map_err(candle_core::Error::wrap)?;
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &mut candle_core::CudaStorage,
        l1: &Layout,
        s2: &candle_core::CudaStorage,
        l2: &Layout,
    ) -> candle_core::Result<()> {
        use super::cuda::{Arg, SUMS, Threads, launch, pointer, pointer_at, u32_arg};
        let (tokens, columns) = l2.shape().dims2()?;
        let scales = vector(&self.scales(), &self.sums.scales)?;
        let args = [
            pointer_at(s1, l1)?,
            pointer_at(s2, l2)?,
            pointer(&scales)?,
            u32_arg(tokens)?,
            u32_arg(columns)?,
            Arg::I64(self.count),
            pointer(&self.sums.bad)?,
        ];
        launch(&s1.device, SUMS, "add_columns", Threads::over(columns, 1), &args)
    }
}
