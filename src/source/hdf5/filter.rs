//! What chunks were put through before they were written, undone.

use miniz_oxide::inflate::decompress_to_vec_zlib_with_limit;

/// One filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filter {
    Deflate,
    /// Bytes of one element: the first bytes of all come first, then the second ones.
    Shuffle(u32),
    /// A sum behind the data.
    Fletcher32,
    Unknown(u16),
}

/// Undoes the filters, but those of the mask: the chunk as it was.
pub(super) fn undo(
    filters: &[Filter],
    mask: u32,
    stored: Vec<u8>,
    chunk_len: usize,
) -> Result<Vec<u8>, String> {
    let mut bytes = stored;
    for (index, filter) in filters.iter().enumerate().rev() {
        if mask & 1u32.checked_shl(index as u32).unwrap_or(0) != 0 {
            continue;
        }
        bytes = match filter {
            // A sum may stand behind the data still.
            Filter::Deflate => decompress_to_vec_zlib_with_limit(&bytes, chunk_len + 4)
                .map_err(|error| format!("a chunk cannot be inflated: {error}"))?,
            Filter::Shuffle(item_len) => unshuffle(&bytes, *item_len as usize),
            Filter::Fletcher32 => checked(bytes)?,
            Filter::Unknown(id) => return Err(format!("filter {id} is not known")),
        };
    }
    if bytes.len() != chunk_len {
        return Err(format!(
            "a chunk has {} bytes, not {chunk_len}",
            bytes.len()
        ));
    }
    Ok(bytes)
}

fn unshuffle(bytes: &[u8], item_len: usize) -> Vec<u8> {
    let count = bytes.len() / item_len.max(1);
    let mut out = bytes.to_vec();
    for (place, column) in bytes.chunks_exact(count.max(1)).take(item_len).enumerate() {
        for (item, &byte) in column.iter().enumerate() {
            if let Some(slot) = out.get_mut(item * item_len + place) {
                *slot = byte;
            }
        }
    }
    out
}

fn checked(mut bytes: Vec<u8>) -> Result<Vec<u8>, String> {
    let Some((data, sum)) = bytes.split_last_chunk::<4>() else {
        return Err("a chunk is shorter than its sum".to_owned());
    };
    let (expected, found) = (u32::from_le_bytes(*sum), fletcher32(data));
    if expected != found {
        return Err(format!(
            "the sum of a chunk is {found:08x}, not {expected:08x}"
        ));
    }
    let len = data.len();
    bytes.truncate(len);
    Ok(bytes)
}

/// The sum as HDF5 computes it: of 16-bit words, the first byte the high one.
fn fletcher32(data: &[u8]) -> u32 {
    let fold = |sum: u32| (sum & 0xffff) + (sum >> 16);
    let (mut one, mut two) = (0u32, 0u32);
    // So many words cannot overflow 32 bits.
    for run in data.chunks(720) {
        for word in run.chunks(2) {
            let low = word.get(1).copied().unwrap_or(0);
            one += u32::from(word[0]) << 8 | u32::from(low);
            two += one;
        }
        (one, two) = (fold(one), fold(two));
    }
    fold(two) << 16 | fold(one)
}
