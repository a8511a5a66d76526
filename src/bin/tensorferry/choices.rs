//! Words that flags choose between, and what each means to the library.

use clap::ValueEnum;
use tensorferry::{
    ReadMode, WriteMode,
    format::codec::CodecChoice,
    measure::rehearsal::Rehearsal,
    protocol::{CommitMode, Layout, NpyDtype, OutFormat},
};

/// How chunks get into their files.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum WriteArg {
    /// Whichever is cheaper: pwrite
    Auto,
    /// Written from the buffers of the connection
    Pwrite,
    /// Copied into a map of the file
    Map,
}

impl From<WriteArg> for WriteMode {
    fn from(write: WriteArg) -> WriteMode {
        match write {
            WriteArg::Auto => WriteMode::Auto,
            WriteArg::Pwrite => WriteMode::Pwrite,
            WriteArg::Map => WriteMode::Map,
        }
    }
}

/// File names on the receiver.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum LayoutArg {
    /// After the tensor: model.norm.weight.npy
    Named,
    /// After its number: weight_0.npy
    Indexed,
}

impl From<LayoutArg> for Layout {
    fn from(layout: LayoutArg) -> Layout {
        match layout {
            LayoutArg::Named => Layout::Named,
            LayoutArg::Indexed => Layout::Indexed,
        }
    }
}

/// What the receiver writes.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum OutFormatArg {
    /// A .npy file for each tensor
    Npy,
    /// One model.safetensors for all
    Safetensors,
}

impl From<OutFormatArg> for OutFormat {
    fn from(format: OutFormatArg) -> OutFormat {
        match format {
            OutFormatArg::Npy => OutFormat::Npy,
            OutFormatArg::Safetensors => OutFormat::Safetensors,
        }
    }
}

/// Element types in `.npy` headers.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum NpyDtypeArg {
    /// As so many bytes (<V2, |V1): any numpy opens them
    Bytes,
    /// By name (bfloat16): `import ml_dtypes` first
    Named,
}

impl From<NpyDtypeArg> for NpyDtype {
    fn from(npy_dtype: NpyDtypeArg) -> NpyDtype {
        match npy_dtype {
            NpyDtypeArg::Bytes => NpyDtype::Bytes,
            NpyDtypeArg::Named => NpyDtype::Named,
        }
    }
}

/// How chunks are compressed.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum CodecArg {
    /// LZ4 where a sample of the chunk shrinks, else as they are
    Auto,
    /// Not at all
    None,
    /// LZ4 wherever that is smaller
    Lz4,
}

impl From<CodecArg> for CodecChoice {
    fn from(codec: CodecArg) -> CodecChoice {
        match codec {
            CodecArg::Auto => CodecChoice::Auto,
            CodecArg::None => CodecChoice::None,
            CodecArg::Lz4 => CodecChoice::Lz4,
        }
    }
}

/// How the source is read.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum ReadArg {
    /// Whichever is cheaper: map
    Auto,
    /// Sent out of a map of the file; a file that is cut meanwhile is an error
    Map,
    /// Read into buffers first
    Pread,
}

impl From<ReadArg> for ReadMode {
    fn from(read: ReadArg) -> ReadMode {
        match read {
            ReadArg::Auto => ReadMode::Auto,
            ReadArg::Map => ReadMode::Map,
            ReadArg::Pread => ReadMode::Pread,
        }
    }
}

/// How often written bytes become durable.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum DurabilityArg {
    /// Every 8 MiB
    Strict,
    /// At 128 MiB, half a second or 512 files
    Group,
    /// Once before publishing, and when the connection ends
    End,
    /// Never: a loss of power may cost everything
    None,
}

impl From<DurabilityArg> for CommitMode {
    fn from(durability: DurabilityArg) -> CommitMode {
        match durability {
            DurabilityArg::Strict => CommitMode::Strict,
            DurabilityArg::Group => CommitMode::Group,
            DurabilityArg::End => CommitMode::End,
            DurabilityArg::None => CommitMode::None,
        }
    }
}

/// What a rehearsal leaves out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RehearsalArg {
    /// Files
    Memory,
    /// Files and checksums
    MemoryUnchecked,
    /// Checksums
    FilesUnchecked,
}

impl RehearsalArg {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            RehearsalArg::Memory => "memory",
            RehearsalArg::MemoryUnchecked => "memory-unchecked",
            RehearsalArg::FilesUnchecked => "files-unchecked",
        }
    }
}

impl From<RehearsalArg> for Rehearsal {
    fn from(what: RehearsalArg) -> Rehearsal {
        match what {
            RehearsalArg::Memory => Rehearsal::Memory,
            RehearsalArg::MemoryUnchecked => Rehearsal::MemoryUnchecked,
            RehearsalArg::FilesUnchecked => Rehearsal::FilesUnchecked,
        }
    }
}
