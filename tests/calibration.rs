//! Calibration data from files to batches, through the public API, with a tokenizer of one token a word.

use proptest::prelude::*;
use quantflow::calibration::{self, Source, Usage};
use quantflow::error::{Error, Result};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// `w0` … `w99` have the ids 0 to 99, anything else 100; 101 ends a sequence.
const VOCAB: usize = 102;
const EOS: u32 = 101;

/// A folder with data files and, in `model/`, a tokenizer.
struct Folder(TempDir);

impl Folder {
    fn new(files: &[(&str, &str)]) -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        let words = (0..100).map(|i| (format!("w{i}"), json!(i)));
        let rest = [("[UNK]".to_owned(), json!(100)), ("</s>".to_owned(), json!(EOS))];
        let vocab: serde_json::Map<_, _> = words.chain(rest).collect();
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
            "decoder": null, "pre_tokenizer": {"type": "WhitespaceSplit"},
            "added_tokens": [{"id": EOS, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true}],
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
        });
        folder.write("model/tokenizer.json", tokenizer.to_string());
        folder.write(
            "model/config.json",
            r#"{"text_config": {"eos_token_id": [101, 7]}}"#,
        );
        let template = "{% for m in messages %}{{ m.content }} w90 {% endfor %}";
        folder.write("model/chat_template.jinja", template);
        for (name, text) in files {
            folder.write(name, text);
        }
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    #[expect(clippy::disallowed_methods, reason = "tests make their own inputs")]
    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn source(&self, names: &[&str]) -> Source {
        Source {
            names: names.iter().map(|n| self.path(n).display().to_string()).collect(),
            samples: 3,
            length: 2,
            ..Source::default()
        }
    }

    fn load(&self, source: &Source) -> Result<(Vec<u32>, Usage)> {
        let loaded = calibration::load(source, &self.path("model"), VOCAB)?;
        Ok((tokens(&loaded), loaded.usage))
    }

    fn dataset(&self, name: &str) -> Result<(Vec<u32>, Usage)> {
        self.load(&Source {
            names: vec![name.to_owned()],
            dataset_dir: Some(self.path("")),
            ..self.source(&[])
        })
    }
}

fn tokens(loaded: &calibration::Calibration) -> Vec<u32> {
    loaded.batches.iter().flat_map(|b| b.tokens.clone()).collect()
}

/// The message and hint of an error.
fn said(error: &Error) -> String {
    format!("{error} / {}", error.hint().unwrap_or_default())
}

#[test]
fn every_kind_of_file_gives_the_same_tokens() {
    let check = |name: &str, text: &str| {
        let folder = Folder::new(&[(name, text)]);
        let (tokens, usage) = folder.load(&folder.source(&[name])).unwrap();
        assert_eq!(tokens, [1, 2, 3, EOS, 4, 5], "{name}: {text}");
        assert_eq!((usage.documents_used, usage.tokens_left_out), (2, 0), "{name}");
    };
    check("a.jsonl", "{\"text\": \"w1 w2 w3\"}\n\n{\"text\": \"w4 w5\"}\n");
    check(
        "a.jsonl",
        "\u{feff}{\"text\": \"w1 w2 w3\"}\r\n{\"text\": \"w4 w5\"}",
    );
    check("a.json", "[{\"text\": \"w1 w2 w3\"},\n {\"text\": \"w4 w5\"}]\n");
    check("a.json", "{\"text\": \"w1 w2 w3\"}\n{\"text\": \"w4 w5\"}");
    check(
        "a.jsonl",
        " [ {\"text\": \"w1 w2 w3\", \"x\": \"]},\\\"\"} , {\"text\": \"w4 w5\"} ] ",
    );
    check("a.csv", "id,text\n1,\"w1 w2\nw3\"\n2,w4 w5\n");
    check("a.tsv", "id\ttext\n1\tw1 w2 w3\n2\tw4 w5\n");
}

