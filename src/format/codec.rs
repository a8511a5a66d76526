//! How the bytes of one chunk are encoded.
//!
//! Lengths come with the chunk and are checked against each other first; a
//! decoder fills a buffer that the receiver chose and never allocates what the
//! encoded bytes ask for.

use lz4_flex::block;
use std::cell::RefCell;

/// Longest element that [`Codec::Fill`] repeats, in bytes: a `complex128`.
const MAX_ITEM_LEN: usize = 16;

/// Encoding of one chunk. Id 2 is reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
#[non_exhaustive]
pub enum Codec {
    /// The raw bytes.
    None = 0,
    /// No bytes: all of them are zero.
    Zero = 1,
    /// One LZ4 block without a length in front.
    Lz4 = 3,
    /// One element, repeated.
    Fill = 4,
}

impl Codec {
    /// Every codec.
    pub const ALL: [Codec; 4] = [Codec::None, Codec::Zero, Codec::Lz4, Codec::Fill];

    /// The codec of this id, if known.
    pub fn from_id(id: u32) -> Option<Codec> {
        Codec::ALL.into_iter().find(|codec| codec.id() == id)
    }

    /// Number on the wire.
    pub const fn id(self) -> u32 {
        self as u32
    }

    /// Whether it stands for one element, repeated.
    pub const fn is_constant(self) -> bool {
        matches!(self, Codec::Zero | Codec::Fill)
    }

    /// The bit that stands for this codec in a set.
    pub const fn bit(self) -> u32 {
        1 << self.id()
    }
}

/// An encoded chunk is not what it claims to be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// Encoded and raw length do not fit the codec.
    #[error("{encoded_len} encoded bytes for {raw_len} raw ones do not fit codec {codec:?}: {why}")]
    Lengths {
        /// Which codec.
        codec: Codec,
        /// Raw length in bytes.
        raw_len: u64,
        /// Encoded length in bytes.
        encoded_len: u64,
        /// The rule.
        why: &'static str,
    },
    /// The block decodes to another length.
    #[error("the lz4 block decodes to {found} bytes, not {expected}")]
    WrongLength {
        /// Raw length announced.
        expected: u64,
        /// Raw length found.
        found: u64,
    },
    /// The block is cut off, asks for more room than announced, or is no LZ4.
    #[error("bad lz4 block of {encoded_len} bytes for {raw_len} raw ones")]
    BadLz4 {
        /// Raw length announced.
        raw_len: u64,
        /// Encoded length in bytes.
        encoded_len: u64,
    },
}

/// Checks the lengths of a chunk, before a byte of it is read. `item_len` is
/// the length of one element in bytes, 1 for blobs and packed types.
///
/// # Errors
/// [`CodecError::Lengths`].
pub fn check_lengths(
    codec: Codec,
    raw_len: u32,
    encoded_len: u32,
    item_len: u32,
) -> Result<(), CodecError> {
    check(codec, raw_len as usize, encoded_len as usize)?;
    if codec == Codec::Fill && encoded_len != item_len {
        return Err(lengths(
            codec,
            raw_len as usize,
            encoded_len as usize,
            "it is not one element",
        ));
    }
    Ok(())
}

/// Decodes a chunk into exactly `raw`. On an error the content of `raw` is
/// undefined (but initialised).
///
/// # Errors
/// Any [`CodecError`]; lengths are checked again.
pub fn decode_into(codec: Codec, encoded: &[u8], raw: &mut [u8]) -> Result<(), CodecError> {
    check(codec, raw.len(), encoded.len())?;
    match codec {
        Codec::None => raw.copy_from_slice(encoded),
        Codec::Zero => raw.fill(0),
        Codec::Fill => raw
            .chunks_exact_mut(encoded.len())
            .for_each(|e| e.copy_from_slice(encoded)),
        Codec::Lz4 => {
            let found = block::decompress_into(encoded, raw).map_err(|_| CodecError::BadLz4 {
                raw_len: raw.len() as u64,
                encoded_len: encoded.len() as u64,
            })?;
            if found != raw.len() {
                let (expected, found) = (raw.len() as u64, found as u64);
                return Err(CodecError::WrongLength { expected, found });
            }
        }
    }
    Ok(())
}

