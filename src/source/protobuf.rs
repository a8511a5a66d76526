//! Fields of a protobuf message, taken from bytes that somebody else wrote. Nothing is
//! allocated and nothing is decoded but the wire format; whoever reads a message that
//! lies in another one asks for its fields in turn, so depth is in the code.

use super::error::ContentError;

/// One field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Field<'a> {
    /// Number in the schema.
    pub(crate) number: u32,
    /// What it holds.
    pub(crate) value: Value<'a>,
}

/// The content of a field, as the wire has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Value<'a> {
    Varint(u64),
    Fixed64(u64),
    Bytes(&'a [u8]),
    Fixed32(u32),
}

/// The fields of one message, in order.
#[derive(Clone, Debug)]
pub(crate) struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(crate) fn new(message: &'a [u8]) -> Self {
        Fields { rest: message }
    }

    fn read(&mut self) -> Result<Field<'a>, ContentError> {
        let tag = varint(&mut self.rest)?;
        let number = u32::try_from(tag >> 3).ok().filter(|&number| number > 0);
        let number = number.ok_or_else(|| bad("a field without a number"))?;
        let value = match tag & 7 {
            0 => Value::Varint(varint(&mut self.rest)?),
            1 => Value::Fixed64(u64::from_le_bytes(self.chunk()?)),
            2 => {
                let len = varint(&mut self.rest)?;
                Value::Bytes(take(&mut self.rest, len)?)
            }
            5 => Value::Fixed32(u32::from_le_bytes(self.chunk()?)),
            kind => return Err(bad(format!("field {number} of the unknown kind {kind}"))),
        };
        Ok(Field { number, value })
    }

    fn chunk<const N: usize>(&mut self) -> Result<[u8; N], ContentError> {
        let (chunk, rest) = self.rest.split_first_chunk().ok_or_else(cut)?;
        self.rest = rest;
        Ok(*chunk)
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<Field<'a>, ContentError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let field = self.read();
        if field.is_err() {
            // After a bad field nothing is where it seems to be.
            self.rest = &[];
        }
        Some(field)
    }
}

impl<'a> Value<'a> {
    /// A number or truth value.
    pub(crate) fn number(self) -> Result<u64, ContentError> {
        match self {
            Value::Varint(number) => Ok(number),
            _ => Err(bad("a field that should be a number is none")),
        }
    }

    /// A message, text or raw bytes.
    pub(crate) fn bytes(self) -> Result<&'a [u8], ContentError> {
        match self {
            Value::Bytes(bytes) => Ok(bytes),
            _ => Err(bad("a field that should hold bytes does not")),
        }
    }

    /// The fields of a message.
    pub(crate) fn fields(self) -> Result<Fields<'a>, ContentError> {
        self.bytes().map(Fields::new)
    }

    /// Text.
    pub(crate) fn text(self) -> Result<&'a str, ContentError> {
        std::str::from_utf8(self.bytes()?).map_err(|_| bad("a text that is not utf-8"))
    }

    /// A number that is never negative and fits.
    pub(crate) fn count<T: TryFrom<u64>>(self) -> Result<T, ContentError> {
        let number = self.number()?;
        T::try_from(number).map_err(|_| bad(format!("a count of {}", number.cast_signed())))
    }

    /// A signed number that must not be negative.
    pub(crate) fn size(self) -> Result<u64, ContentError> {
        let number = self.number()?;
        match number.cast_signed() {
            0.. => Ok(number),
            negative => Err(bad(format!("a size of {negative}"))),
        }
    }
}

/// Takes a number off the front.
pub(crate) fn varint(bytes: &mut &[u8]) -> Result<u64, ContentError> {
    let mut number = 0u64;
    for (index, &byte) in bytes.iter().take(10).enumerate() {
        let bits = u64::from(byte & 0x7f);
        if index == 9 && bits > 1 {
            break;
        }
        number |= bits << (7 * index);
        if byte < 0x80 {
            *bytes = &bytes[index + 1..];
            return Ok(number);
        }
    }
    match bytes.len() {
        10.. => Err(bad("a number of more than 64 bits")),
        _ => Err(cut()),
    }
}

/// Takes so many bytes off the front.
pub(crate) fn take<'a>(bytes: &mut &'a [u8], len: u64) -> Result<&'a [u8], ContentError> {
    let len = usize::try_from(len).ok().filter(|&len| len <= bytes.len());
    let (taken, rest) = bytes.split_at(len.ok_or_else(cut)?);
    *bytes = rest;
    Ok(taken)
}

fn cut() -> ContentError {
    bad("a message that is cut off")
}

fn bad(why: impl Into<String>) -> ContentError {
    ContentError::Malformed(why.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(bytes: &[u8]) -> Result<Vec<Field<'_>>, ContentError> {
        Fields::new(bytes).collect()
    }

    #[test]
    fn every_kind_of_field_is_read() {
        let bytes = [
            0x08, 0x96, 0x01, 0x12, 2, b'h', b'i', 0x1d, 1, 0, 0, 0, 0x21, 2, 0, 0, 0, 0, 0, 0, 0,
        ];
        let field = |number, value| Field { number, value };
        assert_eq!(
            fields(&bytes).unwrap(),
            [
                field(1, Value::Varint(150)),
                field(2, Value::Bytes(b"hi")),
                field(3, Value::Fixed32(1)),
                field(4, Value::Fixed64(2)),
            ]
        );
        assert_eq!(fields(&[]).unwrap(), []);
    }

    #[test]
    fn what_is_cut_or_no_field_is_refused() {
        for bytes in [
            &[0x08][..],
            &[0x12, 3, 1, 2],
            &[0x1d, 0, 0, 0],
            &[0x21, 0, 0, 0, 0, 0, 0, 0],
            &[0x00, 1],
            &[0x0b],
            &[0x0f, 1],
            &[
                0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1,
            ],
        ] {
            assert!(fields(bytes).is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn numbers_have_64_bits_and_no_more() {
        let mut longest = &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 7][..];
        assert_eq!(varint(&mut longest), Ok(u64::MAX));
        assert_eq!(longest, [7]);
        assert!(
            varint(&mut &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2][..]).is_err()
        );
        assert!(varint(&mut &[0x80; 11][..]).is_err());
        assert!(varint(&mut &[0x80; 3][..]).is_err());
        assert!(Value::Varint(u64::MAX).size().is_err());
        assert!(Value::Varint(1 << 32).count::<u32>().is_err());
    }
}
