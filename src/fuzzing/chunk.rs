//! Encoded chunks with any lengths.

use super::input::Input;
use crate::format::codec::{
    Codec, CodecError, check_lengths, constant_element, decode_into, encode_lz4,
};

/// Bytes on both sides of the buffer that must stay as they are.
const FENCE: [u8; 16] = [0xa5; 16];

/// Codec, raw length (2 bytes), element length, then the encoded bytes; they also
/// serve as raw bytes to be encoded.
///
/// # Panics
/// A property is broken.
pub fn chunk(data: &[u8]) {
    let mut input = Input::new(data);
    let codec = input.pick(&Codec::ALL);
    let raw_len = usize::from(input.u16()) % (16 << 10);
    let item_len = input.below(20);
    let bytes = input.rest();
    decode(codec, raw_len, item_len, bytes);
    encode(item_len, bytes);
}

fn decode(codec: Codec, raw_len: usize, item_len: usize, encoded: &[u8]) {
    let fits = check_lengths(codec, raw_len as u32, encoded.len() as u32, item_len as u32);
    let decoded = decode_fenced(codec, raw_len, encoded);
    if fits.is_ok() {
        assert!(!matches!(decoded, Err(CodecError::Lengths { .. })));
    }
    let Ok(raw) = decoded else { return };
    match codec {
        Codec::None => assert_eq!(raw, encoded),
        Codec::Zero => assert!(encoded.is_empty() && raw.iter().all(|&b| b == 0)),
        Codec::Fill => assert_eq!(constant_element(&raw, encoded.len()), Some(encoded)),
        Codec::Lz4 => {
            // An encoded chunk has one raw length, whatever its head claims.
            for other_len in [raw_len - 1, raw_len + 1] {
                assert!(decode_fenced(codec, other_len, encoded).is_err());
            }
            check_lz4(&raw);
        }
    }
}

fn encode(item_len: usize, raw: &[u8]) {
    check_lz4(raw);
    if let Some(element) = constant_element(raw, item_len) {
        assert_eq!(
            decode_fenced(Codec::Fill, raw.len(), element).as_deref(),
            Ok(raw)
        );
        let lens = (raw.len() as u32, item_len as u32);
        assert_eq!(check_lengths(Codec::Fill, lens.0, lens.1, lens.1), Ok(()));
    }
}

fn check_lz4(raw: &[u8]) {
    if let Some(encoded) = encode_lz4(raw) {
        assert!(encoded.len() < raw.len());
        assert_eq!(
            decode_fenced(Codec::Lz4, raw.len(), &encoded).as_deref(),
            Ok(raw)
        );
    }
}

/// Decodes into the middle of a buffer and looks at both sides of it afterwards.
fn decode_fenced(codec: Codec, raw_len: usize, encoded: &[u8]) -> Result<Vec<u8>, CodecError> {
    let mut buffer = [&FENCE[..], &vec![0x5a; raw_len], &FENCE].concat();
    let end = FENCE.len() + raw_len;
    let result = decode_into(codec, encoded, &mut buffer[FENCE.len()..end]);
    assert!(buffer[..FENCE.len()] == FENCE && buffer[end..] == FENCE);
    result.map(|()| buffer[FENCE.len()..end].to_vec())
}
