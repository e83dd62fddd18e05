//! The tokenizer of a checkpoint and the token that stands between documents.
//!
//! Owns tokenizer.json and the end-of-sequence id. It must not know where texts come from or how tokens are packed.

use super::files::{read_json, read_small};
use crate::error::{Error, IoContext, Result};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::path::Path;
use tokenizers::Tokenizer;

/// A longer text is tokenized in pieces of about this size, cut at a line end, so that a huge text costs no more memory
/// and time than the tokens that are wanted of it.
const PIECE_BYTES: usize = 1 << 20;
const MAX_TOKENIZER_BYTES: u64 = 512 << 20;

/// A tokenizer without special tokens, truncation or padding.
pub struct Tokens {
    tokenizer: Tokenizer,
    vocab_size: usize,
    eos: Option<u32>,
    positions_max: Option<usize>,
}

impl Tokens {
    /// Opens the tokenizer of `model_dir`; ids from `vocab_size` on are errors.
    pub fn open(model_dir: &Path, vocab_size: usize) -> Result<Self> {
        let path = model_dir.join("tokenizer.json");
        let missing =
            "save one with transformers: AutoTokenizer.from_pretrained(MODEL).save_pretrained(MODEL)";
        let Some(bytes) = read_small(&path, MAX_TOKENIZER_BYTES)? else {
            return Err(Error::invalid(
                path.display().to_string(),
                "no such file",
                missing,
            ));
        };
        let bad = |problem: String| Error::invalid(path.display().to_string(), problem, missing);
        let mut tokenizer =
            Tokenizer::from_bytes(&bytes).map_err(|e| bad(format!("not a tokenizer: {e}")))?;
        tokenizer
            .with_truncation(None)
            .map_err(|e| bad(e.to_string()))?
            .with_padding(None);
        let config = read_json(&model_dir.join("config.json"))?.unwrap_or(Value::Null);
        let generation = read_json(&model_dir.join("generation_config.json"))?.unwrap_or(Value::Null);
        let towers = ["text_config", "llm_config", "language_config"];
        let towers = towers.iter().filter_map(|key| config.get(key));
        let parts: Vec<&Value> = std::iter::once(&config).chain(towers).collect();
        let eos = parts
            .iter()
            .copied()
            .chain([&generation])
            .find_map(|part| first_id(part.get("eos_token_id")?));
        if let Some(eos) = eos
            && eos as usize >= vocab_size
        {
            return Err(Error::invalid(
                model_dir.join("config.json").display().to_string(),
                format!("eos_token_id {eos} is not below the vocabulary size {vocab_size}"),
                "fetch config.json again",
            ));
        }
        let positions = parts
            .iter()
            .find_map(|part| part.get("max_position_embeddings")?.as_u64());
        Ok(Self {
            tokenizer,
            vocab_size,
            eos,
            positions_max: positions.and_then(|n| usize::try_from(n).ok()),
        })
    }

    /// The id that is put between documents: the first `eos_token_id` of config.json, of its text part, or of
    /// generation_config.json.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// How many positions the model is made for, where its config says so.
    pub fn positions_max(&self) -> Option<usize> {
        self.positions_max
    }

    /// Feeds the ids of `text` piece by piece, until `take` has enough and answers false.
    pub fn encode(&self, text: &str, mut take: impl FnMut(&[u32]) -> bool) -> Result<()> {
        for piece in pieces(text) {
            let encoding = self.tokenizer.encode_fast(piece, false).map_err(|e| {
                Error::invalid("tokenizer.json", format!("could not tokenize a text: {e}"), "")
            })?;
            let ids = encoding.get_ids();
            if let Some(id) = ids.iter().find(|&&id| id as usize >= self.vocab_size) {
                return Err(Error::invalid(
                    "tokenizer.json",
                    format!(
                        "gives id {id}, but the model's vocabulary size is {}",
                        self.vocab_size
                    ),
                    "tokenizer.json and config.json are of different models; fetch both again",
                ));
            }
            if !take(ids) {
                break;
            }
        }
        Ok(())
    }
}

/// SHA-256 of the checkpoint's tokenizer.json, in hex: artifacts made with different tokenizers do not mix.
pub fn tokenizer_digest(model_dir: &Path) -> Result<String> {
    let path = model_dir.join("tokenizer.json");
    let mut file = std::fs::File::open(&path).context("read", &path)?;
    let mut hash = Sha256::new();
    std::io::copy(&mut file, &mut hash).context("read", &path)?;
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

fn first_id(value: &Value) -> Option<u32> {
    let value = value.as_array().map_or(Some(value), |list| list.first())?;
    u32::try_from(value.as_u64()?).ok()
}

/// `text` in pieces of at least [`PIECE_BYTES`], the last one excepted: cut after a line end that no white space follows
/// (a place where no pre-tokenizer joins what stands on both sides); where none comes soon, before a space, or between
/// two characters.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (piece, after) = rest.split_at(cut(rest));
        rest = after;
        Some(piece)
    })
}

fn cut(text: &str) -> usize {
    let bytes = text.as_bytes();
    if bytes.len() <= 2 * PIECE_BYTES {
        return bytes.len();
    }
    let range = PIECE_BYTES..2 * PIECE_BYTES;
    let line = |&at: &usize| bytes[at - 1] == b'\n' && !bytes[at].is_ascii_whitespace();
    let space = |&at: &usize| bytes[at] == b' ' && !bytes[at - 1].is_ascii_whitespace();
    let boundary = |&at: &usize| text.is_char_boundary(at);
    range
        .clone()
        .find(|at| line(at) && boundary(at))
        .or_else(|| range.clone().find(space))
        .or_else(|| range.clone().find(boundary))
        .unwrap_or(bytes.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_join_to_the_text() {
        let check = |text: String, count: usize, starts: &str| {
            let cut: Vec<&str> = pieces(&text).collect();
            assert_eq!((cut.len(), cut.concat() == text), (count, true));
            assert!(cut.iter().skip(1).all(|p| p.starts_with(starts)));
        };
        check(String::new(), 0, "");
        check("short".into(), 1, "");
        check("é".repeat(PIECE_BYTES), 1, "");
        check("é".repeat(PIECE_BYTES * 2 + 9), 4, "é");
        check("one line\n\n".repeat(PIECE_BYTES / 2), 4, "one");
        check("word word".repeat(PIECE_BYTES / 2), 4, " word");
    }

    #[test]
    fn the_first_eos_counts() {
        let check = |json: Value, expect| assert_eq!(first_id(&json), expect, "{json}");
        check(2.into(), Some(2));
        check(vec![7, 8].into(), Some(7));
        check(Value::Array(vec![]), None);
        check((-1).into(), None);
        check(u64::MAX.into(), None);
        check("2".into(), None);
    }
}
