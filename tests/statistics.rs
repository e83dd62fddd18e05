//! The statistics artifact: sums that add up, and can be taken away, to the byte.

use crate::watch::Watch;
use proptest::prelude::*;
use quantflow::artifact::{Artifact, HEADER};
use quantflow::calibration::{self, ContentId, Documents, Placed, Source};
use quantflow::error::Result;
use quantflow::memory::Room;
use quantflow::operators::groups::changed_groups;
use quantflow::pipelines::quantize::{collected, quantize};
use quantflow::pipelines::resolve;
use quantflow::pipelines::statistics::{Change, Job, Summary, merge_artifacts, update};
use quantflow::pipelines::verify::verify;
use quantflow::pipelines::{folder, job};
use quantflow::recipe::{Damping, Recipe, Scheme};
use quantflow::report::{Observer, Row, Silent};
use quantflow::storage;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/tiny-vl")
        .join(name)
}

/// Rows of the calibration text as a file of their own.
fn rows(folder: &Path, name: &str, rows: std::ops::Range<usize>) -> PathBuf {
    let text = std::fs::read_to_string(fixture("data/text_calib.jsonl")).unwrap();
    let lines: Vec<&str> = text.lines().skip(rows.start).take(rows.len()).collect();
    assert_eq!(lines.len(), rows.len());
    let path = folder.join(name);
    storage::write_whole(&path, (lines.join("\n") + "\n").as_bytes()).unwrap();
    path
}

/// Rows before `at`, and those from there to `end`, as two files.
pub(crate) fn two_files(folder: &Path, at: usize, end: usize) -> (PathBuf, PathBuf) {
    (rows(folder, "a.jsonl", 0..at), rows(folder, "b.jsonl", at..end))
}

fn read(files: &[&Path]) -> Documents {
    let source = Source {
        names: files.iter().map(|file| file.display().to_string()).collect(),
        samples: 640,
        length: 128,
        ..Source::default()
    };
    calibration::documents(&source, &fixture("model"), 2048).unwrap()
}

pub(crate) fn job(change: Change, folder: &Path, files: &[&Path]) -> Job {
    Job {
        workers: 2,
        ..Job::new(fixture("model"), folder.to_owned(), change, read(files))
    }
}

pub(crate) fn run(job: &Job) -> Result<Summary> {
    let observer: Arc<dyn Observer> = Arc::new(Silent);
    let summary = update(job, &observer, &Arc::default())?;
    let (asked, planned) = (summary.asked_peak_host_bytes, summary.plan_peak_host_bytes);
    assert!(
        asked <= planned,
        "asked for {asked} bytes where {planned} were planned"
    );
    Ok(summary)
}

/// Every file of an artifact but its header, whose source numbers tell the order of the changes.
pub(crate) fn sums(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    entries
        .filter(|path| !path.ends_with(HEADER))
        .map(|path| {
            (
                path.file_name().unwrap().to_string_lossy().into_owned(),
                std::fs::read(&path).unwrap(),
            )
        })
        .collect()
}

fn all(folder: &Path) -> (BTreeMap<String, Vec<u8>>, Vec<u8>) {
    (sums(folder), std::fs::read(folder.join(HEADER)).unwrap())
}

