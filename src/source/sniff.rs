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
    let kind = kind(&file)?;
    if let Some(why) = part_of_more(path, &file, kind)? {
        let path = path.to_owned();
        return Err(SourceError::Choice { path, why });
    }
    match kind {
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
        Kind::Other => {
            check_extension(path, &file)?;
            if tensorflow::is_index_name(path) {
                return Err(SourceError::malformed(path, tensorflow::table::NO_END));
            }
            Err(SourceError::Unknown {
                path: path.to_owned(),
                looked_at: looks(&file)?,
            })
        }
    }
}

/// What to name instead of a file that says nothing by itself, but belongs to a checkpoint.
fn part_of_more(path: &Path, file: &OpenFile, kind: Kind) -> Result<Option<String>, SourceError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let begins = |magic: &[u8]| Ok::<_, SourceError>(file.prefix(magic.len() as u64)? == magic);
    let text = match (&name[..], kind) {
        // One part alone is a file of PyTorch, of a piece of a tensor.
        (name, Kind::Zip | Kind::Torch) if name.ends_with(".distcp") => {
            "it is part of a torch.distributed checkpoint: name the folder"
        }
        (".metadata", Kind::Other) if begins(b"\x80")? => {
            "it describes a torch.distributed checkpoint: name the folder"
        }
        ("saved_model.pb", Kind::Other) => "it is part of a TensorFlow SavedModel: name the folder",
        ("checkpoint", Kind::Other) if begins(b"model_checkpoint_path")? => {
            "it says which TensorFlow checkpoint of the folder is the latest: name the folder, \
             or a checkpoint without an ending"
        }
        (name, Kind::Other) if name.ends_with(".meta") => {
            let prefix = path.with_extension("");
            if tensorflow::index_of_prefix(&prefix).is_none() {
                return Ok(None);
            }
            return Ok(Some(format!(
                "it is the graph beside a TensorFlow checkpoint: name the checkpoint, {}",
                prefix.display()
            )));
        }
        _ => return Ok(None),
    };
    Ok(Some(text.to_owned()))
}

/// A file that is no checkpoint, though its extension says that it is one.
pub(super) fn check_extension(path: &Path, file: &OpenFile) -> Result<(), SourceError> {
    match path.extension().and_then(|e| e.to_str()) {
        Some("npz" | "pt" | "pth" | "keras") if zip::sniff(&file.prefix(4)?) => {
            Err(archive::why_not(file))
        }
        Some("onnx") if onnx::begins(file)? => Err(onnx::why_not(file)),
        Some(
            extension @ ("npy" | "npz" | "safetensors" | "keras" | "h5" | "hdf5" | "gguf" | "onnx"),
        ) => {
            let known = match extension {
                "safetensors" => safetensors::bad_length(&file.prefix(PREFIX_LEN)?),
                _ => None,
            };
            let what = match known {
                Some(what) => what,
                None => looks(file)?,
            };
            let why = format!("it is named .{extension}, but {what}");
            Err(SourceError::malformed(path, why))
        }
        _ if tensorflow::is_index_of_data(path) => {
            Err(SourceError::malformed(path, tensorflow::table::NO_END))
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
