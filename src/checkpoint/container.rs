//! The file that all tensors of a checkpoint share.

use super::CheckpointInfo;
use crate::{
    plan::{EntryHeader, PlanError},
    store::{encode_container_header, read_exact_at_most},
};
use std::{fs::File, sync::OnceLock};

/// What the file must be by the manifest.
#[derive(Debug)]
pub(super) struct Container {
    /// Length in bytes.
    pub(super) file_len: u64,
    /// Its first bytes, or why there can be none.
    header: Result<Vec<u8>, String>,
    /// The file was looked at, with this result.
    checked: OnceLock<Result<(), String>>,
}

impl Container {
    pub(super) fn of(info: &CheckpointInfo) -> Container {
        let shared = || info.tensors.iter().filter(|t| t.is_in_container());
        let header_len = shared().map(|t| t.data_offset).min().unwrap_or(0);
        let ends = shared().map(|t| t.data_offset.saturating_add(t.byte_len));
        let file_len = ends.max().unwrap_or(0);
        Container {
            file_len,
            header: encode_header(info, header_len),
            checked: OnceLock::new(),
        }
    }

    /// Whether the file begins with the header that the manifest implies.
    pub(super) fn check_header(&self, file: &File) -> Result<(), String> {
        let check = || {
            let expected = self.header.as_ref().map_err(String::clone)?;
            let mut found = vec![0; expected.len()];
            let got = read_exact_at_most(file, &mut found, 0)
                .map_err(|e| format!("the header cannot be read: {e}"))?;
            match found[..got].iter().zip(expected).position(|(a, b)| a != b) {
                None if got == expected.len() => Ok(()),
                at => Err(format!(
                    "the safetensors header is not that of the manifest, from byte {} on",
                    at.unwrap_or(got)
                )),
            }
        };
        self.checked.get_or_init(check).clone()
    }
}

fn encode_header(info: &CheckpointInfo, header_len: u64) -> Result<Vec<u8>, String> {
    let shared = || info.tensors.iter().filter(|t| t.is_in_container());
    let headers = shared().map(|t| EntryHeader::tensor(t.name.clone(), t.dtype, &t.shape));
    let headers: Vec<EntryHeader> = headers
        .collect::<Result<_, PlanError>>()
        .map_err(|e| e.to_string())?;
    let places = headers.iter().zip(shared().map(|t| t.data_offset));
    encode_container_header(places, &info.metadata, header_len)
}
