//! HDF5: the datasets of a file and where their elements are.
//!
//! Superblocks 0 to 3, old and new groups, all layouts but virtual and external ones,
//! the filters gzip, shuffle and fletcher32. What refers to other objects or is of
//! variable length has no counterpart and is listed.

mod chunked;
mod chunks;
mod dense;
mod filter;
mod group;
mod header;
mod message;
mod reader;

use super::derived::Derived;
use super::view::{Refusal, View};
use super::{SourceError, builder::Builder, files::OpenFile};
use crate::format::Dtype;
use crate::plan::{EntryHeader, MAX_ALIASES, clip};
use chunked::{Chunked, Decoded, MAX_CHUNK_LEN};
use chunks::{Chunk, Grid};
use filter::Filter;
use group::Target;
use header::Message;
use message::{Layout, Type};
use reader::Reader;
use std::collections::HashMap;
use std::sync::Arc;

/// What every file begins with, there or at 512, 1024, 2048 and so on.
const SIGNATURE: &[u8; 8] = b"\x89HDF\r\n\x1a\n";
/// Deepest nesting of groups.
const MAX_DEPTH: usize = 64;
/// Most datasets left out that are told apart.
const MAX_TOLD: usize = 1000;
/// What a dataset takes in memory beside its name, in bytes.
const FOUND_BYTES: u64 = 400;

/// A dataset of numbers.
#[derive(Debug)]
pub(crate) struct Found {
    /// Named by its path, without the first slash.
    pub(crate) header: EntryHeader,
    /// Its other paths.
    pub(crate) aliases: Vec<String>,
    place: Place,
}

/// Where the elements are. Offsets count from the start of the file.
#[derive(Debug)]
enum Place {
    Run(u64),
    Chunks(Box<Chunks>),
    /// Never written.
    Fill(Vec<u8>),
}

#[derive(Debug)]
struct Chunks {
    base: u64,
    chunk: Vec<u64>,
    chunk_len: u64,
    counts: Vec<u64>,
    chunks: Vec<Chunk>,
    filters: Vec<Filter>,
    fill: Vec<u8>,
}

/// What is in a file.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    pub(crate) datasets: Vec<Found>,
    /// Path and reason of what is left out.
    pub(crate) skipped: Vec<(String, String)>,
    /// The attribute `name` of groups, by their paths.
    pub(super) names: HashMap<String, String>,
}

/// Whether a file is of this kind, from its first bytes; where it begins.
pub(super) fn sniff(file: &OpenFile) -> Result<Option<u64>, SourceError> {
    let mut at = 0;
    while at + SIGNATURE.len() as u64 <= file.byte_len() {
        if file.bytes_at(at, SIGNATURE.len() as u64)? == SIGNATURE {
            return Ok(Some(at));
        }
        at = (at * 2).max(512);
    }
    Ok(None)
}

/// Adds datasets to a checkpoint; those of one file share what was decoded.
pub(super) struct Adder {
    file_index: u32,
    decoded: Arc<Decoded>,
}

impl Adder {
    pub(super) fn new(file_index: u32) -> Self {
        Adder {
            file_index,
            decoded: Arc::default(),
        }
    }

    pub(super) fn add(
        &self,
        found: Found,
        source_name: Option<String>,
        is_optimizer: bool,
        builder: &mut Builder,
    ) -> Result<(), SourceError> {
        let index = self.file_index;
        let header = found.header;
        let shape = header.shape.clone();
        let make = |chunks: Chunks, item_len: u64| -> Arc<dyn Derived> {
            Arc::new(Chunked {
                file_index: index,
                base: chunks.base,
                item_len,
                shape,
                chunk: chunks.chunk,
                chunk_len: chunks.chunk_len,
                counts: chunks.counts,
                chunks: chunks.chunks,
                filters: chunks.filters,
                fill: chunks.fill,
                decoded: Arc::clone(&self.decoded),
            })
        };
        let len = u64::from(header.item_len());
        let entry = match found.place {
            Place::Run(offset) => builder.add(header, index, offset)?,
            Place::Chunks(chunks) => {
                builder.add_derived(header, vec![index], make(*chunks, len))?
            }
            Place::Fill(fill) => {
                let rank = header.shape.len();
                let chunks = Chunks {
                    base: 0,
                    chunk: header.shape.iter().map(|&len| len.max(1)).collect(),
                    chunk_len: header.byte_len,
                    counts: vec![1; rank],
                    chunks: Vec::new(),
                    filters: Vec::new(),
                    fill,
                };
                builder.add_derived(header, vec![index], make(chunks, len))?
            }
        };
        entry.source_name = source_name;
        entry.is_optimizer = is_optimizer;
        entry.aliases = found.aliases;
        Ok(())
    }
}

