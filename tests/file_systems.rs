//! What each file system offers is found out by its type and said in Accept, in the receipt
//! and by the server. Mounting needs root and the tools; what cannot be mounted here is
//! printed and left out.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a helper of a test may panic, and says what it left out"
)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};
use tensorferry::{Checkpoint, Client, Durability, PushOptions, Server, SourceSet, WriteMode};

/// A mount that goes with it.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        run("umount", &["-l", self.0.to_str().unwrap()]);
    }
}

fn run(program: &str, arguments: &[&str]) -> bool {
    let done = Command::new(program).args(arguments).output();
    done.is_ok_and(|output| output.status.success())
}

/// A file system of its own in a file.
fn mount_image(dir: &Path, kind: &str, force: &str) -> Option<Mounted> {
    let (image, target) = (dir.join("image"), dir.join("mnt"));
    fs::create_dir(&target).unwrap();
    let file = fs::File::create(&image).unwrap();
    file.set_len(400 << 20).unwrap();
    let (image, shown) = (image.to_str().unwrap(), target.to_str().unwrap());
    let made = run(&format!("mkfs.{kind}"), &[force, "-q", image])
        || run(&format!("mkfs.{kind}"), &[force, image]);
    (made && run("mount", &["-o", "loop", image, shown])).then(|| Mounted(target))
}

fn mount(dir: &Path, kind: &str, options: &str) -> Option<Mounted> {
    let target = dir.join("mnt");
    fs::create_dir(&target).unwrap();
    let shown = target.to_str().unwrap();
    run("mount", &["-t", kind, "-o", options, kind, shown]).then(|| Mounted(target))
}

/// An overlay over two folders of a file system that can carry one.
fn mount_overlay(dir: &Path, options: &str) -> Option<Mounted> {
    for layer in ["lower", "upper", "work"] {
        fs::create_dir(dir.join(layer)).unwrap();
    }
    let at = |layer: &str| dir.join(layer).display().to_string();
    let (lower, upper, work) = (at("lower"), at("upper"), at("work"));
    let layers = format!("lowerdir={lower},upperdir={upper},workdir={work}{options}");
    mount(dir, "overlay", &layers)
}

/// Pushes into a folder there, in both ways of writing.
async fn check(kind: &str, root: &Path, durability: Durability) {
    let source = tempfile::tempdir().unwrap();
    let data: Vec<u8> = (0..700_000u32).map(|i| (i * 7 % 251) as u8).collect();
    let header = tensorferry::format::npy::encode_header("|u1", false, &[data.len() as u64]);
    fs::write(source.path().join("w.npy"), [header, data.clone()].concat()).unwrap();
    for (name, mode) in [("auto", WriteMode::Auto), ("map", WriteMode::Map)] {
        let server = Server::builder(root.join("root")).write_mode(mode);
        let server = server.bind(([127, 0, 0, 1], 0).into()).await.unwrap();
        assert_eq!(
            (server.file_system(), server.durability()),
            (kind, durability)
        );
        let client = Client::new(&server.local_addr().to_string()).unwrap();
        let serving = tokio::spawn(server.serve(std::future::pending()));
        let set = SourceSet::open(&[source.path().to_owned()], &Default::default()).unwrap();
        let mut options = PushOptions::default();
        options.chunk_len = Some(256 << 10);
        let transfer = client.push(set, &name.parse().unwrap(), options);
        let watcher = transfer.watcher();
        let report = transfer.await.unwrap();
        assert_eq!(report.durability, durability, "{kind}, in the receipt");
        assert_eq!(
            watcher.progress().durability,
            Some(durability),
            "{kind}, in Accept"
        );
        let landed = Checkpoint::open(root.join("root").join(name)).unwrap();
        assert!(
            landed.tensor("w").unwrap().unwrap().bytes() == &data[..],
            "{kind}"
        );
        serving.abort();
        let _ = serving.await;
    }
    println!("{kind}: {}", durability.as_str());
}

#[tokio::test]
async fn each_file_system_says_what_durable_means_on_it() {
    let temp = tempfile::tempdir().unwrap();
    let dir = |name: &str| {
        let dir = temp.path().join(name);
        fs::create_dir(&dir).unwrap();
        dir
    };
    let disk = Durability::Disk;
    let memory = Durability::Process;
    for (kind, force) in [("ext4", "-F"), ("xfs", "-f"), ("btrfs", "-f")] {
        match mount_image(&dir(kind), kind, force) {
            Some(mounted) => check(kind, &mounted.0, disk).await,
            None => println!("not run: {kind} cannot be made or mounted here"),
        }
    }
    for kind in ["tmpfs", "ramfs"] {
        match mount(&dir(kind), kind, "mode=700") {
            Some(mounted) => check(kind, &mounted.0, memory).await,
            None => println!("not run: {kind} cannot be mounted here"),
        }
    }
    for (kind, options, durability) in [
        ("overlay", "", disk),
        ("overlay (volatile)", ",volatile", memory),
    ] {
        match mount_overlay(&dir(kind), options) {
            Some(mounted) => check(kind, &mounted.0, durability).await,
            None => println!("not run: {kind} cannot be mounted here"),
        }
    }
}
