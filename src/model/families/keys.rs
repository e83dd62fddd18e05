//! Typed reading of a `config.json`, which is untrusted: each getter names the key at fault, each number has
//! bounds, nothing panics. (Serde's own errors on a `Value` do not say which key they are about.)
//!
//! Absent and `null` differ, as they do in transformers: an absent key has its family's default, a `null` is a
//! value of its own where one is allowed.

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Widest layer, embedding or attention that is believed.
pub(super) const MAX_WIDTH: usize = 1 << 20;
/// Most heads that are believed.
pub(super) const MAX_HEADS: usize = 1 << 12;
/// Widest head that is believed.
pub(super) const MAX_HEAD_DIM: usize = 1 << 12;
/// Most decoder layers that are believed.
pub(super) const MAX_LAYERS: usize = 1 << 12;
/// Most experts of a layer that are believed.
pub(super) const MAX_EXPERTS: usize = 1 << 12;
/// Largest vocabulary that is believed.
pub(super) const MAX_VOCAB: usize = 1 << 24;
/// Longest context that is believed.
pub(super) const MAX_POSITIONS: usize = 1 << 32;
/// Largest number that is believed where a key has no bound of its own.
pub(super) const MAX_NUMBER: f64 = 1e12;
/// Smallest positive number that is believed.
const MIN_NUMBER: f64 = 1e-12;
/// Characters of a bad value that an error repeats.
const SHOWN: usize = 60;

/// One JSON object of the config and the path that leads to it.
#[derive(Clone, Debug)]
pub(super) struct Keys<'a> {
    map: Option<&'a Map<String, Value>>,
    path: String,
}

impl<'a> Keys<'a> {
    /// The whole config.
    pub(super) fn root(config: &'a Value) -> Result<Self> {
        match config.as_object() {
            Some(map) => Ok(Self::at(map, "")),
            None => Err(Error::invalid(
                "config.json",
                format!("is {}, expected an object", brief(config)),
                "",
            )),
        }
    }

    /// An object that lies at `path` (`""` or `text_config.`).
    pub(super) fn at(map: &'a Map<String, Value>, path: &str) -> Self {
        Self {
            map: Some(map),
            path: path.to_owned(),
        }
    }

    /// The error that `key` has `problem`.
    pub(super) fn error(&self, key: &str, problem: impl std::fmt::Display) -> Error {
        Error::invalid(
            "config.json",
            format!("`{}{key}` {problem}", self.path),
            "check the checkpoint's config.json; it may be damaged, or newer than this version of quantflow",
        )
    }

    fn wrong(&self, key: &str, value: &Value, expected: impl std::fmt::Display) -> Error {
        self.error(key, format!("is {}, expected {expected}", brief(value)))
    }