#[test]
fn sums_are_the_same_to_the_byte_however_they_came_about() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (a, b) = two_files(folder.path(), 20, 50);
    let only_b = run(&job(Change::Collect, &at("b"), &[&b])).unwrap();
    let only_a = run(&job(Change::Collect, &at("a"), &[&a])).unwrap();
    assert_ne!(only_a.digest, only_b.digest);
    assert!(only_b.batches > 1 && only_b.documents == 30, "{only_b:?}");

    // Add A, add B, retract A.
    run(&job(Change::Collect, &at("x"), &[&a])).unwrap();
    let both = run(&job(Change::Add, &at("x"), &[&b])).unwrap();
    assert_eq!(both.batches_run as u64, only_b.batches, "only what is new runs");
    let rest = run(&job(Change::Retract, &at("x"), &[&a])).unwrap();
    assert_eq!((&rest.digest, rest.tokens), (&only_b.digest, only_b.tokens));
    assert_eq!(sums(&at("x")), sums(&at("b")));

    // Any order, any number of workers, at once, merged.
    run(&job(Change::Collect, &at("ba"), &[&b])).unwrap();
    let reverse = run(&job(Change::Add, &at("ba"), &[&a])).unwrap();
    assert_eq!(reverse.digest, both.digest);
    for workers in [1, 2, 4] {
        let output = at(&format!("at-once-{workers}"));
        let at_once = Job {
            workers,
            ..job(Change::Collect, &output, &[&a, &b])
        };
        assert_eq!(run(&at_once).unwrap().digest, both.digest, "{workers} workers");
        assert_eq!(sums(&output), sums(&at("ba")));
    }
    let merged = merge_artifacts(&[at("b"), at("a")], &at("merged"), false).unwrap();
    assert_eq!(merged.header.digest(), both.digest);
    assert_eq!(sums(&at("merged")), sums(&at("ba")));
    merged.verify().unwrap();
    // What a merge holds can be taken away like what was added.
    let rest = run(&job(Change::Retract, &at("merged"), &[&b])).unwrap();
    assert_eq!(rest.digest, only_a.digest);
}

/// A bit that the disk has lost: the names of what is made of it would vouch for it.
#[test]
fn sums_that_are_damaged_are_not_built_upon() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (a, b) = two_files(folder.path(), 16, 32);
    run(&job(Change::Collect, &at("s"), &[&a])).unwrap();
    run(&job(Change::Collect, &at("other"), &[&b])).unwrap();
    let block = at("s").join(&Artifact::open(&at("s")).unwrap().header.blocks[1]);
    let mut bytes = std::fs::read(&block).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    storage::write_whole(&block, &bytes).unwrap();
    let before = all(&at("s"));
    let added = run(&job(Change::Add, &at("s"), &[&b])).map(|_| ());
    let taken = run(&job(Change::Retract, &at("s"), &[&a])).map(|_| ());
    let merged = merge_artifacts(&[at("other"), at("s")], &at("merged"), false).map(|_| ());
    for outcome in [added, taken, merged] {
        let error = outcome.unwrap_err();
        assert!(
            error.to_string().contains(&block.display().to_string()),
            "{error}"
        );
        assert!(error.hint().is_some_and(|hint| hint.contains("anew")), "{error}");
    }
    assert_eq!(all(&at("s")), before);
    assert!(!at("merged").exists());
}

