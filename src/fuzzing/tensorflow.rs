//! The index of a TensorFlow checkpoint, its graph of objects, and a SavedModel.

use crate::{
    plan::{MAX_ALIASES, MAX_DIMENSIONS, MAX_ENTRY_NAME_LEN},
    source::{
        tensorflow::{
            bundle::{Bundle, BundleEntry, Element, MAX_SLICES},
            graph::Graph,
            only_text,
            saved_model::{SavedModel, object_graph},
            table,
        },
        view::View,
    },
};
use std::collections::HashSet;

/// A table. Its checksums are put right first: nobody would find out by chance what lies
/// behind them.
///
/// # Panics
/// A property is broken.
pub fn tensorflow_index(data: &[u8]) {
    let mut index = data.to_vec();
    table::seal(&mut index);
    // Where blocks of a mutated table overlap, the sum of one lies in another: such a table
    // stays wrong, which is well.
    assert_eq!(index.len(), data.len(), "sealing moves nothing");
    let Ok(bundle) = Bundle::parse(&index) else {
        return;
    };
    assert!((1..=99_999).contains(&bundle.shard_count));
    let names: Vec<&String> = bundle.tensors.iter().map(|(name, _)| name).collect();
    assert!(names.is_sorted_by(|a, b| a < b), "in order and none twice");
    for (name, entry) in &bundle.tensors {
        assert!(!name.starts_with('\0'));
        check(entry, bundle.shard_count);
        for slice in &entry.slices {
            assert!(slice.key(name).starts_with(&[0]));
            if let Some((start, len)) = slice.within(&entry.shape) {
                let ends = start.iter().zip(&len).map(|(start, len)| start + len);
                assert!(ends.zip(&entry.shape).all(|(end, &whole)| end <= whole));
            }
        }
    }
    for (key, part) in &bundle.slices {
        assert_eq!(key.first(), Some(&0));
        check(part, bundle.shard_count);
    }
}

fn check(entry: &BundleEntry, shard_count: u32) {
    assert!(entry.shape.len() <= MAX_DIMENSIONS && entry.slices.len() <= MAX_SLICES);
    if entry.slices.is_empty() {
        assert!(entry.shard < shard_count);
        if let Element::Type(dtype) = entry.element {
            assert_eq!(dtype.byte_len(&entry.shape), Some(entry.len));
        }
    }
}

/// The graph of objects beside a checkpoint, bare and as the text of a tensor.
///
/// # Panics
/// A property is broken.
pub fn tensorflow_graph(data: &[u8]) {
    let graph = only_text(data, None).unwrap_or(data);
    let Ok(graph) = Graph::parse(graph) else {
        return;
    };
    let variables = graph.variables();
    for (key, variable) in &variables.by_key {
        assert!(variable.aliases.len() <= MAX_ALIASES);
        let mut aliases = HashSet::new();
        for alias in &variable.aliases {
            assert!((1..=MAX_ENTRY_NAME_LEN).contains(&alias.len()));
            assert!(aliases.insert(alias), "an alias twice");
        }
        let names = [
            variable.telling_name().map(str::to_owned),
            variable.path_name(key),
        ];
        for name in names.iter().flatten() {
            assert!((1..=MAX_ENTRY_NAME_LEN).contains(&name.len()));
        }
        assert!(!(variable.is_optimizer && variable.trainable_index.is_some()));
    }
}

/// `saved_model.pb`.
///
/// # Panics
/// A property is broken.
pub fn saved_model(data: &[u8]) {
    let Ok(Some((offset, len))) = object_graph(View::memory(data)) else {
        return;
    };
    let objects = &data[offset as usize..(offset + len) as usize];
    let Ok(model) = SavedModel::parse(objects) else {
        return;
    };
    let mut places = HashSet::new();
    for variable in model.variables.values() {
        if let Some(place) = variable.place {
            assert!((place as usize) < model.variables.len());
            assert!(places.insert(place), "a place twice");
        }
    }
}
