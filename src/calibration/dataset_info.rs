//! LLaMA-Factory's `dataset_info.json`: which file a name means, and how its columns and roles are called.
//!
//! Owns that schema and its defaults. It must not read rows.

use super::conversation::Tags;
use super::files::read_small;
use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::path::{Component, Path, PathBuf};

/// Name of the file in a dataset folder.
pub(super) const FILE_NAME: &str = "dataset_info.json";
const MAX_BYTES: u64 = 16 << 20;

/// What the rows of a dataset are.
#[derive(Clone, Debug, PartialEq)]
pub enum Formatting {
    /// instruction, input, output.
    Alpaca,
    /// Messages of from/value.
    Sharegpt(Tags),
    /// Messages of role/content; tool answers that follow each other count as one.
    Openai(Tags),
}

/// Names of columns; `None`: the dataset has no such column.
#[derive(Clone, Debug, Default, PartialEq)]
#[expect(missing_docs, reason = "each is LLaMA-Factory's key of the same name")]
pub struct Columns {
    pub system: Option<String>,
    pub tools: Option<String>,
    pub images: Option<String>,
    pub videos: Option<String>,
    pub audios: Option<String>,
    pub chosen: Option<String>,
    pub prompt: Option<String>,
    pub query: Option<String>,
    pub response: Option<String>,
    pub history: Option<String>,
    pub messages: Option<String>,
}

/// How to read the rows of a dataset.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    /// alpaca, sharegpt or openai.
    pub formatting: Formatting,
    /// Where things stand in a row.
    pub columns: Columns,
    /// Rows carry a chosen and a rejected answer; the chosen one is used.
    pub ranking: bool,
}

/// A dataset by name.
#[derive(Clone, Debug, PartialEq)]
pub struct Dataset {
    /// Its file or folder, inside the dataset folder.
    pub path: PathBuf,
    /// How its rows are read.
    pub layout: Layout,
    /// At most this many rows are used.
    pub num_samples: Option<usize>,
}

/// The datasets of a folder.
#[derive(Clone, Debug)]
pub struct DatasetInfo {
    folder: PathBuf,
    entries: Map<String, Value>,
}

