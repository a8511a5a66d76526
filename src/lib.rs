//! Moves ML checkpoints between machines over gRPC into memory-mappable `.npy` files.

pub mod format;
pub mod plan;
