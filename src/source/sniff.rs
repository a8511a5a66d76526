//! Tells formats apart by the first bytes of a file.

use super::files::OpenFile;
use super::{
    SourceError, archive, builder::Builder, gguf, hdf5, keras, npy, npz, onnx, safetensors,
    sharded, tensorflow, torch, zip,
};
use crate::format;
use std::path::Path;

/// Bytes looked at: a page, as headers of safetensors may begin with spaces.
const PREFIX_LEN: u64 = 4096;

/// What a file turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Npy,
    Safetensors,
    Npz,
    Torch,
    Keras,
    /// Begins at this byte.
    Hdf5(u64),
    Gguf,
    Onnx,
    /// The index of a TensorFlow checkpoint.
    Tensorflow,
    /// An archive of something else, or a damaged one.
    Zip,
    Other,
}

/// The kind of a file.
pub(super) fn kind(file: &OpenFile) -> Result<Kind, SourceError> {
    let prefix = file.prefix(PREFIX_LEN)?;
    Ok(if prefix.starts_with(format::npy::MAGIC) {
        Kind::Npy
    } else if prefix.starts_with(gguf::MAGIC) {
        Kind::Gguf
    } else if safetensors::sniff(&prefix) {
        Kind::Safetensors
    } else if zip::sniff(&prefix) {
        archive::kind(file)?
    } else if let Some(start) = hdf5::sniff(file)? {
        Kind::Hdf5(start)
    } else if tensorflow::is_index(file)? {
        Kind::Tensorflow
    } else if onnx::is_model(file)? {
        Kind::Onnx
    } else {
        Kind::Other
    })
}

/// Loads one file that was named by the user.
pub(super) fn load_file(path: &Path, builder: &mut Builder) -> Result<(), SourceError> {
    let file = OpenFile::open(path)?;
    match kind(&file)? {
        Kind::Npy => npy::load(path, &file, builder),
        Kind::Safetensors => safetensors::load(&file, builder),
        Kind::Npz => npz::load(&file, builder),
        Kind::Torch => torch::load(&file, builder),
        Kind::Keras => keras::load(&file, builder),
        Kind::Hdf5(start) => hdf5::load(&file, start, builder),
        Kind::Gguf => gguf::load(&file, builder),
        Kind::Onnx => onnx::load(path, &file, builder),
        Kind::Tensorflow => tensorflow::load(path, &file, builder),
        Kind::Zip => Err(archive::why_not(&file)),
        Kind::Other if keras::is_index_name(path) => keras::load_index(path, builder).map(drop),
        Kind::Other if sharded::is_index_name(path) => sharded::load_index(path, builder),
        Kind::Other => Err(SourceError::Unknown {
            path: path.to_owned(),
            looked_at: looks(&file)?,
        }),
    }
}

/// A file that is no checkpoint, though its extension says that it is one.
pub(super) fn check_extension(path: &Path, file: &OpenFile) -> Result<(), SourceError> {
    match path.extension().and_then(|e| e.to_str()) {
        Some("npz" | "pt" | "pth" | "keras") if zip::sniff(&file.prefix(4)?) => {
            Err(archive::why_not(file))
        }
        Some(extension @ ("npy" | "npz" | "safetensors" | "keras" | "h5" | "hdf5")) => {
            Err(SourceError::malformed(
                path,
                format!("it is named .{extension}, but {}", looks(file)?),
            ))
        }
        _ => Ok(()),
    }
}

/// The first bytes of a file, in words.
fn looks(file: &OpenFile) -> Result<String, SourceError> {
    let prefix = file.prefix(512)?;
    if prefix.is_empty() {
        return Ok("it is empty".to_owned());
    }
    let known: [(&[u8], &str); 4] = [
        (
            b"version https://git-lfs",
            "it is a git lfs pointer instead of the content",
        ),
        (b"PK\x03\x04", "it is a zip archive"),
        (
            b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19",
            "it is a pytorch file from before 1.6: torch.save(torch.load(…), …) writes one that can be read",
        ),
        (b"\x80\x02", "it is a python pickle"),
    ];
    let is_tar = prefix.get(257..262) == Some(b"ustar");
    let hint = known
        .iter()
        .find(|(magic, _)| prefix.starts_with(magic))
        .map_or("", |(_, n)| n);
    let name = file
        .path()
        .file_name()
        .unwrap_or_default()
        .to_string_lossy();
    let hint = match hint {
        "" if is_tar => {
            "it is a tar archive: if pytorch wrote it, load and save it again with a current version"
        }
        "" if tensorflow::is_data_name(&name) => {
            "it is data of a TensorFlow checkpoint by its name: name its .index, or both without their endings"
        }
        hint => hint,
    };
    let comma = if hint.is_empty() { "" } else { ", " };
    let hex: Vec<String> = prefix.iter().take(8).map(|b| format!("{b:02x}")).collect();
    Ok(format!(
        "its first bytes are {}{comma}{hint}",
        hex.join(" ")
    ))
}