#[test]
fn a_text_file_is_one_document_but_lines_where_dataset_info_names_it() {
    let info = r#"{"t": {"file_name": "a.txt", "columns": {"prompt": "text"}}}"#;
    let folder = Folder::new(&[("a.txt", "w1 w2\n\nw3 w4\nw5 w6\n"), ("dataset_info.json", info)]);
    let (whole, _) = folder.load(&folder.source(&["a.txt"])).unwrap();
    assert_eq!(whole, [1, 2, 3, 4, 5, 6]);
    let (lines, usage) = folder.dataset("t").unwrap();
    assert_eq!(lines, [1, 2, EOS, 3, 4, EOS]);
    assert_eq!((usage.documents_found, usage.documents_used), (3, 2));
    assert_eq!(usage.left_out["the windows were full before its first token"], 1);
}

#[test]
fn what_is_left_out_is_counted() {
    let rows = [
        r#"{"text": "w1 w2"}"#,
        r#"{"text": ""}"#,
        r#"{"text": "w1 w2"}"#,
        r#"3"#,
        r#"{"other": 1}"#,
        r#"{"messages": [{"role": "user", "content": "w3"}]}"#,
        r#"{"conversations": [{"from": "human", "value": "<image>w3"}, {"from": "gpt", "value": "w4"}], "images": ["x.png"]}"#,
        r#"{"text": "w9"}"#,
        r#"{"text": "w9 w9"}"#,
    ];
    let folder = Folder::new(&[("a.jsonl", &rows.join("\n"))]);
    let (tokens, usage) = folder.load(&folder.source(&["a.jsonl"])).unwrap();
    assert_eq!(tokens, [1, 2, EOS, 3, 90, 4]);
    let reasons: Vec<(&str, u64)> = usage.left_out.iter().map(|(r, n)| (r.as_str(), *n)).collect();
    assert_eq!(
        reasons,
        [
            ("no column text, messages, conversations or instruction", 1),
            ("the conversation does not end in an answer", 1),
            ("the row is not a JSON object", 1),
            ("the same text came before", 1),
            ("the text is empty", 1),
        ]
    );
    assert_eq!(
        (
            usage.documents_read,
            usage.documents_used,
            usage.documents_not_reached
        ),
        (7, 2, 2)
    );
    assert_eq!((usage.tokens_used, usage.tokens_left_out), (6, 1));
    assert!(
        usage.notes[0].contains("1 row: the text is used, the images"),
        "{:?}",
        usage.notes
    );
}

#[test]
fn datasets_by_name() {
    let info = json!({
        "alpaca": {"file_name": "alpaca.json"},
        "sharegpt": {"file_name": "share.json", "formatting": "sharegpt", "columns": {"messages": "m", "system": "s"},
            "tags": {"role_tag": "r", "content_tag": "c", "user_tag": "u", "assistant_tag": "a"}},
        "few": {"file_name": "alpaca.json", "num_samples": 1},
        "hub": {"hf_hub_url": "org/data"},
        "out": {"file_name": "../model/config.json"},
        "abs": {"file_name": "/etc/hostname"},
        "odd": {"file_name": "alpaca.json", "formatting": "xml"},
        "none": {},
        "tags": {"file_name": "share.json", "formatting": "sharegpt", "tags": {"user_tag": "u"}},
    });
    let alpaca =
        r#"[{"instruction": "w1", "input": "w2", "output": "w3"}, {"instruction": "w4", "output": "w5"}]"#;
    let share = r#"[{"m": [{"r": "u", "c": "w1"}, {"r": "a", "c": "w2"}], "s": "w3"}, {"m": [{"r": "gpt", "c": "w1"}]}]"#;
    let folder = Folder::new(&[
        ("dataset_info.json", &info.to_string()),
        ("alpaca.json", alpaca),
        ("share.json", share),
    ]);
    let check = |name: &str, expect: std::result::Result<&[u32], &str>| match (folder.dataset(name), expect) {
        (Ok((tokens, _)), Ok(expect)) => assert_eq!(tokens, expect, "{name}"),
        (Err(error), Err(part)) => assert!(said(&error).contains(part), "{name}: {}", said(&error)),
        (found, _) => panic!("{name}: {found:?}"),
    };
    check("alpaca", Ok(&[1, 2, 90, 3, 90, EOS]));
    check("few", Ok(&[1, 2, 90, 3]));
    check("sharegpt", Ok(&[3, 90, 1, 90, 2, 90]));
    check("hub", Err("download it"));
    check("out", Err("leaves the folder"));
    check("abs", Err("leaves the folder"));
    check("odd", Err("alpaca, sharegpt or openai"));
    check("none", Err("no file_name"));
    check("tags", Err("no role_tag"));
    check("alpacas", Err("names in it: alpaca, "));
}

