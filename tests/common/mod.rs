//! A foreign peer for tests: it speaks the generated messages by hand through
//! stock tonic, so nothing of the product's own client stands between a test and
//! the server.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "each test crate uses its own part of this, and a helper of a test may panic"
)]

mod frames;
pub(crate) mod product;
pub(crate) mod raw;
pub(crate) mod relay;
pub(crate) mod session;
pub(crate) mod silent;
pub(crate) mod torn;

pub(crate) use frames::*;
pub(crate) use session::Session;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};
use tensorferry::{
    Client, Server, ServerBuilder,
    wire::pb::{self, ferry_client::FerryClient},
};
use tokio::{sync::oneshot, task::JoinHandle};
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt;

/// Nothing in a test may take this long; only a hang does.
pub(crate) const HANG: Duration = Duration::from_secs(60);

/// How a call ended: `Ok`, or a code with the reason of its ErrorInfo.
pub(crate) type Ending = Result<(), (Code, String)>;

/// A real server on a port of its own.
pub(crate) struct TestServer {
    pub(crate) address: SocketAddr,
    pub(crate) root: PathBuf,
    stop: Option<oneshot::Sender<()>>,
    serving: JoinHandle<Result<(), tensorferry::Error>>,
}

impl TestServer {
    /// With the smallest grid, so that small tensors have many cells.
    pub(crate) async fn start(root: &Path) -> Self {
        Self::with_budget(root, 16 << 20).await
    }

    pub(crate) async fn with_budget(root: &Path, budget_bytes: u64) -> Self {
        Self::with(root, |builder| builder.budget_bytes(budget_bytes)).await
    }

    /// With settings of the test's own.
    pub(crate) async fn with(
        root: &Path,
        change: impl FnOnce(ServerBuilder) -> ServerBuilder,
    ) -> Self {
        Self::bind(root, SocketAddr::from(([127, 0, 0, 1], 0)), change).await
    }

    /// Where another server was before.
    pub(crate) async fn start_at(root: &Path, address: SocketAddr) -> Self {
        Self::bind(root, address, |builder| builder).await
    }

    async fn bind(
        root: &Path,
        address: SocketAddr,
        change: impl FnOnce(ServerBuilder) -> ServerBuilder,
    ) -> Self {
        let builder = Server::builder(root)
            .chunk_len(CHUNK as u32)
            .budget_bytes(16 << 20);
        let server = change(builder)
            .bind(address)
            .await
            .expect("the server starts");
        let address = server.local_addr();
        let (stop, stopped) = oneshot::channel();
        let serving = tokio::spawn(server.serve(async {
            let _ = stopped.await;
        }));
        TestServer {
            address,
            root: root.to_owned(),
            stop: Some(stop),
            serving,
        }
    }

    /// Stops it as a service manager would.
    pub(crate) async fn stop(mut self) {
        let _ = self.stop.take().unwrap().send(());
        (&mut self.serving)
            .await
            .unwrap()
            .expect("the server stops in order");
    }

    pub(crate) async fn ferry(&self) -> FerryClient<Channel> {
        FerryClient::connect(format!("http://{}", self.address))
            .await
            .expect("the server listens")
    }

    /// The product's own client.
    pub(crate) fn client(&self) -> Client {
        Client::new(&self.address.to_string()).unwrap()
    }

    /// Opens a call whose first frame this is.
    pub(crate) async fn call(&self, first: pb::SenderFrame) -> Session {
        let mut session = Session::new(self.ferry().await).await;
        session.send(first).await;
        session
    }

    /// Opens a session and waits until the receiver accepts it.
    pub(crate) async fn open(&self, open: pb::SenderOpen) -> Session {
        let mut session = self.call(frame_open(open)).await;
        session.until(|s| s.accept.is_some()).await;
        session
    }

    /// Opens a session that the receiver refuses.
    pub(crate) async fn refusal(&self, open: pb::SenderOpen) -> Ending {
        let mut session = self.call(frame_open(open)).await;
        let ending = session.end().await;
        assert!(
            session.accept.is_none(),
            "it was accepted first: {ending:?}"
        );
        ending
    }

    /// A whole push in one session, from Open to Done.
    pub(crate) async fn push(&self, open: pb::SenderOpen, load: &Load) -> pb::Done {
        let mut session = self.open(open).await;
        session.announce(load).await;
        session.send_wanted(load).await;
        session.finish(load).await
    }

