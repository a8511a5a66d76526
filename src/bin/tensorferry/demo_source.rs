//! A made-up checkpoint as the Hugging Face tools lay one out: two safetensors
//! shards, their index and a config. The bytes are random, with a fixed seed.

use serde_json::{Map, Value, json};
use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
};

const SEED: u64 = 0x7e45_0fe1_1700_0001;
/// Bytes made at once.
const BLOCK_BYTES: usize = 64 << 10;

struct Tensor {
    name: String,
    dtype: &'static str,
    item_len: u64,
    shape: Vec<u64>,
}

impl Tensor {
    fn new(name: impl Into<String>, dtype: &'static str, item_len: u64, shape: &[u64]) -> Tensor {
        Tensor {
            name: name.into(),
            dtype,
            item_len,
            shape: shape.to_vec(),
        }
    }

    fn byte_len(&self) -> u64 {
        self.shape.iter().product::<u64>() * self.item_len
    }
}

/// Writes the checkpoint, 256 MiB, into an existing folder.
pub(crate) fn write(dir: &Path) -> io::Result<()> {
    let mut random = SplitMix64(SEED);
    let mut weight_map = Map::new();
    let mut total_size = 0;
    for (number, tensors) in [first_shard(), second_shard()].iter().enumerate() {
        let file = format!("model-{:05}-of-00002.safetensors", number + 1);
        write_shard(&dir.join(&file), tensors, &mut random)?;
        for tensor in tensors {
            weight_map.insert(tensor.name.clone(), Value::from(file.clone()));
            total_size += tensor.byte_len();
        }
    }
    let index = json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map });
    std::fs::write(
        dir.join("model.safetensors.index.json"),
        format!("{index:#}\n"),
    )?;
    let config = json!({ "architectures": ["Demo"], "hidden_size": 1024, "vocab_size": 32_768 });
    std::fs::write(dir.join("config.json"), format!("{config:#}\n"))
}

fn first_shard() -> Vec<Tensor> {
    let mut tensors = vec![Tensor::new(
        "model.embed_tokens.weight",
        "BF16",
        2,
        &[32_768, 1024],
    )];
    for layer in 0..4 {
        tensors.push(Tensor::new(
            format!("model.layers.{layer}.mlp.up_proj.weight"),
            "F32",
            4,
            &[4096, 1024],
        ));
    }
    // Many small ones: what makes a transfer slow elsewhere.
    for part in 0..300 {
        tensors.push(Tensor::new(
            format!("model.adapters.{part}.weight"),
            "F16",
            2,
            &[7, 1024],
        ));
    }
    tensors
}

fn second_shard() -> Vec<Tensor> {
    let mut tensors = vec![
        Tensor::new("lm_head.weight", "BF16", 2, &[32_768, 1024]),
        Tensor::new("tokens.ids", "I64", 8, &[1 << 20]),
        Tensor::new("attention.mask", "BOOL", 1, &[4096, 1024]),
        Tensor::new("logit_scale", "F32", 4, &[]),
        Tensor::new("unused.bias", "F32", 4, &[0, 128]),
    ];
    for layer in 0..4 {
        tensors.push(Tensor::new(
            format!("model.layers.{layer}.attn.qkv.weight"),
            "F16",
            2,
            &[6144, 1024],
        ));
    }
    tensors
}

/// A length, a JSON header padded to 8 bytes, and the tensors one after another.
fn write_shard(path: &Path, tensors: &[Tensor], random: &mut SplitMix64) -> io::Result<()> {
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut end = 0;
    for tensor in tensors {
        let begin = end;
        end += tensor.byte_len();
        let entry =
            json!({ "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end] });
        header.insert(tensor.name.clone(), entry);
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut out = BufWriter::with_capacity(1 << 20, File::create_new(path)?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    let mut block = vec![0; BLOCK_BYTES];
    for tensor in tensors {
        let mut left = tensor.byte_len();
        while left > 0 {
            let len = BLOCK_BYTES.min(usize::try_from(left).unwrap_or(BLOCK_BYTES));
            random.fill(&mut block[..len]);
            if tensor.dtype == "BOOL" {
                block.iter_mut().for_each(|b| *b &= 1);
            }
            out.write_all(&block[..len])?;
            left -= len as u64;
        }
    }
    out.into_inner()
        .map_err(io::IntoInnerError::into_error)?
        .sync_all()
}

/// Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014).
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for part in bytes.chunks_mut(8) {
            let value = self.next().to_le_bytes();
            part.copy_from_slice(&value[..part.len()]);
        }
    }
}