/// The LZ4 block of `raw`, or `None` when it is not smaller.
pub fn encode_lz4(raw: &[u8]) -> Option<Vec<u8>> {
    thread_local! {
        // The worst case is longer than the input; only what is kept is allocated.
        static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    if raw.is_empty() {
        return None;
    }
    SCRATCH.with_borrow_mut(|scratch| {
        let most = block::get_maximum_output_size(raw.len());
        if scratch.len() < most {
            scratch.resize(most, 0);
        }
        let encoded_len = block::compress_into(raw, scratch).ok()?;
        (encoded_len < raw.len()).then(|| scratch[..encoded_len].to_vec())
    })
}

/// How the sender picks a codec for a chunk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum CodecChoice {
    /// LZ4 where a sample of the chunk shrinks, else raw; constant chunks as one
    /// element.
    #[default]
    Auto,
    /// Everything raw.
    None,
    /// LZ4 wherever that is smaller; constant chunks as one element.
    Lz4,
    /// Constant chunks as one element, everything else raw.
    Constant,
}

/// A chunk ready for the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Encoded {
    /// As it is.
    Raw,
    /// With this codec as these bytes.
    As(Codec, Vec<u8>),
}

/// Bytes of each of the three samples by which [`CodecChoice::Auto`] decides.
const SAMPLE_LEN: usize = 8 << 10;

impl CodecChoice {
    /// The bits of all codecs that [`CodecChoice::encode`] may use.
    pub fn codecs(self) -> u32 {
        match self {
            CodecChoice::None => Codec::None.bit(),
            CodecChoice::Constant => Codec::None.bit() | Codec::Zero.bit() | Codec::Fill.bit(),
            CodecChoice::Auto | CodecChoice::Lz4 => {
                Codec::None.bit() | Codec::Zero.bit() | Codec::Lz4.bit() | Codec::Fill.bit()
            }
        }
    }

    /// Encodes a chunk with one of the `allowed` codecs. `item_len` as in
    /// [`check_lengths`].
    pub fn encode(self, allowed: u32, raw: &[u8], item_len: u32) -> Encoded {
        let allowed = |codec: Codec| allowed & self.codecs() & codec.bit() != 0;
        if (allowed(Codec::Zero) || allowed(Codec::Fill))
            && let Some(element) = constant_element(raw, item_len as usize)
        {
            if element.iter().all(|&b| b == 0) && allowed(Codec::Zero) {
                return Encoded::As(Codec::Zero, Vec::new());
            }
            if allowed(Codec::Fill) {
                return Encoded::As(Codec::Fill, element.to_vec());
            }
        }
        if allowed(Codec::Lz4) && (self != CodecChoice::Auto || shrinks(raw)) {
            // A block that saves next to nothing costs the receiver a copy.
            let encoded = encode_lz4(raw)
                .filter(|e| self != CodecChoice::Auto || is_worth_it(e.len(), raw.len()));
            if let Some(encoded) = encoded {
                return Encoded::As(Codec::Lz4, encoded);
            }
        }
        Encoded::Raw
    }
}

/// Whether samples from the start, the middle and the end of `raw` shrink.
fn shrinks(raw: &[u8]) -> bool {
    if raw.len() <= 4 * SAMPLE_LEN {
        return true;
    }
    let at = [0, raw.len() / 2, raw.len() - SAMPLE_LEN];
    let samples = at.map(|at| &raw[at..at + SAMPLE_LEN]);
    let encoded_len: usize = samples
        .iter()
        .map(|s| encode_lz4(s).map_or(s.len(), |e| e.len()))
        .sum();
    is_worth_it(encoded_len, 3 * SAMPLE_LEN)
}

/// At least a twentieth is saved.
fn is_worth_it(encoded_len: usize, raw_len: usize) -> bool {
    encoded_len <= raw_len - raw_len / 20
}

