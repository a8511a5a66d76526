//! Whether a landed checkpoint is still what its manifest says.

use super::{Checkpoint, FileInfo, TensorInfo, container::Container};
use crate::{
    error::Error,
    format::{checksum, npy},
    store::{StoreError, read_exact_at_most},
};
use rayon::prelude::*;
use std::{fs::File, ops::Range};

/// Bytes read at once; one such buffer per worker.
const READ_BYTES: usize = 1 << 20;

/// What [`Checkpoint::verify`] found.
#[derive(Clone, Debug)]
#[non_exhaustive]
#[must_use = "damage is in the report, not an error"]
pub struct VerifyReport {
    /// Files looked at.
    pub file_count: u64,
    /// Raw bytes that the manifest promises.
    pub byte_count: u64,
    /// What is not as it should be; empty when the checkpoint is whole.
    pub damages: Vec<Damage>,
}

/// One file that is not what the manifest says.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Damage {
    /// Tensor or side file.
    pub name: String,
    /// The file, beneath the folder.
    pub file: String,
    /// Expected and found.
    pub why: String,
}

impl Checkpoint {
    /// Reads every byte again and compares lengths, headers and checksums with
    /// the manifest. `progress` is told how many more bytes have been read.
    ///
    /// # Errors
    /// A file cannot be read. What is damaged is in the report instead.
    pub fn verify(&self, progress: impl Fn(u64) + Sync) -> Result<VerifyReport, Error> {
        let tensors = self
            .info
            .tensors
            .par_iter()
            .map(|t| self.verify_tensor(t, &progress));
        let files = self
            .info
            .files
            .par_iter()
            .map(|f| self.verify_file(f, &progress));
        let damages = tensors.chain(files).collect::<Result<Vec<_>, _>>()?;
        Ok(VerifyReport {
            file_count: (self.info.tensors.len() + self.info.files.len()) as u64,
            byte_count: self.total_bytes(),
            damages: damages.into_iter().flatten().collect(),
        })
    }

    fn verify_tensor(
        &self,
        info: &TensorInfo,
        progress: &(impl Fn(u64) + Sync),
    ) -> Result<Option<Damage>, Error> {
        let checked = self.open_tensor(info)?;
        let data = info.data_offset..info.data_offset + info.byte_len;
        self.judge(&info.name, &info.file, checked, data, info.crc32c, progress)
    }

    fn verify_file(
        &self,
        info: &FileInfo,
        progress: &(impl Fn(u64) + Sync),
    ) -> Result<Option<Damage>, Error> {
        let file = self.open_file(&info.file, info.byte_len)?;
        self.judge(
            &info.name,
            &info.file,
            file,
            0..info.byte_len,
            info.crc32c,
            progress,
        )
    }

    fn judge(
        &self,
        name: &str,
        path: &str,
        file: Result<File, String>,
        data: Range<u64>,
        crc32c: u32,
        progress: &(impl Fn(u64) + Sync),
    ) -> Result<Option<Damage>, Error> {
        let verdict = match file {
            Ok(file) => self.check_sum(path, &file, data, crc32c, progress)?,
            Err(why) => Err(why),
        };
        Ok(verdict.err().map(|why| Damage {
            name: name.to_owned(),
            file: path.to_owned(),
            why,
        }))
    }

    fn check_sum(
        &self,
        path: &str,
        file: &File,
        data: Range<u64>,
        expected: u32,
        progress: &(impl Fn(u64) + Sync),
    ) -> Result<Result<(), String>, Error> {
        let (mut at, mut found) = (data.start, 0);
        // An empty tensor needs no buffer, a small one a small one.
        let mut buf = vec![0; READ_BYTES.min(usize::try_from(data.end - at).unwrap_or(READ_BYTES))];
        while at < data.end {
            let want = buf
                .len()
                .min(usize::try_from(data.end - at).unwrap_or(buf.len()));
            let got = read_exact_at_most(file, &mut buf[..want], at).map_err(|source| {
                StoreError::Io {
                    op: "read",
                    path: self.folder.root().shown(path),
                    source,
                }
            })?;
            if got < want {
                let end = at + got as u64;
                return Ok(Err(format!(
                    "the file ends at {end}, {} bytes were expected",
                    data.end
                )));
            }
            let sum = checksum::crc32c(&buf[..got]);
            found = if at == data.start {
                sum
            } else {
                checksum::combine(found, sum, got as u64)
            };
            at += got as u64;
            progress(got as u64);
        }
        Ok(if found == expected {
            Ok(())
        } else {
            Err(format!(
                "crc32c {expected:08x} was expected, {found:08x} found"
            ))
        })
    }

    /// The file of a tensor, when it has the length and the header that the manifest implies.
    pub(super) fn open_tensor(&self, info: &TensorInfo) -> Result<Result<File, String>, Error> {
        if !info.is_in_container() {
            let file = self.open_file(&info.file, info.data_offset + info.byte_len)?;
            return Ok(file.and_then(|file| check_header(info, &file).map(|()| file)));
        }
        let container = self.container.get_or_init(|| Container::of(&self.info));
        let file = self.open_file(&info.file, container.file_len)?;
        Ok(file.and_then(|file| container.check_header(&file).map(|()| file)))
    }

    /// The file, when it is there and has exactly this length.
    pub(super) fn open_file(
        &self,
        path: &str,
        file_len: u64,
    ) -> Result<Result<File, String>, Error> {
        let file = match self.folder.root().try_open(path, false) {
            Ok(Some(file)) => file,
            Ok(None) => return Ok(Err(format!("the file {path} is missing"))),
            Err(StoreError::UnsafePath { why, .. }) => {
                return Ok(Err(format!("the file {path}: {why}")));
            }
            Err(error) => return Err(error.into()),
        };
        let found = file.metadata().map_err(|source| StoreError::Io {
            op: "stat",
            path: self.folder.root().shown(path),
            source,
        })?;
        Ok(if found.len() == file_len {
            Ok(file)
        } else {
            Err(format!(
                "{file_len} bytes were expected, the file has {}",
                found.len()
            ))
        })
    }
}

/// Whether the file begins with the header that its manifest entry implies.
fn check_header(info: &TensorInfo, file: &File) -> Result<(), String> {
    let expected = if info.dtype.is_packed() {
        npy::encode_header(&info.npy_descr, false, &[info.byte_len])
    } else {
        npy::encode_header(&info.npy_descr, info.fortran_order, &info.shape)
    };
    if expected.len() as u64 != info.data_offset {
        return Err(format!(
            "data begin at {} by the manifest, at {} by its own shape",
            info.data_offset,
            expected.len()
        ));
    }
    let mut found = vec![0; expected.len()];
    let got = read_exact_at_most(file, &mut found, 0)
        .map_err(|e| format!("the header cannot be read: {e}"))?;
    if found[..got] == expected {
        return Ok(());
    }
    let differs = found
        .iter()
        .zip(&expected)
        .position(|(a, b)| a != b)
        .unwrap_or(got);
    Err(match npy::parse_header(&found[..got]) {
        Ok(header) => format!(
            "the .npy header says {} {:?}, {} {:?} was expected (first other byte at {differs})",
            header.descr, header.shape, info.dtype, info.shape
        ),
        Err(why) => format!("the .npy header is damaged at byte {differs}: {why}"),
    })
}
