//! What can be typed.

use crate::device::{DeviceChoice, Placement};
use crate::error::{Error, Result};
use crate::numerics::factor::ColumnOrder;
use crate::recipe::{Damping, Method, Recipe};
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Quantize large language and multimodal checkpoints: calibrated with text, exact, resumable, in little memory.
///
/// Begin with `quantflow demo`: it quantizes the small multimodal model that ships with the repository and says what that cost.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 110)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub command: Command,
    /// Log filter: error, warn, info, debug, or per module (also RUST_LOG)
    #[arg(long, global = true, value_name = "FILTER")]
    pub log: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Quantize the shipped tiny multimodal model with text, and compare before and after
    Demo(DemoArguments),
    /// Quantize a Hugging Face checkpoint directory
    ///
    /// Example: quantflow quantize ./Qwen3-8B -o ./Qwen3-8B-W4 --calibration texts.jsonl
    ///
    /// Vision towers, projectors and heads are left as they are, byte for byte.
    Quantize(QuantizeArguments),
    /// Say what `quantize` would do, and how much memory it would take; runs nothing
    Plan(QuantizeArguments),
    /// Sum the statistics of a model once; add text, take it back, merge; quantize from them as often as you like
    #[command(subcommand)]
    Statistics(StatisticsCommand),
    /// Quantize from statistics: any recipe, no calibration text, no forward pass
    ///
    /// Example: quantflow solve ./Qwen3-8B --statistics ./statistics -o ./Qwen3-8B-W3 --bits 3
    Solve(SolveArguments),
    /// Solve several bit widths and group sizes from one artifact, and print a table of size and quality
    ///
    /// Example: quantflow sweep ./Qwen3-8B --statistics ./statistics --bits 4,3 --group-size 64,128 --text held-out.txt
    Sweep(SweepArguments),
    /// Compare a quantized checkpoint with its original on text: perplexity, KL, top-1 agreement
    Evaluate(EvaluateArguments),
    /// Read an output back: every tensor accounted for, copies byte-identical, digest as recorded
    Verify(VerifyArguments),
    /// Describe a checkpoint, a statistics artifact or an unfinished run
    Inspect(InspectArguments),
    /// Write the logits of a checkpoint for given tokens (for interoperability tests)
    #[command(hide = true)]
    Logits(LogitsArguments),
}

#[derive(Debug, Args)]
pub(super) struct CalibrationArguments {
    /// Texts: .jsonl .json .txt .csv .parquet, plain `text` rows or conversations; or names in --dataset-dir
    #[arg(long, num_args = 1.., value_name = "PATH", help_heading = "Calibration")]
    pub calibration: Vec<String>,
    /// Folder with dataset_info.json (LLaMA-Factory's schema)
    #[arg(long, value_name = "DIR", help_heading = "Calibration")]
    pub dataset_dir: Option<PathBuf>,
    /// Sequences to calibrate with
    #[arg(long, default_value_t = 128, value_name = "N", help_heading = "Calibration")]
    pub samples: usize,
    /// Tokens of a sequence; short documents are packed
    #[arg(
        long,
        default_value_t = 2048,
        value_name = "TOKENS",
        help_heading = "Calibration"
    )]
    pub length: usize,
    /// 0: documents in file order; else shuffled with this seed
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Calibration")]
    pub seed: u64,
    /// Exactly these token ids: int32 or int64 [sequences, length]
    #[arg(
        long,
        value_name = "FILE.npy",
        conflicts_with = "calibration",
        help_heading = "Calibration"
    )]
    pub calibration_tokens: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct SchemeArguments {
    /// w4a16, w8a16, w3a16, w3a16-down4, w2a16, or a .toml file; flags override it
    #[arg(
        long,
        default_value = "w4a16",
        value_name = "NAME|FILE",
        help_heading = "Scheme"
    )]
    pub recipe: String,
    /// 2, 3, 4 or 8
    #[arg(long, value_name = "N", help_heading = "Scheme")]
    pub bits: Option<u32>,
    /// Inputs that share a scale; 0 or -1: one scale a row
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = group_size, help_heading = "Scheme")]
    pub group_size: Option<usize>,
    /// Where the group size does not divide a width, use its largest divisor that fits, and say so
    #[arg(long, help_heading = "Scheme")]
    pub group_fallback: bool,
    /// Fixed zero points (what Marlin kernels want)
    #[arg(long, conflicts_with = "asymmetric", help_heading = "Scheme")]
    pub symmetric: bool,
    /// Searched zero points
    #[arg(long, help_heading = "Scheme")]
    pub asymmetric: bool,
    /// Column order: by descending Hessian diagonal, or as they come
    #[arg(long, value_name = "ORDER", help_heading = "Scheme")]
    pub actorder: Option<ActOrder>,
    /// Damping as a share of the Hessian's mean diagonal, or auto: by the error on held-out statistics (solve)
    #[arg(long, value_name = "F", help_heading = "Scheme")]
    pub damp_percent: Option<Damping>,
    /// Regular expressions: linears to leave alone besides heads, vision towers, projectors
    #[arg(long, num_args = 1.., value_name = "REGEX", help_heading = "Scheme")]
    pub ignore: Vec<String>,
    /// Rounds of scale refit and coordinate descent after GPTQ; default: 2, or none with --match-original 0
    #[arg(long, value_name = "N", help_heading = "Scheme")]
    pub refine: Option<usize>,
    /// compressed-tensors, gptq or gptq-v2
    #[arg(long, value_name = "NAME", help_heading = "Output")]
    pub format: Option<String>,
    /// Bytes of tensor data in a file: 5GB, 512MiB, …
    #[arg(long, default_value = "5GB", value_parser = bytes, value_name = "BYTES", help_heading = "Output")]
    pub max_shard_size: u64,
}

