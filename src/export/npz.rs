//! A `.npz` file of a checkpoint: a zip archive whose members are stored.

use super::{ExportOptions, Tensors, failed, outputs, outputs::Outputs, pieces::Pieces};
use crate::{
    error::Error,
    fault,
    format::npy,
    plan::{EntryHeader, Order},
};
use std::{
    fs::File,
    io::{self, BufWriter, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

/// Bytes of headers that are written at once.
const BUFFER_LEN: usize = 64 << 10;
/// Members from here on need the long form of their lengths.
const LARGE_LEN: u64 = u32::MAX as u64 - (1 << 20);

/// See [`super::export_npz`].
pub(super) fn write(
    tensors: &Tensors<'_>,
    out: &Path,
    options: &ExportOptions,
    pieces: &mut Pieces<'_>,
) -> Result<PathBuf, Error> {
    if options.max_shard_bytes.is_some() {
        return Err(Error::Usage(
            "a .npz file is not cut into shards".to_owned(),
        ));
    }
    let (dir, name) = outputs::split(out)?;
    let mut outputs = Outputs::begin(&dir, &[&name], options.overwrite, tensors.source)?;
    let file = outputs.create(&name, 0)?;
    let shown = outputs.path(&name);
    let is_over = Arc::new(AtomicBool::new(false));
    let mut zip = ZipWriter::new(Sink {
        file: BufWriter::with_capacity(BUFFER_LEN, file),
        at: 0,
        is_over: Arc::clone(&is_over),
    });
    // Dropped before the archive.
    let end = End(is_over);
    for &index in &tensors.indices {
        let header = &tensors.source.entries()[index].header;
        let npy = npy_header(header);
        let member_len = header.byte_len.saturating_add(npy.len() as u64);
        begin(&mut zip, &header.name, member_len).map_err(failed("write", &shown))?;
        let mut write = |bytes: &[u8]| zip.write_all(bytes).map_err(failed("write", &shown));
        write(&npy)?;
        pieces.copy(index, &mut write)?;
    }
    let sink = zip
        .finish()
        .map_err(|error| failed("write", &shown)(error.into()))?;
    let file =
        (sink.file.into_inner()).map_err(|error| failed("write", &shown)(error.into_error()))?;
    drop(end);
    outputs.keep(&name, &file)?;
    pieces.check_unchanged()?;
    outputs.publish()?;
    Ok(shown)
}

/// The header that the tensor has when it lands.
fn npy_header(header: &EntryHeader) -> Vec<u8> {
    match header.dtype() {
        Some(dtype) if !dtype.is_packed() => npy::encode_header(
            &dtype.npy_descr(header.big_endian),
            header.order == Order::Fortran,
            &header.shape,
        ),
        _ => npy::encode_header("|u1", false, &[header.byte_len]),
    }
}

/// Begins the member of a tensor.
fn begin(zip: &mut ZipWriter<Sink>, name: &str, member_len: u64) -> io::Result<()> {
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Stored)
        .large_file(member_len >= LARGE_LEN);
    Ok(zip.start_file(format!("{name}.npy"), options)?)
}

/// The file beneath an archive. After an error, and once the export has ended with one,
/// nothing is written and all seems to go well: a writer of archives that is dropped still
/// writes their directory, and prints it when that fails.
struct Sink {
    file: BufWriter<File>,
    /// Where the next byte goes, or would go.
    at: u64,
    is_over: Arc<AtomicBool>,
}

impl Sink {
    fn call<T>(
        &mut self,
        otherwise: T,
        act: impl FnOnce(&mut BufWriter<File>) -> io::Result<T>,
    ) -> io::Result<T> {
        if self.is_over.load(Ordering::Relaxed) {
            return Ok(otherwise);
        }
        let result = fault::call("export_write", || act(&mut self.file));
        if result.is_err() {
            self.is_over.store(true, Ordering::Relaxed);
        }
        result
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = self.call(bytes.len(), |file| file.write(bytes))?;
        self.at = self.at.saturating_add(len as u64);
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.call((), BufWriter::flush)
    }
}

impl Seek for Sink {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let otherwise = match to {
            SeekFrom::Start(at) => at,
            // An archive is written at its end.
            SeekFrom::Current(_) | SeekFrom::End(_) => self.at,
        };
        self.at = self.call(otherwise, |file| file.seek(to))?;
        Ok(self.at)
    }

    fn stream_position(&mut self) -> io::Result<u64> {
        Ok(self.at)
    }
}

/// Ends an export when it is dropped.
struct End(Arc<AtomicBool>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
