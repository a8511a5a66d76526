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

/// One line for each, on standard output.
pub(crate) fn tell(tensor: &ReadyTensor, output: &Output) {
    output.event(
        "ready",
        &ReadyEvent {
            checkpoint: &tensor.checkpoint,
            name: &tensor.name,
            path: &tensor.path,
            bytes: tensor.byte_len,
            first: tensor.is_first,
        },
    );
    let path = tensor.path.display();
    output.human(&format!("ready  {}  {path}", units::brief(&tensor.name)));
}
