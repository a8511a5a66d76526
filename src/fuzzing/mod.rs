//! What must hold for any bytes: one function per thing that reads what others
//! wrote. Each panics when a property is broken; that bytes are refused is fine.
//!
//! `cargo test` feeds every function its seeds and seeded mutations of them
//! (`tests`), libFuzzer the same functions in `fuzz/`. Not part of the public API.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a broken property is told by a panic"
)]

mod archive;
mod chunk;
mod gguf;
mod hdf5;
mod input;
mod journal;
mod names;
mod npy;
mod onnx;
mod receiver_frames;
mod roles;
mod safetensors;
mod sender_frames;
mod tensorflow;
mod torch;

#[cfg(test)]
mod mutate;
#[cfg(test)]
mod seeds;
#[cfg(test)]
mod tests;

pub use archive::archive;
pub use chunk::chunk;
pub use gguf::gguf;
pub use hdf5::hdf5;
pub use journal::journal;
pub use names::names;
pub use npy::npy;
pub use onnx::onnx;
pub use receiver_frames::receiver_frames;
pub use roles::roles;
pub use safetensors::safetensors;
pub use sender_frames::sender_frames;
pub use tensorflow::{saved_model, tensorflow_graph, tensorflow_index};
pub use torch::torch;
