//! The header of the file that all tensors of a checkpoint share.

use crate::{
    format::safetensors::{self, TensorSpec},
    plan::EntryHeader,
};
use std::collections::BTreeMap;

/// The first bytes of a file whose tensors begin at these places: so many that the first of
/// them begins at `header_len`.
///
/// # Errors
/// What the format cannot say, or tensors that do not lie one behind the other.
pub(crate) fn encode_container_header<'a>(
    tensors: impl Iterator<Item = (&'a EntryHeader, u64)>,
    metadata: &BTreeMap<String, String>,
    header_len: u64,
) -> Result<Vec<u8>, String> {
    let mut tensors: Vec<_> = tensors.collect();
    // Stable: of those without bytes the order is that of their announcement.
    tensors.sort_by_key(|&(_, data_offset)| data_offset);
    let mut end = header_len;
    let mut rows = Vec::with_capacity(tensors.len());
    for (header, data_offset) in tensors {
        let Some(dtype) = header.dtype().filter(|_| data_offset == end) else {
            let why = format!("{:?} begins at {data_offset}, not at {end}", header.name);
            return Err(why);
        };
        end = end.saturating_add(header.byte_len);
        rows.push(TensorSpec {
            name: &header.name,
            dtype,
            shape: &header.shape,
        });
    }
    safetensors::encode_in_order(&rows, metadata, header_len).map_err(|e| e.to_string())
}
