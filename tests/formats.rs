//! Formats through the public API: what is packed comes back, what others wrote is read, what is damaged is refused.

use proptest::prelude::*;
use quantflow::error::Result;
use quantflow::formats::{Format, LinearLayout, NAMES, TensorSpec, by_name};
use quantflow::numerics::{Grid, QuantizedWeight, ScaleDtype, bits};
use safetensors::Dtype;
use serde_json::{Value, json};
use std::collections::BTreeMap;

const LINEAR: &str = "model.layers.0.mlp.down_proj";

type Tensors = BTreeMap<String, (TensorSpec, Vec<u8>)>;

fn pack(format: &dyn Format, weight: &QuantizedWeight) -> Tensors {
    let specs = format.specs(LINEAR, weight.rows, weight.columns, weight.grid);
    let data = format.pack(weight);
    assert_eq!(specs.len(), data.len());
    let tensors = specs.into_iter().zip(data);
    tensors
        .map(|(spec, data)| (spec.name.clone(), (spec, data)))
        .collect()
}

fn unpack(format: &dyn Format, config: &Value, tensors: &Tensors) -> Result<QuantizedWeight> {
    format.unpack(LINEAR, config, &|name| {
        let (spec, data) = tensors.get(name)?;
        Some((spec.clone(), data.into()))
    })
}

fn layout(name: &str, columns: usize, grid: Option<Grid>) -> LinearLayout {
    LinearLayout {
        name: name.into(),
        rows: 64,
        columns,
        grid,
    }
}

fn config(format: &dyn Format, weight: &QuantizedWeight) -> Value {
    format.quantization_config(&[
        layout(LINEAR, weight.columns, Some(weight.grid)),
        layout("lm_head", 64, None),
    ])
}

fn grid(bits: u32, group_size: usize, symmetric: bool, scale_dtype: ScaleDtype) -> Grid {
    Grid {
        bits,
        group_size,
        symmetric,
        scale_dtype,
    }
}

/// A weight with codes and zero points over the whole range.
pub(crate) fn weight(grid: Grid, rows: usize, columns: usize, seed: u32) -> QuantizedWeight {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 8) as u8 & grid.max_code()
    };
    let groups = rows * columns / grid.group_size;
    let codes: Vec<u8> = (0..rows * columns).map(|_| next()).collect();
    let zeros = (0..groups)
        .map(|_| {
            if grid.symmetric {
                grid.symmetric_zero()
            } else {
                next()
            }
        })
        .collect();
    let scales = (0..groups)
        .map(|at| grid.scale_dtype.round(1e-3 * (at + 1) as f64) as f32)
        .collect();
    QuantizedWeight {
        grid,
        rows,
        columns,
        codes: bits::pack_rows(&codes, columns, grid.bits),
        scales,
        zeros,
    }
}

fn weights() -> impl Strategy<Value = (usize, QuantizedWeight)> {
    let dtypes = [ScaleDtype::Bf16, ScaleDtype::F16, ScaleDtype::F32];
    let bits = prop::sample::select(&[2u32, 3, 4, 8][..]);
    let shape = (1usize..4, 1usize..4, prop::sample::select(&[32usize, 64][..]));
    (
        0..NAMES.len(),
        bits,
        shape,
        any::<(bool, u32)>(),
        prop::sample::select(dtypes.to_vec()),
    )
        .prop_map(
            |(format, bits, (rows, groups, group_size), (symmetric, seed), dtype)| {
                let dtype = if format == 0 { dtype } else { ScaleDtype::F16 };
                let grid = grid(bits, group_size, symmetric || NAMES[format] == "gptq", dtype);
                (format, weight(grid, rows * 32, groups * group_size, seed))
            },
        )
}