    /// The raw value; `None` where absent.
    pub(super) fn raw(&self, key: &str) -> Option<&'a Value> {
        self.map?.get(key)
    }

    /// The raw value; `None` where absent or `null`.
    pub(super) fn some(&self, key: &str) -> Option<&'a Value> {
        self.raw(key).filter(|value| !value.is_null())
    }

    /// The object itself.
    pub(super) fn map(&self) -> Option<&'a Map<String, Value>> {
        self.map
    }

    /// A whole number from `min` to `max`.
    fn whole(&self, key: &str, value: &Value, min: usize, max: usize) -> Result<usize> {
        value
            .as_u64()
            .and_then(|n| usize::try_from(n).ok())
            .filter(|n| (min..=max).contains(n))
            .ok_or_else(|| self.wrong(key, value, format!("a whole number from {min} to {max}")))
    }

    /// A whole number from 1 to `max`.
    pub(super) fn size(&self, key: &str, default: usize, max: usize) -> Result<usize> {
        match self.raw(key) {
            Some(value) => self.whole(key, value, 1, max),
            None => Ok(default),
        }
    }

    /// A whole number from 1 to `max`, or `null`.
    pub(super) fn size_or_null(
        &self,
        key: &str,
        default: Option<usize>,
        max: usize,
    ) -> Result<Option<usize>> {
        match self.raw(key) {
            Some(Value::Null) => Ok(None),
            Some(value) => self.whole(key, value, 1, max).map(Some),
            None => Ok(default),
        }
    }

    /// A whole number from 0 to `max`; `null` counts as absent.
    pub(super) fn count(&self, key: &str, default: usize, max: usize) -> Result<usize> {
        match self.some(key) {
            Some(value) => self.whole(key, value, 0, max),
            None => Ok(default),
        }
    }

    /// A positive number of believable size; `None` where absent or `null`.
    pub(super) fn positive(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.some(key) else {
            return Ok(None);
        };
        self.checked(key, value).map(Some)
    }

    fn checked(&self, key: &str, value: &Value) -> Result<f64> {
        value
            .as_f64()
            .filter(|n| (MIN_NUMBER..=MAX_NUMBER).contains(n))
            .ok_or_else(|| {
                self.wrong(
                    key,
                    value,
                    format!("a number from {MIN_NUMBER:e} to {MAX_NUMBER:e}"),
                )
            })
    }

    /// A list of `length` positive numbers.
    pub(super) fn positives(&self, key: &str, length: usize) -> Result<Vec<f64>> {
        let Some(value) = self.some(key) else {
            return Err(self.error(key, format!("is missing, expected {length} numbers")));
        };
        match value.as_array() {
            Some(list) if list.len() == length => list.iter().map(|entry| self.checked(key, entry)).collect(),
            Some(list) => Err(self.error(key, format!("has {} entries, expected {length}", list.len()))),
            None => Err(self.wrong(key, value, format!("a list of {length} numbers"))),
        }
    }

    /// A softcap or other positive number whose absence and `null` differ.
    pub(super) fn positive_or_null(&self, key: &str, default: Option<f64>) -> Result<Option<f64>> {
        match self.raw(key) {
            Some(_) => self.positive(key),
            None => Ok(default),
        }
    }

    /// A boolean; `null` counts as absent.
    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.some(key) {
            Some(value) => value
                .as_bool()
                .ok_or_else(|| self.wrong(key, value, "true or false")),
            None => Ok(default),
        }
    }

    /// A string; `None` where absent or `null`.
    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.some(key) {
            Some(value) => value
                .as_str()
                .map(Some)
                .ok_or_else(|| self.wrong(key, value, "a string")),
            None => Ok(None),
        }
    }

    /// A list of strings; `None` where absent or `null`.
    pub(super) fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        let Some(value) = self.some(key) else {
            return Ok(None);
        };
        value
            .as_array()
            .and_then(|list| list.iter().map(Value::as_str).collect())
            .map(Some)
            .ok_or_else(|| self.wrong(key, value, "a list of strings"))
    }

    /// A list of whole numbers from 0 to `max`; empty where absent or `null`.
    pub(super) fn counts(&self, key: &str, max: usize) -> Result<Vec<usize>> {
        let Some(value) = self.some(key) else {
            return Ok(Vec::new());
        };
        let list = value
            .as_array()
            .ok_or_else(|| self.wrong(key, value, "a list of whole numbers"))?;
        list.iter().map(|entry| self.whole(key, entry, 0, max)).collect()
    }

    /// The object under `key`; one without entries where absent or `null`.
    pub(super) fn object(&self, key: &str) -> Result<Self> {
        let map = match self.some(key) {
            Some(Value::Object(map)) => Some(map),
            Some(value) => return Err(self.wrong(key, value, "an object")),
            None => None,
        };
        Ok(Self {
            map,
            path: format!("{}{key}.", self.path),
        })
    }

    /// Whether there are no entries.
    pub(super) fn is_empty(&self) -> bool {
        self.map.is_none_or(Map::is_empty)
    }
}

/// A value as an error shows it: on one line, cut short.
pub(super) fn brief(value: &Value) -> String {
    match value {
        Value::Object(_) => "an object".into(),
        Value::Array(_) => "a list".into(),
        Value::String(text) => shorten(text),
        other => other.to_string(),
    }
}

/// A string from the config in quotes, escaped and cut short.
pub(super) fn shorten(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}
