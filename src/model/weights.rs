//! The weights of a checkpoint, however they are stored: plain, among all experts, or quantized. Whoever needs a linear asks here; what is
//! quantized is read as its values (`coded`), and nothing is copied to the disk.

use super::coded::panels;
use super::linear::{Linear, Weight};
use super::sites::{FusedSlice, LinearSpec};
use super::tower::Tower;
use crate::checkpoint::TensorView;
use crate::device;
use crate::error::{Error, Result};
use crate::formats::Stored;
use crate::numerics::{QuantizedWeight, halves};
use bytemuck::allocation::pod_collect_to_vec;
use candle_core::{DType, Device, Tensor};
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};
use safetensors::Dtype;
use std::sync::Arc;

impl Tower {
    /// Shape of a weight, by the name that it has unquantized. Reads headers only.
    ///
    /// # Errors
    /// It is missing, or stored in a way that cannot be read.
    pub(super) fn shape(&self, name: &str) -> Result<Vec<usize>> {
        if let Some(reader) = self.reader_of(name) {
            return reader.shape(name, &|name| self.stored(name));
        }
        let tensor = self.checkpoint.tensor(name)?;
        match float(tensor.dtype) {
            Some(_) => Ok(tensor.shape.to_vec()),
            None => Err(unreadable(name, tensor.dtype)),
        }
    }

    /// Refuses a weight that is missing, unreadable or of another shape. Reads headers only.
    pub(super) fn expect(&self, name: &str, shape: &[usize]) -> Result<()> {
        let found = self.shape(name)?;
        if found == shape {
            return Ok(());
        }
        Err(Error::invalid(
            name,
            format!("has shape {found:?}, config.json asks for {shape:?}"),
            "config.json and weights are of different models",
        ))
    }

    /// Refuses a linear that could not be read. Looks at headers only.
    ///
    /// # Errors
    /// A tensor of it is missing, or has another shape than config.json asks for.
    pub fn expect_linear(&self, block: usize, linear: &LinearSpec) -> Result<()> {
        match (&linear.fused, self.fused_name(block, linear)) {
            (Some(slice), Some(name)) => self.is_input_first(&name, linear, slice).map(drop),
            _ => self.expect(&self.weight_name(block, linear), &[linear.rows, linear.columns]),
        }
    }

    /// `model.layers.3.mlp.up_proj.weight`
    fn weight_name(&self, block: usize, linear: &LinearSpec) -> String {
        format!("{}.weight", self.linear_name(block, linear))
    }

    /// Asks the system to read a linear's pages ahead.
    pub fn prefetch(&self, block: usize, linear: &LinearSpec) {
        let name = self.weight_name(block, linear);
        match self.reader_of(&name) {
            None => self.checkpoint.prefetch(&name),
            Some(reader) => {
                let parts = reader.parts(&name, &|name| self.stored(name));
                parts.iter().for_each(|part| self.checkpoint.prefetch(part));
            }
        }
    }

    /// A weight in f32, by the name that it has unquantized.
    pub fn load(&self, name: &str) -> Result<Tensor> {
        if self.reader_of(name).is_some() {
            let shape = self.shape(name)?;
            let values = self.read(name)?.dequantize(0, 0..shape[0])?;
            self.release(name);
            return Ok(Tensor::from_vec(values, shape, self.device())?);
        }
        let view = self.checkpoint.tensor(name)?;
        let mut values = Vec::with_capacity(view.shape.iter().product());
        self.checkpoint
            .stream(name, |bytes| widen_onto(&mut values, name, view.dtype, bytes))?;
        Ok(Tensor::from_vec(values, view.shape, self.device())?)
    }

