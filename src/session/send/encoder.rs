//! Which codec each chunk gets, learning from those before it.

use crate::format::codec::{CodecChoice, Encoded};
use std::sync::atomic::{AtomicU32, Ordering};

/// Chunks in a row that did not shrink after which most are not tried any more.
const MISSES: u32 = 16;
/// Of those then every so many-th is.
const TRY_EVERY: u32 = 16;

/// The codec side of one session. Shared by the workers; a lost count costs nothing.
#[derive(Debug)]
pub(super) struct Encoder {
    choice: CodecChoice,
    /// Codecs agreed on.
    codecs: u32,
    miss_count: AtomicU32,
}

impl Encoder {
    pub(super) fn new(choice: CodecChoice, codecs: u32) -> Self {
        Encoder {
            choice,
            codecs,
            miss_count: AtomicU32::new(0),
        }
    }

    /// As [`CodecChoice::encode`]; where the user leaves the choice, a model that does
    /// not compress is soon sent without looking at every chunk.
    pub(super) fn encode(&self, raw: &[u8], item_len: u32) -> Encoded {
        let miss_count = self.miss_count.load(Ordering::Relaxed);
        let is_tried = self.choice != CodecChoice::Auto
            || miss_count < MISSES
            || miss_count.is_multiple_of(TRY_EVERY);
        let encoded = match is_tried {
            true => self.choice.encode(self.codecs, raw, item_len),
            false => CodecChoice::Constant.encode(self.codecs, raw, item_len),
        };
        match encoded {
            Encoded::Raw => self.miss_count.fetch_add(1, Ordering::Relaxed),
            // Constant chunks say nothing about their neighbours.
            Encoded::As(codec, _) if codec.is_constant() => 0,
            Encoded::As(..) => self.miss_count.swap(0, Ordering::Relaxed),
        };
        encoded
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::codec::Codec;

    #[test]
    fn noise_is_soon_not_tried_and_text_is_found_again() {
        let encoder = Encoder::new(CodecChoice::Auto, CodecChoice::Auto.codecs());
        let mut noise = vec![0; 4096];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        let text = b"to be or not to be ".repeat(200);
        for _ in 0..1000 {
            assert_eq!(encoder.encode(&noise, 4), Encoded::Raw);
        }
        // Constant chunks are cheap to find and always are.
        let zeros = encoder.encode(&[0; 4096], 4);
        assert_eq!(zeros, Encoded::As(Codec::Zero, Vec::new()));
        let shrunk = |encoded| matches!(encoded, Encoded::As(Codec::Lz4, _));
        let tries = (1..).find(|_| shrunk(encoder.encode(&text, 1)));
        assert!(tries.unwrap() <= TRY_EVERY);
        // From then on all of it is.
        assert!((0..100).all(|_| shrunk(encoder.encode(&text, 1))));
    }

    #[test]
    fn a_wish_of_the_user_is_always_tried() {
        let encoder = Encoder::new(CodecChoice::Lz4, CodecChoice::Lz4.codecs());
        let mut noise = vec![0; 4096];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        let text = b"to be or not to be ".repeat(200);
        for _ in 0..100 {
            assert_eq!(encoder.encode(&noise, 4), Encoded::Raw);
            assert!(matches!(
                encoder.encode(&text, 1),
                Encoded::As(Codec::Lz4, _)
            ));
        }
    }
}
