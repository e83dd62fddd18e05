//! From names and paths to packed tokens: resolves sources, reads rows in order, renders, drops duplicates, packs.
//!
//! Owns the loop; what each step means stands in its own module.

use super::conversation::Conversation;
use super::dataset_info::{self, DatasetInfo};
use super::documents::{Content, Reading, understand};
use super::order::order;
use super::pack::{Packed, Packer};
use super::rows::{self, Row, Rows, TextRows};
use super::template::ChatTemplate;
use super::tokens::Tokens;
use super::usage::{SourceUsage, Usage};
use super::{MAX_TOKENS, Source};
use crate::error::{Error, Result};
use sha2::{Digest, Sha256};
use std::collections::HashSet;
use std::path::Path;

/// A file whose rows can be read, and how.
pub(super) struct Opened {
    name: String,
    rows: Box<dyn Rows>,
    reading: Reading,
    /// Rows of it that may be used.
    limit: usize,
}

/// Opens everything that `source` names.
pub(super) fn open(source: &Source) -> Result<Vec<Opened>> {
    let info = match &source.dataset_dir {
        Some(folder) => Some(DatasetInfo::open(folder)?),
        None => None,
    };
    let mut opened = Vec::new();
    for name in &source.names {
        let dataset = match &info {
            Some(info) => info.get(name)?,
            None => None,
        };
        if let Some(dataset) = dataset {
            let reading = Reading::Layout(Box::new(dataset.layout));
            let limit = dataset.num_samples.unwrap_or(usize::MAX);
            let files = rows::files(&dataset.path)?;
            for file in &files {
                let mut one = open_file(file, TextRows::Line, reading.clone())?;
                one.name = name.clone();
                one.limit = limit.div_ceil(files.len());
                opened.push(one);
            }
            continue;
        }
        let path = Path::new(name);
        if path.ends_with(dataset_info::FILE_NAME) {
            return Err(Error::usage(
                "--calibration",
                format!("{name} describes datasets and holds none"),
                "give its folder with --dataset-dir, and the names of datasets in it with --calibration",
            ));
        }
        if !path.exists() {
            return Err(unknown(name, info.as_ref()));
        }
        let reading = match &source.text_column {
            Some(column) => Reading::TextColumn(column.clone()),
            None => Reading::Detect,
        };
        for file in rows::files(path)? {
            opened.push(open_file(&file, TextRows::File, reading.clone())?);
        }
    }
    match opened.is_empty() {
        true => Err(Error::usage(
            "--calibration",
            "no calibration data is named",
            "give a .jsonl, .json, .txt, .csv or .parquet file, or a name in --dataset-dir",
        )),
        false => Ok(opened),
    }
}

/// One file on its own, as evaluate's `--text` reads it.
pub(super) fn open_one(path: &Path) -> Result<Vec<Opened>> {
    let files = rows::files(path)?;
    let open = |file: &std::path::PathBuf| open_file(file, TextRows::File, Reading::Detect);
    files.iter().map(open).collect()
}

fn open_file(path: &Path, text: TextRows, reading: Reading) -> Result<Opened> {
    let name = path.file_name().unwrap_or_default();
    Ok(Opened {
        name: name.to_string_lossy().into_owned(),
        rows: rows::open(path, text)?,
        reading,
        limit: usize::MAX,
    })
}

fn unknown(name: &str, info: Option<&DatasetInfo>) -> Error {
    let Some(info) = info else {
        let hint = match name.contains(['.', '/']) {
            true => "check the path",
            false => "to use a name in dataset_info.json, give its folder with --dataset-dir",
        };
        return Error::usage("--calibration", format!("there is no file {name}"), hint);
    };
    const NAMES_SHOWN: usize = 12;
    let mut names: Vec<&str> = info.names().collect();
    // Names that share the longest beginning with what was typed come first.
    let common = |n: &str| n.bytes().zip(name.bytes()).take_while(|(a, b)| a == b).count();
    names.sort_by_key(|n| std::cmp::Reverse(common(n)));
    let more = if names.len() > NAMES_SHOWN { ", …" } else { "" };
    names.truncate(NAMES_SHOWN);
    Error::usage(
        "--calibration",
        format!("{name} is neither in {} nor a file", dataset_info::FILE_NAME),
        format!("names in it: {}{more}", names.join(", ")),
    )
}

/// What is wanted of the sources.
pub(super) struct Wanted {
    pub(super) samples: Option<usize>,
    pub(super) length: usize,
    pub(super) seed: u64,
    /// Leave out a document whose text came before.
    pub(super) drop_duplicates: bool,
    /// An end-of-sequence token between documents.
    pub(super) join: bool,
}

/// What was read.
pub(super) struct Loaded {
    pub(super) packed: Packed,
    pub(super) usage: Usage,
    /// Of each document that was used: its source, its row, and where its tokens begin.
    pub(super) places: Vec<(usize, usize, usize)>,
}

