//! Small changes to an input, all of them from one seed.

/// SplitMix64.
#[derive(Clone, Debug)]
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Self {
        Rng(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to below `end`, or 0 when that is 0.
    pub(super) fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

/// Numbers at which code goes wrong, little-endian and as varints.
const NUMBERS: [u64; 14] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0xffff,
    0x0010_0000,
    0x7fff_ffff,
    0xffff_ffff,
    1 << 53,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

/// One input, made of `seed` and pieces of `other`, at most `max_len` long.
pub(super) fn mutate(seed: &[u8], other: &[u8], max_len: usize, rng: &mut Rng) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..1 + rng.below(4) {
        change(&mut bytes, other, rng);
    }
    bytes.truncate(max_len);
    bytes
}

fn change(bytes: &mut Vec<u8>, other: &[u8], rng: &mut Rng) {
    let at = rng.below(bytes.len() + 1);
    let len = 1 + rng.below(16);
    let end = (at + len).min(bytes.len());
    match rng.below(9) {
        0 | 1 if at < bytes.len() => bytes[at] ^= 1 << rng.below(8),
        2 if at < bytes.len() => bytes[at] = rng.next() as u8,
        3 => {
            let noise: Vec<u8> = (0..len).map(|_| rng.next() as u8).collect();
            bytes.splice(at..at, noise);
        }
        4 => drop(bytes.drain(at..end)),
        5 => {
            let copy = bytes[at..end].to_vec();
            let to = rng.below(bytes.len() + 1);
            bytes.splice(to..to, copy);
        }
        6 => {
            let number = NUMBERS[rng.below(NUMBERS.len())];
            let width = [1, 2, 4, 8][rng.below(4)];
            let mut number = match rng.below(2) {
                0 => number.to_le_bytes()[..width].to_vec(),
                _ => {
                    let mut varint = Vec::new();
                    prost::encoding::encode_varint(number, &mut varint);
                    varint
                }
            };
            if rng.below(4) == 0 {
                number.reverse();
            }
            let until = (at + number.len()).min(bytes.len());
            bytes.splice(at..until, number);
        }
        _ => {
            // The beginning of this one, the end of the other, or a piece in between.
            let from = rng.below(other.len() + 1);
            let upto = from + rng.below(other.len() - from + 1);
            match rng.below(2) {
                0 => bytes
                    .splice(at.., other[from..].iter().copied())
                    .for_each(drop),
                _ => bytes
                    .splice(at..at, other[from..upto].iter().copied())
                    .for_each(drop),
            }
        }
    }
}
