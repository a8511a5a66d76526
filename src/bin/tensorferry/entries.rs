//! The entries of a source, for people and for programs.

use crate::{exit::Failure, output::Output, units};
use serde::Serialize;
use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::Arc,
};
use tensorferry::{
    CheckpointInfo, Error,
    plan::{EntryKind, FileNames, Order},
    protocol::{CONTAINER_FILE, Layout, OutFormat},
    source::{SourceOptions, SourceSet},
};

#[derive(Serialize)]
struct TensorEvent<'a> {
    name: &'a str,
    dtype: &'a str,
    shape: &'a [u64],
    bytes: u64,
    fortran_order: bool,
    big_endian: bool,
    aliases: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    source_name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    trainable: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    optimizer: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source_file: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
}

#[derive(Serialize)]
struct FileEvent<'a> {
    name: &'a str,
    bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<&'a str>,
}

#[derive(Serialize)]
struct SkippedEvent<'a> {
    name: &'a str,
    reason: &'a str,
}

#[derive(Serialize)]
struct TotalEvent<'a> {
    format: &'a str,
    tensors: u64,
    files: u64,
    bytes: u64,
    derived_bytes: u64,
}

/// Opens a source where it may block on the disk.
pub(crate) async fn open(
    paths: Vec<PathBuf>,
    options: SourceOptions,
) -> Result<Arc<SourceSet>, Failure> {
    let opened = tokio::task::spawn_blocking(move || SourceSet::open(&paths, &options)).await;
    let source = opened.map_err(|e| Error::Bug(e.to_string()))??;
    Ok(Arc::new(source))
}

/// Tensors and side files.
pub(crate) fn counts(source: &SourceSet) -> (u64, u64) {
    let tensor_count = source
        .entries()
        .iter()
        .filter(|e| e.header.dtype().is_some())
        .count();
    (
        tensor_count as u64,
        (source.entries().len() - tensor_count) as u64,
    )
}

/// Names on standard error what is left out.
pub(crate) fn tell_skipped(source: &SourceSet, output: &Output) {
    for skipped in source.skipped() {
        output.talk(&format!(
            "skipped {}: {}",
            units::brief(&skipped.name),
            units::brief(&skipped.reason)
        ));
        output.event(
            "skipped",
            &SkippedEvent {
                name: &skipped.name,
                reason: &skipped.reason,
            },
        );
    }
}

/// One entry as it is shown, of a source or of a landed checkpoint.
struct Row<'a> {
    name: &'a str,
    /// `None` for a side file.
    dtype: Option<&'a str>,
    shape: &'a [u64],
    bytes: u64,
    fortran_order: bool,
    big_endian: bool,
    aliases: &'a [String],
    source_name: Option<&'a str>,
    trainable: Option<bool>,
    is_optimizer: bool,
    /// What it becomes, or is.
    file: Option<String>,
    /// Where it lies now.
    source_file: Option<&'a str>,
    /// First byte in that file, else in `file`.
    offset: Option<u64>,
}

/// Every entry, with the file it becomes where that is asked for, and the total.
pub(crate) fn show(source: &SourceSet, files: Option<(Layout, OutFormat)>, output: &Output) {
    let mut names = FileNames::default();
    let paths: Vec<String> = source
        .paths()
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    let rows = source.entries().iter().enumerate().map(|(index, entry)| {
        let header = &entry.header;
        let file = files.map(|(layout, format)| match (header.kind, layout) {
            (EntryKind::Blob, _) => names.blob(&header.name),
            _ if format == OutFormat::Safetensors => CONTAINER_FILE.to_owned(),
            (EntryKind::Tensor { .. }, Layout::Indexed) => names.indexed(index as u64),
            (EntryKind::Tensor { .. }, _) => names.tensor(&header.name),
        });
        let place = entry.first_place();
        Row {
            name: &header.name,
            dtype: header.dtype().map(|dtype| dtype.name()),
            shape: &header.shape,
            bytes: header.byte_len,
            fortran_order: header.order == Order::Fortran,
            big_endian: header.big_endian,
            aliases: &entry.aliases,
            source_name: entry.source_name.as_deref(),
            trainable: entry.trainable,
            is_optimizer: entry.is_optimizer,
            file,
            source_file: place.and_then(|(file, _)| paths.get(file as usize).map(|p| &p[..])),
            offset: place.map(|(_, offset)| offset),
        }
    });
    let derived_bytes = source.derived_bytes();
    show_rows(
        &rows.collect::<Vec<_>>(),
        source.format(),
        derived_bytes,
        output,
    );
}