/// Adds all datasets of a file that begins at a place.
pub(super) fn load(file: &OpenFile, start: u64, builder: &mut Builder) -> Result<(), SourceError> {
    let read = || read(View::file(file).part(start, file.byte_len() - start)?);
    let contents = read().map_err(|refusal| refusal.of(file.path()))?;
    let first = file.bytes_at(start, (file.byte_len() - start).min(4096))?;
    let index = builder.files.add(file, &first)?;
    super::keras::add(vec![(contents, Adder::new(index))], builder)?;
    Ok(())
}

/// Reads all headers of a file.
pub(crate) fn read(view: View<'_>) -> Result<Contents, Refusal> {
    let (reader, root) = superblock(view)?;
    let mut walk = Walk {
        reader: &reader,
        contents: Contents::default(),
        seen: HashMap::new(),
    };
    walk.visit(root, "", 0)?;
    Ok(walk.contents)
}

/// The head of a file: how long its numbers are, what addresses count from, and the root.
fn superblock(view: View<'_>) -> Result<(Reader<'_>, u64), Refusal> {
    let head: [u8; 16] = view.array(0)?;
    if !head.starts_with(SIGNATURE) {
        return Err(view.malformed(0, "this is not the signature of HDF5"));
    }
    let version = head[8];
    let (offset_len, length_len, at) = match version {
        0 => (head[13], head[14], 24),
        1 => (head[13], head[14], 28),
        2 | 3 => (head[9], head[10], 12),
        _ => return Err(view.malformed(8, format!("version {version} of HDF5's superblock"))),
    };
    let reader = Reader::new(view, offset_len, length_len)?;
    let step = reader.offset_len as u64;
    let (base, root) = match version {
        0 | 1 => {
            let mut block = reader.block(at, 6 * step)?;
            let base = block.offset()?;
            block.skip(4 * reader.offset_len)?;
            (base, block.offset()?)
        }
        _ => {
            let mut block = reader.block(at, 4 * step)?;
            let base = block.offset()?;
            block.skip(2 * reader.offset_len)?;
            (base, block.offset()?)
        }
    };
    // Files behind a user block count from its end, which is where the view begins.
    let _ = base;
    Ok((reader, root))
}

struct Walk<'r, 'a> {
    reader: &'r Reader<'a>,
    contents: Contents,
    /// Objects by the place of their header: the number of the dataset, where it is one.
    seen: HashMap<u64, Option<usize>>,
}

impl Walk<'_, '_> {
    fn visit(&mut self, address: u64, path: &str, depth: usize) -> Result<(), Refusal> {
        let reader = self.reader;
        if depth > MAX_DEPTH {
            let why = format!("groups nested deeper than {MAX_DEPTH}");
            return Err(Refusal::unsupported(clip(path), why));
        }
        reader.keep(FOUND_BYTES + path.len() as u64, path)?;
        if let Some(&known) = self.seen.get(&address) {
            let found = known.and_then(|index| self.contents.datasets.get_mut(index));
            match found {
                Some(found) if found.aliases.len() < MAX_ALIASES => {
                    found.aliases.push(path.to_owned());
                }
                _ => self.skip(path, "a further name of something that is there already"),
            }
            return Ok(());
        }
        let messages = header::messages(reader, address)?;
        self.seen.insert(address, None);
        if let Some(links) = group::links(reader, &messages)? {
            if let Some(name) = text_attribute(reader, &messages, "name")? {
                self.contents.names.insert(path.to_owned(), name);
            }
            // Not kept while groups below are read.
            drop(messages);
            for link in links {
                let path = match path {
                    "" => link.name,
                    _ => format!("{path}/{}", link.name),
                };
                match link.target {
                    Target::Object(address) => self.visit(address, &path, depth + 1)?,
                    Target::Elsewhere => self.skip(&path, "a link by name, which is not followed"),
                }
            }
            return Ok(());
        }
        let has = |kind| messages.iter().any(|message| message.kind == kind);
        if !has(header::DATASPACE) || !has(header::LAYOUT) {
            // A type with a name of its own, or an empty group.
            return Ok(());
        }
        match self.dataset(&messages, path) {
            Ok(Some(found)) => {
                self.seen
                    .insert(address, Some(self.contents.datasets.len()));
                self.contents.datasets.push(found);
                Ok(())
            }
            Ok(None) => {
                self.skip(path, "an array without a value");
                Ok(())
            }
            Err(Refusal::Unsupported { why, .. }) => {
                self.skip(path, &why);
                Ok(())
            }
            Err(refusal) => Err(refusal),
        }
    }

