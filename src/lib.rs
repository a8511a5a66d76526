//! Moves machine learning checkpoints between machines over gRPC: a safetensors or
//! `.npy` checkpoint on one machine becomes a folder of memory-mappable `.npy` files
//! on another. Every chunk is verified before it is written, what is acknowledged
//! as durable survives a crash, and the same call made again goes on where the
//! receiver's disk stands.
//!
//! A server and a push in one process:
//!
//! ```no_run
//! use std::{path::PathBuf, sync::Arc};
//! use tensorferry::{Checkpoint, Client, Error, PushOptions, Server, source::SourceSet};
//!
//! # async fn example() -> Result<(), Error> {
//! let server = Server::builder("/data").bind(([127, 0, 0, 1], 0).into()).await?;
//! let client = Client::new(&server.local_addr().to_string())?;
//! tokio::spawn(server.serve(std::future::pending()));
//!
//! let source = SourceSet::open(&[PathBuf::from("model")], &Default::default())?;
//! let report = client.push(Arc::new(source), &"run7".parse()?, PushOptions::default()).await?;
//! println!("{} bytes, {} of them resumed", report.bytes, report.resumed_bytes);
//!
//! let landed = Checkpoint::open("/data/run7")?;
//! println!("{} tensors", landed.tensors().len());
//! # Ok(())
//! # }
//! ```
//!
//! The modules are floors; imports run downwards only (see ARCHITECTURE.md).

pub mod blocking;
mod checkpoint;
mod client;
mod embedded;
mod error;
pub mod format;
mod open_push;
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
    Checkpoint, CheckpointInfo, Damage, FileInfo, TensorInfo, TensorView, VerifyReport,
    discard_folder, list_folder, status_folder,
};
pub use client::{CheckpointStatus, CheckpointSummary, Client, DEFAULT_PORT};
pub use embedded::Embedded;
pub use error::{Error, ErrorCode};
pub use open_push::OpenPush;
pub use options::{BUDGET_BYTES_DEFAULT, LANES_MAX, PushOptions};
pub use server::{Server, ServerBuilder};
pub use session::{Progress, Stage};
pub use store::WriteMode;
pub use transfer::{Canceller, Transfer, TransferReport, Watcher};