proptest! {
    #[test]
    fn packed_weights_come_back((format, weight) in weights()) {
        let format = by_name(NAMES[format]).unwrap();
        format.check(LINEAR, weight.rows, weight.columns, weight.grid).unwrap();
        let tensors = pack(&*format, &weight);
        for (spec, data) in tensors.values() {
            prop_assert_eq!(spec.byte_len(), data.len(), "{}", &spec.name);
        }
        prop_assert_eq!(unpack(&*format, &config(&*format, &weight), &tensors).unwrap(), weight);
    }

    /// Any change to name, dtype, shape, length or config is read or refused; never a panic.
    #[test]
    fn damaged_tensors_do_not_panic(
        (format, weight) in weights(),
        which in 0usize..4,
        damage in 0u32..6,
        side in prop::sample::select(vec![0usize, 1, 3, 31, 33, 1 << 20, usize::MAX / 2, usize::MAX]),
        bits in prop::sample::select(vec![json!(2), json!(3), json!(8), json!(5), json!(-1), json!("4"), json!(null), json!(1u64 << 40)]),
    ) {
        let format = by_name(NAMES[format]).unwrap();
        let mut tensors = pack(&*format, &weight);
        let mut config = config(&*format, &weight);
        let name = tensors.keys().nth(which % tensors.len()).unwrap().clone();
        let (spec, data) = tensors.get_mut(&name).unwrap();
        match damage {
            0 => { tensors.remove(&name); }
            1 => spec.shape[0] = side,
            2 => spec.shape.push(side),
            3 => { spec.shape.pop(); }
            4 => { data.truncate(data.len() / 2); }
            _ => spec.dtype = if spec.dtype == Dtype::I32 { Dtype::F32 } else { Dtype::I8 },
        }
        let read = unpack(&*format, &config, &tensors);
        let changed = tensors.get(&name) != pack(&*format, &weight).get(&name);
        if changed && (damage != 0 || !name.ends_with("g_idx")) {
            prop_assert!(read.is_err(), "{}", name);
        }
        for key in ["/config_groups/group_0/weights/num_bits", "/config_groups/group_0/weights/group_size", "/bits", "/group_size"] {
            if let Some(value) = config.pointer_mut(key) {
                *value = bits.clone();
            }
        }
        let _ = unpack(&*format, &config, &pack(&*format, &weight));
    }
}

/// Words that the real packers produce, taken from GPTQModel 7.7 and compressed-tensors 0.20.
#[test]
fn known_words() {
    let mut weight = weight(grid(4, 32, false, ScaleDtype::F16), 8, 32, 1);
    let codes: Vec<u8> = (0..8u8)
        .flat_map(|row| (0..32).map(move |column| (column + row) & 15))
        .collect();
    weight.codes = bits::pack_rows(&codes, 32, 4);
    weight.zeros = vec![0, 1, 2, 3, 4, 5, 6, 7];
    let words = |tensors: &Tensors, part: &str, at: usize| {
        let data = &tensors[&format!("{LINEAR}.{part}")].1;
        u32::from_le_bytes(data[4 * at..4 * at + 4].try_into().unwrap())
    };
    let gptq = pack(&*by_name("gptq-v2").unwrap(), &weight);
    // Word [0, 0] holds columns 0 to 7 of row 0, word [0, 1] the same columns of row 1.
    assert_eq!(words(&gptq, "qweight", 0), 0x7654_3210);
    assert_eq!(words(&gptq, "qweight", 1), 0x8765_4321);
    assert_eq!(words(&gptq, "qweight", 8), 0xfedc_ba98);
    assert_eq!(words(&gptq, "qzeros", 0), 0x7654_3210);
    let packed = pack(&*by_name("compressed-tensors").unwrap(), &weight);
    assert_eq!(words(&packed, "weight_packed", 0), 0x7654_3210);
    assert_eq!(words(&packed, "weight_packed", 1), 0xfedc_ba98);
    assert_eq!(words(&packed, "weight_zero_point", 0), 0x7654_3210);
}

#[test]
fn version_1_stores_zero_points_minus_one_in_each_field() {
    for (bits, expect) in [(2, 0x5555_5555), (4, 0x7777_7777), (8, 0x7f7f_7f7f)] {
        let weight = weight(grid(bits, 32, true, ScaleDtype::F16), 32, 32, 1);
        let tensors = pack(&*by_name("gptq").unwrap(), &weight);
        let (_, data) = &tensors[&format!("{LINEAR}.qzeros")];
        assert_eq!(data[..4], u32::to_le_bytes(expect), "{bits} bits");
    }
}

