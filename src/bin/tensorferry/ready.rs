//! Says which tensors can be used already.

use crate::{output::Output, units};
use serde::Serialize;
use std::path::Path;
use tensorferry::ReadyTensor;

#[derive(Serialize)]
struct ReadyEvent<'a> {
    checkpoint: &'a str,
    name: &'a str,
    path: &'a Path,
    bytes: u64,
    first: bool,
}

/// One line for each of the only checkpoint, on standard output.
pub(crate) fn tell(tensor: &ReadyTensor, output: &Output) {
    tell_as(&units::brief(&tensor.name), tensor, output);
}

/// The same where other checkpoints may come too.
pub(crate) fn tell_of_many(tensor: &ReadyTensor, output: &Output) {
    let name = format!("{}  {}", tensor.checkpoint, units::brief(&tensor.name));
    tell_as(&name, tensor, output);
}

fn tell_as(name: &str, tensor: &ReadyTensor, output: &Output) {
    // Who reads it may well work elsewhere.
    let path = std::path::absolute(&tensor.path).unwrap_or_else(|_| tensor.path.clone());
    output.event(
        "ready",
        &ReadyEvent {
            checkpoint: &tensor.checkpoint,
            name: &tensor.name,
            path: &path,
            bytes: tensor.byte_len,
            first: tensor.is_first,
        },
    );
    output.human(&format!("ready  {name}  {}", path.display()));
}
