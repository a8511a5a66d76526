//! A made-up checkpoint of f32 values that no codec makes smaller: one safetensors file.

use serde_json::{Map, json};
use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
};
use tensorferry::measure::{Halt, Noise};

const SEED: u64 = 1;
/// Tensors in it.
const TENSORS: u64 = 8;
/// Bytes made at once.
const BLOCK_BYTES: usize = 1 << 20;

/// Writes `bytes` of values, rounded down to whole ones.
pub(super) fn write(path: &Path, bytes: u64, halt: &Halt) -> io::Result<()> {
    let (mut header, mut end) = (Map::new(), 0);
    let values = bytes / 4;
    for number in 0..TENSORS {
        // The last ones are longer by one value until all are used up.
        let len = values / TENSORS + u64::from(number >= TENSORS - values % TENSORS);
        let begin = end;
        end += len * 4;
        header.insert(
            format!("layer.{number}.weight"),
            json!({ "dtype": "F32", "shape": [len], "data_offsets": [begin, end] }),
        );
    }
    let mut text = serde_json::to_string(&header)?;
    text.push_str(&" ".repeat(text.len().wrapping_neg() % 8));
    let mut out = BufWriter::new(File::create_new(path)?);
    out.write_all(&(text.len() as u64).to_le_bytes())?;
    out.write_all(text.as_bytes())?;
    let mut noise = Noise::new(SEED);
    let mut block = vec![0; BLOCK_BYTES];
    let mut left = end;
    while left > 0 {
        halt.check()?;
        let len = left.min(BLOCK_BYTES as u64);
        let part = block.get_mut(..len as usize).unwrap_or_default();
        noise.fill(part);
        out.write_all(part)?;
        left -= len;
    }
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensorferry::SourceSet;

    #[test]
    fn it_is_a_checkpoint_of_as_many_bytes() {
        let temp = tempfile::tempdir().unwrap();
        for bytes in [32, 36, (8 << 20) + 12] {
            let path = temp.path().join(format!("{bytes}.safetensors"));
            write(&path, bytes, &Halt::default()).unwrap();
            let source = SourceSet::open(&[path], &Default::default()).unwrap();
            assert_eq!(source.total_bytes(), bytes);
            assert_eq!(source.entries().len() as u64, TENSORS);
        }
    }
}