#[derive(Debug, Args)]
pub(super) struct AllocationArguments {
    /// Choose each linear's bits from 2, 3, 4 and 8: at most so many code bits a weight on average (scales not counted), least KL
    #[arg(long, value_name = "F", conflicts_with = "bits", help_heading = "Scheme")]
    pub average_bits: Option<f64>,
    /// With --average-bits: quantflow_sensitivity.json of an earlier output, instead of measuring anew
    #[arg(long, value_name = "FILE", requires = "average_bits", help_heading = "Scheme")]
    pub sensitivity: Option<PathBuf>,
    /// With --average-bits: windows to measure on, evenly spaced over those given
    #[arg(long, default_value_t = 4, value_name = "N", help_heading = "Scheme")]
    pub windows: usize,
}

/// What checkpoints are compared on.
#[derive(Debug, Args)]
#[command(next_help_heading = "Evaluation")]
pub(super) struct WindowArguments {
    /// Text to compare with the original on: any calibration format
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Exactly these token ids: int32 or int64 [windows, length]
    #[arg(long, value_name = "FILE.npy", conflicts_with = "text")]
    pub tokens: Option<PathBuf>,
    /// Tokens of a window of --text
    #[arg(long, default_value_t = 512, value_name = "TOKENS")]
    pub length: usize,
    /// Only the first N windows
    #[arg(long, value_name = "N")]
    pub windows: Option<usize>,
}

#[derive(Debug, Args)]
pub(super) struct ResourceArguments {
    /// Resident memory to stay within: 2GiB, …
    #[arg(long, value_parser = bytes, value_name = "BYTES", help_heading = "Resources")]
    pub memory: Option<u64>,
    /// Where activations and large matrices go that do not fit; default: the output directory
    #[arg(long, value_name = "DIR", help_heading = "Resources")]
    pub scratch: Option<PathBuf>,
    /// auto, cpu, cuda or cuda:1; auto is the first CUDA device of a build with one, else the CPU
    #[arg(
        long,
        default_value = "auto",
        value_name = "DEVICE",
        help_heading = "Resources"
    )]
    pub device: DeviceChoice,
    /// Memory of the device to stay within: 20GiB, …; default: what is free there
    #[arg(long, value_parser = bytes, value_name = "BYTES", help_heading = "Resources")]
    pub device_memory: Option<u64>,
    /// Worker threads; default: one a core. Any number gives the same bytes
    #[arg(long, value_name = "N", help_heading = "Resources")]
    pub workers: Option<usize>,
}

