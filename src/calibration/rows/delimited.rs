//! .csv and .tsv: a header line, then a row a record; fields may be quoted and hold line ends.

use super::{Fields, MAX_ROW_BYTES, MAX_ROWS, Row, Rows, too_many_rows};
use crate::error::{Error, IoContext, Result};
use csv::{Position, Reader, ReaderBuilder, StringRecord};
use serde_json::Value;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Rows of a delimited file, at the offsets found by one pass over it.
pub(super) struct DelimitedRows {
    path: PathBuf,
    reader: Reader<Bounded>,
    columns: StringRecord,
    /// Byte offset and line of each record.
    places: Vec<(u64, u32)>,
}

impl DelimitedRows {
    /// Indexes the file.
    pub(super) fn open(path: &Path, delimiter: u8) -> Result<Self> {
        let file = File::open(path).context("read", path)?;
        let mut reader = ReaderBuilder::new()
            .delimiter(delimiter)
            .from_reader(Bounded { file, left: 0 });
        reader.get_mut().refill();
        let columns = reader.headers().map_err(|e| bad(path, &e))?.clone();
        let mut places = Vec::new();
        let mut record = csv::ByteRecord::new();
        loop {
            reader.get_mut().refill();
            if !reader.read_byte_record(&mut record).map_err(|e| bad(path, &e))? {
                break;
            }
            if places.len() == MAX_ROWS {
                return Err(too_many_rows(path));
            }
            let place = record.position().cloned().unwrap_or_else(Position::new);
            let line = u32::try_from(place.line()).unwrap_or(u32::MAX);
            places.push((place.byte(), line));
        }
        Ok(Self {
            path: path.to_owned(),
            reader,
            columns,
            places,
        })
    }

    fn row(&mut self, row: usize) -> Result<Row> {
        let (byte, line) = self.places[row];
        let mut place = Position::new();
        place
            .set_byte(byte)
            .set_line(line.into())
            .set_record(row as u64 + 1);
        self.reader.get_mut().refill();
        let mut record = StringRecord::new();
        self.reader
            .seek(place)
            .and_then(|()| self.reader.read_record(&mut record))
            .map_err(|e| bad(&self.path, &e))?;
        let fields: Fields = self
            .columns
            .iter()
            .zip(&record)
            .map(|(column, value)| (column.to_owned(), Value::from(value)))
            .collect();
        Ok(Row::Fields(fields))
    }
}

impl Rows for DelimitedRows {
    fn len(&self) -> usize {
        self.places.len()
    }

    fn read(&mut self, rows: &[usize]) -> Result<Vec<Row>> {
        rows.iter().map(|&row| self.row(row)).collect()
    }
}

fn bad(path: &Path, problem: &csv::Error) -> Error {
    let subject = match problem.position() {
        Some(place) => format!("{} line {}", path.display(), place.line()),
        None => path.display().to_string(),
    };
    Error::invalid(
        subject,
        format!("malformed CSV: {problem}"),
        "fields that hold commas, quotes or line ends stand in double quotes, as UTF-8",
    )
}

/// A file that refuses to feed one record for ever, as an unclosed quote would have it.
struct Bounded {
    file: File,
    left: u64,
}

impl Bounded {
    /// Before each record.
    fn refill(&mut self) {
        self.left = MAX_ROW_BYTES;
    }
}

impl Read for Bounded {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            return Err(io::Error::other(
                "a record is longer than 64 MiB; is a quote left open?",
            ));
        }
        let read = self.file.read(into)?;
        self.left = self.left.saturating_sub(read as u64);
        Ok(read)
    }
}

impl Seek for Bounded {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}