#[test]
fn what_does_not_add_up_is_an_error_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (a, b) = two_files(folder.path(), 16, 32);
    run(&job(Change::Collect, &at("s"), &[&a])).unwrap();
    run(&job(Change::Collect, &at("other"), &[&b])).unwrap();
    let before = all(&at("s"));
    let refused = |job: &Job, words: &str| {
        let error = run(job).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        assert!(error.hint().is_some_and(|hint| !hint.is_empty()), "{error}");
        assert_eq!(all(&at("s")), before, "{words}");
    };
    refused(
        &job(Change::Add, &at("s"), &[&a]),
        "holds all these documents already",
    );
    refused(&job(Change::Retract, &at("s"), &[&b]), "does not hold document");
    refused(
        &job(Change::Collect, &at("s"), &[&b]),
        "holds an artifact already",
    );
    // A part of a group: what stays would have to be packed anew, and was not given.
    let part = rows(folder.path(), "part.jsonl", 0..3);
    refused(&job(Change::Retract, &at("s"), &[&part]), "packed with documents");
    let twice = merge_artifacts(&[at("s"), at("s")], &at("twice"), false).unwrap_err();
    assert!(twice.to_string().contains("already"), "{twice}");
    assert!(!at("twice").exists() || std::fs::read_dir(at("twice")).unwrap().next().is_none());

    // A folder that is read is not emptied; a text that two later parts share is found, too.
    for (name, other) in [("left", "A cat sits."), ("right", "It rains.")] {
        let file = folder.path().join(format!("{name}.jsonl"));
        let lines = ["A text of both.", other].map(|text| serde_json::json!({"text": text}).to_string());
        storage::write_whole(&file, lines.join("\n").as_bytes()).unwrap();
        run(&job(Change::Collect, &at(name), &[&file])).unwrap();
    }
    let into_itself = merge_artifacts(&[at("s"), at("other")], &at("s"), true).unwrap_err();
    assert!(
        into_itself.to_string().contains("one of the parts"),
        "{into_itself}"
    );
    assert_eq!(all(&at("s")), before);
    let shared = merge_artifacts(&[at("s"), at("left"), at("right")], &at("shared"), false).unwrap_err();
    assert!(shared.to_string().contains("another part holds"), "{shared}");

    // Another model, another tokenizer, another prefix.
    let change = |edit: &dyn Fn(&mut serde_json::Value)| {
        let mut header: serde_json::Value = serde_json::from_slice(&before.1).unwrap();
        edit(&mut header["origin"]);
        storage::write_json(&at("s").join(HEADER), &header).unwrap();
        let changed = all(&at("s"));
        let error = run(&job(Change::Add, &at("s"), &[&b])).unwrap_err().to_string();
        let merged = merge_artifacts(&[at("other"), at("s")], &at("mixed"), false).unwrap_err();
        assert_eq!(all(&at("s")), changed);
        storage::write_whole(&at("s").join(HEADER), &before.1).unwrap();
        assert!(merged.to_string().contains("another"), "{merged}");
        error
    };
    assert!(change(&|origin| origin["model"] = "0".repeat(64).into()).contains("another model"));
    assert!(change(&|origin| origin["tokenizer"] = "1".into()).contains("another tokenizer"));
    assert!(change(&|origin| origin["prefix"] = "2".into()).contains("another prefix"));
    assert!(change(&|origin| origin["arithmetic"] = "3".into()).contains("another arithmetic"));

    // A flipped byte is found by inspect; a missing file and a hostile name at once.
    let header = Artifact::open(&at("s")).unwrap().header;
    let file = at("s").join(&header.blocks[1]);
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    storage::write_whole(&file, &bytes).unwrap();
    let error = Artifact::open(&at("s")).unwrap().verify().unwrap_err();
    assert!(error.to_string().contains(&header.blocks[1]), "{error}");
    storage::remove(&file).unwrap();
    assert!(Artifact::open(&at("s")).is_err());
    let hostile = String::from_utf8(before.1.clone())
        .unwrap()
        .replace(&header.blocks[1], "../s/block");
    storage::write_whole(&at("s").join(HEADER), hostile.as_bytes()).unwrap();
    assert!(Artifact::open(&at("s")).is_err());
}

#[test]
fn token_ids_count_as_often_as_they_come() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let tokens: Vec<u32> = (0..128).map(|i| i * 7 % 2000).collect();
    let document = |row| Placed {
        source: 0,
        row,
        id: ContentId::of(1, 128, &tokens),
        tokens: 128,
        length: 128,
        exact: true,
    };
    let given = |rows: u32| Documents {
        placed: (0..rows).map(document).collect(),
        tokens: [(document(0).id, tokens.clone())].into(),
        ..Documents::default()
    };
    let file = rows(folder.path(), "a.jsonl", 0..8);
    let with = |change, name: &str, rows| Job {
        documents: given(rows),
        ..job(change, &at(name), &[&file])
    };
    let once = run(&with(Change::Collect, "once", 1)).unwrap();
    let thrice = run(&with(Change::Collect, "thrice", 3)).unwrap();
    assert_eq!(
        (thrice.batches, thrice.batches_run, thrice.tokens),
        (3, 1, 3 * once.tokens)
    );
    let left = run(&with(Change::Retract, "thrice", 2)).unwrap();
    assert_eq!(left.digest, once.digest);
    assert!(run(&with(Change::Add, "once", 1)).is_err(), "a batch counts once");
}