/// The same of a checkpoint that stands on a server.
pub(crate) fn show_landed(info: &CheckpointInfo, output: &Output) {
    let tensors = info.tensors.iter().map(|tensor| Row {
        name: &tensor.name,
        dtype: Some(tensor.dtype.name()),
        shape: &tensor.shape,
        bytes: tensor.byte_len,
        fortran_order: tensor.fortran_order,
        big_endian: tensor.big_endian,
        aliases: &tensor.aliases,
        source_name: tensor.source_name.as_deref(),
        trainable: tensor.trainable,
        is_optimizer: false,
        file: Some(tensor.file.clone()),
        source_file: None,
        offset: Some(tensor.data_offset),
    });
    let files = info.files.iter().map(|file| Row {
        name: &file.name,
        dtype: None,
        shape: &[],
        bytes: file.byte_len,
        fortran_order: false,
        big_endian: false,
        aliases: &[],
        source_name: None,
        trainable: None,
        is_optimizer: false,
        file: Some(file.file.clone()),
        source_file: None,
        offset: None,
    });
    let rows = tensors.chain(files).collect::<Vec<_>>();
    show_rows(&rows, &info.source_format, 0, output);
}

/// What a tensor is for, in one word.
fn role(entry: &Row<'_>) -> &'static str {
    match (entry.is_optimizer, entry.trainable) {
        (true, _) => "optimizer",
        (false, Some(true)) => "trainable",
        (false, Some(false)) => "fixed",
        (false, None) => "",
    }
}

/// Where a tensor begins, with the name of its file where there are several.
fn offset(entry: &Row<'_>, has_several: bool) -> String {
    let (Some(offset), Some(_)) = (entry.offset, entry.dtype) else {
        return String::new();
    };
    match entry.source_file.filter(|_| has_several) {
        Some(file) => {
            let name = Path::new(file).file_name().unwrap_or_default();
            format!("{}:{offset}", units::brief(&name.to_string_lossy()))
        }
        None => offset.to_string(),
    }
}

fn show_rows(entries: &[Row<'_>], format: &str, derived_bytes: u64, output: &Output) {
    let has_files = entries.iter().any(|row| row.file.is_some());
    // Of a source that calls its tensors otherwise, or knows what they are for.
    let has_origins = has_files && entries.iter().any(|row| row.source_name.is_some());
    let has_roles = entries
        .iter()
        .any(|row| row.trainable.is_some() || row.is_optimizer);
    // A mapping shows what becomes of a tensor instead.
    let has_offsets = !(has_files && entries.iter().any(|row| row.source_file.is_some()));
    let sources: HashSet<_> = entries.iter().filter_map(|row| row.source_file).collect();
    let mut rows = vec![vec!["NAME".to_owned()]];
    rows[0].extend(has_origins.then(|| "SOURCE".to_owned()));
    rows[0].extend(["DTYPE", "SHAPE"].map(str::to_owned));
    rows[0].extend(has_roles.then(|| "ROLE".to_owned()));
    rows[0].extend(has_files.then(|| "FILE".to_owned()));
    rows[0].extend(has_offsets.then(|| "OFFSET".to_owned()));
    rows[0].push("BYTES".to_owned());
    for entry in entries {
        let (name, bytes, file) = (entry.name, entry.bytes, entry.file.as_deref());
        match entry.dtype {
            Some(dtype) => output.event(
                "tensor",
                &TensorEvent {
                    name,
                    dtype,
                    shape: entry.shape,
                    bytes,
                    fortran_order: entry.fortran_order,
                    big_endian: entry.big_endian,
                    aliases: entry.aliases,
                    source_name: entry.source_name,
                    trainable: entry.trainable,
                    optimizer: entry.is_optimizer.then_some(true),
                    file,
                    source_file: entry.source_file,
                    offset: entry.offset,
                },
            ),
            None => output.event("file", &FileEvent { name, bytes, file }),
        }
        if output.is_quiet() {
            output.line(&units::shown(name));
        }
        let shape = entry.dtype.map(|_| format!("{:?}", entry.shape));
        let mut row = vec![units::brief(name)];
        row.extend(has_origins.then(|| units::brief(entry.source_name.unwrap_or(name))));
        row.extend([
            entry.dtype.unwrap_or("file").to_owned(),
            shape.unwrap_or_default(),
        ]);
        row.extend(has_roles.then(|| role(entry).to_owned()));
        row.extend(file.map(units::brief));
        row.extend(has_offsets.then(|| offset(entry, sources.len() > 1)));
        row.push(bytes.to_string());
        rows.push(row);
    }
    output.table(rows[0].len() - 1, &rows);
    let tensors = entries.iter().filter(|row| row.dtype.is_some()).count() as u64;
    let files = entries.len() as u64 - tensors;
    let bytes = entries.iter().map(|row| row.bytes).sum();
    output.event(
        "total",
        &TotalEvent {
            format,
            tensors,
            files,
            bytes,
            derived_bytes,
        },
    );
    output.human(&format!(
        "{}, {}, {} ({bytes} bytes), {}",
        units::count(tensors, "tensor"),
        units::count(files, "file"),
        units::bytes(bytes),
        units::shown(format)
    ));
    if derived_bytes > 0 {
        output.human(&format!(
            "{} of them ({derived_bytes} bytes) do not lie in the source as they are sent: \
             the sender puts them together, which copies them once",
            units::bytes(derived_bytes)
        ));
    }
}
