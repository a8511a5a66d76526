//! The container of a TensorFlow index: a sorted table as LevelDB writes it.
//!
//! The last 48 bytes name an index block, whose values name data blocks. A block is
//! entries with shared prefixes, the offsets of those that share nothing, a byte that
//! says how it is compressed, and a masked CRC-32C.

use super::super::{
    error::ContentError,
    protobuf::{take, varint},
};
use crate::format::checksum;

/// The last 8 bytes of a table.
pub(crate) const MAGIC: [u8; 8] = 0xdb47_7524_8b80_fb57_u64.to_le_bytes();
/// What is wrong with a file that does not end with it.
pub(crate) const NO_END: &str = "it does not end like a table";
/// Bytes of the footer, the magic included.
pub(crate) const FOOTER_LEN: usize = 48;
/// Bytes behind each block: how it is compressed, and its checksum.
const TRAILER_LEN: u64 = 5;
/// What TensorFlow and LevelDB add to a checksum that is stored with its data.
const MASK: u32 = 0xa282_ead8;
/// Longest key: the name of a tensor, twice for what is escaped, and a slice of it.
const MAX_KEY_LEN: usize = 16 << 10;

/// A part of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Handle {
    offset: u64,
    len: u64,
}

impl Handle {
    fn read(bytes: &mut &[u8]) -> Result<Handle, ContentError> {
        Ok(Handle {
            offset: varint(bytes)?,
            len: varint(bytes)?,
        })
    }
}

/// Whether a file that ends like this is such a table.
pub(crate) fn is_table(end: &[u8]) -> bool {
    end.ends_with(&MAGIC)
}

/// Calls `visit` with every key and value, in the order of the keys.
pub(crate) fn for_each(
    table: &[u8],
    mut visit: impl FnMut(&[u8], &[u8]) -> Result<(), ContentError>,
) -> Result<(), ContentError> {
    let body_len = table.len().checked_sub(FOOTER_LEN);
    let (body, footer) = match body_len.map(|len| table.split_at(len)) {
        Some((body, footer)) if is_table(footer) => (body, footer),
        _ => return Err(bad(NO_END)),
    };
    let mut handles = footer;
    Handle::read(&mut handles)?; // of what is said about the table: nothing
    let index = block(body, Handle::read(&mut handles)?)?;
    let (mut end_of_last, mut is_first) = (0, true);
    let mut last = Vec::new();
    for_each_of_block(index, &mut Vec::new(), |_, mut value| {
        let handle = Handle::read(&mut value)?;
        // Blocks follow each other, so that none is read twice.
        if handle.offset < end_of_last {
            return Err(bad(format!(
                "a block at {} before {end_of_last}, the end of the one before",
                handle.offset
            )));
        }
        let data = block(body, handle)?;
        end_of_last = handle.offset + handle.len + TRAILER_LEN;
        let mut key = Vec::new();
        for_each_of_block(data, &mut key, |key, value| {
            if !is_first && key <= &last[..] {
                return Err(bad("keys that are not in order"));
            }
            is_first = false;
            last.clear();
            last.extend_from_slice(key);
            visit(key, value)
        })
    })
}

/// The content of a block, after its checksum.
fn block(body: &[u8], handle: Handle) -> Result<&[u8], ContentError> {
    let Handle { offset, len } = handle;
    let out_of_range = || {
        bad(format!(
            "a block of {len} bytes at {offset}, before the footer are {}",
            body.len()
        ))
    };
    let end = offset
        .checked_add(len)
        .and_then(|end| end.checked_add(TRAILER_LEN));
    let end = end.filter(|&end| end <= body.len() as u64);
    let range = offset as usize..end.ok_or_else(out_of_range)? as usize;
    let block = &body[range];
    let (sealed, crc) = block.split_last_chunk::<4>().ok_or_else(out_of_range)?;
    let (stored, found) = (u32::from_le_bytes(*crc), mask(checksum::crc32c(sealed)));
    if stored != found {
        return Err(bad(format!(
            "the block at {offset} has the checksum {found:08x}, not {stored:08x}"
        )));
    }
    match sealed.split_last() {
        Some((0, content)) => Ok(content),
        Some((1, _)) => Err(ContentError::unsupported(
            "",
            "it is compressed with snappy, which TensorFlow has not written since 2017: load and save it again",
        )),
        _ => Err(bad(format!(
            "the block at {offset} is compressed in an unknown way"
        ))),
    }
}