#[test]
fn an_interrupted_change_leaves_the_artifact_and_continues() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (a, b) = two_files(folder.path(), 16, 40);
    run(&job(Change::Collect, &at("whole"), &[&a])).unwrap();
    let whole = run(&job(Change::Add, &at("whole"), &[&b])).unwrap();
    run(&job(Change::Collect, &at("parts"), &[&a])).unwrap();
    let before = Artifact::open(&at("parts")).unwrap().header;
    let batches = whole.batches_run;
    for pieces in [1, 5 * batches, 10 * batches] {
        let broken = Watch::until(move |seen| seen.pieces > pieces)
            .over(|observer, halt| update(&job(Change::Add, &at("parts"), &[&b]), observer, halt));
        assert!(broken.is_err());
        let held = Artifact::open(&at("parts")).unwrap();
        assert_eq!(held.header, before, "an unfinished change is not seen");
        held.verify().unwrap();
    }
    let other = run(&job(Change::Retract, &at("parts"), &[&a])).unwrap_err();
    assert!(other.hint().unwrap().contains("--fresh"), "{other}");
    let watch = Watch::to_the_end();
    let rest = watch
        .over(|observer, halt| update(&job(Change::Add, &at("parts"), &[&b]), observer, halt))
        .unwrap();
    watch.assert_all_told("statistics");
    assert!(rest.resumed_blocks >= 2, "{}", rest.resumed_blocks);
    assert_eq!(rest.digest, whole.digest);
    assert_eq!(sums(&at("parts")), sums(&at("whole")));
}

/// `kill -9` at random moments, then the same command to the end; at every moment there is the old artifact or the new one.
#[test]
fn a_killed_change_continues_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (a, b) = two_files(folder.path(), 16, 60);
    let command = |name: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quantflow"));
        command
            .args(["statistics", "add"])
            .arg(fixture("model"))
            .arg("--statistics")
            .arg(at(name));
        command
            .arg("--calibration")
            .arg(&b)
            .args(["--length", "128", "--json"]);
        command
    };
    for name in ["whole", "killed"] {
        run(&job(Change::Collect, &at(name), &[&a])).unwrap();
    }
    let old = Artifact::open(&at("killed")).unwrap().header;
    let begin = std::time::Instant::now();
    let result = command("whole").output().unwrap();
    assert!(
        result.status.success(),
        "{}",
        String::from_utf8_lossy(&result.stderr)
    );
    let summary: serde_json::Value = serde_json::from_slice(&result.stdout).unwrap();
    let (taken, whole) = (begin.elapsed(), summary["digest"].as_str().unwrap().to_owned());
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seed = seed.unwrap().as_nanos() as u64;
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let held = || Artifact::open(&at("killed")).unwrap();
    for _ in 0..6 {
        let mut child = command("killed")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(taken.mul_f64(f64::from(random.next_u32()) / f64::from(u32::MAX)));
        child.kill().unwrap();
        child.wait().unwrap();
        held().verify().unwrap();
        if held().header.digest() == whole {
            break;
        }
        assert_eq!(held().header, old, "seed {seed}");
    }
    if held().header.digest() != whole {
        assert!(
            command("killed").output().unwrap().status.success(),
            "seed {seed}"
        );
    }
    assert_eq!(held().header.digest(), whole, "seed {seed}");
    assert_eq!(sums(&at("whole")).len(), held().header.blocks.len());
}