    /// The server is alive and well: another push goes through.
    pub(crate) async fn serves_others(&self) {
        let load = Load::of(vec![tensor("other", 2 * CHUNK + 5)]);
        let mut open = load.open("still.serving", [0xee; 16]);
        open.overwrite = true;
        // The fingerprint differs every time, or nothing would be sent.
        open.fingerprint = Vec::new().into();
        self.push(open, &load).await;
        self.assert_landed("still.serving", &load);
    }

    /// Nothing lies under the final name and no file is left open; what is in
    /// staging can be resumed by whoever pushed it.
    pub(crate) async fn assert_unpublished(&self, name: &str) {
        assert!(
            !self.root.join(name).join("manifest.json").exists(),
            "{name} was published"
        );
        self.assert_quiet().await;
        self.serves_others().await;
    }

    /// Waits until no descriptor into the root but those of folders is open. The
    /// status can overtake the last worker that drops its handle.
    pub(crate) async fn assert_quiet(&self) {
        let root = self.root.canonicalize().unwrap();
        for _ in 0..500 {
            if open_files(&root).is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("left open: {:?}", open_files(&root));
    }

    /// What the server says of an unfinished transfer.
    pub(crate) async fn status(&self, name: &str) -> Result<pb::StatusResponse, (Code, String)> {
        let request = pb::StatusRequest {
            checkpoint: name.to_owned(),
        };
        let answer = self.ferry().await.status(request).await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(|s| code_and_reason(&s))
    }

    /// Where a published entry lies.
    pub(crate) fn landed_file(&self, name: &str, entry: &str) -> PathBuf {
        let folder = self.root.join(name);
        let manifest = manifest(&folder);
        let rows = ["tensors", "files"]
            .map(|list| manifest[list].as_array().unwrap().clone())
            .concat();
        let row = rows.iter().find(|row| row["name"] == entry);
        folder.join(
            row.unwrap_or_else(|| panic!("{entry} is in the manifest"))["file"]
                .as_str()
                .unwrap(),
        )
    }

    /// The published bytes of an entry, without the `.npy` header.
    pub(crate) fn landed(&self, name: &str, entry: &str, len: usize) -> Vec<u8> {
        let bytes = std::fs::read(self.landed_file(name, entry)).unwrap();
        bytes[bytes.len() - len..].to_vec()
    }

    /// Exactly these entries are published, byte for byte.
    pub(crate) fn assert_landed(&self, name: &str, load: &Load) {
        let manifest = manifest(&self.root.join(name));
        let count = ["tensors", "files"].map(|list| manifest[list].as_array().unwrap().len());
        assert_eq!(count.iter().sum::<usize>(), load.parts.len());
        for part in &load.parts {
            let found = self.landed(name, &part.entry.name, part.bytes.len());
            assert!(
                found == part.bytes,
                "the bytes of {} differ",
                part.entry.name
            );
        }
    }

    /// The staging folder of the only unfinished transfer.
    pub(crate) fn staging(&self) -> PathBuf {
        let transfers = self.root.join(".tensorferry/transfers");
        let mut found = std::fs::read_dir(transfers)
            .unwrap()
            .map(|e| e.unwrap().path());
        let only = found.next().expect("there is a staging");
        assert!(found.next().is_none(), "there is one staging only");
        only
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// Code and reason of a status. Every refusal carries a reason.
pub(crate) fn code_and_reason(status: &Status) -> (Code, String) {
    let info = status.get_details_error_info();
    let info = info.unwrap_or_else(|| panic!("no ErrorInfo: {status:?}"));
    assert_eq!(info.domain, "tensorferry");
    (status.code(), info.reason)
}

/// The ending that a test expects.
pub(crate) fn refused(code: Code, reason: &str) -> Ending {
    Err((code, reason.to_owned()))
}

/// The manifest of a published folder.
pub(crate) fn manifest(folder: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(folder.join("manifest.json")).unwrap()).unwrap()
}

/// Every path below a folder, with its size, so that any change shows.
pub(crate) fn tree(folder: &Path) -> BTreeMap<PathBuf, u64> {
    let mut out = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let metadata = std::fs::symlink_metadata(&path).unwrap();
        if metadata.is_dir() {
            out.extend(tree(&path));
            out.insert(path, 0);
        } else {
            out.insert(path, metadata.size());
        }
    }
    out
}

/// Files below a folder that this process has open.
fn open_files(root: &Path) -> Vec<PathBuf> {
    let fds = std::fs::read_dir("/proc/self/fd").unwrap();
    let targets = fds.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok());
    targets
        .filter(|t| t.starts_with(root) && t != root)
        .collect()
}
