//! Moves machine learning checkpoints between machines over gRPC: a safetensors or
//! `.npy` checkpoint on one machine becomes a folder of memory-mappable `.npy` files
//! on another. Every chunk is verified before it is written, what is acknowledged
//! as durable survives a crash, and the same call made again goes on where the
//! receiver's disk stands.
//!
//! A server and a push in one process:
//!
//! ```
//! use tensorferry::{Checkpoint, Client, PushOptions, Server, SourceSet};
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let temp = tempfile::tempdir()?;
//! # let (model, root) = (temp.path().join("model"), temp.path().join("data"));
//! # std::fs::create_dir(&model)?;
//! # let header = tensorferry::format::npy::encode_header("<f4", false, &[2]);
//! # let values = [1.5f32, -2.0].map(f32::to_le_bytes).concat();
//! # std::fs::write(model.join("norm.weight.npy"), [header, values].concat())?;
//! let server = Server::builder(&root).bind(([127, 0, 0, 1], 0).into()).await?;
//! let client = Client::new(&server.local_addr().to_string())?;
//! tokio::spawn(server.serve(std::future::pending()));
//!
//! let source = SourceSet::open(&[model], &Default::default())?;
//! let report = client.push(source, &"run7".parse()?, PushOptions::default()).await?;
//! assert_eq!((report.tensor_count, report.bytes), (1, 8));
//!
//! let landed = Checkpoint::open(root.join("run7"))?;
//! let weight = landed.tensor("norm.weight")?.expect("it was pushed");
//! assert_eq!(weight.as_slice::<f32>()?, [1.5, -2.0]);
//! # Ok(())
//! # }
//! ```
//!
//! | to | use |
//! |---|---|
//! | open what is to be sent | [`SourceSet`] |
//! | send it, ask a server | [`Client`], [`PushOptions`], [`Transfer`] |
//! | send what is still being produced | [`Client::push_open`], [`OpenPush`] |
//! | receive | [`Server`] |
//! | convert into a folder of this machine | [`Embedded`] |
//! | read what landed | [`Checkpoint`], [`list_folder`], [`status_folder`] |
//! | write one file of another format | [`export_safetensors`], [`export_npz`] |
//! | measure the machine beneath | [`measure`] |
//! | do the same without `async` | [`blocking`] |
//!
//! What is needed for that stands here at the root. The modules [`mod@format`],
//! [`plan`], [`protocol`] and [`wire`] are the engine itself, open to tests,
//! measurements and other programs that speak the protocol; they change more often.
//!
//! The modules are floors; imports run downwards only (see ARCHITECTURE.md).

mod attempts;
pub mod blocking;
mod checkpoint;
mod client;
mod copy;
mod embedded;
mod error;
mod export;
mod fault;
#[cfg(test)]
mod fault_tests;
pub mod format;
#[cfg(any(test, feature = "__internals"))]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(feature = "__internals")]
#[doc(hidden)]
pub mod internals;
mod loopback;
mod map;
pub mod measure;
mod mutant;
mod open_push;
mod opening;
mod options;
pub mod plan;
pub mod protocol;
mod pull;
mod ready;
mod server;
mod session;
pub mod source;
mod store;
#[cfg(test)]
mod throttle_tests;
mod transfer;
pub mod wire;

pub use checkpoint::{
    Checkpoint, CheckpointInfo, Damage, FileInfo, TensorInfo, TensorView, VerifyReport,
    discard_folder, list_folder, status_folder,
};
pub use client::{CheckpointStatus, CheckpointSummary, Client, DEFAULT_PORT};
pub use copy::CopyOptions;
pub use embedded::Embedded;
pub use error::{Error, ErrorCode};
pub use export::{ExportOptions, ExportReport, export_npz, export_safetensors};
pub use format::{Dtype, codec::CodecChoice};
pub use map::install_sigbus_guard;
pub use open_push::OpenPush;
pub use options::{BUDGET_BYTES_DEFAULT, LANES_MAX, Lanes, PushOptions, RateLimit};
pub use plan::CheckpointName;
pub use protocol::{
    CommitMode, Durability, Layout, NpyDtype, OutFormat, PipelineStage, Reason, ReceiverStages,
    SenderStages, Side, StageTimes,
};
pub use pull::PullOptions;
pub use ready::{OnReady, ReadyTensor};
pub use server::{Server, ServerBuilder};
pub use session::{Progress, Stage, StageShare, Stages};
pub use source::{
    GrowingSource, MemoryEntry, NameFilter, ReadMode, SourceError, SourceOptions, SourceSet,
};
pub use store::WriteMode;
pub use transfer::{Canceller, Transfer, TransferReport, Watcher};