    /// The rows of the matrix `name` in f32, from the first to the last, a panel at a time: it is never whole in memory.
    pub(super) fn panels<T>(
        &self,
        name: &str,
        mut use_panel: impl FnMut(&Tensor) -> Result<T>,
    ) -> Result<Vec<T>> {
        let shape = self.shape(name)?;
        let [rows, columns] = shape[..] else {
            return Err(Error::invalid(
                name,
                format!("has shape {shape:?}, not two sides"),
                "",
            ));
        };
        let coded = match self.reader_of(name) {
            Some(_) => Some(self.read(name)?),
            None => None,
        };
        let view = self.checkpoint.get(name);
        let panels = panels(rows, columns).map(|rows| {
            let (height, begin) = (rows.len(), rows.start);
            let panel = match (&coded, view) {
                (Some(stored), _) => {
                    Tensor::from_vec(stored.dequantize(0, rows)?, (height, columns), self.device())?
                }
                (None, Some(view)) => {
                    let row_bytes = view.bytes.len() / shape[0];
                    let bytes = &view.bytes[begin * row_bytes..][..height * row_bytes];
                    let shape = &[height, columns];
                    widen(&TensorView { bytes, shape, ..view }, self.device())?
                }
                (None, None) => return Err(Error::invalid(name, "is missing", "")),
            };
            self.release(name);
            self.checkpoint.release(name);
            use_panel(&panel)
        });
        panels.collect()
    }

    /// The tensor of all experts that holds this linear, by its full name, where there is one and no tensor of the linear's own.
    pub fn fused_name(&self, block: usize, linear: &LinearSpec) -> Option<String> {
        let slice = linear.fused.as_ref()?;
        let own = self.weight_name(block, linear);
        let name = format!("{}{}", self.block_prefix(block), slice.tensor);
        (!self.checkpoint.contains(&own) && self.checkpoint.contains(&name)).then_some(name)
    }

    /// The bias of a linear, if it has one.
    pub fn bias(&self, block: usize, linear: &LinearSpec) -> Result<Option<Tensor>> {
        let name = format!("{}.bias", self.linear_name(block, linear));
        if self.checkpoint.contains(&name) {
            self.expect(&name, &[linear.rows])?;
            return self.load(&name).map(Some);
        }
        let Some(slice) = &linear.fused else {
            return Ok(None);
        };
        let name = format!("{}{}_bias", self.block_prefix(block), slice.tensor);
        if !self.checkpoint.contains(&name) {
            return Ok(None);
        }
        let rows = linear.rows * slice.parts;
        self.expect(&name, &[slice.experts, rows])?;
        let all = self.expert(&name, slice, &[rows, 1])?;
        let own = part(&all, linear.rows, slice)?.flatten_all()?;
        Ok(Some(own.to_dtype(DType::F32)?))
    }

    /// One expert's share of a tensor of all experts, which is `[experts, ..]`, in `shape`: in the dtype that it has, or in f32 where it is
    /// quantized.
    fn expert(&self, name: &str, slice: &FusedSlice, shape: &[usize]) -> Result<Tensor> {
        if self.reader_of(name).is_some() {
            let values = self.read(name)?.dequantize(slice.expert, 0..shape[0])?;
            self.release(name);
            return Ok(Tensor::from_vec(values, shape, self.device())?);
        }
        let all = self.checkpoint.tensor(name)?;
        let bytes = all.bytes.len() / slice.experts;
        let bytes = &all.bytes[slice.expert * bytes..][..bytes];
        let dtype = float(all.dtype).ok_or_else(|| unreadable(name, all.dtype))?;
        let tensor = Tensor::from_raw_buffer(bytes, dtype, shape, self.device())?;
        self.checkpoint.release(name);
        Ok(tensor)
    }

    /// Whether a tensor of all experts is `[experts, in, out]`, not `[experts, out, in]`.
    fn is_input_first(&self, name: &str, linear: &LinearSpec, slice: &FusedSlice) -> Result<bool> {
        let (rows, columns) = (linear.rows * slice.parts, linear.columns);
        let found = self.shape(name)?;
        let layouts = [[slice.experts, columns, rows], [slice.experts, rows, columns]];
        match layouts.map(|shape| found == shape) {
            [true, true] => Ok(slice.layout.input_first),
            [true, false] => Ok(true),
            [false, true] => Ok(false),
            [false, false] => Err(Error::invalid(
                name,
                format!(
                    "has shape {found:?}, config.json asks for {:?} or {:?}",
                    layouts[0], layouts[1]
                ),
                "config.json and weights are of different models",
            )),
        }
    }