#[test]
fn one_artifact_serves_many_recipes() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let a = rows(folder.path(), "a.jsonl", 0..40);
    run(&job(Change::Collect, &at("s"), &[&a])).unwrap();
    let solve = |name: &str, bits: u32, workers: usize| job::Job {
        statistics: Some(Arc::new(Artifact::open(&at("s")).unwrap())),
        workers,
        ..job::Job::new(
            fixture("model"),
            at(name),
            Recipe {
                bits,
                group_size: 64,
                match_original: 0.0,
                ..Recipe::default()
            },
        )
    };
    let observer: Arc<dyn Observer> = Arc::new(Silent);
    let four = quantize(&solve("w4", 4, 2), &observer, &Arc::default()).unwrap();
    let three = quantize(&solve("w3", 3, 2), &observer, &Arc::default()).unwrap();
    assert!(four.relative_error_mean < three.relative_error_mean && four.calibration_tokens > 1000);
    for workers in [1, 4] {
        let again = quantize(
            &solve(&format!("w4-{workers}"), 4, workers),
            &observer,
            &Arc::default(),
        );
        assert_eq!(again.unwrap().output_digest, four.output_digest);
    }
    let found = verify(&at("w3"), &fixture("model")).unwrap();
    assert_eq!((found.problems, found.quantized), (Vec::new(), 35));
    // Statistics of another model are refused, whatever its shapes.
    let header = std::fs::read_to_string(at("s").join(HEADER)).unwrap();
    let model = Artifact::open(&at("s")).unwrap().header.origin.model;
    storage::write_whole(
        &at("s").join(HEADER),
        header.replace(&model, &"0".repeat(64)).as_bytes(),
    )
    .unwrap();
    let error = quantize(&solve("other", 4, 2), &observer, &Arc::default()).unwrap_err();
    assert!(error.to_string().contains("another model"), "{error}");
    storage::write_whole(&at("s").join(HEADER), header.as_bytes()).unwrap();
    // The same in one command.
    let job = job::Job {
        statistics: None,
        ..solve("independent", 4, 2)
    };
    let at_once = {
        let collected = collected(&job, read(&[&a]), &observer, &Arc::default()).unwrap();
        quantize(&collected, &observer, &Arc::default()).unwrap()
    };
    assert_eq!(at_once.output_digest, four.output_digest);
    assert!(!at("independent").join(".quantflow").exists());
}

fn solve(job: &job::Job, watch: &Arc<Watch>) -> Result<job::Summary> {
    let summary = watch.over(|observer, halt| resolve::solve(job, observer, halt))?;
    assert!(summary.asked_peak_host_bytes <= summary.plan_peak_host_bytes);
    Ok(summary)
}

#[test]
fn a_changed_recipe_solves_what_it_touches_to_the_bytes_of_a_new_solve() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (a, b) = two_files(folder.path(), 24, 40);
    run(&job(Change::Collect, &at("s"), &[&a])).unwrap();
    let job_of = |name: &str, down_bits: u32| job::Job {
        statistics: Some(Arc::new(Artifact::open(&at("s")).unwrap())),
        workers: 2,
        shard_bytes_max: 400_000,
        ..job::Job::new(
            fixture("model"),
            at(name),
            Recipe {
                group_size: 64,
                match_original: 0.0,
                schemes: vec![Scheme {
                    targets: vec!["down_proj$".into()],
                    bits: Some(down_bits),
                    ..Scheme::default()
                }],
                ..Recipe::default()
            },
        )
    };
    let fresh = |name: &str, bits: u32| {
        let all = Watch::to_the_end();
        let summary = solve(&job_of(name, bits), &all).unwrap();
        assert_eq!((all.seen().linears, summary.reused_linears), (35, 0));
        all.assert_all_told("quantize");
        summary.output_digest
    };
    let (four, three) = (fresh("out", 4), fresh("three", 3));
    let report = |name: &str| {
        let text = std::fs::read_to_string(at(name).join(folder::REPORT)).unwrap();
        let rows = text
            .lines()
            .map(|line| serde_json::from_str::<Row>(line).unwrap());
        rows.map(|row| (row.name, row.scheme, row.relative_error))
            .collect::<Vec<_>>()
    };

    // Broken off, the old output is whole; another command does not continue it; the same one does.
    for linears in [0, 2] {
        let stopped = Watch::until(move |seen| seen.linears > linears);
        assert!(solve(&job_of("out", 3), &stopped).is_err());
        assert!(verify(&at("out"), &fixture("model")).unwrap().problems.is_empty());
    }
    let other = solve(&job_of("out", 8), &Watch::to_the_end()).unwrap_err();
    assert!(other.hint().unwrap().contains("--fresh"), "{other}");
    let observer: Arc<dyn Observer> = Arc::new(Silent);
    let refused = quantize(&job_of("out", 3), &observer, &Arc::default()).unwrap_err();
    assert!(refused.to_string().contains("finished"), "{refused}");
    let rest = Watch::to_the_end();
    let summary = solve(&job_of("out", 3), &rest).unwrap();
    assert_eq!(summary.reused_linears, 30);
    assert!(
        (1..5).contains(&rest.seen().linears) && summary.resumed_blocks > 0,
        "{}",
        rest.seen().linears
    );
    assert_eq!(summary.output_digest, three);
    assert_eq!(report("out"), report("three"));
    assert!(!at("out").join(".quantflow").exists());
    assert!(verify(&at("out"), &fixture("model")).unwrap().problems.is_empty());

    // Back again: only the five down_proj; and once more: none.
    for solved in [5, 0] {
        let back = Watch::to_the_end();
        let summary = solve(&job_of("out", 4), &back).unwrap();
        assert_eq!(
            (back.seen().linears, summary.reused_linears),
            (solved, 35 - solved)
        );
        assert_eq!(summary.output_digest, four);
    }
    // Other statistics change every site.
    run(&job(Change::Add, &at("s"), &[&b])).unwrap();
    let all = Watch::to_the_end();
    solve(&job_of("out", 4), &all).unwrap();
    assert_eq!(all.seen().linears, 35);
}

