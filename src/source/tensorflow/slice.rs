//! A part of a partitioned variable, and the key under which its bytes are listed.

use super::super::{error::ContentError, protobuf::Value};
use crate::plan::MAX_DIMENSIONS;

/// A box: first index and length in each dimension.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Slice {
    /// No length: all of that dimension.
    pub(crate) extents: Vec<(u64, Option<u64>)>,
}

impl Slice {
    pub(crate) fn read(message: Value<'_>) -> Result<Slice, ContentError> {
        let mut slice = Slice::default();
        for field in message.fields()? {
            let field = field?;
            if field.number != 1 {
                continue;
            }
            if slice.extents.len() == MAX_DIMENSIONS {
                let why = format!("a part of more than {MAX_DIMENSIONS} dimensions");
                return Err(ContentError::Malformed(why));
            }
            let (mut start, mut len) = (0, None);
            for field in field.value.fields()? {
                let field = field?;
                match field.number {
                    1 => start = field.value.size()?,
                    2 => len = Some(field.value.size()?),
                    _ => {}
                }
            }
            slice.extents.push((start, len));
        }
        Ok(slice)
    }

    /// Where it begins and how long it is in a tensor of this shape; `None` where it
    /// does not lie in one.
    pub(crate) fn within(&self, shape: &[u64]) -> Option<(Vec<u64>, Vec<u64>)> {
        if self.extents.len() != shape.len() {
            return None;
        }
        let parts = self.extents.iter().zip(shape);
        let parts = parts.map(|(&(start, len), &whole)| {
            let len = match len {
                None if start > 0 => return None,
                None => whole,
                Some(len) => len,
            };
            let end = start.checked_add(len)?;
            (end <= whole).then_some((start, len))
        });
        Some(parts.collect::<Option<Vec<_>>>()?.into_iter().unzip())
    }

    /// The key of the entry that says where its bytes are: numbers and names in a form
    /// whose bytewise order is theirs.
    pub(crate) fn key(&self, name: &str) -> Vec<u8> {
        let mut key = Vec::with_capacity(name.len() + 8 + 4 * self.extents.len());
        push_number(&mut key, 0);
        for &byte in name.as_bytes() {
            match byte {
                0 => key.extend_from_slice(&[0, 0xff]),
                0xff => key.extend_from_slice(&[0xff, 0]),
                _ => key.push(byte),
            }
        }
        key.extend_from_slice(&[0, 1]);
        push_number(&mut key, self.extents.len() as u64);
        for &(start, len) in &self.extents {
            push_signed(&mut key, start.cast_signed());
            push_signed(&mut key, len.map_or(-1, u64::cast_signed));
        }
        key
    }
}

/// The length of the number in bytes, then its bytes, the highest first.
fn push_number(key: &mut Vec<u8>, number: u64) {
    let len = 8 - number.leading_zeros() as usize / 8;
    key.push(len as u8);
    key.extend_from_slice(&number.to_be_bytes()[8 - len..]);
}

/// As many leading bits as there are bytes say how long it is; the sign turns all over.
fn push_signed(key: &mut Vec<u8>, number: i64) {
    let magnitude = if number < 0 { !number } else { number } as u64;
    let bits = 64 - magnitude.leading_zeros() as usize;
    // One bit of each byte is for the length, one of all for the sign.
    let len = bits / 7 + 1;
    let mut bytes = [if number < 0 { 0xff } else { 0 }; 10];
    bytes[2..].copy_from_slice(&number.to_be_bytes());
    let bytes = &mut bytes[10 - len..];
    let header = !(0xffff_u16 >> len);
    bytes[0] ^= (header >> 8) as u8;
    if let Some(second) = bytes.get_mut(1) {
        *second ^= header as u8;
    }
    key.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(number: i64) -> String {
        let mut key = Vec::new();
        push_signed(&mut key, number);
        key.iter().map(|b| format!("{b:02x}")).collect()
    }

    #[test]
    fn signed_numbers_are_those_that_tensorflow_writes() {
        for (number, expected) in [
            (0, "80"),
            (4, "84"),
            (63, "bf"),
            (64, "c040"),
            (100, "c064"),
            (8191, "dfff"),
            (8192, "e02000"),
            (11_808, "e02e20"),
            (1_000_000, "ef4240"),
            (1 << 31, "f880000000"),
            (-1, "7f"),
            (-65, "3fbf"),
        ] {
            assert_eq!(hex(number), expected, "{number}");
        }
        assert_eq!(hex(i64::MAX), "ffc07fffffffffffffff");
    }

    #[test]
    fn the_order_of_keys_is_the_order_of_numbers() {
        let numbers = [
            0,
            1,
            63,
            64,
            8191,
            8192,
            (1 << 20) - 1,
            1 << 20,
            1 << 40,
            i64::MAX,
        ];
        let encoded: Vec<Vec<u8>> = numbers
            .iter()
            .map(|&number| {
                let mut key = Vec::new();
                push_signed(&mut key, number);
                key
            })
            .collect();
        assert!(encoded.is_sorted());
    }

    #[test]
    fn keys_are_those_that_tensorflow_writes() {
        let slice = Slice {
            extents: vec![(7, Some(3)), (0, Some(4))],
        };
        assert_eq!(
            slice.key("part/w"),
            b"\0part/w\0\x01\x01\x02\x87\x83\x80\x84"
        );
        let whole = Slice {
            extents: vec![(0, None)],
        };
        assert_eq!(whole.key(""), b"\0\0\x01\x01\x01\x80\x7f");
    }

    #[test]
    fn parts_lie_in_their_tensor() {
        let slice = |start, len| Slice {
            extents: vec![(start, len)],
        };
        assert_eq!(slice(2, Some(3)).within(&[5]), Some((vec![2], vec![3])));
        assert_eq!(slice(0, None).within(&[5]), Some((vec![0], vec![5])));
        for outside in [slice(3, Some(3)), slice(1, None), slice(u64::MAX, Some(1))] {
            assert_eq!(outside.within(&[5]), None);
        }
        assert_eq!(slice(0, Some(5)).within(&[5, 1]), None);
    }
}
