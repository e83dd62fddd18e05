//! What the user wants, as TOML or flags: pure data. A recipe never names a file of the user's machine.

use crate::error::{Error, Result};
use crate::numerics::factor::ColumnOrder;
use serde::{Deserialize, Serialize};

/// Bit widths that can be asked for.
pub const BITS: [u32; 4] = [2, 3, 4, 8];

/// The recipes that ship with the program, by name; their text is in `pipelines/recipes`.
pub const SHIPPED: [(&str, &str); 5] = [
    ("w4a16", include_str!("../pipelines/recipes/w4a16.toml")),
    ("w8a16", include_str!("../pipelines/recipes/w8a16.toml")),
    ("w3a16", include_str!("../pipelines/recipes/w3a16.toml")),
    (
        "w3a16-down4",
        include_str!("../pipelines/recipes/w3a16-down4.toml"),
    ),
    ("w2a16", include_str!("../pipelines/recipes/w2a16.toml")),
];

/// How codes are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Second-order, calibrated.
    Gptq,
    /// Round to nearest on searched scales; needs no calibration.
    Rtn,
}

/// How strongly a Hessian is damped before it is factored, as a share of its mean diagonal.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Damping {
    /// Whatever gives the smallest error on held-out statistics.
    Auto,
    /// This much.
    #[serde(untagged)]
    Fixed(f64),
}

impl Damping {
    /// What to try.
    pub fn candidates(self) -> Vec<f64> {
        match self {
            Self::Auto => vec![0.003, 0.01, 0.03, 0.1],
            Self::Fixed(share) => vec![share],
        }
    }
}

impl std::str::FromStr for Damping {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            text => text
                .parse()
                .map(Self::Fixed)
                .map_err(|_| "give a share of the mean diagonal, such as 0.01, or auto".into()),
        }
    }
}

/// What some linears have instead of the recipe's own values; what is left out stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scheme {
    /// Regular expressions: it is for the linears whose module name matches one.
    pub targets: Vec<String>,
    /// 2, 3, 4 or 8
    pub bits: Option<u32>,
    /// As [`Recipe::group_size`].
    pub group_size: Option<usize>,
    /// As [`Recipe::symmetric`].
    pub symmetric: Option<bool>,
}

/// A recipe: scheme, method and output format.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Recipe {
    /// 2, 3, 4 or 8
    pub bits: u32,
    /// Input features that share a scale; 0 for one scale a row (per channel).
    pub group_size: usize,
    /// Use the largest divisor of a width that is at most `group_size` where `group_size` itself does not divide it.
    pub group_fallback: bool,
    /// Fixed zero point.
    pub symmetric: bool,
    /// Column order of the sweep.
    pub actorder: ColumnOrder,
    /// Damping as a share of the Hessian's mean diagonal, or `auto`.
    pub damp_percent: Damping,
    /// α of the asymmetric target; 0 turns the full-precision stream off.
    pub match_original: f64,
    /// Rounds of scale refit and coordinate descent after the sweep; see [`Recipe::refine_rounds`] for the default.
    pub refine_rounds: Option<usize>,
    /// Sum the statistics of each expert of a mixture over all tokens, not only over those that are sent to it.
    pub all_experts: bool,
    /// How codes are chosen.
    pub method: Method,
    /// Regular expressions: linears whose module name matches one are left alone.
    pub ignore: Vec<String>,
    /// Name of the output format.
    pub format: String,
    /// Schemes of single linears, `[[scheme]]` in the file; the first that matches counts.
    #[serde(rename = "scheme", skip_serializing_if = "Vec::is_empty")]
    pub schemes: Vec<Scheme>,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            bits: 4,
            group_size: 128,
            group_fallback: false,
            symmetric: true,
            actorder: ColumnOrder::Static,
            damp_percent: Damping::Fixed(0.01),
            match_original: 0.5,
            refine_rounds: None,
            all_experts: false,
            method: Method::Gptq,
            ignore: Vec::new(),
            format: "compressed-tensors".into(),
            schemes: Vec::new(),
        }
    }
}

impl Recipe {
    /// A shipped recipe by name, or one in a `.toml` file.
    ///
    /// # Errors
    /// Neither, or a file with unknown or malformed keys.
    pub fn find(name: &str) -> Result<Self> {
        if let Some((_, text)) = SHIPPED.iter().find(|(shipped, _)| *shipped == name) {
            return Self::parse(name, text);
        }
        if !name.ends_with(".toml") {
            let names: Vec<_> = SHIPPED.iter().map(|(name, _)| *name).collect();
            return Err(Error::usage(
                "--recipe",
                format!("{name} is neither a shipped recipe nor a .toml file"),
                format!("use one of {}, or a file", names.join(", ")),
            ));
        }
        let path = std::path::Path::new(name);
        let text = std::fs::read_to_string(path).map_err(|source| Error::Io {
            action: "read",
            path: path.to_owned(),
            source,
        })?;
        Self::parse(name, &text)
    }

    /// As a `.toml` file, which [`Self::find`] reads.
    ///
    /// # Errors
    /// A value that TOML cannot hold.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|error| Error::invalid("recipe", error.to_string(), ""))
    }

    fn parse(name: &str, text: &str) -> Result<Self> {
        toml::from_str(text).map_err(|error| {
            Error::invalid(
                name,
                error.to_string().trim(),
                "compare with the recipes in pipelines/recipes",
            )
        })
    }

    /// Rounds of scale refit and coordinate descent: unless given, 2 with `match_original`, else none. Toward the original's
    /// activations they lower the divergence on held-out text; without, they raise it at 4 bits (benches/results).
    pub fn refine_rounds(&self) -> usize {
        self.refine_rounds
            .unwrap_or(if self.match_original > 0.0 { 2 } else { 0 })
    }

    /// Checks every value against its range.
    pub fn check(&self) -> Result<()> {
        let range = |flag: &str, ok: bool, wanted: &str| match ok {
            true => Ok(()),
            false => Err(Error::usage(flag, format!("must be {wanted}"), "")),
        };
        let schemes = || self.schemes.iter();
        let bits = [self.bits]
            .into_iter()
            .chain(schemes().filter_map(|scheme| scheme.bits));
        for bits in bits {
            range("--bits", BITS.contains(&bits), "2, 3, 4 or 8")?;
        }
        let sizes = [self.group_size].into_iter();
        for size in sizes.chain(schemes().filter_map(|scheme| scheme.group_size)) {
            range(
                "--group-size",
                size <= 65_536,
                "at most 65536; 0 means one scale a row",
            )?;
        }
        range(
            "--damp-percent",
            (self.damp_percent.candidates().iter()).all(|share| (0.0..=1.0).contains(share)),
            "between 0 and 1 (0.01 is 1 percent), or auto",
        )?;
        range(
            "--match-original",
            (0.0..=1.0).contains(&self.match_original),
            "between 0 and 1",
        )?;
        range("--refine", self.refine_rounds() <= 100, "at most 100 rounds")?;
        crate::formats::by_name(&self.format).map(drop)
    }
}
