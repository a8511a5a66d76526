//! The central directory of a zip archive: which member lies where.
//!
//! Readers differ in what they make of archives that contradict themselves. Here such
//! an archive is refused: members that overlap, a name that occurs twice, a local
//! header that is not the one of the directory.

use super::view::{Refusal, View};
use crate::plan::clip;
use std::collections::HashSet;

/// How a member is stored: as it is.
pub(super) const STORED: u16 = 0;
/// How a member is stored: deflated.
pub(super) const DEFLATED: u16 = 8;

/// Most members of one archive: the most tensors, and what stands beside them.
const MAX_MEMBERS: u64 = (1 << 20) + 4096;
/// Longest name of a member in bytes.
const MAX_NAME_LEN: usize = 4608;
/// Longest directory in bytes.
const MAX_DIRECTORY_LEN: u64 = 256 << 20;
/// Bytes of the record that ends an archive, and of the longest comment behind it.
const END_LEN: u64 = 22;
const MAX_COMMENT_LEN: u64 = 65_535;
/// Bytes of a directory record and of a local header, without what varies.
const RECORD_LEN: usize = 46;
const LOCAL_LEN: u64 = 30;

/// What the directory of an archive says.
#[derive(Debug)]
pub(crate) struct Archive {
    /// In the order of the directory.
    pub(crate) members: Vec<Member>,
    /// First byte of the directory.
    pub(crate) directory_offset: u64,
    /// Bytes of the directory.
    pub(crate) directory_len: u64,
}

/// One file of an archive.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) name: String,
    pub(crate) method: u16,
    /// CRC-32 of the content.
    pub(crate) crc32: u32,
    /// First byte of the local header.
    header_offset: u64,
    /// First byte of the data.
    pub(crate) data_offset: u64,
    /// Bytes in the archive.
    pub(crate) stored_len: u64,
    /// Bytes of the content.
    pub(crate) byte_len: u64,
}

impl Archive {
    /// The member of this name.
    pub(super) fn member(&self, name: &str) -> Option<&Member> {
        self.members.iter().find(|member| member.name == name)
    }
}

/// Whether a file that begins like this is an archive.
pub(super) fn sniff(prefix: &[u8]) -> bool {
    prefix.starts_with(b"PK\x03\x04") || prefix.starts_with(b"PK\x05\x06")
}

/// Reads the directory and looks at every local header.
pub(crate) fn read(view: View<'_>) -> Result<Archive, Refusal> {
    let end = find_end(view)?;
    let (count, len, offset) = (end.count, end.directory_len, end.directory_offset);
    if offset.checked_add(len).is_none_or(|to| to > end.offset) {
        let why = format!("the directory, {len} bytes from {offset}, does not end before it");
        return Err(view.malformed(end.offset, why));
    }
    if len > MAX_DIRECTORY_LEN || count > MAX_MEMBERS {
        let why = format!(
            "{count} members in {len} bytes are more than {MAX_MEMBERS} or {MAX_DIRECTORY_LEN}"
        );
        return Err(view.malformed(end.offset, why));
    }
    if count > len / RECORD_LEN as u64 {
        let why = format!("{count} members do not fit in {len} bytes of directory");
        return Err(view.malformed(end.offset, why));
    }
    let bytes = view.read(offset, len)?;
    let mut members = Vec::with_capacity(count as usize);
    let mut at = 0;
    for _ in 0..count {
        let record = bytes.get(at..).unwrap_or_default();
        let (member, record_len) = parse_record(record)
            .map_err(|why| refuse(view.malformed(offset + at as u64, String::new()), why))?;
        at += record_len;
        members.push(member);
    }
    if at as u64 != len {
        let why = format!("{} bytes of directory belong to no member", len - at as u64);
        return Err(view.malformed(offset + at as u64, why));
    }
    for member in &mut members {
        locate(view, member, offset)?;
    }
    check_apart(view, &members)?;
    Ok(Archive {
        members,
        directory_offset: offset,
        directory_len: len,
    })
}