    /// A linear out of a tensor of all experts.
    fn fused_linear(&self, name: &str, linear: &LinearSpec, slice: &FusedSlice) -> Result<Tensor> {
        let (rows, columns) = (linear.rows * slice.parts, linear.columns);
        let all = match self.is_input_first(name, linear, slice)? {
            true => self.expert(name, slice, &[columns, rows])?.t()?,
            false => self.expert(name, slice, &[rows, columns])?,
        };
        Ok(part(&all, linear.rows, slice)?)
    }

    /// A weight of its own tensor, as narrow as it is stored.
    pub(super) fn weight(&self, name: &str) -> Result<Weight> {
        let on_device = self.placement().on_device;
        if self.reader_of(name).is_some() && !on_device {
            let weight = match self.read(name)? {
                Stored::Codes(weight) => Weight::Codes(Arc::new(weight)),
                Stored::Floats(floats) => Weight::Floats(Arc::new(floats.into_matrix()?)),
            };
            self.release(name);
            return Ok(weight);
        }
        let view = self.checkpoint.get(name);
        let halves =
            view.and_then(|view| Some((view, float(view.dtype).filter(|dtype| *dtype != DType::F32)?)));
        match halves {
            Some((view, dtype)) if on_device && dtype == self.precision() => {
                let weight = device::transfer::upload(view.bytes, dtype, view.shape, self.device())?;
                self.checkpoint.release(name);
                Ok(Weight::Whole(weight))
            }
            Some((view, dtype)) if !on_device => {
                let mut bits: Vec<u16> = Vec::with_capacity(view.shape.iter().product());
                self.checkpoint.stream(name, |bytes| {
                    bits.extend(pod_collect_to_vec::<u8, u16>(bytes));
                    Ok(())
                })?;
                let (shape, device) = (view.shape, self.device());
                Ok(Weight::Halves(match dtype {
                    DType::BF16 => Tensor::from_vec(bits.reinterpret_into::<bf16>(), shape, device)?,
                    _ => Tensor::from_vec(bits.reinterpret_into::<f16>(), shape, device)?,
                }))
            }
            _ => Ok(Weight::Whole(self.load(name)?.to_dtype(self.precision())?)),
        }
    }

    /// A linear as the checkpoint has it.
    ///
    /// # Errors
    /// It is missing, misshapen or cannot be read.
    pub fn linear(&self, block: usize, linear: &LinearSpec) -> Result<Linear> {
        let weight = match (&linear.fused, self.fused_name(block, linear)) {
            (Some(slice), Some(name)) => {
                let weight = self.fused_linear(&name, linear, slice)?;
                match self.placement().on_device || weight.dtype() == DType::F32 {
                    true => Weight::Whole(weight.to_dtype(self.precision())?),
                    false => Weight::Halves(weight),
                }
            }
            _ => {
                let name = self.weight_name(block, linear);
                self.expect(&name, &[linear.rows, linear.columns])?;
                self.weight(&name)?
            }
        };
        Ok(Linear {
            weight,
            bias: self.bias(block, linear)?,
        })
    }

    /// Bytes of [`Self::linear`]'s weight in the CPU's memory. Looks at headers only.
    ///
    /// # Errors
    /// It is stored quantized, and its tensors do not fit each other.
    pub fn linear_bytes(&self, block: usize, linear: &LinearSpec) -> Result<usize> {
        let fused = self.fused_name(block, linear);
        let own = || self.weight_name(block, linear);
        let name = fused.clone().unwrap_or_else(own);
        let elements = linear.rows * linear.columns;
        let stored = self.checkpoint.get(&name).map(|view| view.dtype);
        Ok(match (self.reader_of(&name), stored) {
            (None, Some(Dtype::BF16 | Dtype::F16)) => elements * 2,
            (Some(reader), _) if fused.is_none() => reader.byte_len(&name, &|name| self.stored(name))?,
            _ => elements * 4,
        })
    }

