//! `manifest.json`: what a landed checkpoint says of itself. Its presence means
//! that the checkpoint is complete.

use super::{
    dir::Dir,
    error::{IoContext, StoreError},
};
use crate::fault;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    io::Read,
    time::{SystemTime, UNIX_EPOCH},
};

/// File name of the manifest.
pub(crate) const MANIFEST_FILE: &str = "manifest.json";
/// Most bytes of a manifest.
pub(super) const MAX_MANIFEST_BYTES: u64 = 1 << 30;

/// The manifest of one checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    /// Always `tensorferry`.
    pub(crate) format: String,
    /// Always 1.
    pub(crate) version: u32,
    /// When it was published, RFC 3339 in UTC.
    pub(crate) created: String,
    /// Checkpoint name.
    pub(crate) checkpoint: String,
    /// Where it came from.
    pub(crate) source: ManifestSource,
    /// 32 hex digits of the transfer that made it.
    pub(crate) transfer_id: String,
    /// 32 hex digits, or null when the source could not be trusted to show a change.
    pub(crate) fingerprint: Option<String>,
    /// 32 hex digits over all entry headers.
    pub(crate) entries_digest: String,
    /// Cell length in bytes that the transfer used.
    pub(crate) chunk_len: u32,
    /// `disk` or `process`.
    pub(crate) durability: String,
    /// Tensors in the order of their announcement.
    pub(crate) tensors: Vec<ManifestTensor>,
    /// Side files.
    pub(crate) files: Vec<ManifestBlob>,
    /// Sum of all `nbytes`.
    pub(crate) total_nbytes: u64,
}

/// Origin of a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ManifestSource {
    /// `safetensors`, `npy`, ….
    pub(crate) format: String,
    /// The source's own metadata.
    pub(crate) metadata: BTreeMap<String, String>,
}

/// One tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ManifestTensor {
    /// Number in the order of announcement.
    pub(crate) index: u64,
    /// Name as users know it.
    pub(crate) name: String,
    /// Key in the source.
    pub(crate) source_name: String,
    /// Other names of the same bytes.
    pub(crate) aliases: Vec<String>,
    /// File beside the manifest.
    pub(crate) file: String,
    /// numpy or ml_dtypes name.
    pub(crate) dtype: String,
    /// `descr` of the file's header.
    pub(crate) npy_descr: String,
    /// Logical shape.
    pub(crate) shape: Vec<u64>,
    /// Order of the elements.
    pub(crate) fortran_order: bool,
    /// `little` or `big`.
    pub(crate) byteorder: String,
    /// Elements smaller than a byte share bytes: the file holds `|u1`.
    pub(crate) packed: bool,
    /// Where the data begins in the file, in bytes.
    pub(crate) data_offset: u64,
    /// Length of the data in bytes.
    pub(crate) nbytes: u64,
    /// 8 hex digits of CRC-32C of the data.
    pub(crate) crc32c: String,
    /// The source's own flag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) trainable: Option<bool>,
}

/// One side file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ManifestBlob {
    /// Name in the source.
    pub(crate) name: String,
    /// File beside the manifest.
    pub(crate) file: String,
    /// Length in bytes.
    pub(crate) nbytes: u64,
    /// 8 hex digits of CRC-32C.
    pub(crate) crc32c: String,
}

/// Bytes of a usual entry as JSON.
const ENTRY_LEN_GUESS: usize = 512;

impl Manifest {
    /// The file's bytes.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        // Room for all of it, or it is copied again and again as it grows.
        let entry_count = self.tensors.len() + self.files.len();
        let mut bytes = Vec::with_capacity((entry_count + 1) * ENTRY_LEN_GUESS);
        // Cannot fail: there are no maps with keys that are not text.
        let _ = serde_json::to_writer_pretty(&mut bytes, self);
        bytes.push(b'\n');
        bytes
    }

    /// Reads the manifest of a folder, with its bytes; `None` when there is none.
    pub(crate) fn read(dir: &Dir) -> Result<Option<(Manifest, Vec<u8>)>, StoreError> {
        let Some(bytes) = read_bytes(dir)? else {
            return Ok(None);
        };
        let manifest = Manifest::from_bytes(&bytes).map_err(|why| bad(dir, why))?;
        Ok(Some((manifest, bytes)))
    }

    /// Reads a manifest's bytes, or says why that is none.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Manifest, String> {
        let manifest: Manifest = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        if manifest.format != "tensorferry" || manifest.version != 1 {
            return Err(format!(
                "format {:?} version {}",
                manifest.format, manifest.version
            ));
        }
        Ok(manifest)
    }

    /// BLAKE3 of the manifest in a folder, or `None` when there is none.
    pub(crate) fn hash(dir: &Dir) -> Result<Option<[u8; 32]>, StoreError> {
        let bytes = read_bytes(dir)?;
        Ok(bytes.map(|b| *blake3::hash(&b).as_bytes()))
    }
}

fn read_bytes(dir: &Dir) -> Result<Option<Vec<u8>>, StoreError> {
    let Some(file) = dir.try_open(MANIFEST_FILE, false)? else {
        return Ok(None);
    };
    let mut bytes = Vec::new();
    let mut limited = file.take(MAX_MANIFEST_BYTES + 1);
    fault::call("read", || limited.read_to_end(&mut bytes))
        .context("read", dir.shown(MANIFEST_FILE))?;
    if bytes.len() as u64 > MAX_MANIFEST_BYTES {
        return Err(bad(
            dir,
            format!("it is longer than {MAX_MANIFEST_BYTES} bytes"),
        ));
    }
    Ok(Some(bytes))
}

fn bad(dir: &Dir, why: String) -> StoreError {
    StoreError::Manifest {
        path: dir.shown(MANIFEST_FILE),
        why,
    }
}

/// Lower-case hex digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut out, b| {
        let _ = write!(out, "{b:02x}");
        out
    })
}

/// Now, as RFC 3339 in UTC with seconds.
pub(crate) fn rfc3339_now() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    rfc3339(now.map_or(0, |d| d.as_secs()))
}

/// Civil date of a day count, after H. Hinnant, "chrono-compatible low-level date
/// algorithms", for dates from 1970 on.
fn rfc3339(unix_seconds: u64) -> String {
    let (days, second) = (unix_seconds / 86_400, unix_seconds % 86_400);
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(rfc3339(1_893_455_999), "2029-12-31T23:59:59Z");
    }
}
