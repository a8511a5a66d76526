//! Pickles, and what PyTorch says with them.

use crate::source::{
    pickle,
    torch::{Storages, contents},
    torch_distributed,
    view::Refusal,
};

/// Bytes of every storage, and where it begins.
const STORAGE_LEN: u64 = 4096;
const START: u64 = 1000;
/// Bytes that a tree may take.
const BUDGET: u64 = 1 << 20;

/// As many storages as there are short keys.
struct Everywhere;

impl Storages for Everywhere {
    fn place(&self, key: &str) -> Option<Result<(u64, u64), Refusal>> {
        (key.len() < 4).then_some(Ok((START, STORAGE_LEN)))
    }
}

/// The first byte says whether numbers are big-endian, the rest is a pickle.
///
/// # Panics
/// A property is broken.
pub fn torch(data: &[u8]) {
    let Some((first, pickled)) = data.split_first() else {
        return;
    };
    let Ok(tree) = pickle::parse(pickled.to_vec(), BUDGET) else {
        return;
    };
    if let Ok(found) = contents(&tree, &Everywhere, first & 1 == 1, "alone", BUDGET) {
        for tensor in &found.tensors {
            let header = &tensor.header;
            header.check().expect("every header was checked");
            assert!(tensor.aliases.len() <= crate::plan::MAX_ALIASES);
            assert!((START..=START + STORAGE_LEN).contains(&tensor.offset));
            let end = match &tensor.steps {
                None => tensor.offset + header.byte_len,
                Some(steps) => {
                    let last = header
                        .shape
                        .iter()
                        .zip(steps)
                        .map(|(len, step)| (len - 1) * step);
                    tensor.offset + last.sum::<u64>() + u64::from(header.item_len())
                }
            };
            assert!(
                header.byte_len == 0 || end <= START + STORAGE_LEN,
                "{tensor:?}"
            );
        }
    }
    if let Ok(plan) = torch_distributed::plan(&tree) {
        for tensor in &plan.tensors {
            tensor.header.check().expect("every header was checked");
            assert!(tensor.parts.len() <= crate::plan::MAX_ENTRY_SOURCES);
        }
    }
}
