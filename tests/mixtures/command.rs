//! The command on a mixture: its exit codes, its plan, and `kill -9`.

use super::{model, text};
use quantflow::pipelines::verify::verify;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Windows of token ids as an `.npy` file.
fn tokens(folder: &Path, windows: usize) -> PathBuf {
    let shape = format!("{{'descr': '<i4', 'fortran_order': False, 'shape': ({windows}, 24), }}");
    let header = format!("{shape:<117}\n");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    for batch in text(windows, 24, 11).batches {
        bytes.extend(batch.tokens.iter().flat_map(|token| token.to_le_bytes()));
    }
    let path = folder.join(format!("{windows}.npy"));
    quantflow::storage::write_whole(&path, &bytes).unwrap();
    path
}

fn command(verb: &str, tokens: &Path, output: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quantflow"));
    command.arg(verb).arg(model("deepseek_v3"));
    command
        .arg("--calibration-tokens")
        .arg(tokens)
        .arg("-o")
        .arg(output);
    command.args("--bits 8 --group-size 0 --json --fresh".split(' '));
    command
}

#[test]
fn too_few_tokens_are_a_warning_in_the_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for (windows, flags, code) in [(1, "", 3), (1, "--no-strict", 0), (8, "--all-experts", 0)] {
        let mut command = command("quantize", &tokens(folder.path(), windows), &at("out"));
        let result = command.args(flags.split_whitespace()).output().unwrap();
        let text = String::from_utf8_lossy(&result.stderr);
        assert_eq!(result.status.code(), Some(code), "{windows} {flags}: {text}");
    }
    let result = command("plan", &tokens(folder.path(), 64), &at("out"))
        .output()
        .unwrap();
    let plan: serde_json::Value = serde_json::from_slice(&result.stdout).unwrap();
    assert_eq!(plan["experts_per_step"], 8);
}

/// `kill -9` at random moments, then the same command to the end.
#[test]
fn a_killed_run_continues_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let tokens = tokens(folder.path(), 128);
    let quantize = |name: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quantflow"));
        command
            .arg("quantize")
            .arg(model("deepseek_v3"))
            .arg("-o")
            .arg(at(name));
        command.arg("--calibration-tokens").arg(&tokens);
        command.args("--bits 8 --group-size 0 --json --no-strict".split(' '));
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command
    };
    let digest = |name: &str| verify(&at(name), &model("deepseek_v3")).unwrap().output_digest;
    let begin = std::time::Instant::now();
    assert!(quantize("whole").status().unwrap().success());
    let taken = begin.elapsed();
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seed = seed.unwrap().as_nanos() as u64;
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let finished = || at("killed").join("config.json").exists() && !at("killed").join(".quantflow").exists();
    for _ in 0..6 {
        let mut child = quantize("killed").spawn().unwrap();
        std::thread::sleep(taken.mul_f64(f64::from(random.next_u32()) / f64::from(u32::MAX)));
        child.kill().unwrap();
        child.wait().unwrap();
        if finished() {
            break;
        }
    }
    if !finished() {
        assert!(quantize("killed").status().unwrap().success(), "seed {seed}");
    }
    assert_eq!(digest("killed"), digest("whole"), "seed {seed}");
}