/// Calls `visit` with every key and value of one block; `key` is room for keys.
fn for_each_of_block(
    block: &[u8],
    key: &mut Vec<u8>,
    mut visit: impl FnMut(&[u8], &[u8]) -> Result<(), ContentError>,
) -> Result<(), ContentError> {
    let too_short = || bad("a block that is too short");
    let (rest, count) = block.split_last_chunk::<4>().ok_or_else(too_short)?;
    let restarts_len = (u32::from_le_bytes(*count) as usize).checked_mul(4);
    let entries_len = restarts_len.and_then(|len| rest.len().checked_sub(len));
    let (mut entries, restarts) = rest.split_at(entries_len.ok_or_else(too_short)?);
    let whole_len = entries.len();
    let mut restarts = restarts
        .chunks_exact(4)
        .map(|r| u32::from_le_bytes([r[0], r[1], r[2], r[3]]));
    let mut next_restart = restarts.next();
    while !entries.is_empty() {
        let at = whole_len - entries.len();
        let shared = varint(&mut entries)?;
        let (unshared_len, value_len) = (varint(&mut entries)?, varint(&mut entries)?);
        let is_restart = next_restart.is_some_and(|restart| restart as usize == at);
        if shared > key.len() as u64 || (is_restart && shared > 0) {
            return Err(bad(format!(
                "a key that shares {shared} bytes with one of {}",
                if is_restart { 0 } else { key.len() }
            )));
        }
        if is_restart {
            next_restart = restarts.next();
        }
        let unshared = take(&mut entries, unshared_len)?;
        if shared as usize + unshared.len() > MAX_KEY_LEN {
            return Err(bad(format!("a key of more than {MAX_KEY_LEN} bytes")));
        }
        key.truncate(shared as usize);
        key.extend_from_slice(unshared);
        visit(key, take(&mut entries, value_len)?)?;
    }
    match next_restart {
        // An empty block has one at its beginning.
        Some(restart) if whole_len > 0 || restart > 0 => Err(bad(format!(
            "no entry begins at {restart}, though one should"
        ))),
        _ => Ok(()),
    }
}

/// A checksum as it is stored.
pub(crate) fn mask(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(MASK)
}

/// The checksum that is stored like this.
pub(crate) fn unmask(masked: u32) -> u32 {
    masked.wrapping_sub(MASK).rotate_left(15)
}

/// Puts the right checksum behind every block that lies in the table, so that what is
/// behind the checksums meets any bytes.
#[cfg(any(test, feature = "__internals"))]
pub(crate) fn seal(table: &mut [u8]) {
    fn seal_block(body: &mut [u8], handle: Handle) -> Option<()> {
        let start = usize::try_from(handle.offset).ok()?;
        let end = start
            .checked_add(usize::try_from(handle.len).ok()?)?
            .checked_add(1)?;
        let crc = mask(checksum::crc32c(body.get(start..end)?)).to_le_bytes();
        body.get_mut(end..end.checked_add(4)?)?
            .copy_from_slice(&crc);
        Some(())
    }
    let Some(body_len) = table.len().checked_sub(FOOTER_LEN) else {
        return;
    };
    let (body, footer) = table.split_at_mut(body_len);
    let mut handles = &footer[..];
    let _ = Handle::read(&mut handles);
    let Ok(index) = Handle::read(&mut handles) else {
        return;
    };
    let mut found = Vec::new();
    seal_block(body, index);
    if let Ok(content) = block(body, index) {
        let _ = for_each_of_block(content, &mut Vec::new(), |_, mut value| {
            found.push(Handle::read(&mut value)?);
            Ok(())
        });
    }
    for handle in found {
        seal_block(body, handle);
    }
    seal_block(body, index);
}

