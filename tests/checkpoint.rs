//! Hostile and damaged checkpoints: an error that names the file, never a panic.
#![allow(clippy::disallowed_methods)] // damage is the point

use proptest::prelude::*;
use quantflow::checkpoint::Checkpoint;
use std::path::Path;

fn folder_with(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

fn shard(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

fn refuse(files: &[(&str, &[u8])], expect: &str) {
    let folder = folder_with(files);
    let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains(expect), "{error:?} does not say {expect:?}");
}

/// Resident bytes of the mapping of a file, from what the system says of each.
#[cfg(target_os = "linux")]
fn resident_bytes(path: &Path) -> usize {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mapping = maps.split_once(path.to_str().unwrap()).expect("it is mapped").1;
    let line = mapping.lines().find(|line| line.starts_with("Rss:")).unwrap();
    let kilobytes: usize = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kilobytes << 10
}

#[cfg(target_os = "linux")]
#[test]
fn what_was_read_is_not_resident() {
    const TENSORS: usize = 300;
    const BYTES: usize = 100_000;
    let entry = |i: usize| {
        let (begin, end) = (i * BYTES, (i + 1) * BYTES);
        format!(r#""t{i}":{{"dtype":"U8","shape":[1000,100],"data_offsets":[{begin},{end}]}}"#)
    };
    let entries: Vec<String> = (0..TENSORS).map(entry).collect();
    let mut bytes = shard(&format!("{{{}}}", entries.join(",")), 0);
    let first = bytes.len();
    bytes.extend((0..TENSORS * BYTES).map(|i| (i / 100) as u8));
    let folder = folder_with(&[("config.json", b"{}"), ("model.safetensors", &bytes)]);
    let path = folder.path().join("model.safetensors");
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let opened = resident_bytes(&path);
    checkpoint.digest();
    let left = resident_bytes(&path);
    assert!(
        left <= opened.max(1 << 20),
        "{left} bytes of {TENSORS} tensors stay"
    );
    // The last tensor's last rows, and some twice.
    let rows: Vec<u32> = (0..1000).rev().chain([5, 999]).collect();
    let name = format!("t{}", TENSORS - 1);
    let expected = rows.iter().flat_map(|&row| {
        let begin = first + (TENSORS - 1) * BYTES + row as usize * 100;
        bytes[begin..begin + 100].iter().copied()
    });
    assert!(expected.eq(checkpoint.rows(&name, &rows).unwrap()));
    assert!(
        checkpoint
            .rows(&name, &[1000])
            .unwrap_err()
            .to_string()
            .contains("1000 rows")
    );
    let left = resident_bytes(&path);
    assert!(left <= opened.max(1 << 20), "{left} bytes stay");
}

#[test]
fn damaged_checkpoints_are_refused_by_file() {
    let good = shard(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8);
    let config: (&str, &[u8]) = ("config.json", b"{}");
    refuse(&[], "config.json");
    refuse(&[config], "holds no *.safetensors");
    refuse(
        &[("config.json", b"{"), ("model.safetensors", &good)],
        "not valid JSON",
    );
    refuse(&[config, ("model.safetensors", b"")], "empty");
    refuse(
        &[config, ("model.safetensors", &good[..good.len() - 1])],
        "model.safetensors",
    );
    refuse(
        &[config, ("model.safetensors", &u64::MAX.to_le_bytes())],
        "not a valid safetensors",
    );
    for header in [
        r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#,
        r#"{"a":{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,8]}}"#,
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#,
        r#"{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}"#,
        "[]",
    ] {
        refuse(
            &[config, ("model.safetensors", &shard(header, 8))],
            "model.safetensors",
        );
    }
    refuse(
        &[config, ("a.safetensors", &good), ("b.safetensors", &good)],
        "is also in",
    );
    let index = |file: &str| format!(r#"{{"weight_map":{{"a":"{file}"}}}}"#).into_bytes();
    for file in [
        "../model.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "model.bin",
        "",
    ] {
        refuse(
            &[
                config,
                ("model.safetensors", &good),
                ("model.safetensors.index.json", &index(file)),
            ],
            "not a .safetensors file",
        );
    }
    let other = br#"{"weight_map":{"b":"model.safetensors"}}"#;
    refuse(
        &[
            config,
            ("model.safetensors", &good),
            ("model.safetensors.index.json", other),
        ],
        "does not hold it",
    );
    let folder = folder_with(&[config, ("model.safetensors", &good)]);
    assert_eq!(
        Checkpoint::open(folder.path())
            .unwrap()
            .tensor("a")
            .unwrap()
            .bytes
            .len(),
        8
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn random_headers_never_panic(header in "[\\PC\\[\\]{}:,\"0-9a-z_]{0,80}", data in 0usize..40, cut in 0usize..60) {
        let mut bytes = shard(&header, data);
        bytes.truncate(bytes.len().saturating_sub(cut));
        let folder = folder_with(&[("config.json", b"{}"), ("model.safetensors", &bytes)]);
        let _ = Checkpoint::open(Path::new(folder.path()));
    }
}
