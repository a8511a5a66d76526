//! Promises of the library's types that no call shows.

use std::error::Error as _;
use tensorferry::{
    Canceller, Checkpoint, CheckpointInfo, CheckpointName, CheckpointStatus, CheckpointSummary,
    Client, Embedded, Error, ErrorCode, Progress, PushOptions, Server, ServerBuilder, SourceError,
    SourceSet, TensorView, Transfer, TransferReport, VerifyReport, Watcher, blocking,
};

fn is_shared<T: Send + Sync + Unpin + std::fmt::Debug + 'static>() {}
fn is_sent<T: Send>(_: &T) {}

#[test]
fn all_that_a_caller_holds_goes_to_any_thread() {
    is_shared::<Client>();
    is_shared::<Transfer>();
    is_shared::<Canceller>();
    is_shared::<Watcher>();
    is_shared::<Server>();
    is_shared::<ServerBuilder>();
    is_shared::<Embedded>();
    is_shared::<Checkpoint>();
    is_shared::<TensorView>();
    is_shared::<SourceSet>();
    is_shared::<Error>();
    is_shared::<SourceError>();
    is_shared::<(ErrorCode, Progress, PushOptions, TransferReport)>();
    is_shared::<(VerifyReport, CheckpointInfo, CheckpointName)>();
    is_shared::<(CheckpointStatus, CheckpointSummary)>();
    is_shared::<blocking::Client>();
    is_shared::<blocking::Transfer>();
    is_shared::<blocking::Server>();
    is_shared::<blocking::Serving>();
    is_shared::<blocking::Embedded>();
}

#[test]
fn what_is_no_port_is_refused_and_never_another_port() {
    for good in ["lab", "lab:1", "[::1]", "[::1]:65535"] {
        Client::new(good).unwrap();
    }
    for bad in ["lab:", "lab:x", "lab:0", "lab:65536", "lab:-1", "[::1]:x"] {
        let error = Client::new(bad).unwrap_err();
        assert!(matches!(error, Error::Usage(_)), "{bad}: {error}");
    }
}

#[test]
fn what_is_awaited_may_be_spawned() {
    let client = Client::new("localhost").unwrap();
    let name: CheckpointName = "a".parse().unwrap();
    is_sent(&client.list(""));
    is_sent(&client.describe(&name));
    is_sent(&client.status(&name));
    is_sent(&client.discard(&name));
    is_sent(&Server::builder("x").bind(([127, 0, 0, 1], 0).into()));
    is_sent(&Embedded::start("x", 1));
    fn serve(server: Server) -> impl Future<Output = Result<(), Error>> + Send {
        server.serve(std::future::pending())
    }
    fn wait(transfer: Transfer) -> impl Future<Output = Result<TransferReport, Error>> + Send {
        transfer.into_future()
    }
    let _ = (serve, wait);
}

#[test]
fn an_error_keeps_its_cause_and_its_class() {
    let temp = tempfile::tempdir().unwrap();
    let error: Error = SourceSet::open(&[temp.path().join("absent")], &Default::default())
        .unwrap_err()
        .into();
    assert_eq!(error.code(), ErrorCode::SourceMissing);
    let cause = error.source().unwrap();
    assert!(cause.is::<SourceError>() && cause.to_string().contains("absent"));

    // The file system's own error at the end of the chain.
    let file = temp.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error =
        blocking::Server::bind(Server::builder(&file), ([127, 0, 0, 1], 0).into()).unwrap_err();
    let cause = error.source().unwrap();
    assert!(cause.is::<std::io::Error>(), "{error:?}");
}
