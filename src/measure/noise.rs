//! Values as weights have them, made from a seed.

/// Endless 32-bit floats with either sign between 2^-15 and 2. No codec of a general
/// kind makes them smaller, unless they are sparse.
#[derive(Clone, Debug)]
pub struct Noise {
    state: u64,
    is_sparse: bool,
}

impl Noise {
    /// Dense values.
    pub fn new(seed: u64) -> Noise {
        Noise {
            state: seed,
            is_sparse: false,
        }
    }

    /// Three values of four are zero, as in a pruned model.
    pub fn sparse(seed: u64) -> Noise {
        Noise {
            state: seed,
            is_sparse: true,
        }
    }

    /// The next values; a rest shorter than two of them is made of their first bytes.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for pair in bytes.chunks_mut(8) {
            let values = self.next_pair().to_le_bytes();
            for (byte, value) in pair.iter_mut().zip(values) {
                *byte = value;
            }
        }
    }

    /// Two values.
    fn next_pair(&mut self) -> u64 {
        let random = self.next();
        let values = random & 0x87ff_ffff_87ff_ffff | 0x3800_0000_3800_0000;
        if !self.is_sparse {
            return values;
        }
        let keep = self.next();
        let low = if keep & 3 == 0 { 0xffff_ffff } else { 0 };
        let high = if keep & 12 == 0 { 0xffff_ffff << 32 } else { 0 };
        values & (low | high)
    }

    /// SplitMix64.
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::codec::encode_lz4;

    #[test]
    fn dense_values_do_not_shrink_and_sparse_ones_do() {
        let mut bytes = vec![0; 1 << 20];
        Noise::new(7).fill(&mut bytes);
        assert_eq!(encode_lz4(&bytes), None);
        for value in bytes.as_chunks::<4>().0 {
            let value = f32::from_le_bytes(*value).abs();
            assert!((2f32.powi(-15)..2.0).contains(&value));
        }
        Noise::sparse(7).fill(&mut bytes);
        let zeros = bytes.as_chunks::<4>().0.iter().filter(|v| **v == [0; 4]);
        assert!((190_000..205_000).contains(&zeros.count()));
        assert!(encode_lz4(&bytes).unwrap().len() < 3 * bytes.len() / 4);
    }
}