/// The element of `item_len` bytes that `raw` repeats, if it does so: the
/// payload of [`Codec::Fill`], and of [`Codec::Zero`] when all its bytes are 0.
/// `None` as well when `raw` is empty or not a whole number of elements.
pub fn constant_element(raw: &[u8], item_len: usize) -> Option<&[u8]> {
    if !(1..=MAX_ITEM_LEN).contains(&item_len) || !raw.len().is_multiple_of(item_len) {
        return None;
    }
    let element = raw.get(..item_len)?;
    // Equal to itself shifted by one element; leaves at the first difference.
    (raw[item_len..] == raw[..raw.len() - item_len]).then_some(element)
}

fn check(codec: Codec, raw_len: usize, encoded_len: usize) -> Result<(), CodecError> {
    let (fits, why) = match codec {
        Codec::None => (encoded_len == raw_len, "they must be equal"),
        Codec::Zero => (encoded_len == 0, "it has no payload"),
        Codec::Lz4 => (
            0 < encoded_len && encoded_len < raw_len,
            "it must be smaller, not empty",
        ),
        Codec::Fill => (
            (1..=MAX_ITEM_LEN).contains(&encoded_len)
                && encoded_len <= raw_len
                && raw_len.is_multiple_of(encoded_len),
            "the element must have 1 to 16 bytes and divide the raw length",
        ),
    };
    if fits {
        Ok(())
    } else {
        Err(lengths(codec, raw_len, encoded_len, why))
    }
}

