//! However the bytes get into the files, they are the same bytes.

mod common;

use common::{product::*, *};
use std::net::SocketAddr;
use tensorferry::{Checkpoint, Client, Server, WriteMode};

#[tokio::test]
async fn chunks_land_the_same_by_pwrite_and_by_map() {
    let dir = source_dir("s01");
    let load = Load::of_source(&open_source(&dir));
    for mode in [WriteMode::Auto, WriteMode::Pwrite, WriteMode::Map] {
        let temp = tempfile::tempdir().unwrap();
        let server = Server::builder(temp.path())
            .chunk_len(CHUNK as u32)
            .write_mode(mode)
            .bind(SocketAddr::from(([127, 0, 0, 1], 0)))
            .await
            .unwrap();
        let client = Client::new(&server.local_addr().to_string()).unwrap();
        tokio::spawn(server.serve(std::future::pending()));
        let source = open_source(&dir);
        client
            .push(source, &name("model"), defaults())
            .await
            .unwrap();
        // Every checksum of the manifest is that of the bytes on disk.
        let checkpoint = Checkpoint::open(temp.path().join("model")).unwrap();
        let report = checkpoint.verify(|_| {}).unwrap();
        assert!(report.damages.is_empty(), "{mode:?}: {report:?}");
        let manifest = manifest(&temp.path().join("model"));
        for part in &load.parts {
            let rows = ["tensors", "files"].map(|list| manifest[list].as_array().unwrap().clone());
            let row = rows
                .concat()
                .into_iter()
                .find(|r| r["name"] == part.entry.name);
            let file = temp
                .path()
                .join("model")
                .join(row.unwrap()["file"].as_str().unwrap());
            let bytes = std::fs::read(file).unwrap();
            assert!(
                bytes.ends_with(&part.bytes),
                "{mode:?}: {}",
                part.entry.name
            );
        }
    }
}
