//! Checkpoints in memory, stored in other tools' quantizations and turned back into values by the definitions: slow, in f64.

#![allow(clippy::disallowed_methods)] // made-up checkpoints are the point

use candle_core::{DType, Device};
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// The linear that is damaged.
const DAMAGED: &str = "model.layers.1.mlp.up_proj";
/// Sides of a block in DeepSeek's manner.
const BLOCK: usize = 16;

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tensor {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

impl Tensor {
    pub(crate) fn f32(shape: &[usize], values: &[f32]) -> Self {
        Self {
            dtype: Dtype::F32,
            shape: shape.to_vec(),
            bytes: values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        }
    }

    /// Elements of a plain tensor.
    pub(crate) fn values(&self) -> Vec<f32> {
        let halves = || self.bytes.as_chunks::<2>().0.iter();
        match self.dtype {
            Dtype::F32 => (self.bytes.as_chunks::<4>().0.iter())
                .map(|&b| f32::from_le_bytes(b))
                .collect(),
            Dtype::BF16 => halves().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
            Dtype::F16 => halves().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
            other => panic!("{other:?} is not plain"),
        }
    }

    fn words(&self) -> Vec<u32> {
        assert_eq!(self.dtype, Dtype::I32);
        let words = self.bytes.as_chunks::<4>().0.iter();
        words.map(|&b| u32::from_le_bytes(b)).collect()
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Checkpoint {
    pub(crate) config: Value,
    pub(crate) tensors: BTreeMap<String, Tensor>,
}

impl Checkpoint {
    pub(crate) fn read(folder: &Path) -> Self {
        let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.iter().map(|(name, view)| {
            let tensor = Tensor {
                dtype: view.dtype(),
                shape: view.shape().to_vec(),
                bytes: view.data().to_vec(),
            };
            (name.to_owned(), tensor)
        });
        Self {
            tensors: tensors.collect(),
            config: serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap(),
        }
    }

    pub(crate) fn write(&self, folder: &Path) {
        std::fs::create_dir_all(folder).unwrap();
        let views = self.tensors.iter().map(|(name, tensor)| {
            let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes);
            (name, view.unwrap())
        });
        let file = safetensors::serialize(views, None).unwrap();
        std::fs::write(folder.join("model.safetensors"), file).unwrap();
        std::fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
    }

    fn part(&mut self, part: &str) -> &mut Tensor {
        self.tensors.get_mut(&format!("{DAMAGED}.{part}")).unwrap()
    }

    pub(crate) fn drop(&mut self, part: &str) {
        self.tensors.remove(&format!("{DAMAGED}.{part}")).unwrap();
    }

    pub(crate) fn reshape(&mut self, part: &str, change: fn(&mut Vec<usize>)) {
        change(&mut self.part(part).shape);
    }

    /// The last two bytes of a tensor.
    pub(crate) fn bytes(&mut self, part: &str, value: u8) {
        let bytes = &mut self.part(part).bytes;
        let last = bytes.len() - 2;
        bytes[last..].fill(value);
    }
}

/// A way to store a weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    /// `fp8`, as DeepSeek-V3.
    Blocks,
    /// `fp8`, as Qwen3: scales in bf16.
    HalfBlocks,
    /// `fp8` with one scale a tensor, or an expert.
    Tensor,
    /// compressed-tensors, floats, a scale a row.
    Rows,
    /// compressed-tensors, floats, blocks that are not square.
    Rectangles,
    /// compressed-tensors, signed bytes, a scale a row.
    Bytes,
}

impl Kind {
    pub(crate) const ALL: [Self; 6] = [
        Self::Blocks,
        Self::HalfBlocks,
        Self::Tensor,
        Self::Rows,
        Self::Rectangles,
        Self::Bytes,
    ];

    /// Sides of what has a scale.
    fn block(self, rows: usize, columns: usize) -> [usize; 2] {
        match self {
            Self::Blocks | Self::HalfBlocks => [BLOCK, BLOCK],
            Self::Rectangles => [8, BLOCK],
            Self::Tensor => [rows, columns],
            Self::Rows | Self::Bytes => [1, columns],
        }
    }

    fn config(self) -> Value {
        let fp8 = |sides: Value| json!({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": sides});
        let compressed = |format: &str, weights: Value| {
            let group = json!({"targets": ["Linear"], "weights": weights});
            json!({"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}, "ignore": []})
        };
        match self {
            Self::Blocks | Self::HalfBlocks => fp8(json!([BLOCK, BLOCK])),
            Self::Tensor => fp8(Value::Null),
            Self::Rows => compressed(
                "float-quantized",
                json!({"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": true}),
            ),
            Self::Rectangles => compressed(
                "float-quantized",
                json!({"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [8, BLOCK], "symmetric": true}),
            ),
            Self::Bytes => compressed(
                "int-quantized",
                json!({"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": true}),
            ),
        }
    }

    /// Stores the chosen weights of `model`, and writes their values plainly beside it.
    pub(crate) fn store(self, model: &Path, coded: &Path, plain: &Path, chosen: &dyn Fn(&str) -> bool) {
        let mut checkpoint = Checkpoint::read(model);
        let mut values = checkpoint.clone();
        let names: Vec<String> = (checkpoint.tensors.iter())
            .filter(|(name, tensor)| chosen(name) && tensor.shape.len() > 1)
            .map(|(name, _)| name.clone())
            .collect();
        assert!(names.len() > 3);
        for name in &names {
            let value = self.store_tensor(&mut checkpoint, name);
            values.tensors.insert(name.clone(), value);
        }
        checkpoint.config["quantization_config"] = self.config();
        checkpoint.write(coded);
        values.write(plain);
    }

    /// Stores one weight; returns its value.
    pub(crate) fn store_tensor(self, checkpoint: &mut Checkpoint, name: &str) -> Tensor {
        let tensor = checkpoint.tensors.remove(name).unwrap();
        let source = tensor.values();
        let (experts, [rows, columns]) = match tensor.shape[..] {
            [rows, columns] => (None, [rows, columns]),
            [experts, rows, columns] => (Some(experts), [rows, columns]),
            _ => panic!("{name} has shape {:?}", tensor.shape),
        };
        let block = self.block(rows, columns);
        let [down, across] = [rows.div_ceil(block[0]), columns.div_ceil(block[1])];
        let cell = |at: usize| {
            let (expert, row, column) = (at / columns / rows, at / columns % rows, at % columns);
            (expert * down + row / block[0]) * across + column / block[1]
        };
        let largest = if self == Self::Bytes { 127.0 } else { 448.0 };
        let mut scales = vec![0f32; experts.unwrap_or(1) * down * across];
        for (at, value) in source.iter().enumerate() {
            scales[cell(at)] = scales[cell(at)].max(value.abs() / largest);
        }
        let half = [Self::HalfBlocks, Self::Rows, Self::Rectangles].contains(&self);
        for scale in &mut scales {
            assert!(*scale > 0.0);
            *scale = if half {
                bf16::from_f32(*scale).to_f32()
            } else {
                *scale
            };
        }
        let scaled: Vec<f32> = source
            .iter()
            .enumerate()
            .map(|(at, v)| v / scales[cell(at)])
            .collect();
        let (dtype, bytes) = match self {
            Self::Bytes => {
                let signed = scaled.iter().map(|v| v.round().clamp(-128.0, 127.0) as i8 as u8);
                (Dtype::I8, signed.collect())
            }
            _ => (Dtype::F8_E4M3, to_e4m3(&scaled)),
        };
        let codes = |at: usize| match self {
            Self::Bytes => f64::from(bytes[at] as i8),
            _ => e4m3(bytes[at]),
        };
        let values: Vec<f32> = (0..source.len())
            .map(|at| (codes(at) * f64::from(scales[cell(at)])) as f32)
            .collect();
        let value = Tensor::f32(&tensor.shape, &values);
        let shape: Vec<usize> = match (self, experts) {
            // A scalar, or one an expert.
            (Self::Tensor, experts) => experts.into_iter().collect(),
            (_, experts) => experts.into_iter().chain([down, across]).collect(),
        };
        let mut scale = Tensor::f32(&shape, &scales);
        if half {
            scale.dtype = Dtype::BF16;
            let halves = scales.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes());
            scale.bytes = halves.collect();
        }
        let ending = match self {
            Self::Blocks | Self::HalfBlocks => "_scale_inv",
            _ => "_scale",
        };
        checkpoint.tensors.insert(format!("{name}{ending}"), scale);
        if self == Self::Tensor
            && let Some(linear) = name.strip_suffix(".weight")
        {
            // Of its quantized activations.
            let input = Tensor::f32(&[], &[0.5]);
            checkpoint.tensors.insert(format!("{linear}.input_scale"), input);
        }
        let shape = tensor.shape;
        checkpoint
            .tensors
            .insert(name.into(), Tensor { dtype, shape, bytes });
        value
    }
}

fn to_e4m3(values: &[f32]) -> Vec<u8> {
    let tensor = candle_core::Tensor::new(values, &Device::Cpu).unwrap();
    let tensor = tensor.to_dtype(DType::F8E4M3).unwrap();
    let file = safetensors::serialize([("codes", &tensor)], None).unwrap();
    SafeTensors::deserialize(&file)
        .unwrap()
        .tensor("codes")
        .unwrap()
        .data()
        .to_vec()
}

/// The definition of E4M3, bit by bit.
fn e4m3(byte: u8) -> f64 {
    let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, fraction) = (f64::from(byte >> 3 & 15), f64::from(byte & 7) / 8.0);
    assert!(byte & 0x7f != 0x7f, "NaN");
    match exponent {
        0.0 => sign * fraction / 64.0,
        _ => sign * (1.0 + fraction) * (exponent - 7.0).exp2(),
    }
}

/// Code `at` of a stream of `bits` wide codes in words, which lie `stride` apart from `begin` on.
fn code(words: &[u32], begin: usize, stride: usize, at: usize, bits: usize) -> i64 {
    let bit = |bit: usize| i64::from(words[begin + bit / 32 * stride] >> (bit % 32) & 1);
    (0..bits).map(|i| bit(at * bits + i) << i).sum()
}

/// Writes the values of what quantflow wrote, or of 8-bit floats in square blocks, to `plain`.
pub(crate) fn values_of(coded: &Path, plain: &Path) {
    let mut checkpoint = Checkpoint::read(coded);
    let config = checkpoint
        .config
        .as_object_mut()
        .unwrap()
        .remove("quantization_config")
        .unwrap();
    let names: Vec<String> = checkpoint.tensors.keys().cloned().collect();
    for name in names {
        let Some((linear, part)) = name.rsplit_once('.') else {
            continue;
        };
        let floats = checkpoint
            .tensors
            .get(&name)
            .is_some_and(|t| t.dtype == Dtype::F8_E4M3);
        let value = match part {
            "weight_packed" => compressed(&mut checkpoint, linear, &config),
            "qweight" => gptq(&mut checkpoint, linear, &config),
            "weight" if floats => blocks(&mut checkpoint, linear, &config),
            _ => continue,
        };
        checkpoint.tensors.insert(format!("{linear}.weight"), value);
    }
    checkpoint.write(plain);
}

fn take(checkpoint: &mut Checkpoint, linear: &str, part: &str) -> Option<Tensor> {
    checkpoint.tensors.remove(&format!("{linear}.{part}"))
}

fn blocks(checkpoint: &mut Checkpoint, linear: &str, config: &Value) -> Tensor {
    let side = |at: usize| config["weight_block_size"][at].as_u64().unwrap() as usize;
    let codes = take(checkpoint, linear, "weight").unwrap();
    let scales = take(checkpoint, linear, "weight_scale_inv").unwrap().values();
    let (columns, across) = (codes.shape[1], codes.shape[1].div_ceil(side(1)));
    let value = |(at, byte): (usize, &u8)| {
        let scale = scales[at / columns / side(0) * across + at % columns / side(1)];
        (e4m3(*byte) * f64::from(scale)) as f32
    };
    let values: Vec<f32> = codes.bytes.iter().enumerate().map(value).collect();
    Tensor::f32(&codes.shape, &values)
}

fn compressed(checkpoint: &mut Checkpoint, linear: &str, config: &Value) -> Tensor {
    let bits = config["config_groups"]["group_0"]["weights"]["num_bits"]
        .as_u64()
        .unwrap() as usize;
    let packed = take(checkpoint, linear, "weight_packed").unwrap();
    let scale = take(checkpoint, linear, "weight_scale").unwrap();
    let zeros = take(checkpoint, linear, "weight_zero_point").map(|zeros| zeros.words());
    let shape = take(checkpoint, linear, "weight_shape").unwrap().bytes;
    let columns = u64::from_le_bytes(shape[8..].try_into().unwrap()) as usize;
    let (rows, width, groups) = (packed.shape[0], packed.shape[1], scale.shape[1]);
    let (words, scales) = (packed.words(), scale.values());
    let value = |at: usize| {
        let (row, column) = (at / columns, at % columns);
        let group = column / (columns / groups);
        let zero = match &zeros {
            None => 1 << (bits - 1),
            Some(zeros) => code(zeros, group, groups, row, bits),
        };
        let code = code(&words, row * width, 1, column, bits);
        ((code - zero) as f64 * f64::from(scales[row * groups + group])) as f32
    };
    let values: Vec<f32> = (0..rows * columns).map(value).collect();
    Tensor::f32(&[rows, columns], &values)
}

fn gptq(checkpoint: &mut Checkpoint, linear: &str, config: &Value) -> Tensor {
    let bits = config["bits"].as_u64().unwrap() as usize;
    let less = i64::from(config["checkpoint_format"] == "gptq");
    let packed = take(checkpoint, linear, "qweight").unwrap();
    let scale = take(checkpoint, linear, "scales").unwrap();
    let zeros = take(checkpoint, linear, "qzeros").unwrap();
    take(checkpoint, linear, "g_idx").unwrap();
    let (rows, columns, groups) = (packed.shape[1], packed.shape[0] * 32 / bits, scale.shape[0]);
    let (words, scales, width, zeros) = (packed.words(), scale.values(), zeros.shape[1], zeros.words());
    let value = |at: usize| {
        let (row, column) = (at / columns, at % columns);
        let group = column / (columns / groups);
        let zero = code(&zeros, group * width, 1, row, bits) + less;
        let code = code(&words, row, rows, column, bits);
        ((code - zero) as f64 * f64::from(scales[group * rows + row])) as f32
    };
    let values: Vec<f32> = (0..rows * columns).map(value).collect();
    Tensor::f32(&[rows, columns], &values)
}
