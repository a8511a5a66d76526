//! What is in a zip archive.

use super::view::{Refusal, View};
use super::zip::{self, Archive};
use super::{SourceError, files::OpenFile, keras, sniff::Kind, torch};

/// The kind of a file that begins like a zip archive.
pub(super) fn kind(file: &OpenFile) -> Result<Kind, SourceError> {
    match zip::read(View::file(file)) {
        Ok(archive) => Ok(kind_of(&archive)),
        Err(Refusal::Source(error)) => Err(error),
        // Said by whoever wants it to be a checkpoint.
        Err(_) => Ok(Kind::Zip),
    }
}

fn kind_of(archive: &Archive) -> Kind {
    if torch::is_torch(archive) {
        return Kind::Torch;
    }
    if keras::is_keras(archive) {
        return Kind::Keras;
    }
    let mut names = archive.members.iter().map(|member| &member.name);
    if names.any(|name| name.ends_with(".npy")) || archive.members.is_empty() {
        Kind::Npz
    } else {
        Kind::Zip
    }
}

/// Why an archive is no checkpoint.
pub(super) fn why_not(file: &OpenFile) -> SourceError {
    match zip::read(View::file(file)) {
        Ok(archive) => SourceError::Unknown {
            path: file.path().to_owned(),
            looked_at: format!(
                "it is a zip archive of {} members: no .npy file, data.pkl or model.weights.h5 among them",
                archive.members.len()
            ),
        },
        Err(refusal) => refusal.of(file.path()),
    }
}