#[derive(Debug, Args)]
pub(super) struct FinishArguments {
    /// Forget an unfinished run, or replace an output of quantflow
    #[arg(long)]
    pub fresh: bool,
    /// Exit with 0 even if a row of the report passed its threshold
    #[arg(long)]
    pub no_strict: bool,
    /// Exit with 3 if a row of the report passed its threshold (the default)
    #[arg(long, conflicts_with = "no_strict")]
    pub strict: bool,
    /// One JSON object on stdout instead of text
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub(super) struct QuantizeArguments {
    /// Checkpoint directory: config.json, *.safetensors, tokenizer.json
    pub model: PathBuf,
    /// Output directory: new, empty, or holding an unfinished run of the same command
    #[arg(short, long, value_name = "OUT")]
    pub output: Option<PathBuf>,
    #[command(flatten)]
    pub calibration: CalibrationArguments,
    #[command(flatten)]
    pub scheme: SchemeArguments,
    /// gptq (calibrated) or rtn (no calibration)
    #[arg(long, value_name = "METHOD", help_heading = "Scheme")]
    pub method: Option<MethodName>,
    /// Where calibration activations come from: the model with earlier blocks already quantized, or the original (see `statistics`)
    #[arg(
        long,
        default_value = "sequential",
        value_name = "MODE",
        help_heading = "Scheme"
    )]
    pub activations: Activations,
    /// Pull every layer toward the original model's activations: 0 to 1; 0 saves its forward pass
    #[arg(long, value_name = "F", help_heading = "Scheme")]
    pub match_original: Option<f64>,
    /// Sum the statistics of each expert of a mixture over all tokens, not only over those that are sent to it
    #[arg(long, help_heading = "Calibration")]
    pub all_experts: bool,
    #[command(flatten)]
    pub allocation: AllocationArguments,
    #[command(flatten)]
    pub resources: ResourceArguments,
    #[command(flatten)]
    pub finish: FinishArguments,
}

#[derive(Debug, Args)]
pub(super) struct SolveArguments {
    /// Checkpoint directory that the statistics are of
    pub model: PathBuf,
    /// The artifact: see `quantflow statistics`
    #[arg(long, value_name = "DIR")]
    pub statistics: PathBuf,
    /// Output directory: new, empty, or holding an unfinished run of the same command
    #[arg(short, long, value_name = "OUT")]
    pub output: PathBuf,
    #[command(flatten)]
    pub scheme: SchemeArguments,
    #[command(flatten)]
    pub allocation: AllocationArguments,
    /// With --average-bits: text to measure on, any calibration format
    #[arg(long, value_name = "FILE", requires = "average_bits", help_heading = "Scheme")]
    pub text: Option<PathBuf>,
    /// With --average-bits: token ids to measure on, int32 or int64 [windows, length]
    #[arg(long, value_name = "FILE.npy", requires = "average_bits", conflicts_with_all = ["text", "sensitivity"], help_heading = "Scheme")]
    pub tokens: Option<PathBuf>,
    /// Tokens of a window of --text
    #[arg(long, default_value_t = 512, value_name = "TOKENS", help_heading = "Scheme")]
    pub length: usize,
    #[command(flatten)]
    pub resources: ResourceArguments,
    #[command(flatten)]
    pub finish: FinishArguments,
}

#[derive(Debug, Args)]
pub(super) struct SweepArguments {
    /// Checkpoint directory that the statistics are of
    pub model: PathBuf,
    /// The artifact: see `quantflow statistics`
    #[arg(long, value_name = "DIR")]
    pub statistics: PathBuf,
    /// Bit widths to try
    #[arg(long, value_delimiter = ',', default_values_t = [4, 3, 2], value_name = "N,…", help_heading = "Scheme")]
    pub bits: Vec<u32>,
    /// Group sizes to try with each; 0 or -1: one scale a row
    #[arg(long, value_delimiter = ',', default_values_t = [32, 64, 128], value_name = "N,…", allow_negative_numbers = true, value_parser = group_size, help_heading = "Scheme")]
    pub group_size: Vec<usize>,
    /// What else the schemes have: a shipped recipe, or a .toml file; its bits and group size do not count
    #[arg(
        long,
        default_value = "w4a16",
        value_name = "NAME|FILE",
        help_heading = "Scheme"
    )]
    pub recipe: String,
    /// Where a group size does not divide a width, use its largest divisor that fits
    #[arg(long, help_heading = "Scheme")]
    pub group_fallback: bool,
    /// Keep the quantized checkpoints here, a folder each; default: they are removed
    #[arg(short, long, value_name = "DIR")]
    pub output: Option<PathBuf>,
    #[command(flatten)]
    pub windows: WindowArguments,
    #[command(flatten)]
    pub resources: ResourceArguments,
    /// One JSON object on stdout instead of text
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub(super) enum StatisticsCommand {
    /// Sum the statistics of a model over calibration text into a new artifact
    ///
    /// Example: quantflow statistics collect ./Qwen3-8B -o ./statistics --calibration texts.jsonl
    Collect(CollectArguments),
    /// Add calibration text to an artifact: only what is new is run
    Add(ChangeArguments),
    /// Take calibration text out of an artifact, without a trace: give the files and flags with which it was added
    Retract(ChangeArguments),
    /// Add up artifacts of one model that were made from different texts, perhaps on different machines
    Merge(MergeArguments),
    /// Say what an artifact holds, and check its files
    Inspect(InspectArguments),
}

