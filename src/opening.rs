//! What a sender says first: the identity of a transfer and what its options ask for.

use crate::{
    options::PushOptions,
    plan::{CheckpointName, Digest16, EntryKind, digest_entries},
    protocol::{Layout, ManifestPromise, NpyDtype, Open, OutFormat},
    source::SourceSet,
};

/// The opening of a transfer whose entries are all known.
pub(crate) fn open_of_set(
    name: &CheckpointName,
    target: &str,
    source: &SourceSet,
    options: &PushOptions,
) -> Open {
    let entries_digest = digest_entries(source.entries().iter().map(|e| &e.header));
    Open {
        transfer_id: transfer_id(target, source, options),
        manifest: ManifestPromise::Complete {
            total_bytes: source.total_bytes(),
            entry_count: source.entries().len() as u64,
            entries_digest,
        },
        fingerprint: Some(fingerprint(source, entries_digest)),
        metadata: source.metadata().clone(),
        source_format: source.format().to_owned(),
        ..open_of(name, options)
    }
}

pub(crate) fn open_of_key(
    name: &CheckpointName,
    target: &str,
    key: &str,
    options: &PushOptions,
) -> Open {
    let mut hasher = blake3::Hasher::new_derive_key("tensorferry v1 open transfer");
    let layout = layout_word(options.layout);
    let mut field = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    for bytes in [target.as_bytes(), &machine_id(), key.as_bytes(), layout] {
        field(bytes);
    }
    shape_words(options, &mut field);
    Open {
        transfer_id: crate::plan::first_16(hasher.finalize()),
        source_format: "memory".to_owned(),
        ..open_of(name, options)
    }
}

/// What does not depend on the source.
fn open_of(name: &CheckpointName, options: &PushOptions) -> Open {
    Open {
        checkpoint: name.clone(),
        transfer_id: Digest16::default(),
        manifest: ManifestPromise::Open,
        fingerprint: None,
        codecs: options.codec.codecs(),
        chunk_len: options.chunk_len,
        commit_mode: options.commit_mode,
        layout: options.layout,
        out_format: options.out_format,
        container_header_len: 0,
        npy_dtype: options.npy_dtype,
        overwrite: options.overwrite,
        restart: options.restart,
        verify: options.verify,
        metadata: Default::default(),
        source_format: String::new(),
    }
}

/// Nothing, where files are as they always are.
fn shape_words(options: &PushOptions, field: &mut impl FnMut(&[u8])) {
    if options.out_format == OutFormat::Safetensors {
        field(b"out-format safetensors");
    }
    if options.npy_dtype == NpyDtype::Named {
        field(b"npy-dtype named");
    }
}

fn layout_word(layout: Layout) -> &'static [u8] {
    match layout {
        Layout::Named => b"named",
        Layout::Indexed => b"indexed",
    }
}

/// Derived, so that the sender keeps nothing on disk: the same command on the
/// same machine is the same transfer.
pub(crate) fn transfer_id(target: &str, source: &SourceSet, options: &PushOptions) -> Digest16 {
    let mut hasher = blake3::Hasher::new_derive_key("tensorferry v1 transfer");
    let mut field = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    field(target.as_bytes());
    field(&machine_id());
    for root in source.canonical_roots() {
        field(root.as_os_str().as_encoded_bytes());
    }
    field(layout_word(options.layout));
    let has_files = source
        .entries()
        .iter()
        .any(|e| e.header.kind == EntryKind::Blob);
    field(&[u8::from(has_files)]);
    shape_words(options, &mut field);
    // Nothing, where all is taken: such transfers are what they were before one could select.
    if !source.selection().is_empty() {
        field(source.selection());
    }
    crate::plan::first_16(hasher.finalize())
}

/// Over everything that would show a change. A source that may change without
/// showing it adds a nonce: what was published from it is recognised as long as
/// this push runs, and by no later one.
pub(crate) fn fingerprint(source: &SourceSet, entries_digest: Digest16) -> Digest16 {
    let mut hasher = blake3::Hasher::new_derive_key("tensorferry v1 fingerprint");
    hasher.update(&entries_digest);
    for state in source.states() {
        hasher.update(&state.key).update(&state.fingerprint);
    }
    if source.states().iter().any(|state| !state.settled) {
        let mut nonce = [0; 16];
        // Without random bytes the pushes of such a source look alike, which only
        // matters if it changes within its clock tick.
        let _ = getrandom::fill(&mut nonce);
        hasher.update(&nonce);
    }
    crate::plan::first_16(hasher.finalize())
}

/// What tells this machine from others: systemd's id, else the host name.
pub(crate) fn machine_id() -> Vec<u8> {
    let id = std::fs::read("/etc/machine-id").unwrap_or_default();
    if !id.is_empty() {
        return id;
    }
    rustix::system::uname().nodename().to_bytes().to_vec()
}
