//! Inverse frequencies of rotary embeddings, in every scaling that the supported families use. Computed in f32
//! in the order in which transformers does, so that tables agree to the last bits.
//!
//! Two spellings are read: `rope_theta` + `rope_scaling` (up to transformers 4) and `rope_parameters` (from 5).
//! Text positions make the three axes of M-RoPE equal, so `mrope` is `default` here.

use std::f64::consts::TAU;

use super::keys::{Keys, MAX_POSITIONS, shorten};
use crate::error::Result;
use crate::model::spec::RopeSpec;

/// Default of yarn's `beta_fast`.
const YARN_BETA_FAST: f64 = 32.0;
/// Default of yarn's `beta_slow`.
const YARN_BETA_SLOW: f64 = 1.0;
/// What transformers adds where yarn's ramp would have no width.
const YARN_MIN_WIDTH: f64 = 0.001;
/// What the table can be.
const KINDS: &str = "default, mrope, linear, dynamic, llama3, yarn, longrope";

/// What a family brings to its table besides the config's rope keys.
#[derive(Clone, Copy, Debug)]
pub(super) struct Context {
    /// Width of one head.
    pub(super) head_dim: usize,
    /// `max_position_embeddings`.
    pub(super) max_positions: usize,
    /// `rope_theta` where the config has none.
    pub(super) theta: f64,
    /// `original_max_position_embeddings` where the family's config class has a default for it.
    pub(super) original_positions: Option<usize>,
    /// Whether the family rotates part of a head.
    pub(super) partial: bool,
    /// Phi-3 calls longrope `su` or `yarn` in older configs.
    pub(super) longrope_aliases: bool,
}

/// A table, and the longest sequence it holds for where longer ones need other frequencies.
#[derive(Debug)]
pub(super) struct Table {
    /// The table.
    pub(super) rope: RopeSpec,
    /// `None` where it holds for any length.
    pub(super) max_sequence: Option<usize>,
}

/// The rope keys of a family whose layers share one table, in the spelling that the config has.
pub(super) fn parameters<'a>(keys: &Keys<'a>) -> Result<Keys<'a>> {
    let old = keys.object("rope_scaling")?;
    match old.is_empty() {
        true => keys.object("rope_parameters"),
        false => Ok(old),
    }
}

/// The one table of a family whose layers all share it.
pub(super) fn shared(keys: &Keys, context: Context) -> Result<Table> {
    let parameters = parameters(keys)?;
    for layer_type in ["full_attention", "sliding_attention"] {
        if parameters.some(layer_type).is_some() {
            return Err(parameters.error(
                layer_type,
                "gives a layer type its own rotary table, which this architecture does not have",
            ));
        }
    }
    let theta = match parameters.positive("rope_theta")? {
        Some(theta) => theta,
        None => keys.positive("rope_theta")?.unwrap_or(context.theta),
    };
    let partial = match parameters.positive("partial_rotary_factor")? {
        Some(partial) => Some(partial),
        None => keys.positive("partial_rotary_factor")?,
    };
    let original = keys.size_or_null(
        "original_max_position_embeddings",
        context.original_positions,
        MAX_POSITIONS,
    )?;
    table(&parameters, context, theta, partial, original)
}

/// The table that `parameters` describe. `original` stands above the original length that they may name.
pub(super) fn table(
    parameters: &Keys,
    context: Context,
    theta: f64,
    partial: Option<f64>,
    original: Option<usize>,
) -> Result<Table> {
    let partial = partial.unwrap_or(1.0);
    if partial > 1.0 || (partial < 1.0 && !context.partial) {
        return Err(parameters.error(
            "partial_rotary_factor",
            format!("is {partial}, which this architecture does not support"),
        ));
    }
    let rotary_dim = (context.head_dim as f64 * partial) as usize;
    if rotary_dim < 2 || rotary_dim % 2 == 1 {
        return Err(parameters.error(
            "partial_rotary_factor",
            format!(
                "is {partial}: {rotary_dim} of {} channels would rotate, expected an even number",
                context.head_dim
            ),
        ));
    }
    let original = match original {
        Some(original) => original,
        None => parameters.size(
            "original_max_position_embeddings",
            context.max_positions,
            MAX_POSITIONS,
        )?,
    };
    let scaling = Scaling {
        parameters,
        theta,
        base: bases(theta, rotary_dim),
        original: original as f64,
        stretch: context.max_positions as f64 / original as f64,
    };

    let named = kind(parameters)?;
    let kind = match named {
        "su" | "yarn" if context.longrope_aliases => "longrope",
        other => other,
    };
    let (inverse_frequencies, attention_factor) = match kind {
        "default" | "mrope" | "dynamic" => (scaling.unscaled(), 1.0),
        "linear" => (scaling.linear()?, 1.0),
        "llama3" => (scaling.llama3()?, 1.0),
        "yarn" => scaling.yarn()?,
        "longrope" => scaling.longrope()?,
        other => {
            return Err(parameters.error(
                "rope_type",
                format!("is {}, supported are {KINDS}", shorten(other)),
            ));
        }
    };
    let attention_factor = attention_factor as f32;
    let sound = |x: f32| x.is_finite() && x > 0.0;
    if !inverse_frequencies.iter().copied().all(sound) || !sound(attention_factor) {
        return Err(parameters.error(
            "rope_type",
            format!(
                "is {}, whose values give no usable rotary frequencies",
                shorten(named)
            ),
        ));
    }
    Ok(Table {
        rope: RopeSpec {
            inverse_frequencies,
            attention_factor,
            rotary_dim,
            interleaved: false,
        },
        max_sequence: match kind {
            "dynamic" => Some(context.max_positions),
            "longrope" => Some(original),
            _ => None,
        },
    })
}

