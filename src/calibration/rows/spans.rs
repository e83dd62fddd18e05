//! .json, .jsonl and .txt: files whose rows are byte ranges. One streaming pass finds the ranges.
//!
//! Whether a file holds one array or one object a line is seen from its first byte, not from its name.

use super::{MAX_ROW_BYTES, MAX_ROWS, NOT_AN_OBJECT, Row, Rows, TOO_LONG, TextRows, too_many_rows};
use crate::error::{Error, IoContext, Result};
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// A .txt file of more bytes than this is cut at a line end into several documents.
const TEXT_PIECE_BYTES: u64 = 16 << 20;
const BUFFER_BYTES: usize = 1 << 18;
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
const NOT_UTF8: &str = "convert it, for instance with `iconv -t UTF-8`";

#[derive(Clone, Copy)]
struct Span {
    start: u64,
    /// `u32::MAX`: longer than a row may be.
    bytes: u32,
}

enum Kind {
    Json,
    Text,
}

/// Rows at byte ranges of a file.
pub(super) struct SpanRows {
    path: PathBuf,
    file: File,
    spans: Vec<Span>,
    kind: Kind,
}

impl SpanRows {
    /// Indexes a file that is one JSON array, or has one JSON value a line.
    pub(super) fn json(path: &Path) -> Result<Self> {
        let mut scan = Scan::open(path)?;
        let spans = match scan.first_byte()? {
            Some(b'[') => scan.array()?,
            _ => scan.lines()?,
        };
        Self::new(path, spans, Kind::Json)
    }

    /// Indexes a text file.
    pub(super) fn text(path: &Path, rows: TextRows) -> Result<Self> {
        let scan = Scan::open(path)?;
        let spans = match rows {
            TextRows::File => scan.pieces()?,
            TextRows::Line => scan.lines()?,
        };
        Self::new(path, spans, Kind::Text)
    }

    fn new(path: &Path, spans: Vec<Span>, kind: Kind) -> Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            file: File::open(path).context("read", path)?,
            spans,
            kind,
        })
    }

    fn row(&mut self, row: usize) -> Result<Row> {
        let span = self.spans[row];
        if u64::from(span.bytes) > MAX_ROW_BYTES {
            return Ok(Row::Unusable(TOO_LONG));
        }
        let mut bytes = vec![0; span.bytes as usize];
        self.file
            .seek(SeekFrom::Start(span.start))
            .and_then(|_| self.file.read_exact(&mut bytes))
            .context("read", &self.path)?;
        match self.kind {
            Kind::Text => match String::from_utf8(bytes) {
                Ok(text) => Ok(Row::Text(text)),
                Err(_) => Err(self.bad(row, 0, "not UTF-8 text", NOT_UTF8)),
            },
            Kind::Json => match serde_json::from_slice(&bytes) {
                Ok(Value::Object(fields)) => Ok(Row::Fields(fields)),
                Ok(_) => Ok(Row::Unusable(NOT_AN_OBJECT)),
                Err(problem) => Err(self.bad(
                    row,
                    problem.line().saturating_sub(1) as u64,
                    &format!("malformed JSON: {problem}"),
                    "a file holds either one JSON array of rows, or one JSON object a line; mend or remove this row",
                )),
            },
        }
    }

    fn bad(&self, row: usize, lines_into: u64, problem: &str, hint: &str) -> Error {
        let line = line_at(&self.path, self.spans[row].start).map(|line| line + lines_into);
        let place = match line {
            Ok(line) => format!("{} line {line} (row {})", self.path.display(), row + 1),
            Err(_) => format!("{} row {}", self.path.display(), row + 1),
        };
        Error::invalid(place, problem, hint)
    }
}

impl Rows for SpanRows {
    fn len(&self) -> usize {
        self.spans.len()
    }

    fn read(&mut self, rows: &[usize]) -> Result<Vec<Row>> {
        rows.iter().map(|&row| self.row(row)).collect()
    }
}

/// The line number, from 1, of the byte at `offset`.
fn line_at(path: &Path, offset: u64) -> Result<u64> {
    let file = File::open(path).context("read", path)?;
    let mut reader = BufReader::with_capacity(BUFFER_BYTES, file.take(offset));
    let mut line = 1;
    loop {
        let chunk = reader.fill_buf().context("read", path)?;
        if chunk.is_empty() {
            return Ok(line);
        }
        line += chunk.iter().filter(|&&b| b == b'\n').count() as u64;
        let read = chunk.len();
        reader.consume(read);
    }
}

/// One pass over the bytes of a file.
struct Scan<'a> {
    path: &'a Path,
    reader: BufReader<File>,
    start: u64,
    spans: Vec<Span>,
}

impl<'a> Scan<'a> {
    fn open(path: &'a Path) -> Result<Self> {
        let file = File::open(path).context("read", path)?;
        let mut reader = BufReader::with_capacity(BUFFER_BYTES, file);
        let head = reader.fill_buf().context("read", path)?;
        let start = match head.starts_with(BYTE_ORDER_MARK) {
            true => BYTE_ORDER_MARK.len(),
            false => 0,
        };
        reader.consume(start);
        Ok(Self {
            path,
            reader,
            start: start as u64,
            spans: Vec::new(),
        })
    }