#[derive(Debug, Args)]
pub(super) struct CollectArguments {
    /// Checkpoint directory: config.json, *.safetensors, tokenizer.json
    pub model: PathBuf,
    /// The artifact's directory: new, empty, or holding an unfinished run of the same command
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    #[command(flatten)]
    pub calibration: CalibrationArguments,
    #[command(flatten)]
    pub resources: ResourceArguments,
    /// Share of the batches to keep apart: `solve` measures on them, and chooses damping by them
    #[arg(
        long,
        default_value_t = 0.0,
        value_name = "SHARE",
        help_heading = "Calibration"
    )]
    pub held_out: f64,
    /// Sum the statistics of each expert of a mixture over all tokens, not only over those that are sent to it
    #[arg(long, help_heading = "Calibration")]
    pub all_experts: bool,
    /// Forget an unfinished run, or replace an artifact
    #[arg(long)]
    pub fresh: bool,
    /// One JSON object on stdout instead of text
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub(super) struct ChangeArguments {
    /// Checkpoint directory that the statistics are of
    pub model: PathBuf,
    /// The artifact's directory
    #[arg(long, value_name = "DIR")]
    pub statistics: PathBuf,
    #[command(flatten)]
    pub calibration: CalibrationArguments,
    #[command(flatten)]
    pub resources: ResourceArguments,
    /// Forget an unfinished change
    #[arg(long)]
    pub fresh: bool,
    /// One JSON object on stdout instead of text
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub(super) struct MergeArguments {
    /// Artifacts
    #[arg(required = true, num_args = 2.., value_name = "DIR")]
    pub parts: Vec<PathBuf>,
    /// The new artifact's directory
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// Replace an artifact
    #[arg(long)]
    pub fresh: bool,
    /// One JSON object on stdout instead of text
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum ActOrder {
    Static,
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum MethodName {
    Gptq,
    Rtn,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Activations {
    Sequential,
    Independent,
}

#[derive(Debug, Args)]
pub(super) struct EvaluateArguments {
    /// The quantized checkpoint
    pub model: PathBuf,
    /// The original checkpoint
    #[arg(long, value_name = "ORIGINAL")]
    pub reference: PathBuf,
    #[command(flatten)]
    pub windows: WindowArguments,
    /// auto, cpu, cuda or cuda:1; auto is the first CUDA device of a build with one, else the CPU
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    pub device: DeviceChoice,
    /// Worker threads; default: one a core
    #[arg(long, value_name = "N")]
    pub workers: Option<usize>,
    /// One JSON object on stdout instead of text
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub(super) struct VerifyArguments {
    /// The output of `quantize`
    pub output: PathBuf,
    /// The checkpoint that it was made from
    #[arg(long, value_name = "MODEL")]
    pub source: PathBuf,
    /// One JSON object on stdout instead of text
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub(super) struct InspectArguments {
    /// A checkpoint, a statistics artifact, or the folder of an unfinished run
    pub path: PathBuf,
    /// One JSON object on stdout instead of text
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub(super) struct LogitsArguments {
    pub model: PathBuf,
    #[arg(long)]
    pub tokens: PathBuf,
    #[arg(short, long)]
    pub output: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct DemoArguments {
    /// Folder of the tiny model and its data; default: the one in the repository
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Keep the quantized checkpoint here
    #[arg(short, long, value_name = "OUT")]
    pub output: Option<PathBuf>,
    /// 2, 3, 4 or 8
    #[arg(long, default_value_t = 4, value_name = "N")]
    pub bits: u32,
    /// One JSON object on stdout instead of text
    #[arg(long)]
    pub json: bool,
}

impl SchemeArguments {
    /// The recipe that was named, with the flags that were given over it.
    pub(super) fn resolve(&self) -> Result<Recipe> {
        let mut recipe = Recipe::find(&self.recipe)?;
        recipe.bits = self.bits.unwrap_or(recipe.bits);
        recipe.group_size = self.group_size.unwrap_or(recipe.group_size);
        recipe.refine_rounds = self.refine.or(recipe.refine_rounds);
        recipe.group_fallback |= self.group_fallback;
        recipe.symmetric = !self.asymmetric && (self.symmetric || recipe.symmetric);
        if let Some(order) = self.actorder {
            recipe.actorder = match order {
                ActOrder::Static => ColumnOrder::Static,
                ActOrder::None => ColumnOrder::None,
            };
        }
        recipe.damp_percent = self.damp_percent.unwrap_or(recipe.damp_percent);
        recipe.ignore.extend(self.ignore.iter().cloned());
        if let Some(format) = &self.format {
            recipe.format.clone_from(format);
        }
        Ok(recipe)
    }
}

impl QuantizeArguments {
    /// Whether statistics of the original model are collected first.
    pub(super) fn collects(&self) -> bool {
        self.activations == Activations::Independent && self.method != Some(MethodName::Rtn)
    }

    /// The recipe that was named, with the flags that were given over it.
    pub(super) fn resolve(&self) -> Result<Recipe> {
        let mut recipe = self.scheme.resolve()?;
        if let Some(method) = self.method {
            recipe.method = match method {
                MethodName::Gptq => Method::Gptq,
                MethodName::Rtn => Method::Rtn,
            };
        }
        recipe.all_experts |= self.all_experts;
        recipe.match_original = match (self.activations, self.match_original) {
            (Activations::Sequential, flag) => flag.unwrap_or(recipe.match_original),
            (Activations::Independent, None | Some(0.0)) => 0.0,
            (Activations::Independent, Some(_)) => {
                return Err(Error::usage(
                    "--match-original",
                    "needs the quantized model's activations beside the original's",
                    "leave it out, or use --activations sequential",
                ));
            }
        };
        recipe.check()?;
        Ok(recipe)
    }
}

impl SolveArguments {
    /// The recipe that was named, with the flags that were given over it.
    pub(super) fn resolve(&self) -> Result<Recipe> {
        let mut recipe = self.scheme.resolve()?;
        // The artifact knows the original model's inputs alone.
        recipe.match_original = 0.0;
        recipe.check()?;
        Ok(recipe)
    }
}

impl ResourceArguments {
    /// Worker threads.
    ///
    /// # Errors
    /// Their number is out of range.
    pub(super) fn workers(&self) -> Result<usize> {
        workers(self.workers)
    }

    /// The device.
    ///
    /// # Errors
    /// It is not there; or there is a budget for the device of a run on the CPU.
    pub(super) fn placement(&self) -> Result<Placement> {
        // `auto` may end on the CPU: then nothing is on a device, within any budget.
        match (self.device, self.device_memory) {
            (DeviceChoice::Cpu, Some(_)) => Err(Error::usage(
                "--device-memory",
                "--device cpu runs on the CPU",
                "leave --device-memory out; --memory is the budget of the machine's own",
            )),
            (device, _) => Placement::open(device),
        }
    }
}

/// One worker a core.
pub(super) fn workers(flag: Option<usize>) -> Result<usize> {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    match flag.unwrap_or_else(cores) {
        workers @ 1..=256 => Ok(workers),
        other => Err(Error::usage(
            "--workers",
            format!("{other} is not between 1 and 256"),
            "",
        )),
    }
}

/// A group size; other tools write -1 for one scale a row.
fn group_size(text: &str) -> Result<usize, String> {
    match text {
        "-1" => Ok(0),
        text => text
            .parse()
            .map_err(|_| "give a number of inputs, or 0 for one scale a row".into()),
    }
}

/// `5GB`, `512MiB`, `1000000`
fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic()).trim();
    let unit: u64 = match text[text.trim_end_matches(|c: char| c.is_ascii_alphabetic()).len()..]
        .to_ascii_lowercase()
        .as_str()
    {
        "" | "b" => 1,
        "k" | "kb" => 1_000,
        "m" | "mb" => 1_000_000,
        "g" | "gb" => 1_000_000_000,
        "t" | "tb" => 1_000_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        other => return Err(format!("{other} is not a unit: use KB, MB, GB, KiB, MiB, GiB")),
    };
    let number: f64 = digits
        .parse()
        .map_err(|_| format!("{text} is not a number of bytes: try 2GiB"))?;
    let value = number * unit as f64;
    if (1.0..1e18).contains(&value) {
        Ok(value as u64)
    } else {
        Err(format!("{text} is out of range"))
    }
}
