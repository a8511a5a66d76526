//! Compiles the two protobuf schemas without needing a `protoc` binary.

use std::{env, error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    let wire = "proto/tensorferry/v1/ferry.proto";
    let journal = "proto/tensorferry/journal/v1/journal.proto";
    println!("cargo:rerun-if-changed=proto");

    let out_dir = PathBuf::from(env::var("OUT_DIR")?);
    let files = protox::compile([wire], ["proto"])?;
    fs::write(
        out_dir.join("ferry_descriptor.bin"),
        prost_types_bytes(&files),
    )?;
    tonic_prost_build::configure()
        .bytes(".tensorferry.v1")
        .compile_fds(files)?;

    let files = protox::compile([journal], ["proto"])?;
    tonic_prost_build::configure()
        .bytes(".tensorferry.journal.v1")
        .compile_fds(files)?;
    Ok(())
}

/// The descriptor set as bytes, for the reflection service.
fn prost_types_bytes(files: &prost_types::FileDescriptorSet) -> Vec<u8> {
    use protox::prost::Message as _;
    files.encode_to_vec()
}