/// Mean held-out error over the linears of an output's report.
fn held_out_error(output: &Path) -> f64 {
    let report = std::fs::read_to_string(output.join(folder::REPORT)).unwrap();
    let rows: Vec<Row> = report
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    rows.iter().map(|row| row.held_out_error.unwrap()).sum::<f64>() / rows.len() as f64
}

#[test]
fn held_out_batches_measure_and_choose_the_damping() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (a, b) = two_files(folder.path(), 24, 80);
    let apart = |change, name: &str, files: &[&Path]| Job {
        held_out: if change == Change::Collect { 0.3 } else { 0.0 },
        ..job(change, &at(name), files)
    };
    // What is kept apart follows from the content: it adds up and goes away like the rest.
    let at_once = run(&apart(Change::Collect, "s", &[&a, &b])).unwrap();
    run(&apart(Change::Collect, "x", &[&a])).unwrap();
    run(&apart(Change::Add, "x", &[&b])).unwrap();
    assert_eq!(sums(&at("x")), sums(&at("s")));
    run(&apart(Change::Collect, "b", &[&b])).unwrap();
    run(&apart(Change::Retract, "x", &[&a])).unwrap();
    assert_eq!(sums(&at("x")), sums(&at("b")));
    let whole = run(&job(Change::Collect, &at("whole"), &[&a])).unwrap();
    assert!(whole.tokens > 0);
    assert!(merge_artifacts(&[at("whole"), at("b")], &at("mixed"), false).is_err());

    let artifact = Arc::new(Artifact::open(&at("s")).unwrap());
    let first = artifact
        .site(0, quantflow::model::SiteKind::Qkv, &Room::Memory)
        .unwrap();
    let used = first.tokens() as u64;
    assert!(used > 0 && used < at_once.tokens, "{used} of {}", at_once.tokens);
    let observer: Arc<dyn Observer> = Arc::new(Silent);
    let solve = |name: &str, damp_percent, statistics: &Arc<Artifact>| {
        let job = job::Job {
            statistics: Some(Arc::clone(statistics)),
            workers: 2,
            ..job::Job::new(
                fixture("model"),
                at(name),
                Recipe {
                    bits: 3,
                    group_size: 64,
                    match_original: 0.0,
                    damp_percent,
                    ..Recipe::default()
                },
            )
        };
        quantize(&job, &observer, &Arc::default())
    };
    solve("auto", Damping::Auto, &artifact).unwrap();
    let auto = held_out_error(&at("auto"));
    for damp in Damping::Auto.candidates() {
        let name = format!("fixed-{damp}");
        solve(&name, Damping::Fixed(damp), &artifact).unwrap();
        let fixed = held_out_error(&at(&name));
        // The error of a layer on text that it was not fitted to is of the size of the error on its own.
        assert!(
            auto <= fixed * 1.000_001 && fixed < 0.2,
            "{damp}: {fixed}, auto {auto}"
        );
    }
    let without = Arc::new(Artifact::open(&at("whole")).unwrap());
    let error = solve("refused", Damping::Auto, &without).unwrap_err();
    assert!(error.hint().unwrap().contains("--held-out"), "{error}");
}