/// Rows that were used, but not as they stand.
#[derive(Default)]
struct Departures {
    media: u64,
    second_answers: u64,
    systems_folded: u64,
    tools_unused: u64,
    untemplated: u64,
}

/// Reads, renders and packs until the windows are full or the rows end.
pub(super) fn pack(
    mut sources: Vec<Opened>,
    wanted: &Wanted,
    tokens: &Tokens,
    model_dir: &Path,
) -> Result<Loaded> {
    let mut usage = Usage {
        windows_wanted: wanted.samples.unwrap_or(0) as u64,
        ..Usage::default()
    };
    for source in &sources {
        usage.sources.push(SourceUsage {
            name: source.name.clone(),
            rows: source.rows.len() as u64,
            used: 0,
        });
    }
    let lengths: Vec<usize> = sources.iter().map(|s| s.rows.len()).collect();
    let total: usize = lengths.iter().sum();
    usage.documents_found = total as u64;
    if u32::try_from(total).is_err() {
        return Err(Error::usage(
            "--calibration",
            format!("{total} rows are too many"),
            "name fewer files; a few thousand rows are plenty for calibration",
        ));
    }
    let mut reader = Reader {
        packer: Packer::new(
            wanted.length,
            wanted.samples,
            tokens.eos().filter(|_| wanted.join),
        ),
        tokens,
        model_dir,
        template: None,
        seen: wanted.drop_duplicates.then(HashSet::new),
        departures: Departures::default(),
        places: Vec::new(),
        join: wanted.join,
    };
    let mut left: Vec<usize> = sources.iter().map(|s| s.limit).collect();
    let mut order = order(&lengths, wanted.seed).filter(|(source, _)| {
        let allowed = left[*source] > 0;
        left[*source] = left[*source].saturating_sub(1);
        allowed
    });
    let ahead = sources.iter().map(|s| s.rows.read_ahead()).max().unwrap_or(1);
    'full: loop {
        let places: Vec<_> = order.by_ref().take(ahead).collect();
        if places.is_empty() {
            break;
        }
        for (&(source, place), row) in places.iter().zip(read(&mut sources, &places)?) {
            if reader.packer.is_full() {
                break 'full;
            }
            usage.documents_read += 1;
            let begin = reader.packer.len();
            if reader.document(row, &sources[source].reading, &mut usage)? {
                reader.places.push((source, place, begin));
                usage.documents_used += 1;
                usage.sources[source].used += 1;
            }
        }
        if reader.packer.is_full() {
            break;
        }
    }
    drop(order);
    for (source, lines) in sources.iter().zip(&lengths) {
        if source.limit < *lines {
            let sentence = format!("num_samples takes {} of {lines} rows", source.limit);
            usage.notes.push(format!("{}: {sentence}", source.name));
        }
    }
    reader.finish(usage)
}

/// Reads rows at these places, in this order, each source in one ascending sweep.
fn read(sources: &mut [Opened], places: &[(usize, usize)]) -> Result<Vec<Row>> {
    let mut found: Vec<Option<Row>> = places.iter().map(|_| None).collect();
    for (index, source) in sources.iter_mut().enumerate() {
        let mut of_source: Vec<(usize, usize)> = (places.iter().enumerate())
            .filter(|(_, (s, _))| *s == index)
            .map(|(at, (_, row))| (*row, at))
            .collect();
        if of_source.is_empty() {
            continue;
        }
        of_source.sort_unstable();
        let rows: Vec<usize> = of_source.iter().map(|(row, _)| *row).collect();
        for ((_, at), row) in of_source.iter().zip(source.rows.read(&rows)?) {
            found[*at] = Some(row);
        }
    }
    Ok(found.into_iter().flatten().collect())
}

struct Reader<'a> {
    packer: Packer,
    tokens: &'a Tokens,
    model_dir: &'a Path,
    /// Opened at the first conversation: plain text needs none.
    template: Option<Option<ChatTemplate>>,
    /// Digests of the texts that came before.
    seen: Option<HashSet<[u8; 16]>>,
    departures: Departures,
    places: Vec<(usize, usize, usize)>,
    join: bool,
}