    fn skip(&mut self, path: &str, why: &str) {
        if self.contents.skipped.len() < MAX_TOLD {
            self.contents.skipped.push((clip(path), why.to_owned()));
        }
    }

    fn dataset(&self, messages: &[Message<'_, '_>], path: &str) -> Result<Option<Found>, Refusal> {
        let reader = self.reader;
        let unsupported = |why: String| Refusal::unsupported(clip(path), why);
        let of_kind = |kind| messages.iter().find(|message| message.kind == kind);
        let content = |kind| of_kind(kind).map(|message| message.content.clone());
        if of_kind(header::EXTERNAL).is_some() {
            return Err(unsupported("its elements are in other files".to_owned()));
        }
        let Some(shape) = content(header::DATASPACE) else {
            return Ok(None);
        };
        let Some(shape) = message::dataspace(&mut { shape })? else {
            return Ok(None);
        };
        let (dtype, big_endian) = self.dtype(messages, path)?;
        let mut header = EntryHeader::tensor(path, dtype, &shape)?;
        header.big_endian = big_endian;
        if big_endian && !dtype.can_be_big_endian() {
            let why = format!("big-endian {dtype} has no counterpart in .npy");
            return Err(unsupported(why));
        }
        let item_len = u64::from(header.item_len());
        let mut fill = Vec::new();
        for message in messages {
            if matches!(message.kind, header::FILL | header::FILL_OLD) && !message.is_shared {
                let content = message.content.clone();
                let mut message = Message {
                    content,
                    ..*message
                };
                let found = message::fill(&mut message)?;
                if !found.is_empty() || message.kind == header::FILL {
                    fill = found;
                }
            }
        }
        if !fill.is_empty() && fill.len() as u64 != item_len {
            return Err(unsupported(format!("a fill value of {} bytes", fill.len())));
        }
        if fill.iter().all(|&byte| byte == 0) {
            fill.clear();
        }
        let filters = match of_kind(header::FILTERS) {
            Some(message) => message::filters(&mut message.content.clone())?,
            None => Vec::new(),
        };
        let Some(layout) = content(header::LAYOUT) else {
            return Ok(None);
        };
        let layout = message::layout(reader, &mut { layout })?;
        let place = match layout {
            _ if header.byte_len == 0 => Place::Run(0),
            Layout::Compact { offset, len } if len == header.byte_len => {
                Place::Run(reader.view.absolute(offset))
            }
            Layout::Compact { offset, len } => {
                let why = format!(
                    "{len} bytes of {:?} in its header, not {}",
                    clip(path),
                    header.byte_len
                );
                return Err(reader.view.malformed(offset, why));
            }
            Layout::Contiguous { address: None } => Place::Fill(fill),
            Layout::Contiguous {
                address: Some(address),
            } => {
                reader.view.part(address, header.byte_len)?;
                Place::Run(reader.view.absolute(address))
            }
            Layout::Chunked { index, chunk } => {
                let (chunk, item) = chunk.split_at(chunk.len().saturating_sub(1));
                if chunk.len() != shape.len() || item != [item_len] || chunk.contains(&0) {
                    let why = format!("chunks of {chunk:?} for {shape:?} of {:?}", clip(path));
                    return Err(reader.view.malformed(0, why));
                }
                let chunk_len = chunk
                    .iter()
                    .try_fold(item_len, |n, &len| n.checked_mul(len));
                let Some(chunk_len) = chunk_len.filter(|len| *len < 1 << 40) else {
                    return Err(unsupported(format!("chunks of {chunk:?} elements")));
                };
                if let Some(Filter::Unknown(id)) = filters
                    .iter()
                    .find(|filter| matches!(filter, Filter::Unknown(_)))
                {
                    let why = format!(
                        "its chunks went through filter {id}: undo it with h5repack -f GZIP=1"
                    );
                    return Err(unsupported(why));
                }
                let is_filtered = !filters.is_empty();
                if is_filtered && chunk_len > MAX_CHUNK_LEN {
                    let why = format!(
                        "filtered chunks of {chunk_len} bytes are longer than {MAX_CHUNK_LEN}: \
                         pack it with h5repack and smaller chunks"
                    );
                    return Err(unsupported(why));
                }
                let grid = Grid {
                    shape: &shape,
                    chunk,
                    chunk_len,
                    is_filtered,
                };
                let chunks = grid.find(reader, &index)?;
                // Filters may make a chunk a little longer.
                let max_len = match is_filtered {
                    true => chunk_len * 2 + 65_536,
                    false => chunk_len,
                };
                let is_odd = |c: &&Chunk| c.len > max_len || (!is_filtered && c.len != chunk_len);
                if let Some(odd) = chunks.iter().find(is_odd) {
                    let why = format!("a chunk of {} bytes in place of {chunk_len}", odd.len);
                    return Err(reader.view.malformed(odd.offset, why));
                }
                match &chunks[..] {
                    [only] if !is_filtered && chunk == shape => {
                        Place::Run(reader.view.absolute(only.offset))
                    }
                    _ => Place::Chunks(Box::new(Chunks {
                        base: reader.view.absolute(0),
                        chunk: chunk.to_vec(),
                        chunk_len,
                        counts: grid.counts(),
                        chunks,
                        filters,
                        fill,
                    })),
                }
            }
            Layout::Other(what) => return Err(unsupported(format!("its layout is {what}"))),
        };
        let aliases = Vec::new();
        Ok(Some(Found {
            header,
            aliases,
            place,
        }))
    }