/// What the table is called.
pub(super) fn kind<'a>(parameters: &Keys<'a>) -> Result<&'a str> {
    match parameters.text("rope_type")? {
        Some(kind) => Ok(kind),
        None => Ok(parameters.text("type")?.unwrap_or("default")),
    }
}

/// Yarn's magnitude for a stretch by `factor`.
pub(super) fn magnitude(factor: f64, by: f64) -> f64 {
    match factor > 1.0 {
        true => 0.1 * by * factor.ln() + 1.0,
        false => 1.0,
    }
}

/// theta^(2i / dim) for each pair.
fn bases(theta: f64, dim: usize) -> Vec<f32> {
    let exponent = |i: usize| (2 * i) as f32 / dim as f32;
    (0..dim / 2).map(|i| (theta as f32).powf(exponent(i))).collect()
}

/// What the scalings share.
struct Scaling<'a> {
    parameters: &'a Keys<'a>,
    theta: f64,
    base: Vec<f32>,
    original: f64,
    /// How far the context is stretched, where `factor` is not given.
    stretch: f64,
}

impl Scaling<'_> {
    fn unscaled(&self) -> Vec<f32> {
        self.base.iter().map(|base| 1.0 / base).collect()
    }

    fn needed(&self, key: &str) -> Result<f64> {
        self.parameters
            .positive(key)?
            .ok_or_else(|| self.parameters.error(key, "is missing"))
    }

    fn or(&self, key: &str, default: f64) -> Result<f64> {
        Ok(self.parameters.positive(key)?.unwrap_or(default))
    }

    fn linear(&self) -> Result<Vec<f32>> {
        let factor = self.needed("factor")? as f32;
        Ok(self.base.iter().map(|base| 1.0 / base / factor).collect())
    }

    /// Long waves are divided by `factor`, short ones kept, those between are mixed.
    fn llama3(&self) -> Result<Vec<f32>> {
        let factor = self.needed("factor")? as f32;
        let low = self.needed("low_freq_factor")?;
        let high = self.needed("high_freq_factor")?;
        if high <= low {
            return Err(self.parameters.error(
                "high_freq_factor",
                format!("is {high}, expected more than `low_freq_factor` = {low}"),
            ));
        }
        let longest = (self.original / low) as f32;
        let shortest = (self.original / high) as f32;
        let scaled = |base: &f32| {
            let frequency = 1.0 / base;
            let wave = TAU as f32 / frequency;
            if wave > longest {
                frequency / factor
            } else if wave < shortest {
                frequency
            } else {
                let smooth = (self.original as f32 / wave - low as f32) / (high - low) as f32;
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        };
        Ok(self.base.iter().map(scaled).collect())
    }

    /// Pairs that turn often are kept, pairs that turn seldom are divided by `factor`, a ramp lies between.
    fn yarn(&self) -> Result<(Vec<f32>, f64)> {
        let factor = self.or("factor", self.stretch)?;
        let magnitude = |by: f64| magnitude(factor, by);
        let inferred = match (
            self.parameters.positive("mscale")?,
            self.parameters.positive("mscale_all_dim")?,
        ) {
            (Some(mscale), Some(all)) => magnitude(mscale) / magnitude(all),
            _ => magnitude(1.0),
        };
        let attention_factor = self.or("attention_factor", inferred)?;

        let dim = 2.0 * self.base.len() as f64;
        let pair_of = |turns: f64| dim * (self.original / (turns * TAU)).ln() / (2.0 * self.theta.ln());
        let mut low = pair_of(self.or("beta_fast", YARN_BETA_FAST)?);
        let mut high = pair_of(self.or("beta_slow", YARN_BETA_SLOW)?);
        if self.parameters.flag("truncate", true)? {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += YARN_MIN_WIDTH;
        }
        let scaled = |(i, base): (usize, &f32)| {
            let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            let keep = 1.0 - ramp;
            1.0 / (factor as f32 * base) * (1.0 - keep) + 1.0 / base * keep
        };
        let frequencies = self.base.iter().enumerate().map(scaled).collect();
        Ok((frequencies, attention_factor))
    }

    /// A factor of its own for each pair; the short ones, as sequences stay within the original length.
    fn longrope(&self) -> Result<(Vec<f32>, f64)> {
        let factor = self.or("factor", self.stretch)?;
        let inferred = match factor > 1.0 {
            true => (1.0 + factor.ln() / self.original.ln()).sqrt(),
            false => 1.0,
        };
        let attention_factor = self.or("attention_factor", inferred)?;
        let short = self.parameters.positives("short_factor", self.base.len())?;
        let scaled = |(base, factor): (&f32, f64)| 1.0 / (factor as f32 * base);
        let frequencies = self.base.iter().zip(short).map(scaled).collect();
        Ok((frequencies, attention_factor))
    }
}
