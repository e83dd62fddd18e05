//! .parquet, through the row API. A row can only be reached by decoding its row group up to it, so rows are
//! asked for in ascending batches and a cursor stays where the last one ended.
//!
//! Columns of raw image, video or audio bytes are not decoded; they stand in the row as a marker.

use super::{Fields, MAX_ROWS, Row, Rows, too_many_rows};
use crate::error::{Error, IoContext, Result};
use parquet::basic::{ConvertedType, LogicalType, Type as Physical};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::file::serialized_reader::ReadOptionsBuilder;
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row as Record};
use parquet::schema::types::Type;
use serde_json::Value;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Rows asked for at once: enough that a shuffled read does not decode a row group for one row.
const READ_AHEAD: usize = 256;

/// Rows of a parquet file.
pub(super) struct ParquetRows {
    path: PathBuf,
    /// The first row of each row group, and the number of all rows.
    group_starts: Vec<usize>,
    /// The columns that are decoded.
    projection: Type,
    /// Names of columns left as a marker.
    opaque: Vec<String>,
    cursor: Option<(usize, RowIter<'static>)>,
}

impl ParquetRows {
    /// Reads the footer.
    pub(super) fn open(path: &Path) -> Result<Self> {
        guarded(path, || {
            let file = File::open(path).context("read", path)?;
            let reader = SerializedFileReader::new(file).map_err(|e| bad(path, &e))?;
            let mut group_starts = vec![0usize];
            for group in reader.metadata().row_groups() {
                let rows = usize::try_from(group.num_rows()).unwrap_or(usize::MAX);
                let next = group_starts[group_starts.len() - 1].saturating_add(rows);
                if next > MAX_ROWS {
                    return Err(too_many_rows(path));
                }
                group_starts.push(next);
            }
            let root = reader.metadata().file_metadata().schema();
            let (opaque, kept): (Vec<_>, Vec<_>) =
                root.get_fields().iter().cloned().partition(holds_raw_bytes);
            let projection = Type::group_type_builder(root.name())
                .with_fields(kept)
                .build()
                .map_err(|e| bad(path, &e))?;
            Ok(Self {
                path: path.to_owned(),
                group_starts,
                projection,
                opaque: opaque.iter().map(|c| c.name().to_owned()).collect(),
                cursor: None,
            })
        })
    }

    fn seek(&mut self, row: usize) -> Result<()> {
        // Of several groups with the same start all but the last are empty.
        let group = self.group_starts.partition_point(|&start| start <= row) - 1;
        let start = self.group_starts[group];
        if let Some((next, _)) = &self.cursor
            && (start..=row).contains(next)
        {
            return Ok(());
        }
        let path = &self.path;
        let file = File::open(path).context("read", path)?;
        let options = ReadOptionsBuilder::new()
            .with_predicate(Box::new(move |_, index| index >= group))
            .build();
        let reader = SerializedFileReader::new_with_options(file, options).map_err(|e| bad(path, &e))?;
        let rows = RowIter::from_file_into(Box::new(reader))
            .project(Some(self.projection.clone()))
            .map_err(|e| bad(path, &e))?;
        self.cursor = Some((start, rows));
        Ok(())
    }

    fn row(&mut self, row: usize) -> Result<Row> {
        self.seek(row)?;
        let Some((next, records)) = &mut self.cursor else {
            return Ok(Row::Unusable("the parquet file ends before its last row"));
        };
        loop {
            let record = records.next();
            *next += 1;
            match record {
                Some(Ok(record)) if *next > row => {
                    let mut fields = group(&record);
                    for name in &self.opaque {
                        fields.insert(name.clone(), Value::from("(bytes)"));
                    }
                    return Ok(Row::Fields(fields));
                }
                Some(Ok(_)) => {}
                Some(Err(problem)) => return Err(bad(&self.path, &problem)),
                None => {
                    return Err(Error::invalid(
                        self.path.display().to_string(),
                        format!("row {} is missing", row + 1),
                        "the file is damaged; fetch it again",
                    ));
                }
            }
        }
    }
}

impl Rows for ParquetRows {
    fn len(&self) -> usize {
        self.group_starts[self.group_starts.len() - 1]
    }

    fn read(&mut self, rows: &[usize]) -> Result<Vec<Row>> {
        let path = self.path.clone();
        guarded(&path, || rows.iter().map(|&row| self.row(row)).collect())
    }

    fn read_ahead(&self) -> usize {
        READ_AHEAD
    }
}

/// The row API panics on some damaged pages; a damaged file is an error here.
fn guarded<T>(path: &Path, read: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| {
        Err(Error::invalid(
            path.display().to_string(),
            "the parquet file is damaged",
            "fetch it again, or convert it to .jsonl",
        ))
    })
}

fn bad(path: &Path, problem: &ParquetError) -> Error {
    Error::invalid(
        path.display().to_string(),
        format!("could not read the parquet file: {problem}"),
        "if it is whole, rewrite it with snappy, zstd, gzip, lz4 or brotli compression, or as .jsonl",
    )
}

/// Whether a column holds bytes that are no text, at any depth.
fn holds_raw_bytes(column: &Arc<Type>) -> bool {
    if !column.is_primitive() {
        return column.get_fields().iter().any(holds_raw_bytes);
    }
    let info = column.get_basic_info();
    let text = matches!(
        info.converted_type(),
        ConvertedType::UTF8 | ConvertedType::JSON | ConvertedType::ENUM | ConvertedType::DECIMAL
    ) || matches!(
        info.logical_type_ref(),
        Some(LogicalType::String | LogicalType::Json | LogicalType::Enum)
    );
    column.get_physical_type() == Physical::BYTE_ARRAY && !text
}

fn group(record: &Record) -> Fields {
    record
        .get_column_iter()
        .map(|(name, field)| (name.clone(), value(field)))
        .collect()
}

fn value(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(v) => Value::from(*v),
        Field::Byte(v) => Value::from(*v),
        Field::Short(v) => Value::from(*v),
        Field::Int(v) => Value::from(*v),
        Field::Long(v) => Value::from(*v),
        Field::UByte(v) => Value::from(*v),
        Field::UShort(v) => Value::from(*v),
        Field::UInt(v) => Value::from(*v),
        Field::ULong(v) => Value::from(*v),
        Field::Float16(v) => Value::from(v.to_f32()),
        Field::Float(v) => Value::from(*v),
        Field::Double(v) => Value::from(*v),
        Field::Str(v) => Value::from(v.as_str()),
        Field::Group(record) => Value::Object(group(record)),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        Field::MapInternal(map) => {
            let entries = map.entries().iter();
            Value::Object(entries.map(|(k, v)| (key(k), value(v))).collect())
        }
        Field::Bytes(_) => Value::from("(bytes)"),
        other => Value::from(other.to_string()),
    }
}

fn key(field: &Field) -> String {
    match field {
        Field::Str(text) => text.clone(),
        other => other.to_string(),
    }
}
