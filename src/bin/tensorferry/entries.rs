//! The entries of a source, for people and for programs.

use crate::{exit::Failure, output::Output, units};
use serde::Serialize;
use std::{path::PathBuf, sync::Arc};
use tensorferry::{
    Error,
    plan::{EntryKind, FileNames, Order},
    protocol::Layout,
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
    file: Option<&'a str>,
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
}

/// Opens a source where it may block on the disk.
pub(crate) async fn open(
    paths: Vec<PathBuf>,
    include_files: bool,
) -> Result<Arc<SourceSet>, Failure> {
    let opened = tokio::task::spawn_blocking(move || {
        SourceSet::open(&paths, &SourceOptions { include_files })
    })
    .await;
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
            units::shown(&skipped.name),
            units::shown(&skipped.reason)
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

/// Every entry, with the file it becomes where a layout is given, and the total.
pub(crate) fn show(source: &SourceSet, layout: Option<Layout>, output: &Output) {
    let mut names = FileNames::default();
    let mut rows = vec![["NAME", "DTYPE", "SHAPE"].map(str::to_owned).to_vec()];
    rows[0].extend(layout.map(|_| "FILE".to_owned()));
    rows[0].push("BYTES".to_owned());
    for (index, entry) in source.entries().iter().enumerate() {
        let header = &entry.header;
        let file = layout.map(|layout| match (header.kind, layout) {
            (EntryKind::Blob, _) => names.blob(&header.name),
            (EntryKind::Tensor { .. }, Layout::Named) => names.tensor(&header.name),
            (EntryKind::Tensor { .. }, Layout::Indexed) => names.indexed(index as u64),
        });
        let (dtype, shape) = match header.kind {
            EntryKind::Tensor { dtype } => (dtype.name(), format!("{:?}", header.shape)),
            EntryKind::Blob => ("file", String::new()),
        };
        match header.kind {
            EntryKind::Tensor { .. } => output.event(
                "tensor",
                &TensorEvent {
                    name: &header.name,
                    dtype,
                    shape: &header.shape,
                    bytes: header.byte_len,
                    fortran_order: header.order == Order::Fortran,
                    big_endian: header.big_endian,
                    aliases: &entry.aliases,
                    file: file.as_deref(),
                },
            ),
            EntryKind::Blob => output.event(
                "file",
                &FileEvent {
                    name: &header.name,
                    bytes: header.byte_len,
                    file: file.as_deref(),
                },
            ),
        }
        if output.is_quiet() {
            output.line(&units::shown(&header.name));
        }
        let mut row = vec![units::shown(&header.name), dtype.to_owned(), shape];
        row.extend(file);
        row.push(header.byte_len.to_string());
        rows.push(row);
    }
    output.table(rows[0].len() - 1, &rows);
    let (tensors, files) = counts(source);
    let bytes = source.total_bytes();
    output.event(
        "total",
        &TotalEvent {
            format: source.format(),
            tensors,
            files,
            bytes,
        },
    );
    output.human(&format!(
        "{}, {}, {} ({bytes} bytes), {}",
        units::count(tensors, "tensor"),
        units::count(files, "file"),
        units::bytes(bytes),
        source.format()
    ));
}