impl Reader<'_> {
    /// Packs a row; whether its tokens are used.
    fn document(&mut self, row: Row, reading: &Reading, usage: &mut Usage) -> Result<bool> {
        let document = match understand(row, reading) {
            Ok(document) => document,
            Err(reason) => {
                usage.leave_out(&reason);
                return Ok(false);
            }
        };
        let text = match &document.content {
            Content::Text(text) => Ok(text.clone()),
            Content::Conversation(conversation) => self.render(conversation)?,
        };
        let text = match text {
            Ok(text) => text,
            Err(reason) => {
                usage.leave_out(&reason);
                return Ok(false);
            }
        };
        if let Some(seen) = &mut self.seen {
            let mut key = [0; 16];
            key.copy_from_slice(&Sha256::digest(&text)[..16]);
            if !seen.insert(key) {
                usage.leave_out("the same text came before");
                return Ok(false);
            }
        }
        self.packer.begin_document();
        self.tokens.encode(&text, |ids| self.packer.push(ids))?;
        if self.packer.len() > MAX_TOKENS {
            return Err(Error::usage(
                "--samples",
                format!("more than {MAX_TOKENS} tokens"),
                "use a smaller file, or fewer samples",
            ));
        }
        let used = self.packer.document_tokens() > 0;
        match used {
            true => {
                self.departures.media += u64::from(document.has_media);
                self.departures.second_answers += u64::from(document.has_unused_answer);
            }
            // The separator before it took the last place.
            false if self.packer.is_full() => usage.leave_out("the windows were full before its first token"),
            false => usage.leave_out("the text has no tokens"),
        }
        Ok(used)
    }

    fn render(
        &mut self,
        conversation: &Conversation,
    ) -> Result<std::result::Result<String, super::conversation::Reason>> {
        if self.template.is_none() {
            self.template = Some(ChatTemplate::open(self.model_dir)?);
        }
        let Some(Some(template)) = &self.template else {
            self.departures.untemplated += 1;
            let turns: Vec<&str> = conversation.turns.iter().map(|t| t.text.as_str()).collect();
            return Ok(Ok(turns.join("\n\n")));
        };
        Ok(template.render(conversation).map(|rendered| {
            self.departures.systems_folded += u64::from(rendered.system_folded);
            self.departures.tools_unused += u64::from(rendered.tools_unused);
            rendered.text
        }))
    }

    fn finish(self, mut usage: Usage) -> Result<Loaded> {
        let found = self.packer.len();
        let length = self.packer.length();
        let packed = self.packer.finish();
        usage.documents_not_reached = usage.documents_found - usage.documents_read;
        usage.windows_used = packed.windows as u64;
        usage.tokens_used = packed.tokens.len() as u64;
        usage.tokens_left_out = packed.left_out;
        let gone = &self.departures;
        for (count, sentence) in [
            (
                gone.media,
                "the text is used, the images, videos or audios are not",
            ),
            (
                gone.second_answers,
                "the chosen answer is used, the rejected one is not",
            ),
            (
                gone.systems_folded,
                "the chat template takes no system turn; its text opens the first user turn",
            ),
            (
                gone.tools_unused,
                "the chat template does not show the tools on offer",
            ),
            (
                gone.untemplated,
                "the model has no chat template; the turns are joined by blank lines",
            ),
        ] {
            usage.note_count(count, sentence);
        }
        if self.join && self.tokens.eos().is_none() && usage.documents_used > 1 {
            let note = "the model names no eos_token_id; documents are joined with nothing between";
            usage.notes.push(note.into());
        }
        if let Some(most) = self.tokens.positions_max().filter(|most| length > *most) {
            let note = format!(
                "windows of {length} tokens are longer than the {most} positions that the model is made for"
            );
            usage.notes.push(note);
        }
        if self.join && usage.windows_used > 0 && usage.windows_used < usage.windows_wanted {
            usage.notes.push(format!(
                "{} of {} windows of {length} tokens: the texts have {found} tokens in all",
                usage.windows_used, usage.windows_wanted
            ));
        }
        match packed.windows {
            0 => Err(too_short(found, length, &usage)),
            _ => Ok(Loaded {
                packed,
                usage,
                places: self.places,
            }),
        }
    }
}

fn too_short(found: usize, length: usize, usage: &Usage) -> Error {
    let names: Vec<&str> = usage.sources.iter().map(|s| s.name.as_str()).collect();
    let names = names.join(", ");
    if usage.documents_used == 0 {
        let problem = match usage.left_out.is_empty() {
            true => "no row at all".to_owned(),
            false => format!(
                "none of {} rows can be used: {}",
                usage.documents_read,
                usage.left_out_summary()
            ),
        };
        return Error::invalid(
            names,
            problem,
            "rows are text, instruction/output, conversations of from/value or messages of role/content; other names go into dataset_info.json",
        );
    }
    // The largest power of two that gives a window.
    let fits = 1usize << found.max(1).ilog2();
    let left_out = match usage.left_out.is_empty() {
        true => String::new(),
        false => format!(
            " ({} rows left out: {})",
            usage.left_out.values().sum::<u64>(),
            usage.left_out_summary()
        ),
    };
    Error::invalid(
        names,
        format!("{found} tokens, not one window of {length}{left_out}"),
        format!("add text, or use --length {fits} or less"),
    )
}