impl DatasetInfo {
    /// Reads the `dataset_info.json` of `folder`.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE_NAME);
        let Some(bytes) = read_small(&path, MAX_BYTES)? else {
            return Err(Error::usage(
                "--dataset-dir",
                format!("{} has no {FILE_NAME}", folder.display()),
                "name the folder that holds dataset_info.json, or leave --dataset-dir out and give --calibration a file",
            ));
        };
        let entries = serde_json::from_slice(&bytes).map_err(|problem| {
            Error::invalid(
                path.display().to_string(),
                format!("malformed JSON: {problem}"),
                "the file holds one object, dataset names to their descriptions",
            )
        })?;
        Ok(Self {
            folder: folder.to_owned(),
            entries,
        })
    }

    /// The names, in file order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The dataset called `name`; `None` if there is none.
    pub fn get(&self, name: &str) -> Result<Option<Dataset>> {
        let Some(entry) = self.entries.get(name) else {
            return Ok(None);
        };
        self.dataset(name, entry).map(Some)
    }

    fn dataset(&self, name: &str, entry: &Value) -> Result<Dataset> {
        let bad = |problem: String, hint: &str| {
            let subject = format!("{} entry {name}", self.folder.join(FILE_NAME).display());
            Error::invalid(subject, problem, hint)
        };
        let text = |from: &Value, key: &str| from.get(key).and_then(Value::as_str).map(str::to_owned);
        if !entry.is_object() {
            return Err(bad("not an object".into(), "it needs at least file_name"));
        }
        let remote = [
            "hf_hub_url",
            "ms_hub_url",
            "om_hub_url",
            "script_url",
            "cloud_file_name",
        ]
        .into_iter()
        .find_map(|key| Some((key, text(entry, key)?)));
        let file_name = match (text(entry, "file_name"), remote) {
            // LLaMA-Factory prefers the hub; a run that fetches nothing uses the file where one is named.
            (Some(file_name), _) => file_name,
            (None, Some((key, url))) => {
                return Err(bad(
                    format!("the dataset is not a local file ({key} {url})"),
                    "download it, then name the file: --calibration FILE, or file_name in the entry",
                ));
            }
            (None, None) => return Err(bad("no file_name".into(), "add the name of a data file")),
        };
        let path = resolve_inside(&self.folder, &file_name)?;
        let columns = entry.get("columns");
        let tags = entry.get("tags");
        for (key, value) in [("columns", columns), ("tags", tags)] {
            let strings = value.is_none_or(|v| {
                v.as_object()
                    .is_some_and(|map| map.values().all(|v| v.is_string() || v.is_null()))
            });
            if !strings {
                return Err(bad(format!("{key} is not an object of names"), ""));
            }
        }
        let tags = |default: Tags| -> Result<Tags> {
            match tags {
                None => Ok(default),
                Some(tags) => {
                    let required = |key: &str| {
                        text(tags, key).ok_or_else(|| {
                            bad(
                                format!("tags has no {key}"),
                                "where tags is given, what it does not list is absent",
                            )
                        })
                    };
                    Ok(Tags {
                        role: required("role_tag")?,
                        content: required("content_tag")?,
                        user: text(tags, "user_tag"),
                        assistant: text(tags, "assistant_tag"),
                        observation: text(tags, "observation_tag"),
                        function: text(tags, "function_tag"),
                        system: text(tags, "system_tag"),
                        lenient: false,
                    })
                }
            }
        };
        let formatting = match entry.get("formatting").map_or(Some("alpaca"), Value::as_str) {
            Some("alpaca") => Formatting::Alpaca,
            Some("sharegpt") => Formatting::Sharegpt(tags(Tags::sharegpt())?),
            Some("openai") => Formatting::Openai(tags(Tags::openai())?),
            other => {
                return Err(bad(
                    format!("formatting {} is not known", other.unwrap_or("(not a name)")),
                    "it is alpaca, sharegpt or openai",
                ));
            }
        };
        let default = Layout::of(formatting);
        let columns = columns.map_or(default.columns, |given| Columns {
            system: text(given, "system"),
            tools: text(given, "tools"),
            images: text(given, "images"),
            videos: text(given, "videos"),
            audios: text(given, "audios"),
            chosen: text(given, "chosen"),
            prompt: text(given, "prompt"),
            query: text(given, "query"),
            response: text(given, "response"),
            history: text(given, "history"),
            messages: text(given, "messages"),
        });
        let num_samples = entry.get("num_samples").and_then(Value::as_u64);
        Ok(Dataset {
            path,
            layout: Layout {
                formatting: default.formatting,
                columns,
                ranking: entry.get("ranking").and_then(Value::as_bool) == Some(true),
            },
            num_samples: num_samples.map(|n| usize::try_from(n).unwrap_or(usize::MAX)),
        })
    }
}

impl Layout {
    /// A format with the column names that it has by default.
    pub fn of(formatting: Formatting) -> Self {
        let name = |name: &str| Some(name.to_owned());
        let columns = match &formatting {
            Formatting::Alpaca => Columns {
                prompt: name("instruction"),
                query: name("input"),
                response: name("output"),
                ..Columns::default()
            },
            Formatting::Sharegpt(_) => Columns {
                messages: name("conversations"),
                ..Columns::default()
            },
            Formatting::Openai(_) => Columns {
                messages: name("messages"),
                ..Columns::default()
            },
        };
        Self {
            formatting,
            columns,
            ranking: false,
        }
    }
}

/// `name` under `folder`: an error if it is absolute, climbs out with `..`, or leads out by a symbolic link.
pub fn resolve_inside(folder: &Path, name: &str) -> Result<PathBuf> {
    let outside = || {
        Error::invalid(
            name.to_owned(),
            format!("the path leaves the folder {}", folder.display()),
            "move the file into the folder, or name the file directly",
        )
    };
    let relative = Path::new(name);
    let plain = relative
        .components()
        .all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if name.is_empty() || name.contains('\0') || !plain {
        return Err(outside());
    }
    let path = folder.join(relative);
    // What does not exist fails when it is read, with its name.
    if let (Ok(real), Ok(root)) = (path.canonicalize(), folder.canonicalize())
        && !real.starts_with(&root)
    {
        return Err(outside());
    }
    Ok(path)
}