fn bad(why: impl Into<String>) -> ContentError {
    ContentError::Malformed(why.into())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    type Entries = Vec<(Vec<u8>, Vec<u8>)>;

    fn push_varint(out: &mut Vec<u8>, mut number: u64) {
        while number >= 0x80 {
            out.push(number as u8 | 0x80);
            number >>= 7;
        }
        out.push(number as u8);
    }

    fn push_block(out: &mut Vec<u8>, entries: &[(Vec<u8>, Vec<u8>)]) -> Vec<u8> {
        let start = out.len();
        let mut restarts = Vec::new();
        let mut last: &[u8] = &[];
        for (index, (key, value)) in entries.iter().enumerate() {
            let mut shared = key.iter().zip(last).take_while(|(a, b)| a == b).count();
            if index % 16 == 0 {
                restarts.push((out.len() - start) as u32);
                shared = 0;
            }
            for number in [shared, key.len() - shared, value.len()] {
                push_varint(out, number as u64);
            }
            out.extend_from_slice(&key[shared..]);
            out.extend_from_slice(value);
            last = key;
        }
        if restarts.is_empty() {
            restarts.push(0);
        }
        for restart in &restarts {
            out.extend_from_slice(&restart.to_le_bytes());
        }
        out.extend_from_slice(&(restarts.len() as u32).to_le_bytes());
        let len = out.len() - start;
        out.push(0);
        let crc = mask(checksum::crc32c(&out[start..]));
        out.extend_from_slice(&crc.to_le_bytes());
        let mut handle = Vec::new();
        push_varint(&mut handle, start as u64);
        push_varint(&mut handle, len as u64);
        handle
    }

    /// A table of these entries, with so many in each block.
    pub(crate) fn write(entries: &[(Vec<u8>, Vec<u8>)], for_each_block: usize) -> Vec<u8> {
        let mut out = Vec::new();
        let mut index = Vec::new();
        for block in entries.chunks(for_each_block) {
            let handle = push_block(&mut out, block);
            index.push((block.last().unwrap().0.clone(), handle));
        }
        let metadata = push_block(&mut out, &[]);
        let index = push_block(&mut out, &index);
        let mut footer = [metadata, index].concat();
        footer.resize(FOOTER_LEN - MAGIC.len(), 0);
        footer.extend_from_slice(&MAGIC);
        [out, footer].concat()
    }

    fn entries(count: usize) -> Entries {
        let entry = |i| {
            (
                format!("layer/{i:05}/kernel").into_bytes(),
                vec![i as u8; i % 7],
            )
        };
        let first = (Vec::new(), b"header".to_vec());
        [first].into_iter().chain((0..count).map(entry)).collect()
    }

    fn read(table: &[u8]) -> Result<Entries, ContentError> {
        let mut found = Vec::new();
        for_each(table, |key, value| {
            found.push((key.to_vec(), value.to_vec()));
            Ok(())
        })?;
        Ok(found)
    }

    #[test]
    fn every_entry_is_found_beginning_with_the_empty_key() {
        for (count, for_each_block) in [(0, 1), (1, 1), (15, 100), (16, 100), (17, 3), (400, 50)] {
            let entries = entries(count);
            assert_eq!(read(&write(&entries, for_each_block)).unwrap(), entries);
        }
    }

    #[test]
    fn no_single_byte_can_be_damaged_unnoticed() {
        let table = write(&entries(40), 11);
        // A varint may be spelled in two ways and the padding means nothing.
        for at in 0..table.len() - FOOTER_LEN {
            let mut damaged = table.clone();
            damaged[at] ^= 0x10;
            let is_metadata = read(&damaged).is_ok();
            // Nobody reads the block about the table itself: 8 bytes and 5 behind them.
            assert!(
                !is_metadata || read(&damaged).unwrap() == entries(40),
                "{at}"
            );
        }
        for len in 0..table.len() {
            assert!(read(&table[..len]).is_err(), "{len}");
        }
    }

    #[test]
    fn keys_out_of_order_and_blocks_read_twice_are_refused() {
        let twice = [entries(1), entries(1)].concat();
        assert!(read(&write(&twice, 2)).is_err());
        assert!(read(&write(&twice, 100)).is_err());
    }

    #[test]
    fn snappy_is_refused_by_name() {
        let mut table = write(&entries(3), 100);
        // The type of the first block stands before its checksum.
        let len = {
            let (mut found, mut at) = (0, &table[table.len() - FOOTER_LEN..]);
            for _ in 0..2 {
                found = Handle::read(&mut at).unwrap().offset;
            }
            found as usize
        };
        let metadata_len = 8 + TRAILER_LEN as usize;
        table[len - metadata_len - 5] = 1;
        seal(&mut table);
        let error = read(&table).unwrap_err().to_string();
        assert!(error.contains("snappy"), "{error}");
    }

    #[test]
    fn masks_come_off_again() {
        for crc in [0, 1, u32::MAX, 0xdead_beef] {
            assert_eq!(unmask(mask(crc)), crc);
        }
        assert_eq!(mask(0), MASK);
    }
}