#[test]
fn errors_name_the_place_and_the_way_out() {
    let check = |name: &str, text: &str, parts: &[&str]| {
        let folder = Folder::new(&[(name, text)]);
        let error = folder.load(&folder.source(&[name])).unwrap_err();
        for part in parts {
            assert!(said(&error).contains(part), "{name}: {}", said(&error));
        }
    };
    check(
        "a.jsonl",
        "{\"text\": \"w1\"}\n\n{\"text\": w2}\n",
        &["a.jsonl line 3 (row 2)", "malformed JSON"],
    );
    check(
        "a.json",
        "[{\"text\": \"w1\"},\n{\"text\": }]",
        &["a.json line 2 (row 2)"],
    );
    check(
        "a.json",
        "[{\"text\": \"w1\"},\n]",
        &["line 2", "missing between commas"],
    );
    check("a.json", "[{\"text\": \"w1\"}", &["does not end"]);
    check("a.json", "[{\"text\": \"w1\"}] x", &["something follows"]);
    check(
        "a.json",
        "{\n\"text\": \"w1\"\n}",
        &["line 1", "one JSON object a line"],
    );
    check("a.csv", "text,x\nw1,1\nw2\n", &["a.csv line 3"]);
    check("a.txt", "", &["no row"]);
    check("a.jsonl", "{\"t\": 1}", &["none of 1 rows", "no column text"]);
    check(
        "a.jsonl",
        "{\"text\": \"w1\"}",
        &["1 tokens, not one window of 2", "--length 1"],
    );
    check("a.zip", "x", &["not a known kind"]);
    check("a.parquet", "x", &["parquet"]);
    let folder = Folder::new(&[]);
    let missing = folder.load(&folder.source(&["missing.jsonl"])).unwrap_err();
    assert!(said(&missing).contains("there is no file"));
    folder.write("latin.txt", b"w1 \xff w2 w3");
    let latin = folder.load(&folder.source(&["latin.txt"])).unwrap_err();
    assert!(said(&latin).contains("UTF-8"));
}

#[test]
fn several_files_take_turns_and_a_seed_shuffles() {
    let lines = |from: usize| {
        let rows = (from..from + 20).map(|i| format!("{{\"text\": \"w{i} w{i}\"}}\n"));
        rows.collect::<String>()
    };
    let folder = Folder::new(&[("a.jsonl", &lines(0)), ("b.jsonl", &lines(40))]);
    let load = |seed| {
        let source = Source {
            seed,
            samples: 20,
            ..folder.source(&["a.jsonl", "b.jsonl"])
        };
        folder.load(&source).unwrap().0
    };
    assert_eq!(load(0)[..8], [0, 0, EOS, 40, 40, EOS, 1, 1]);
    assert_eq!(load(5), load(5));
    assert_ne!(load(5), load(6));
    assert_ne!(load(5), load(0));
}

#[test]
fn evaluation_reads_everything() {
    let folder = Folder::new(&[("a.txt", "w1 w2 w3 w4 w5"), ("one.txt", "w1")]);
    let read = |name: &str, length| {
        calibration::read_texts(&folder.path(name), &folder.path("model"), length, VOCAB)
    };
    let two = read("a.txt", 2).unwrap();
    assert_eq!((tokens(&two), two.usage.tokens_left_out), (vec![1, 2, 3, 4], 1));
    let short = read("a.txt", 9).unwrap();
    assert_eq!(
        (tokens(&short), short.batches[0].length),
        (vec![1, 2, 3, 4, 5], 5)
    );
    assert_eq!(short.usage.windows_used, 1);
    assert!(read("one.txt", 9).is_err());
}

