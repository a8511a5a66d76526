//! Keyword arguments as options of the library.

use pyo3::{exceptions::PyValueError, prelude::*};
use std::path::PathBuf;
use tensorferry::{
    CommitMode, Error, Lanes, Layout, NpyDtype, OutFormat, PullOptions, PushOptions, SourceOptions,
    format::codec::CodecChoice,
};

/// All that `_transfer.py` gathers, by name.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct Options {
    include: Vec<String>,
    exclude: Vec<String>,
    trainable: bool,
    rename: Vec<String>,
    first: Vec<String>,
    codec: String,
    lanes: Option<u32>,
    overwrite: bool,
    restart: bool,
    verify: bool,
    durability: String,
    retries: Option<u32>,
    bwlimit: Option<String>,
    layout: String,
    out_format: String,
    npy_dtype: String,
    max_bytes: Option<u64>,
}

fn unknown<T>(what: &str, found: &str, known: &str) -> PyResult<T> {
    Err(PyValueError::new_err(format!(
        "{what} is {found:?}: one of {known} is possible"
    )))
}

impl Options {
    /// How it travels.
    pub(crate) fn push(&self) -> PyResult<PushOptions> {
        let mut options = PushOptions::default();
        options.codec = match self.codec.as_str() {
            "auto" => CodecChoice::Auto,
            "none" => CodecChoice::None,
            "lz4" => CodecChoice::Lz4,
            other => return unknown("codec", other, "auto, none, lz4"),
        };
        options.commit_mode = match self.durability.as_str() {
            "strict" => CommitMode::Strict,
            "group" => CommitMode::Group,
            "end" => CommitMode::End,
            "none" => CommitMode::None,
            other => return unknown("durability", other, "strict, group, end, none"),
        };
        options.layout = match self.layout.as_str() {
            "named" => Layout::Named,
            "indexed" => Layout::Indexed,
            other => return unknown("layout", other, "named, indexed"),
        };
        options.out_format = match self.out_format.as_str() {
            "npy" => OutFormat::Npy,
            "safetensors" => OutFormat::Safetensors,
            other => return unknown("out_format", other, "npy, safetensors"),
        };
        options.npy_dtype = match self.npy_dtype.as_str() {
            "bytes" => NpyDtype::Bytes,
            "named" => NpyDtype::Named,
            other => return unknown("npy_dtype", other, "bytes, named"),
        };
        options.lanes = self.lanes.map_or(Lanes::Auto, Lanes::Fixed);
        if let Some(retries) = self.retries {
            options.retries = retries;
        }
        if let Some(text) = &self.bwlimit {
            let limit = text.parse();
            options.rate_limit = limit.map_err(PyValueError::new_err::<String>)?;
        }
        (options.overwrite, options.restart) = (self.overwrite, self.restart);
        options.verify = self.verify;
        options.first = self.first.clone();
        Ok(options)
    }

    /// What is pulled, and how it travels.
    pub(crate) fn pull(&self) -> PyResult<PullOptions> {
        let mut options = PullOptions::default();
        options.transfer = self.push()?;
        (options.include, options.exclude) = (self.include.clone(), self.exclude.clone());
        options.max_bytes = self.max_bytes;
        Ok(options)
    }

    /// What is taken of a source.
    pub(crate) fn source(&self) -> PyResult<SourceOptions> {
        let mut options = SourceOptions::default();
        (options.include, options.exclude) = (self.include.clone(), self.exclude.clone());
        options.trainable = self.trainable;
        for text in &self.rename {
            let rename = text.parse();
            let bad = |why: String| PyValueError::new_err(format!("rename {text:?}: {why}"));
            options.rename.push(rename.map_err(bad)?);
        }
        Ok(options)
    }
}

/// A source opened on a thread that may block.
pub(crate) async fn open_source(
    paths: Vec<PathBuf>,
    options: SourceOptions,
) -> Result<tensorferry::SourceSet, Error> {
    let opened =
        tokio::task::spawn_blocking(move || tensorferry::SourceSet::open(&paths, &options));
    let opened = opened.await.map_err(|e| Error::Bug(e.to_string()))?;
    Ok(opened?)
}