/// What is wrong with a record of the directory.
enum Bad {
    Malformed(String),
    Unsupported(String, &'static str),
}

fn refuse(place: Refusal, bad: Bad) -> Refusal {
    match (place, bad) {
        (Refusal::Malformed { at, .. }, Bad::Malformed(why)) => Refusal::Malformed { at, why },
        (_, Bad::Unsupported(name, why)) => Refusal::unsupported(name, why),
        (place, Bad::Malformed(_)) => place,
    }
}

/// The record that ends an archive, with the larger numbers of zip64 if there are any.
struct End {
    offset: u64,
    count: u64,
    directory_len: u64,
    directory_offset: u64,
}

fn find_end(view: View<'_>) -> Result<End, Refusal> {
    let tail_len = view.byte_len().min(END_LEN + MAX_COMMENT_LEN);
    let tail_offset = view.byte_len() - tail_len;
    let tail = view.read(tail_offset, tail_len)?;
    let fits = |&at: &usize| {
        let record = &tail[at..];
        let comment_len = u16_at(record, 20).map(usize::from);
        record.starts_with(b"PK\x05\x06") && comment_len == Some(record.len() - END_LEN as usize)
    };
    let last = tail.len().checked_sub(END_LEN as usize);
    let Some(at) = last.and_then(|last| (0..=last).rev().find(fits)) else {
        let why = "no end of a zip directory: the file is cut, or something follows it";
        return Err(view.malformed(view.byte_len(), why));
    };
    let record = &tail[at..];
    let offset = tail_offset + at as u64;
    let short = || view.malformed(offset, "the end of the directory is cut");
    let end = End {
        offset,
        count: u16_at(record, 10).ok_or_else(short)?.into(),
        directory_len: u32_at(record, 12).ok_or_else(short)?.into(),
        directory_offset: u32_at(record, 16).ok_or_else(short)?.into(),
    };
    let disk = u32_at(record, 4).ok_or_else(short)?;
    let has_more = end.count == 0xffff
        || end.directory_len == 0xffff_ffff
        || end.directory_offset == 0xffff_ffff;
    match offset.checked_sub(20) {
        Some(locator) if has_more && view.read(locator, 4)? == b"PK\x06\x07" => {
            let locator: [u8; 20] = view.array(locator)?;
            let at = u64_at(&locator, 8).ok_or_else(short)?;
            if at.checked_add(56).is_none_or(|to| to > offset - 20) {
                let why = format!("the zip64 record at {at} does not end before its locator");
                return Err(view.malformed(offset - 20, why));
            }
            let record: [u8; 56] = view.array(at)?;
            if !record.starts_with(b"PK\x06\x06") || u64_at(&record, 16) != Some(0) {
                return Err(view.malformed(at, "this is no zip64 end of one archive in one file"));
            }
            Ok(End {
                offset: at,
                count: u64_at(&record, 32).ok_or_else(short)?,
                directory_len: u64_at(&record, 40).ok_or_else(short)?,
                directory_offset: u64_at(&record, 48).ok_or_else(short)?,
            })
        }
        _ if disk != 0 => Err(view.malformed(offset, "the archive is split over several files")),
        _ => Ok(end),
    }
}

/// A member and the bytes of its record; where its data are is not known yet.
fn parse_record(record: &[u8]) -> Result<(Member, usize), Bad> {
    let cut = || Bad::Malformed("a record of the zip directory is cut".to_owned());
    let fixed = record.get(..RECORD_LEN).ok_or_else(cut)?;
    if !fixed.starts_with(b"PK\x01\x02") {
        return Err(Bad::Malformed(
            "this is no record of a zip directory".to_owned(),
        ));
    }
    let u16_of = |at| u16_at(fixed, at).ok_or_else(cut);
    let u32_of = |at| u32_at(fixed, at).ok_or_else(cut);
    let [name_len, extra_len, comment_len] =
        [u16_of(28)?, u16_of(30)?, u16_of(32)?].map(usize::from);
    let extra_at = RECORD_LEN + name_len;
    let record_len = extra_at + extra_len + comment_len;
    let name = record.get(RECORD_LEN..extra_at).ok_or_else(cut)?;
    let extra = record.get(extra_at..extra_at + extra_len).ok_or_else(cut)?;
    if record.len() < record_len {
        return Err(cut());
    }
    if name_len > MAX_NAME_LEN {
        let why = format!("a name of {name_len} bytes is longer than {MAX_NAME_LEN}");
        return Err(Bad::Malformed(why));
    }
    let Ok(name) = std::str::from_utf8(name) else {
        return Err(Bad::Malformed(
            "the name of a member is not utf-8".to_owned(),
        ));
    };
    if u16_of(8)? & 1 != 0 {
        return Err(Bad::Unsupported(
            clip(name),
            "this member of the archive is encrypted",
        ));
    }
    let mut numbers = [u32_of(24)?, u32_of(20)?, u32_of(42)?].map(u64::from);
    let mut wide = zip64_extra(extra);
    for number in numbers.iter_mut().filter(|number| **number == 0xffff_ffff) {
        // Without the extra field the number is what it is.
        if let Some((value, rest)) = wide.and_then(|wide| wide.split_first_chunk::<8>()) {
            *number = u64::from_le_bytes(*value);
            wide = Some(rest);
        }
    }
    let [byte_len, stored_len, header_offset] = numbers;
    let member = Member {
        name: name.to_owned(),
        method: u16_of(10)?,
        crc32: u32_of(16)?,
        header_offset,
        data_offset: 0,
        stored_len,
        byte_len,
    };
    if member.method == STORED && byte_len != stored_len {
        let why = format!(
            "{:?} is stored with {stored_len} bytes, not {byte_len}",
            clip(name)
        );
        return Err(Bad::Malformed(why));
    }
    Ok((member, record_len))
}

/// The larger numbers of a record.
fn zip64_extra(mut extra: &[u8]) -> Option<&[u8]> {
    loop {
        let (id, len) = (u16_at(extra, 0)?, usize::from(u16_at(extra, 2)?));
        let field = extra.get(4..4 + len)?;
        if id == 1 {
            return Some(field);
        }
        extra = &extra[4 + len..];
    }
}

/// Finds the data behind the local header, whose extra field is of a length of its own.
fn locate(view: View<'_>, member: &mut Member, directory_offset: u64) -> Result<(), Refusal> {
    let at = member.header_offset;
    let name_len = member.name.len() as u64;
    let head = view.read(at, LOCAL_LEN + name_len)?;
    let lens = u16_at(&head, 26).zip(u16_at(&head, 28));
    let other = || {
        let why = format!("this is not the local header of {:?}", clip(&member.name));
        view.malformed(at, why)
    };
    let (local_name_len, extra_len) = lens.ok_or_else(other)?;
    let is_same = head.starts_with(b"PK\x03\x04")
        && u16_at(&head, 8) == Some(member.method)
        && u64::from(local_name_len) == name_len
        && head.ends_with(member.name.as_bytes());
    if !is_same {
        return Err(other());
    }
    // All far from overflow: `at` lies in the file.
    member.data_offset = at + LOCAL_LEN + name_len + u64::from(extra_len);
    let end = member.data_offset.checked_add(member.stored_len);
    if end.is_none_or(|end| end > directory_offset) {
        let why = format!(
            "{:?} has {} bytes at {}, the directory begins at {directory_offset}",
            clip(&member.name),
            member.stored_len,
            view.absolute(member.data_offset),
        );
        return Err(view.malformed(at, why));
    }
    Ok(())
}

fn check_apart(view: View<'_>, members: &[Member]) -> Result<(), Refusal> {
    let mut spans: Vec<&Member> = members.iter().collect();
    spans.sort_unstable_by_key(|member| member.header_offset);
    for pair in spans.windows(2) {
        let [one, next] = pair else { continue };
        if one.data_offset + one.stored_len > next.header_offset {
            let why = format!("{:?} overlaps {:?}", clip(&next.name), clip(&one.name));
            return Err(view.malformed(next.header_offset, why));
        }
    }
    let mut names = HashSet::with_capacity(members.len());
    for member in members {
        if !names.insert(&member.name) {
            let why = format!("the name {:?} occurs twice", clip(&member.name));
            return Err(view.malformed(member.header_offset, why));
        }
    }
    Ok(())
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|b| u16::from_le_bytes(*b))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|b| u32::from_le_bytes(*b))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|b| u64::from_le_bytes(*b))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Members with their local headers, and a directory whose records are changed.
    fn archive(members: &[(&str, &[u8])], change: impl Fn(usize, &mut Vec<u8>)) -> Vec<u8> {
        let (mut out, mut directory) = (Vec::new(), Vec::new());
        for (index, (name, data)) in members.iter().enumerate() {
            let at = out.len() as u32;
            let len = data.len() as u32;
            let mut shared = [0u8; 12];
            shared[..4].copy_from_slice(&1u32.to_le_bytes());
            shared[4..8].copy_from_slice(&len.to_le_bytes());
            shared[8..].copy_from_slice(&len.to_le_bytes());
            let name_len = (name.len() as u16).to_le_bytes();
            out.extend(b"PK\x03\x04\x14\0\0\0\0\0\0\0\0\0");
            out.extend(shared);
            // An extra field that the directory does not have.
            out.extend([name_len[0], name_len[1], 3, 0]);
            out.extend(name.as_bytes());
            out.extend(b"abc");
            out.extend(*data);
            let mut record = b"PK\x01\x02\x14\0\x14\0\0\0\0\0\0\0\0\0".to_vec();
            record.extend(shared);
            record.extend(name_len);
            record.extend([0; 12]);
            record.extend(at.to_le_bytes());
            record.extend(name.as_bytes());
            change(index, &mut record);
            directory.extend(record);
        }
        let (at, len) = (out.len() as u32, directory.len() as u32);
        let count = (members.len() as u16).to_le_bytes();
        out.extend(directory);
        out.extend(b"PK\x05\x06\0\0\0\0");
        out.extend([count, count].concat());
        out.extend(len.to_le_bytes());
        out.extend(at.to_le_bytes());
        out.extend([0, 0]);
        out
    }

    fn why(bytes: &[u8]) -> String {
        let refusal = read(View::memory(bytes)).unwrap_err();
        refusal.of(std::path::Path::new("a.zip")).to_string()
    }

    const TWO: [(&str, &[u8]); 2] = [("one", b"first"), ("two", b"second")];

    #[test]
    fn data_begin_behind_the_extra_field_of_the_local_header() {
        let bytes = archive(&TWO, |_, _| {});
        let found = read(View::memory(&bytes)).unwrap();
        for (member, (name, data)) in found.members.iter().zip(TWO) {
            let at = member.data_offset as usize;
            assert_eq!(
                (member.name.as_str(), &bytes[at..at + data.len()]),
                (name, data)
            );
        }
    }

    #[test]
    fn members_that_share_bytes_are_refused() {
        // The second record leads to the first member, or the first one is too long.
        let shared = archive(&[("one", b"first"), ("one", b"first")], |index, record| {
            if index == 1 {
                record[42..46].fill(0);
            }
        });
        assert!(why(&shared).contains("overlaps"), "{}", why(&shared));
        let long = archive(&TWO, |index, record| {
            if index == 0 {
                record[20] += 1;
                record[24] += 1;
            }
        });
        assert!(why(&long).contains("overlaps"), "{}", why(&long));
    }

    #[test]
    fn archives_that_contradict_themselves_are_refused_with_the_place() {
        let twice = archive(&[("one", b"a"), ("one", b"b")], |_, _| {});
        assert!(why(&twice).contains("occurs twice"), "{}", why(&twice));
        let renamed = archive(&TWO, |_, record| *record.last_mut().unwrap() = b'x');
        assert!(why(&renamed).contains("at byte 0: this is not the local header"));
        let encrypted = archive(&TWO, |_, record| record[8] |= 1);
        assert!(why(&encrypted).contains("encrypted"));
        let outside = archive(&TWO, |_, record| record[20..28].fill(0x7f));
        assert!(
            why(&outside).contains("the directory begins"),
            "{}",
            why(&outside)
        );
        let mut cut = archive(&TWO, |_, _| {});
        cut.pop();
        assert!(why(&cut).contains("no end of a zip directory"));
    }
}
