//! CRC-32C of raw bytes, and how the sums of cells become that of a tensor.
//!
//! The polynomial is Castagnoli's, as in iSCSI (RFC 3720), TensorFlow
//! checkpoints and object stores.

use crc_fast::{CrcAlgorithm, Digest};

/// CRC-32C of `bytes`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::checksum(CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// CRC-32 of `bytes`, as zip archives have it.
pub(crate) fn crc32(bytes: &[u8]) -> u32 {
    crc_fast::checksum(CrcAlgorithm::Crc32IsoHdlc, bytes) as u32
}

/// CRC-32C of a sequence of slices.
pub fn crc32c_of_parts<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> u32 {
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    for part in parts {
        digest.update(part);
    }
    digest.finalize() as u32
}

/// CRC-32C of bytes that come one run after another.
#[derive(Clone, Debug)]
pub(crate) struct RunningCrc32c(Digest);

impl Default for RunningCrc32c {
    fn default() -> Self {
        RunningCrc32c(Digest::new(CrcAlgorithm::Crc32Iscsi))
    }
}

impl RunningCrc32c {
    /// Takes the next run in.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The sum of all runs.
    pub(crate) fn finish(self) -> u32 {
        self.0.finalize() as u32
    }
}

/// CRC-32C of `a ‖ b` from the sums of both and the length of `b` in bytes.
///
/// A sum is a polynomial over GF(2) modulo that of the CRC, and bytes that follow multiply
/// it by x^8 each: the sum of the whole is `a * x^(8 * b_len) + b`. The powers are products
/// of those in `SQUARES`, a single one for a cell whose length is a power of two.
pub fn combine(a: u32, b: u32, b_len: u64) -> u32 {
    // The bits of a length in bytes begin at x^8, the third square of x.
    let set_bits = (0..u64::BITS as usize).filter(|bit| b_len >> bit & 1 == 1);
    let shifted = set_bits.fold(a, |product, bit| multiply(product, SQUARES[bit + 3]));
    shifted ^ b
}

/// Castagnoli's polynomial without its highest term; as in every sum here, the highest bit
/// is the coefficient of x^0.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// x^(2^i) modulo the polynomial.
const SQUARES: [u32; 67] = {
    let mut powers = [0; 67];
    // x itself.
    let mut power = 1 << 30;
    let mut i = 0;
    while i < powers.len() {
        powers[i] = power;
        power = multiply(power, power);
        i += 1;
    }
    powers
};

/// The product of two polynomials modulo the CRC's.
const fn multiply(a: u32, b: u32) -> u32 {
    let (mut a, mut b) = (a, b);
    let mut product = 0;
    while a != 0 {
        // All ones if `a` has the term that `b` stands multiplied by.
        product ^= b & ((a >> 31).wrapping_neg());
        a <<= 1;
        b = b >> 1 ^ POLYNOMIAL & (b & 1).wrapping_neg();
    }
    product
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_vectors_of_rfc_3720() {
        assert_eq!(crc32c(b""), 0);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn parts_and_combination_equal_the_whole() {
        let bytes: Vec<u8> = (0..100_003u32).map(|i| ((i * 7919) >> 3) as u8).collect();
        let whole = crc32c(&bytes);
        for cut in [0, 1, 63, 64, 65_537, bytes.len()] {
            let (a, b) = bytes.split_at(cut);
            assert_eq!(crc32c_of_parts([a, b]), whole);
            assert_eq!(combine(crc32c(a), crc32c(b), b.len() as u64), whole);
        }
    }

    #[test]
    fn sums_combine_as_the_library_says_for_every_power_of_two() {
        let (a, b) = (0xe306_9283, 0x8a91_36aa);
        let lens = (0..63).flat_map(|bit| [1u64 << bit, (1 << bit) + 1, (3 << bit) - 1]);
        for len in lens.chain([0, u64::MAX]) {
            let expected = match len {
                0 => a ^ b,
                len => {
                    crc_fast::checksum_combine(CrcAlgorithm::Crc32Iscsi, a.into(), b.into(), len)
                        as u32
                }
            };
            assert_eq!(combine(a, b, len), expected, "{len} bytes");
            assert_eq!(combine(0, b, len), b);
        }
    }
}