    /// Quantized values, where the model runs.
    ///
    /// # Errors
    /// The device has no memory left.
    pub fn quantized_weight(&self, weight: Arc<QuantizedWeight>) -> Result<Weight> {
        Ok(match self.placement().on_device {
            true => Weight::Whole(device::codes::dequantize(
                &weight,
                self.precision(),
                self.device(),
            )?),
            false => Weight::Codes(weight),
        })
    }

    /// A linear with another, quantized weight, and its own bias.
    ///
    /// # Errors
    /// The weight has another shape than config.json asks for.
    pub fn quantized_linear(&self, block: usize, linear: &LinearSpec, weight: Weight) -> Result<Linear> {
        let shape = weight.sides()?;
        if shape != (linear.rows, linear.columns) {
            return Err(Error::invalid(
                self.linear_name(block, linear),
                format!(
                    "has shape {shape:?}, config.json asks for {:?}",
                    (linear.rows, linear.columns)
                ),
                "config.json and weights are of different models",
            ));
        }
        Ok(Linear {
            weight,
            bias: self.bias(block, linear)?,
        })
    }
}

/// The rows of one of the linears that a tensor `[rows * parts, columns]` joins.
fn part(all: &Tensor, rows: usize, slice: &FusedSlice) -> candle_core::Result<Tensor> {
    if slice.layout.interleaved && slice.parts > 1 {
        let (_, columns) = all.dims2()?;
        let turns = all.contiguous()?.reshape((rows, slice.parts, columns))?;
        return turns.narrow(1, slice.part, 1)?.squeeze(1)?.contiguous();
    }
    all.narrow(0, slice.part * rows, rows)?.contiguous()
}

/// The floats that plain weights may be.
fn float(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F32 => Some(DType::F32),
        Dtype::BF16 => Some(DType::BF16),
        Dtype::F16 => Some(DType::F16),
        _ => None,
    }
}

pub(super) fn unreadable(name: &str, dtype: Dtype) -> Error {
    Error::invalid(
        name,
        format!("is {dtype:?}; bf16, f16 and f32 weights can be read"),
        "if the checkpoint is quantized, its config.json needs the quantization_config",
    )
}

/// Copies a tensor out of the memory map, in f32.
pub(super) fn widen(tensor: &TensorView<'_>, device: &Device) -> Result<Tensor> {
    if let (false, Some(dtype)) = (device.is_cpu(), float(tensor.dtype)) {
        // As they are stored: half the way, and the device widens faster.
        let narrow = device::transfer::upload(tensor.bytes, dtype, tensor.shape, device)?;
        return Ok(narrow.to_dtype(DType::F32)?);
    }
    let mut values = Vec::with_capacity(tensor.shape.iter().product());
    widen_onto(&mut values, tensor.name, tensor.dtype, tensor.bytes)?;
    Ok(Tensor::from_vec(values, tensor.shape, device)?)
}

/// Appends elements, in f32. `name` is for the error alone.
fn widen_onto(values: &mut Vec<f32>, name: &str, dtype: Dtype, bytes: &[u8]) -> Result<()> {
    let begin = values.len();
    match dtype {
        Dtype::F32 => values.extend(pod_collect_to_vec::<u8, f32>(bytes)),
        Dtype::BF16 | Dtype::F16 => {
            values.resize(begin + bytes.len() / 2, 0.0);
            match dtype {
                Dtype::BF16 => halves::widen::<bf16>(bytes, &mut values[begin..]),
                _ => halves::widen::<f16>(bytes, &mut values[begin..]),
            }
        }
        other => return Err(unreadable(name, other)),
    }
    Ok(())
}