#[test]
fn version_1_zero_of_zero_is_refused_or_follows_gptqmodel() {
    let v1 = by_name("gptq").unwrap();
    let asymmetric = grid(4, 32, false, ScaleDtype::F16);
    let error = v1.check(LINEAR, 32, 32, asymmetric).unwrap_err();
    assert!(error.hint().unwrap().contains("gptq-v2"), "{error}");

    let mut weight = weight(asymmetric, 8, 32, 7);
    weight.zeros = vec![0, 5, 0, 0, 15, 1, 0, 9];
    let v2 = by_name("gptq-v2").unwrap();
    let mut tensors = pack(&*v2, &weight);
    // GPTQModel turns version 2 into 1 by a subtraction on the word, borrows and all.
    let (_, data) = tensors.get_mut(&format!("{LINEAR}.qzeros")).unwrap();
    let word = u32::from_le_bytes(data[..4].try_into().unwrap()).wrapping_sub(0x1111_1111);
    data.copy_from_slice(&word.to_le_bytes());
    let mut config = config(&*v2, &weight);
    let error = unpack(&*v1, &config, &tensors).unwrap_err();
    assert!(error.to_string().contains("qzeros"), "{error}");
    config["meta"]["quantizer"] = json!(["gptqmodel:7.7.0"]);
    assert_eq!(unpack(&*v1, &config, &tensors).unwrap(), weight);
}

#[test]
fn reordered_columns_are_refused() {
    for (name, part) in [("gptq", "g_idx"), ("compressed-tensors", "weight_g_idx")] {
        let format = by_name(name).unwrap();
        let weight = weight(grid(4, 32, true, ScaleDtype::F16), 32, 64, 3);
        let mut tensors = pack(&*format, &weight);
        let full = format!("{LINEAR}.{part}");
        let mut order: Vec<u32> = (0..64).map(|column| column / 32).collect();
        let mut set = |order: &[u32]| {
            let data = order.iter().flat_map(|group| group.to_le_bytes()).collect();
            let spec = TensorSpec {
                name: full.clone(),
                dtype: Dtype::I32,
                shape: vec![64],
            };
            tensors.insert(full.clone(), (spec, data));
            unpack(&*format, &config(&*format, &weight), &tensors)
        };
        assert_eq!(set(&order).unwrap(), weight);
        order.swap(3, 40);
        let error = set(&order).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
        assert!(error.hint().unwrap().contains("desc_act"), "{error}");
    }
}

#[test]
fn older_files_of_other_writers_are_read() {
    let format = by_name("compressed-tensors").unwrap();
    let weight = weight(grid(3, 32, false, ScaleDtype::Bf16), 32, 64, 5);
    let mut tensors = pack(&*format, &weight);
    // Ten 3-bit codes a word, and zero points as signed bytes.
    let codes = weight.unpacked();
    let words = codes.chunks(64).flat_map(|row| {
        row.chunks(10).map(|codes| {
            codes
                .iter()
                .rev()
                .fold(0u32, |word, &code| word << 3 | u32::from(code))
        })
    });
    let mut put = |part: &str, dtype, shape, data| {
        let name = format!("{LINEAR}.{part}");
        tensors.insert(name.clone(), (TensorSpec { name, dtype, shape }, data));
    };
    put(
        "weight_packed",
        Dtype::I32,
        vec![32, 7],
        words.flat_map(u32::to_le_bytes).collect(),
    );
    let zeros = weight.zeros.iter().map(|&zero| (zero as i8 - 4) as u8).collect();
    put("weight_zero_point", Dtype::I8, vec![32, 2], zeros);
    let config = config(&*format, &weight);
    assert_eq!(unpack(&*format, &config, &tensors).unwrap(), weight);
}