    /// The element type; Keras says in an attribute what it calls opaque bytes.
    fn dtype(&self, messages: &[Message<'_, '_>], path: &str) -> Result<(Dtype, bool), Refusal> {
        let reader = self.reader;
        let unsupported = |why: String| Refusal::unsupported(clip(path), why);
        let found = messages
            .iter()
            .find(|message| message.kind == header::DATATYPE);
        let Some(message) = found else {
            return Err(unsupported("it has no element type".to_owned()));
        };
        let mut content = message.content.clone();
        let found = if message.is_shared {
            let (version, kind) = (content.u8()?, content.u8()?);
            if version == 1 {
                content.skip(6)?;
            }
            if version == 3 && kind != 2 {
                return Err(unsupported(
                    "its element type is kept in a shared heap".to_owned(),
                ));
            }
            let address = content.offset()?;
            let named = header::messages(reader, address)?;
            let inner = named
                .into_iter()
                .find(|message| message.kind == header::DATATYPE);
            match inner {
                Some(mut inner) if !inner.is_shared => message::datatype(&mut inner.content)?,
                _ => return Err(content.bad("there is no element type")),
            }
        } else {
            message::datatype(&mut content)?
        };
        let what = match found {
            Type::Number { dtype, big_endian } => return Ok((dtype, big_endian)),
            Type::Opaque(len) => {
                let named = text_attribute(reader, messages, "dtype")?;
                let named = named.and_then(|name| Dtype::from_name(&name));
                let plain = match len {
                    1 => Some(Dtype::V1),
                    2 => Some(Dtype::Bf16),
                    4 => Some(Dtype::V4),
                    _ => None,
                };
                let fits = |dtype: &Dtype| dtype.bits() == u64::from(len) * 8;
                match named.filter(fits).or(plain) {
                    Some(dtype) => return Ok((dtype, false)),
                    None => "opaque bytes",
                }
            }
            Type::Text { .. } | Type::VariableText => "text",
            Type::Other(what) => what,
        };
        Err(unsupported(format!(
            "its elements are {what}, which has no counterpart"
        )))
    }
}

/// The text of the attribute of this name.
fn text_attribute(
    reader: &Reader<'_>,
    messages: &[Message<'_, '_>],
    wanted: &str,
) -> Result<Option<String>, Refusal> {
    for message in messages
        .iter()
        .filter(|message| message.kind == header::ATTRIBUTE)
    {
        if message.is_shared {
            continue;
        }
        let found = message::attribute(reader, &mut message.content.clone())?;
        if let Some((_, text)) = found.filter(|(name, _)| name == wanted) {
            return Ok(Some(text));
        }
    }
    Ok(None)
}
