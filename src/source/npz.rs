//! `.npz`: a zip archive of `.npy` files, each a tensor.

use super::inflate::{self, Inflated, Kept};
use super::view::{Refusal, View};
#[cfg(any(test, feature = "__internals"))]
use super::zip::Archive;
use super::zip::{self, DEFLATED, Member, STORED};
use super::{SourceError, builder::Builder, files::OpenFile, npy};
use crate::format::npy::{header_len, parse_header};
use crate::plan::{EntryHeader, clip};
use std::sync::Arc;

/// A tensor of an archive.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) header: EntryHeader,
    /// First byte of the data, in the content of the member.
    pub(crate) data_offset: u64,
}

/// Adds all tensors of an archive.
pub(super) fn load(file: &OpenFile, builder: &mut Builder) -> Result<(), SourceError> {
    let view = View::file(file);
    let of_file = |refusal: Refusal| refusal.of(file.path());
    let archive = zip::read(view).map_err(of_file)?;
    let directory = file.bytes_at(archive.directory_offset, archive.directory_len)?;
    let index = builder.files.add(file, &directory)?;
    drop(directory);
    let kept = Arc::new(Kept::default());
    for member in &archive.members {
        match tensor(view, member) {
            Ok(Some(found)) if member.method == STORED => {
                builder.add(found.header, index, member.data_offset + found.data_offset)?;
            }
            Ok(Some(found)) => {
                let derived = Inflated::new(view, member, index, found.data_offset, &kept);
                builder.add_derived(found.header, vec![index], Arc::new(derived))?;
            }
            Ok(None) => {}
            Err(Refusal::Unsupported { name, why }) => builder.skip(name, why),
            Err(refusal) => return Err(of_file(refusal)),
        }
    }
    builder.add_format("npz");
    Ok(())
}

/// Every tensor of an archive, for a test of any bytes.
#[cfg(any(test, feature = "__internals"))]
pub(crate) fn tensors(
    view: View<'_>,
    archive: &Archive,
) -> impl Iterator<Item = Result<Option<Found>, Refusal>> {
    (archive.members.iter()).map(move |member| tensor(view, member))
}

/// The tensor of a member; folders have none.
fn tensor(view: View<'_>, member: &Member) -> Result<Option<Found>, Refusal> {
    let Some(name) = member.name.strip_suffix(".npy").filter(|n| !n.is_empty()) else {
        if member.name.ends_with('/') {
            return Ok(None);
        }
        let why = "this member of the archive is no .npy file";
        return Err(Refusal::unsupported(clip(&member.name), why));
    };
    let prefix = |len: u64| match member.method {
        STORED => view.read(member.data_offset, len.min(member.byte_len)),
        DEFLATED => inflate::prefix(view, member, len),
        other => {
            let why = format!("compression method {other} is not known, only 0 and 8");
            Err(Refusal::unsupported(name, why))
        }
    };
    let placed = |refusal| match refusal {
        // Of the member nothing but its own bytes is known.
        Refusal::Malformed { at: 0, why } => view.malformed(
            member.data_offset,
            format!("{:?}: {why}", clip(&member.name)),
        ),
        other => other,
    };
    let bad = |error| placed(npy::refusal(name, error));
    let len = header_len(&prefix(12)?).map_err(bad)?;
    let header = parse_header(&prefix(len as u64)?).map_err(bad)?;
    let (header, data_offset) = npy::entry_of(name, header, member.byte_len).map_err(placed)?;
    Ok(Some(Found {
        header,
        data_offset,
    }))
}