#[test]
fn a_model_without_a_template_joins_turns_and_says_so() {
    let row = r#"{"instruction": "w1", "output": "w2 w3"}"#;
    let folder = Folder::new(&[("a.jsonl", row), ("model/chat_template.jinja", "{% broken")]);
    let broken = folder.load(&folder.source(&["a.jsonl"])).unwrap_err();
    assert!(said(&broken).contains("does not compile"));
    #[expect(clippy::disallowed_methods, reason = "tests make their own inputs")]
    fs::remove_file(folder.path("model/chat_template.jinja")).unwrap();
    let (tokens, usage) = folder.load(&folder.source(&["a.jsonl"])).unwrap();
    assert_eq!(tokens, [1, 2]);
    assert!(
        usage.notes.iter().any(|n| n.contains("no chat template")),
        "{:?}",
        usage.notes
    );
}

#[cfg(feature = "parquet")]
#[test]
fn parquet_rows_are_read_in_any_order() {
    use parquet::data_type::ByteArrayType;
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    let schema = "message row { required binary text (UTF8); required binary image; }";
    let schema = parquet::schema::parser::parse_message_type(schema).unwrap();
    let mut bytes = Vec::new();
    let properties = WriterProperties::builder().build();
    let mut writer = SerializedFileWriter::new(&mut bytes, schema.into(), properties.into()).unwrap();
    for group in 0..3 {
        let mut rows = writer.next_row_group().unwrap();
        let texts = (group * 5..group * 5 + 5).map(|i| format!("w{i}").into_bytes().into());
        let texts: Vec<_> = texts.collect();
        while let Some(mut column) = rows.next_column().unwrap() {
            column
                .typed::<ByteArrayType>()
                .write_batch(&texts, None, None)
                .unwrap();
            column.close().unwrap();
        }
        rows.close().unwrap();
    }
    writer.close().unwrap();
    let folder = Folder::new(&[]);
    folder.write("a.parquet", &bytes);
    let load = |seed| {
        let source = Source {
            seed,
            samples: 29,
            length: 1,
            ..folder.source(&["a.parquet"])
        };
        folder.load(&source).unwrap()
    };
    let words = |tokens: Vec<u32>| tokens.into_iter().step_by(2).collect::<Vec<_>>();
    let (tokens, usage) = load(0);
    assert_eq!(words(tokens), (0..15).collect::<Vec<_>>());
    assert!(
        usage.notes[0].starts_with("15 rows: the text is used"),
        "{:?}",
        usage.notes
    );
    let mut shuffled = words(load(3).0);
    assert_ne!(shuffled, (0..15).collect::<Vec<_>>());
    shuffled.sort_unstable();
    assert_eq!(shuffled, (0..15).collect::<Vec<_>>());
    // Damage anywhere is an error or other text, never a panic.
    for at in (0..bytes.len()).step_by(7) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x55;
        folder.write("damaged.parquet", &damaged);
        let _ = folder.load(&folder.source(&["damaged.parquet"]));
    }
}

fn garbage(name: &str, bytes: &[u8]) {
    let folder = Folder::new(&[]);
    folder.write(name, bytes);
    for seed in [0, 1] {
        let source = Source {
            seed,
            ..folder.source(&[name])
        };
        let _ = folder.load(&source);
    }
    let _ = calibration::from_npy(Path::new(&folder.path(name)), VOCAB);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn garbage_is_an_error(
        noise in prop::collection::vec(any::<u8>(), 0..80),
        syntax in "[\\[\\]{}\",:\\\\ \n0tn]{0,40}",
        name in prop::sample::select(vec!["a.json", "a.jsonl", "a.csv", "a.txt", "a.parquet", "a.npy"]),
    ) {
        garbage(name, &noise);
        garbage(name, syntax.as_bytes());
        garbage(name, format!("[{{\"text\": \"w1\"}}{syntax}").as_bytes());
        garbage(name, format!("{{\"messages\": [{syntax}]}}").as_bytes());
    }
}
