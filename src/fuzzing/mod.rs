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

mod chunk;
mod input;
mod journal;
mod names;
mod npy;
mod receiver_frames;
mod roles;
mod safetensors;
mod sender_frames;

#[cfg(test)]
mod mutate;
#[cfg(test)]
mod seeds;
#[cfg(test)]
mod tests;

pub use chunk::chunk;
pub use journal::journal;
pub use names::names;
pub use npy::npy;
pub use receiver_frames::receiver_frames;
pub use roles::roles;
pub use safetensors::safetensors;
pub use sender_frames::sender_frames;