fn ids(
    groups: &[(Vec<Placed>, isize)],
    tokens: &BTreeMap<ContentId, Vec<u32>>,
) -> BTreeMap<ContentId, isize> {
    let mut found = BTreeMap::new();
    for (group, diff) in groups {
        let texts: Vec<&[u32]> = group
            .iter()
            .map(|document| tokens[&document.id].as_slice())
            .collect();
        for batch in calibration::pack(&texts, group[0].length as usize, Some(0)) {
            *found.entry(batch.id).or_insert(0) += diff;
        }
    }
    found.retain(|_, count| *count != 0);
    found
}

/// The slow, obvious way: documents in order, the first of equal ones, grouped by hand.
fn groups_by_hand(documents: &[Placed]) -> BTreeSet<Vec<Placed>> {
    let mut sorted = documents.to_vec();
    sorted.sort();
    let mut seen = BTreeSet::new();
    let mut groups: BTreeMap<(u32, u32, bool), Vec<Placed>> = BTreeMap::new();
    for document in sorted {
        if document.exact || seen.insert(document.id) {
            groups.entry(document.group()).or_default().push(document);
        }
    }
    groups.into_values().collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn a_document_changes_its_own_group_only(
        lengths in prop::collection::vec((0u32..3, 0u32..40, 1usize..700, 0u32..60), 1..60),
        changed in 0usize..60,
    ) {
        let tokens = RefCell::new(BTreeMap::new());
        let place = |&(source, row, length, word): &(u32, u32, usize, u32)| {
            let text: Vec<u32> = (0..length as u32).map(|i| i % 5 + word).collect();
            let id = ContentId::of(1, length, &text);
            tokens.borrow_mut().insert(id, text);
            Placed { source, row, id, tokens: length as u32, length: 128, exact: false }
        };
        let mut by_place: BTreeMap<(u32, u32), Placed> = BTreeMap::new();
        for each in &lengths {
            by_place.insert((each.0, each.1), place(each));
        }
        let before: Vec<Placed> = by_place.values().copied().collect();
        let old = before[changed % before.len()];
        let new = place(&(old.source, old.row, old.tokens as usize + 1, 1000));
        let after: Vec<Placed> = before.iter().map(|&d| if d == old { new } else { d }).collect();

        let whole = |documents: &[Placed]| -> Vec<(Vec<Placed>, isize)> {
            changed_groups(Vec::new(), documents.iter().map(|&d| (d, 1)).collect())
        };
        let more = place(&(9, 0, 300, 2000));
        let tokens = tokens.into_inner();
        let (first, second) = (whole(&before), whole(&after));
        let sets = |groups: &[(Vec<Placed>, isize)]| -> BTreeSet<Vec<Placed>> {
            groups.iter().map(|(group, _)| group.clone()).collect()
        };
        prop_assert_eq!(sets(&first), groups_by_hand(&before));
        prop_assert_eq!(sets(&second), groups_by_hand(&after));
        // The difference, found without looking at the rest, is the difference.
        let difference = changed_groups(before.clone(), vec![(old, -1), (new, 1)]);
        let mut expected = ids(&second, &tokens);
        for (id, count) in ids(&first, &tokens) {
            *expected.entry(id).or_insert(0) -= count;
        }
        expected.retain(|_, count| *count != 0);
        prop_assert_eq!(ids(&difference, &tokens), expected);
        // Its own group before and after, and where a copy of it stood.
        prop_assert!(difference.len() <= 6, "{difference:?}");
        // Another file leaves the groups that are there.
        let added = changed_groups(before.clone(), vec![(more, 1)]);
        prop_assert_eq!(added, vec![(vec![more], 1)]);
    }
}