fn lengths(codec: Codec, raw_len: usize, encoded_len: usize, why: &'static str) -> CodecError {
    CodecError::Lengths {
        codec,
        raw_len: raw_len as u64,
        encoded_len: encoded_len as u64,
        why,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ids_are_those_of_the_wire() {
        let ids: Vec<u32> = Codec::ALL.iter().map(|c| c.id()).collect();
        assert_eq!(ids, [0, 1, 3, 4]);
        assert_eq!(Codec::Fill.bit(), 16);
        for id in 0..40 {
            assert_eq!(Codec::from_id(id).is_some(), ids.contains(&id));
        }
        assert_eq!(Codec::from_id(u32::MAX), None);
    }

    #[test]
    fn lengths_must_fit_the_codec() {
        for (codec, raw, encoded, item, fits) in [
            (Codec::None, 8, 8, 4, true),
            (Codec::None, 8, 7, 4, false),
            (Codec::None, 8, 9, 4, false),
            (Codec::Zero, 8, 0, 4, true),
            (Codec::Zero, 8, 1, 4, false),
            (Codec::Lz4, 8, 7, 4, true),
            (Codec::Lz4, 8, 8, 4, false),
            (Codec::Lz4, 8, 0, 4, false),
            (Codec::Fill, 8, 4, 4, true),
            (Codec::Fill, 8, 2, 4, false),
            (Codec::Fill, 9, 4, 4, false),
            (Codec::Fill, 8, 0, 0, false),
            (Codec::Fill, 0, 4, 4, false),
            (Codec::Fill, 32, 16, 16, true),
            (Codec::Fill, 34, 17, 17, false),
            (Codec::None, u32::MAX, u32::MAX, 1, true),
        ] {
            let result = check_lengths(codec, raw, encoded, item);
            assert_eq!(result.is_ok(), fits, "{codec:?} {raw} {encoded} {item}");
        }
    }

    #[test]
    fn lying_sizes_are_found() {
        let raw = vec![7u8; 4096];
        let encoded = encode_lz4(&raw).unwrap();
        let mut exact = vec![0; 4096];
        decode_into(Codec::Lz4, &encoded, &mut exact).unwrap();
        assert_eq!(exact, raw);
        let mut larger = vec![0; 4097];
        let error = CodecError::WrongLength {
            expected: 4097,
            found: 4096,
        };
        assert_eq!(decode_into(Codec::Lz4, &encoded, &mut larger), Err(error));
        let mut smaller = vec![0; 4095];
        assert!(matches!(
            decode_into(Codec::Lz4, &encoded, &mut smaller),
            Err(CodecError::BadLz4 { .. })
        ));
        for cut in 1..encoded.len() {
            assert!(
                decode_into(Codec::Lz4, &encoded[..cut], &mut exact).is_err(),
                "{cut}"
            );
        }
    }

    #[test]
    fn noise_and_nothing_do_not_become_lz4() {
        let noise: Vec<u8> = blake3::hash(b"noise").as_bytes().to_vec();
        assert_eq!(encode_lz4(&noise), None);
        assert_eq!(encode_lz4(&[]), None);
    }

    #[test]
    fn fill_and_zero_repeat_their_element() {
        let mut raw = [9; 6];
        decode_into(Codec::Zero, &[], &mut raw).unwrap();
        assert_eq!(raw, [0; 6]);
        decode_into(Codec::Fill, &[1, 2], &mut raw).unwrap();
        assert_eq!(raw, [1, 2, 1, 2, 1, 2]);
        assert!(decode_into(Codec::Fill, &[1, 2, 3, 4], &mut raw).is_err());
        assert!(decode_into(Codec::Zero, &[0], &mut raw).is_err());
    }

    #[test]
    fn each_chunk_gets_the_codec_that_suits_it() {
        let all = CodecChoice::Auto.codecs();
        let noise: Vec<u8> = (0..4096u32)
            .flat_map(|i| *blake3::hash(&i.to_le_bytes()).as_bytes())
            .collect();
        let text = b"the quick brown fox jumps over the lazy dog ".repeat(4096);
        let mut mixed = noise.clone();
        mixed[..20_000].fill(7);
        for choice in [CodecChoice::Auto, CodecChoice::Lz4] {
            let encode = |raw: &[u8]| choice.encode(all, raw, 4);
            assert_eq!(encode(&[0; 64]), Encoded::As(Codec::Zero, Vec::new()));
            assert_eq!(
                encode(&[1, 2, 3, 4].repeat(9)),
                Encoded::As(Codec::Fill, vec![1, 2, 3, 4])
            );
            assert_eq!(encode(&noise), Encoded::Raw);
            for raw in [&text, &mixed] {
                let Encoded::As(Codec::Lz4, encoded) = encode(raw) else {
                    panic!("{choice:?} sends compressible bytes raw");
                };
                let mut back = vec![0; raw.len()];
                decode_into(Codec::Lz4, &encoded, &mut back).unwrap();
                assert_eq!(&back, raw);
            }
            // What was not agreed on is not used.
            assert_eq!(choice.encode(Codec::None.bit(), &text, 4), Encoded::Raw);
            assert_eq!(choice.encode(Codec::None.bit(), &[0; 64], 4), Encoded::Raw);
            let zeros_as_fill = choice.encode(Codec::Fill.bit(), &[0; 64], 4);
            assert_eq!(zeros_as_fill, Encoded::As(Codec::Fill, vec![0; 4]));
        }
        assert_eq!(CodecChoice::None.encode(all, &[0; 64], 4), Encoded::Raw);
        assert_eq!(CodecChoice::None.encode(all, &text, 4), Encoded::Raw);
    }

    #[test]
    fn constant_elements_are_found() {
        assert_eq!(constant_element(&[1, 2, 1, 2], 2), Some(&[1, 2][..]));
        assert_eq!(constant_element(&[1, 2], 2), Some(&[1, 2][..]));
        assert_eq!(constant_element(&[1, 2, 1, 3], 2), None);
        assert_eq!(constant_element(&[0; 6], 4), None);
        assert_eq!(constant_element(&[0; 34], 17), None);
        assert_eq!(constant_element(&[0; 4], 0), None);
        assert_eq!(constant_element(&[], 1), None);
    }

    proptest! {
        #[test]
        fn decoding_any_bytes_never_panics(
            id in 0u32..6,
            encoded in prop::collection::vec(any::<u8>(), 0..100),
            raw_len in 0usize..300,
        ) {
            if let Some(codec) = Codec::from_id(id) {
                let _ = decode_into(codec, &encoded, &mut vec![0; raw_len]);
            }
        }

        #[test]
        fn lz4_gives_back_what_it_took(unit in prop::collection::vec(any::<u8>(), 1..20), times in 1usize..200) {
            let raw = unit.repeat(times);
            if let Some(encoded) = encode_lz4(&raw) {
                let mut back = vec![0; raw.len()];
                decode_into(Codec::Lz4, &encoded, &mut back).unwrap();
                prop_assert_eq!(back, raw);
            }
        }
    }
}