#[test]
fn what_a_layout_cannot_hold_is_refused() {
    let f16 = ScaleDtype::F16;
    let cases = [
        ("compressed-tensors", 32, 64, grid(5, 32, true, f16), "--bits"),
        (
            "compressed-tensors",
            32,
            72,
            grid(4, 32, true, f16),
            "--group-size",
        ),
        ("compressed-tensors", 32, 72, grid(3, 72, true, f16), "--bits"),
        (
            "compressed-tensors",
            32,
            64,
            grid(4, 0, true, f16),
            "--group-size",
        ),
        ("compressed-tensors", 0, 64, grid(4, 32, true, f16), "weight"),
        ("gptq", 36, 64, grid(4, 32, true, f16), "--format"),
        ("gptq-v2", 40, 64, grid(3, 32, false, f16), "--format"),
        ("gptq-v2", 32, 64, grid(4, 32, true, ScaleDtype::Bf16), "--format"),
        ("gptq", 32, 64, grid(4, 32, false, f16), "--format"),
    ];
    for (format, rows, columns, grid, subject) in cases {
        let error = by_name(format)
            .unwrap()
            .check(LINEAR, rows, columns, grid)
            .unwrap_err();
        assert!(error.to_string().contains(subject), "{format} {grid:?}: {error}");
        assert!(error.to_string().contains(LINEAR), "{error}");
        assert!(error.hint().is_some(), "{error}");
    }
}

#[test]
fn config_of_one_scheme() {
    let format = by_name("compressed-tensors").unwrap();
    let int4 = Some(grid(4, 128, true, ScaleDtype::Bf16));
    // A linear of one group joins the grouped scheme.
    let linears = [
        layout("model.a", 512, int4),
        layout("model.b", 128, int4),
        layout("lm_head", 128, None),
    ];
    let config = format.quantization_config(&linears);
    assert_eq!(config["ignore"], json!(["lm_head"]));
    assert_eq!(
        config["config_groups"],
        json!({"group_0": {
            "targets": ["Linear"], "format": "pack-quantized",
            "weights": {"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 128,
                "dynamic": false, "actorder": null},
            "input_activations": null, "output_activations": null,
        }})
    );
    assert!(format.side_files(&linears).is_empty());
    let channel = [
        layout("model.a", 512, Some(grid(8, 512, true, ScaleDtype::Bf16))),
        layout("model.b", 128, int4),
    ];
    let config = format.quantization_config(&channel);
    assert_eq!(
        config["config_groups"]["group_0"]["weights"]["strategy"],
        "channel"
    );
    assert_eq!(
        config["config_groups"]["group_0"]["weights"]["group_size"],
        Value::Null
    );
    assert_eq!(config["config_groups"]["group_0"]["targets"], json!(["model.a"]));
    assert_eq!(config["config_groups"]["group_1"]["targets"], json!(["model.b"]));
}

#[test]
fn gptq_config_covers_linears_and_their_fusions() {
    let format = by_name("gptq").unwrap();
    let (int4, int8) = (
        Some(grid(4, 64, true, ScaleDtype::F16)),
        Some(grid(8, 64, true, ScaleDtype::F16)),
    );
    let name = |part: &str| format!("model.language_model.layers.1.{part}");
    let mut linears: Vec<LinearLayout> = ["q_proj", "k_proj", "v_proj"]
        .map(|part| layout(&name(&format!("self_attn.{part}")), 256, int8))
        .into();
    linears.extend(["o_proj", "x", "y", "z"].map(|part| layout(&name(part), 256, int4)));
    linears.push(layout("model.visual.blocks.0.attn.qkv", 256, None));
    linears.push(layout("lm_head", 256, None));
    let config = format.quantization_config(&linears);
    assert_eq!(config["bits"], 4);
    assert_eq!(config["group_size"], 64);
    assert_eq!(
        config["dynamic"],
        json!({
            r"-:(?:.*\.)?visual\.blocks\.0\.attn\.qkv$": {},
            r"+:(?:.*\.)?layers\.1\.self_attn\.(?:q_proj|k_proj|v_proj|qkv_proj)$": {"bits": 8, "group_size": 64, "sym": true},
        })
    );
    let [(file, side)] = &format.side_files(&linears)[..] else {
        panic!("one side file")
    };
    assert_eq!((*file, side), ("quantize_config.json", &config));
    // The same through the reader's eyes.
    let weight = weight(int8.unwrap(), 32, 64, 9);
    let tensors = pack(&*format, &weight);
    let linear = name("self_attn.k_proj");
    let read = format.unpack(&linear, &config, &|full| {
        let (spec, data) = tensors.get(&full.replace(&linear, LINEAR))?;
        Some((spec.clone(), data.into()))
    });
    assert_eq!(read.unwrap().grid.bits, 8);
}