    /// The first byte that is not white space, looked for in the first buffer; nothing is consumed.
    fn first_byte(&mut self) -> Result<Option<u8>> {
        let head = self.reader.fill_buf().context("read", self.path)?;
        Ok(head.iter().copied().find(|b| !b.is_ascii_whitespace()))
    }

    /// Feeds every byte with its offset; the last call has no byte.
    fn each(
        mut self,
        mut visit: impl FnMut(&mut Vec<Span>, u64, Option<u8>) -> Result<()>,
    ) -> Result<Vec<Span>> {
        let mut offset = self.start;
        loop {
            let chunk = self.reader.fill_buf().context("read", self.path)?;
            if chunk.is_empty() {
                visit(&mut self.spans, offset, None)?;
                return Ok(self.spans);
            }
            for &byte in chunk {
                visit(&mut self.spans, offset, Some(byte))?;
                offset += 1;
            }
            let read = chunk.len();
            self.reader.consume(read);
            if self.spans.len() > MAX_ROWS {
                return Err(too_many_rows(self.path));
            }
        }
    }

    /// A row for each line that is not blank.
    fn lines(self) -> Result<Vec<Span>> {
        let (mut start, mut blank) = (self.start, true);
        self.each(|spans, offset, byte| {
            if let Some(byte) = byte.filter(|&b| b != b'\n') {
                blank &= byte.is_ascii_whitespace();
                return Ok(());
            }
            if !blank {
                spans.push(Span::new(start, offset));
            }
            (start, blank) = (offset + 1, true);
            Ok(())
        })
    }

    /// The whole file as one row; a file over [`TEXT_PIECE_BYTES`] is cut at line ends, or between characters where a line
    /// does not end.
    fn pieces(self) -> Result<Vec<Span>> {
        let (mut start, mut line_end) = (self.start, false);
        self.each(|spans, offset, byte| {
            let bytes = offset - start;
            let cut = match byte {
                None => bytes > 0,
                Some(byte) => {
                    let between = byte & 0xc0 != 0x80;
                    (bytes >= TEXT_PIECE_BYTES && line_end && between)
                        || (bytes >= 2 * TEXT_PIECE_BYTES && between)
                }
            };
            if cut {
                spans.push(Span::new(start, offset));
                start = offset;
            }
            line_end = byte == Some(b'\n');
            Ok(())
        })
    }

    /// A row for each element of the array that the file is.
    fn array(self) -> Result<Vec<Span>> {
        let path = self.path;
        let bad = |offset: u64, problem: &str| {
            let line = line_at(path, offset).unwrap_or(0);
            Error::invalid(
                format!("{} line {line}", path.display()),
                format!("malformed JSON: {problem}"),
                "the file begins as a JSON array of rows; one object a line needs no brackets around",
            )
        };
        // Depth 0: before or after the array; 1: between its elements; deeper: inside one.
        let (mut depth, mut done) = (0u64, false);
        let (mut in_string, mut escaped) = (false, false);
        // Where the element in work began, and the end of its last byte that is not white space.
        let mut element: Option<(u64, u64)> = None;
        let mut wanted = false;
        self.each(|spans, offset, byte| {
            let Some(byte) = byte else {
                return match done {
                    true => Ok(()),
                    false => Err(bad(offset, "the array does not end")),
                };
            };
            if in_string {
                match byte {
                    _ if escaped => escaped = false,
                    b'\\' => escaped = true,
                    b'"' => in_string = false,
                    _ => {}
                }
                if let Some((_, end)) = &mut element {
                    *end = offset + 1;
                }
                return Ok(());
            }
            if byte.is_ascii_whitespace() {
                return Ok(());
            }
            if depth == 0 {
                if done || byte != b'[' {
                    return Err(bad(offset, "something follows the array"));
                }
                depth = 1;
                return Ok(());
            }
            if depth == 1 && (byte == b',' || byte == b']') {
                match element.take() {
                    Some((start, end)) => spans.push(Span::new(start, end)),
                    None if byte == b',' || wanted => {
                        return Err(bad(offset, "a row is missing between commas"));
                    }
                    None => {}
                }
                wanted = byte == b',';
                if byte == b']' {
                    (depth, done) = (0, true);
                }
                return Ok(());
            }
            match byte {
                b'"' => in_string = true,
                b'[' | b'{' => depth += 1,
                b']' | b'}' if depth > 1 => depth -= 1,
                b']' | b'}' => return Err(bad(offset, "a bracket that nothing opened")),
                _ => {}
            }
            element = Some((element.map_or(offset, |(start, _)| start), offset + 1));
            Ok(())
        })
    }
}

impl Span {
    fn new(start: u64, end: u64) -> Self {
        Self {
            start,
            bytes: u32::try_from(end - start).unwrap_or(u32::MAX),
        }
    }
}
