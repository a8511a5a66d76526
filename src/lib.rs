//! Moves ML checkpoints between machines over gRPC into memory-mappable `.npy` files.

mod checkpoint;
mod client;
mod embedded;
mod error;
pub mod format;
mod options;
pub mod plan;
pub mod protocol;
mod server;
mod session;
pub mod source;
mod store;
mod transfer;
pub mod wire;

pub use checkpoint::{
    Checkpoint, Damage, FileInfo, TensorInfo, TensorView, VerifyReport, discard_folder, list_folder,
};
pub use client::{CheckpointSummary, Client, DEFAULT_PORT};
pub use embedded::Embedded;
pub use error::{Error, ErrorCode};
pub use options::{BUDGET_BYTES_DEFAULT, PushOptions};
pub use server::{Server, ServerBuilder};
pub use session::{Progress, Stage};
pub use transfer::{Canceller, Transfer, TransferReport, Watcher};
