//! A checkpoint whose tensors are going to lie in one safetensors file.

use super::{SourceEntry, SourceSet};
use crate::format::safetensors::{self, TensorSpec};
use crate::plan::{EntryKind, Order, clip};

/// Tensors that an error names; of more it says how many.
const MAX_SHOWN: usize = 5;

impl SourceSet {
    /// The same with its tensors in the order in which they lie in such a file, and how many
    /// bytes come before them there.
    ///
    /// # Errors
    /// Which tensors the format cannot hold, and the way out.
    pub(crate) fn for_safetensors(&self) -> Result<(SourceSet, u64), String> {
        let refused: Vec<_> = self.entries.iter().filter_map(refusal).collect();
        if !refused.is_empty() {
            let mut text = refused[..refused.len().min(MAX_SHOWN)].join(", ");
            if refused.len() > MAX_SHOWN {
                text.push_str(&format!(", and {} more", refused.len() - MAX_SHOWN));
            }
            return Err(format!(
                "one safetensors file cannot hold {text}; leave them out with --exclude, or land .npy files"
            ));
        }
        let (tensors, blobs): (Vec<_>, Vec<_>) = (self.entries.iter())
            .cloned()
            .partition(|entry| entry.header.dtype().is_some());
        let specs: Vec<_> = tensors.iter().filter_map(spec).collect();
        let encoded = safetensors::encode_header(&specs, &self.metadata)
            .map_err(|error| format!("one safetensors file: {error}"))?;
        let ordered = encoded
            .order
            .iter()
            .filter_map(|&i| tensors.get(i).cloned());
        let set = SourceSet {
            entries: ordered.chain(blobs).collect(),
            ..self.clone()
        };
        Ok((set, encoded.header.len() as u64))
    }
}

fn spec(entry: &SourceEntry) -> Option<TensorSpec<'_>> {
    Some(TensorSpec {
        name: &entry.header.name,
        dtype: entry.header.dtype()?,
        shape: &entry.header.shape,
    })
}

/// Why a tensor cannot be held, with its name.
fn refusal(entry: &SourceEntry) -> Option<String> {
    let header = &entry.header;
    let EntryKind::Tensor { dtype } = header.kind else {
        return None;
    };
    let why = if header.order == Order::Fortran {
        "its elements are in Fortran order"
    } else if header.big_endian {
        "its elements are big-endian"
    } else if safetensors::name_of(dtype).is_none() {
        "the format has no name for its element type"
    } else if !safetensors::can_hold(&header.name, dtype) {
        "the format keeps that name for itself"
    } else {
        return None;
    };
    Some(format!("{:?} of {dtype} ({why})", clip(&header.name)))
}
