//! Parquet: the text columns of one row group at a time.

use std::fs::File;
use std::path::Path;

use fathom_trace::input;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use parquet::schema::types::Type;

use super::DataError;
use super::config::SourceConfig;
use super::source::Document;

fn open(path: &Path) -> Result<SerializedFileReader<File>, DataError> {
    let file = input::open_regular(path).map_err(DataError::io(path))?;
    SerializedFileReader::new(file).map_err(broken(path, "the footer"))
}

fn broken<'a>(path: &'a Path, place: &str) -> impl FnOnce(ParquetError) -> DataError + 'a {
    let place = place.to_owned();
    |e| DataError::Content {
        path: path.to_owned(),
        place,
        expected: "a Parquet file".into(),
        found: e.to_string(),
    }
}

/// Row groups of a file.
pub(super) fn row_groups(path: &Path) -> Result<usize, DataError> {
    Ok(open(path)?.num_row_groups())
}

/// The documents of a row group. Only the columns of the text are read.
pub(super) fn read_group(
    path: &Path,
    config: &SourceConfig,
    group: usize,
) -> Result<Vec<Document>, DataError> {
    let file = open(path)?;
    let place = format!("row group {group}");
    if group >= file.num_row_groups() {
        return Err(DataError::Content {
            path: path.to_owned(),
            place,
            expected: "the row groups that were indexed".into(),
            found: format!("{} row groups", file.num_row_groups()),
        });
    }
    let schema = file.metadata().file_metadata().schema();
    let wanted: Vec<&str> = match &config.prompt_response {
        None => vec![&config.text_field],
        Some(pair) => pair.iter().map(String::as_str).collect(),
    };
    let columns = schema.get_fields();
    let mut kept = Vec::new();
    for name in wanted {
        let Some(column) = columns.iter().find(|c| c.name() == name) else {
            let names: Vec<&str> = columns.iter().map(|c| c.name()).collect();
            return Err(DataError::Content {
                path: path.to_owned(),
                place: "the schema".into(),
                expected: format!("a column '{name}'"),
                found: format!("columns {}", names.join(", ")),
            });
        };
        kept.push(column.clone());
    }
    let projection = Type::group_type_builder(schema.name()).with_fields(kept).build();
    let projection = projection.map_err(broken(path, &place))?;
    let reader = file.get_row_group(group).map_err(broken(path, &place))?;
    let rows = reader.get_row_iter(Some(projection)).map_err(broken(path, &place))?;
    let mut documents = Vec::new();
    for (number, row) in rows.enumerate() {
        let place = format!("row group {group}, row {number}");
        let row = row.map_err(broken(path, &place))?;
        let document = Document::of(config, |name| text(&row, name));
        documents.push(document.map_err(|(name, found)| DataError::Content {
            path: path.to_owned(),
            place,
            expected: format!("UTF-8 text in column '{name}'"),
            found,
        })?);
    }
    Ok(documents)
}

/// A column's text; the error is its name and what was found.
fn text(row: &Row, name: &str) -> Result<String, (String, String)> {
    let field = row.get_column_iter().find(|(n, _)| *n == name).map(|(_, field)| field);
    let found = match field {
        Some(Field::Str(text)) => return Ok(text.clone()),
        Some(Field::Bytes(bytes)) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => return Ok(text.to_owned()),
            Err(e) => e.to_string(),
        },
        Some(Field::Null) => "null".into(),
        Some(other) => format!("the value {other}"),
        None => "nothing".into(),
    };
    Err((name.to_owned(), found))
}
