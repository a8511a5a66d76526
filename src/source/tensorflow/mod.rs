//! A TensorFlow checkpoint of version 2: `PREFIX.index` says which tensor lies where in
//! `PREFIX.data-00000-of-00001` and its like. No tensor is touched.

pub(crate) mod bundle;
pub(crate) mod graph;
pub(crate) mod saved_model;
pub(crate) mod slice;
pub(crate) mod state;
pub(crate) mod table;

use super::{
    SourceEntry, SourceError,
    builder::Builder,
    error::ContentError,
    files::OpenFile,
    protobuf::{take, varint},
    slabs::{Slab, Slabs},
};
use crate::{
    format::{Dtype, checksum},
    plan::{EntryHeader, EntryKind, Order, PlanError, clip},
};
use bundle::{Bundle, BundleEntry, Element};
use graph::{GRAPH_KEY, Graph, VALUE_SUFFIX, Variable, Variables};
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

/// What the name of an index ends with.
const INDEX_SUFFIX: &str = ".index";
/// Longest index in bytes.
const MAX_INDEX_LEN: u64 = 256 << 20;
/// Longest graph of objects in bytes.
const MAX_GRAPH_LEN: u64 = 64 << 20;

/// The index of the checkpoint of this name, where there is one and nothing else is
/// called so.
pub(super) fn index_of_prefix(path: &Path) -> Option<PathBuf> {
    if path.symlink_metadata().is_ok() {
        return None;
    }
    let index = with_suffix(path, INDEX_SUFFIX);
    index
        .is_file()
        .then_some(index)
        .or_else(|| version_1_shard(path))
}

/// The first shard of a checkpoint of version 1 of this name, where there is one: what is
/// wrong with it is said by whoever reads it.
fn version_1_shard(prefix: &Path) -> Option<PathBuf> {
    let name = prefix.file_name()?.to_str()?;
    // What the file `checkpoint` calls all shards together.
    if name.contains("-?????-of-") {
        let first = prefix.with_file_name(name.replace("?????", "00000"));
        return first.is_file().then_some(first);
    }
    let folder = match prefix.parent()? {
        empty if empty.as_os_str().is_empty() => Path::new("."),
        folder => folder,
    };
    let shards = folder.read_dir().ok()?.filter_map(|item| {
        let shard = item.ok()?.file_name().into_string().ok()?;
        let is_first = shard_prefix(&shard) == Some(name) && shard.contains("-00000-of-");
        is_first.then(|| prefix.with_file_name(shard))
    });
    shards.min()
}

/// What a file is a shard of by its name: of `NAME-00000-of-00002` it is NAME, which has data of
/// its own in version 2.
pub(super) fn shard_prefix(name: &str) -> Option<&str> {
    let is_number = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    let (rest, count) = name.rsplit_once("-of-")?;
    let (prefix, shard) = rest.rsplit_once('-')?;
    let is_shard = is_number(shard) && is_number(count) && !prefix.is_empty();
    is_shard.then_some(prefix)
}

/// Whether a file ends like an index.
pub(super) fn is_index(file: &OpenFile) -> Result<bool, SourceError> {
    let len = table::FOOTER_LEN as u64;
    let Some(start) = file.byte_len().checked_sub(len) else {
        return Ok(false);
    };
    Ok(table::is_table(&file.bytes_at(start, len)?))
}

/// Whether a file is named like an index.
pub(super) fn is_index_name(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending == "index")
}

/// Whether a file is named like an index and has data beside it; others have that ending, too.
pub(super) fn is_index_of_data(path: &Path) -> bool {
    let data = path.with_extension("data");
    is_index_name(path) && version_1_shard(&data).is_some()
}

/// Whether a file is named like the data of a checkpoint.
pub(super) fn is_data_name(name: &str) -> bool {
    shard_prefix(name).is_some_and(|prefix| prefix.ends_with(".data"))
}

/// Loads the checkpoint of an index.
pub(super) fn load(path: &Path, file: &OpenFile, builder: &mut Builder) -> Result<(), SourceError> {
    load_with(path, file, builder, |_| None)?;
    builder.add_format("tf-bundle");
    Ok(())
}

/// What else is known of a variable.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Facts {
    /// Whether a list of the model's own says that it is trainable.
    pub(super) listed: Option<bool>,
    /// What it was made for, where nothing else is known.
    pub(super) trainable: Option<bool>,
    /// Its place in the model.
    pub(super) place: Option<u32>,
    /// Such places are the model's own order, not a guess.
    pub(super) is_ordered: bool,
}

/// Loads the checkpoint of an index; `facts` may say more of its variables.
pub(super) fn load_with(
    path: &Path,
    file: &OpenFile,
    builder: &mut Builder,
    facts: impl Fn(&Variable) -> Option<Facts>,
) -> Result<(), SourceError> {
    if file.byte_len() > MAX_INDEX_LEN {
        let why = format!(
            "an index of {} bytes is longer than {MAX_INDEX_LEN}",
            file.byte_len()
        );
        return Err(SourceError::malformed(path, why));
    }
    let index = file.prefix(MAX_INDEX_LEN)?;
    let bundle = Bundle::parse(&index).map_err(|error| SourceError::content(path, error))?;
    let prefix = path
        .to_str()
        .and_then(|path| path.strip_suffix(INDEX_SUFFIX));
    let Some(prefix) = prefix else {
        let why = "the name of an index must end with .index, for its data are named after it";
        return Err(SourceError::malformed(path, why));
    };
    let mut reader = Reader {
        path,
        prefix: PathBuf::from(prefix),
        index_file: builder.files.add(file, &index)?,
        shard_count: bundle.shard_count,
        big_endian: bundle.big_endian,
        shards: HashMap::new(),
        builder,
    };
    let variables = reader.variables(&bundle)?;
    let mut tensors = reader.plan(bundle.tensors, variables, facts)?;
    tensors.sort_by_key(|tensor| tensor.place);
    for tensor in tensors {
        reader.add(tensor, &bundle.slices)?;
    }
    Ok(())
}

/// A tensor and all that is known of it.
struct Planned {
    key: String,
    name: String,
    dtype: Dtype,
    entry: BundleEntry,
    variable: Variable,
    trainable: Option<bool>,
    place: (u8, u32),
}

struct Reader<'a> {
    path: &'a Path,
    prefix: PathBuf,
    index_file: u32,
    shard_count: u32,
    big_endian: bool,
    /// File numbers of the shards that were opened.
    shards: HashMap<u32, u32>,
    builder: &'a mut Builder,
}

impl Reader<'_> {
    fn shard_path(&self, shard: u32) -> PathBuf {
        with_suffix(
            &self.prefix,
            &format!(".data-{shard:05}-of-{:05}", self.shard_count),
        )
    }

    fn open_shard(&self, shard: u32) -> Result<OpenFile, SourceError> {
        let path = self.shard_path(shard);
        OpenFile::open(&path).map_err(|error| match error {
            SourceError::NotFound { .. } => {
                let name = path
                    .file_name()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned();
                SourceError::malformed(self.path, format!("its data {name:?} do not exist"))
            }
            error => error,
        })
    }

    /// The file number of a shard.
    fn shard(&mut self, shard: u32) -> Result<u32, SourceError> {
        if let Some(&file) = self.shards.get(&shard) {
            return Ok(file);
        }
        let file = self.builder.files.add(&self.open_shard(shard)?, &[])?;
        self.shards.insert(shard, file);
        Ok(file)
    }

    /// What the graph of objects says, if there is one.
    fn variables(&mut self, bundle: &Bundle) -> Result<Variables, SourceError> {
        let found = bundle.tensors.iter().find(|(key, _)| key == GRAPH_KEY);
        let Some((_, entry)) = found.filter(|(_, entry)| entry.element == Element::Text) else {
            return Ok(Variables::default());
        };
        if entry.len > MAX_GRAPH_LEN {
            let why = format!(
                "a graph of {} bytes is longer than {MAX_GRAPH_LEN}",
                entry.len
            );
            return Err(SourceError::unsupported(self.path, GRAPH_KEY, why));
        }
        let file = self.open_shard(entry.shard)?;
        let bytes = file.bytes_at(entry.offset, entry.len)?;
        let content = |error| SourceError::content(file.path(), error);
        let graph = only_text(&bytes, entry.crc32c).map_err(content)?;
        Ok(Graph::parse(graph).map_err(content)?.variables())
    }

    /// Decides on names, and on what is left out.
    fn plan(
        &mut self,
        tensors: Vec<(String, BundleEntry)>,
        mut variables: Variables,
        facts: impl Fn(&Variable) -> Option<Facts>,
    ) -> Result<Vec<Planned>, SourceError> {
        let keys: HashSet<String> = tensors.iter().map(|(key, _)| key.clone()).collect();
        let mut planned = Vec::with_capacity(tensors.len());
        for (key, entry) in tensors {
            let dtype = match entry.element {
                Element::Type(dtype) => dtype,
                // Its names and paths were read.
                Element::Text if key == GRAPH_KEY => continue,
                Element::Text => {
                    self.builder.skip(key, "it holds texts");
                    continue;
                }
                Element::Other => {
                    let why = "it is a resource, or of a type that is not known";
                    return Err(SourceError::unsupported(self.path, &key, why));
                }
            };
            let known = variables.by_key.remove(&key);
            let is_variable = known.is_some();
            let mut variable = known.unwrap_or_default();
            // Without a graph of objects the name is all there is.
            variable.is_optimizer |=
                !is_variable && state::is_slot_name(&key, |name| keys.contains(name));
            let facts = facts(&variable).unwrap_or_default();
            let by_list = variables
                .has_trainable
                .then_some(variable.trainable_index.is_some());
            let by_role = variable.is_optimizer.then_some(false);
            let trainable = facts.listed.or(by_list).or(by_role).or(facts.trainable);
            // The list of an optimizer is in the model's order, and knows no others.
            let by_optimizer = variable.trainable_index.filter(|_| !facts.is_ordered);
            let place = match by_optimizer {
                Some(index) => (0, index),
                None => (1, facts.place.unwrap_or(u32::MAX)),
            };
            planned.push(Planned {
                name: key.clone(),
                key,
                dtype,
                entry,
                variable,
                trainable,
                place,
            });
        }
        let mut planned = without_doubles(planned);
        name(&mut planned);
        Ok(planned)
    }

    fn add(
        &mut self,
        tensor: Planned,
        slices: &HashMap<Vec<u8>, BundleEntry>,
    ) -> Result<(), SourceError> {
        let Planned {
            key,
            name,
            dtype,
            entry,
            mut variable,
            trainable,
            ..
        } = tensor;
        let byte_len = dtype
            .byte_len(&entry.shape)
            .ok_or_else(|| PlanError::Shape {
                name: clip(&name),
                why: format!("shape {:?} of {dtype} does not fit in 64 bits", entry.shape),
            })?;
        let header = EntryHeader {
            name,
            kind: EntryKind::Tensor { dtype },
            shape: entry.shape.clone(),
            order: Order::C,
            big_endian: self.big_endian && dtype.bits() > 8,
            byte_len,
        };
        header.check()?;
        let index_file = self.index_file;
        let (added, crc32c) = if entry.slices.is_empty() {
            let file = self.shard(entry.shard)?;
            (self.builder.add(header, file, entry.offset)?, entry.crc32c)
        } else {
            self.add_parts(header, &key, dtype, &entry, slices)?
        };
        added.crc32c = crc32c;
        added.trainable = trainable;
        added.is_optimizer = variable.is_optimizer;
        added.sources.push(index_file);
        variable.aliases.retain(|alias| *alias != added.header.name);
        added.aliases = variable.aliases;
        if added.header.name != key {
            added.source_name = Some(key);
        }
        Ok(())
    }

    /// Adds a partitioned variable, with its checksum where that follows from its parts'.
    fn add_parts(
        &mut self,
        header: EntryHeader,
        key: &str,
        dtype: Dtype,
        entry: &BundleEntry,
        slices: &HashMap<Vec<u8>, BundleEntry>,
    ) -> Result<(&mut SourceEntry, Option<u32>), SourceError> {
        let path = self.path;
        let bad = |why| SourceError::malformed(path, format!("{:?}: {why}", clip(key)));
        let mut slabs = Vec::with_capacity(entry.slices.len());
        let mut crcs = HashMap::new();
        for slice in &entry.slices {
            let (start, shape) = slice
                .within(&entry.shape)
                .ok_or_else(|| bad(format!("a part at {:?} lies outside of it", slice.extents)))?;
            let part = slices
                .get(&slice.key(key))
                .ok_or_else(|| bad(format!("its part at {start:?} is missing")))?;
            if part.element != Element::Type(dtype) || Some(part.len) != dtype.byte_len(&shape) {
                let why = format!("its part at {start:?} has another type or length");
                return Err(bad(why));
            }
            let file_index = self.shard(part.shard)?;
            crcs.insert((file_index, part.offset), part.crc32c);
            slabs.push(Slab {
                file_index,
                file_offset: part.offset,
                start,
                shape,
            });
        }
        let slabs = Slabs::new(&entry.shape, header.item_len(), slabs).map_err(bad)?;
        let Some(runs) = slabs.runs() else {
            return Ok((self.builder.add_slabs(header, slabs)?, None));
        };
        let crc32c = runs.iter().try_fold(0, |sum, &(len, file, offset)| {
            let crc = crcs.get(&(file, offset)).copied().flatten()?;
            Some(checksum::combine(sum, crc, len))
        });
        Ok((self.builder.add_runs(header, &runs)?, crc32c))
    }
}

/// Leaves out what Keras stores a second time in the list `_all_variables`: the same
/// variable with the same bytes.
fn without_doubles(planned: Vec<Planned>) -> Vec<Planned> {
    let is_hidden = |key: &str| key.starts_with("_all_variables/");
    let same = |tensor: &Planned| {
        let crc32c = tensor
            .entry
            .crc32c
            .filter(|_| tensor.entry.slices.is_empty())?;
        let name = Some(&tensor.variable.given_name).filter(|name| !name.is_empty())?;
        Some((
            name.clone(),
            tensor.dtype,
            tensor.entry.shape.clone(),
            crc32c,
        ))
    };
    let shown = planned.iter().filter(|tensor| !is_hidden(&tensor.key));
    let shown: HashSet<_> = shown.filter_map(same).collect();
    let mut kept: Vec<Planned> = planned;
    let mut hidden = HashMap::new();
    kept.retain(|tensor| match same(tensor) {
        Some(id) if is_hidden(&tensor.key) && shown.contains(&id) => {
            let path = tensor.key.strip_suffix(VALUE_SUFFIX).unwrap_or(&tensor.key);
            hidden.insert(id, path.to_owned());
            false
        }
        _ => true,
    });
    for tensor in &mut kept {
        if let Some(path) = same(tensor).and_then(|id| hidden.remove(&id)) {
            tensor.variable.aliases.push(path);
        }
    }
    kept
}

/// Calls every tensor what its maker called it, where that says something and no other is called
/// so; else by its way, where no other has that name; else by its key.
fn name(planned: &mut [Planned]) {
    let mut given_count = HashMap::<&str, u32>::new();
    for tensor in planned.iter() {
        let given = &tensor.variable.given_name[..];
        *given_count.entry(given).or_default() += 1;
    }
    let wanted = |tensor: &Planned| {
        let given = tensor.variable.telling_name();
        given
            .filter(|name| given_count.get(name) == Some(&1))
            .map(str::to_owned)
            .or_else(|| tensor.variable.path_name(&tensor.key))
    };
    let names: Vec<Option<String>> = planned.iter().map(wanted).collect();
    let mut count = HashMap::<&str, u32>::new();
    let keys = planned.iter().map(|tensor| &tensor.key[..]);
    for name in keys.chain(names.iter().flatten().map(|name| &name[..])) {
        *count.entry(name).or_default() += 1;
    }
    let is_free: Vec<bool> = names
        .iter()
        .map(|name| {
            name.as_deref()
                .is_some_and(|name| count.get(name) == Some(&1))
        })
        .collect();
    for ((tensor, name), is_free) in planned.iter_mut().zip(names).zip(is_free) {
        if let (Some(name), true) = (name, is_free) {
            tensor.name = name;
        }
    }
}

/// The one text of a scalar: its length, a checksum of that, its bytes.
pub(crate) fn only_text(mut bytes: &[u8], crc32c: Option<u32>) -> Result<&[u8], ContentError> {
    let len = varint(&mut bytes)?;
    let lens_crc = take(&mut bytes, 4)?;
    let text = take(&mut bytes, len)?;
    if !bytes.is_empty() {
        return Err(ContentError::Malformed(format!(
            "{} bytes behind a text",
            bytes.len()
        )));
    }
    let len_bytes = match u32::try_from(len) {
        Ok(len) => len.to_le_bytes().to_vec(),
        Err(_) => len.to_le_bytes().to_vec(),
    };
    let found = checksum::crc32c_of_parts([&len_bytes[..], lens_crc, text]);
    match crc32c {
        Some(stored) if stored != found => Err(ContentError::Malformed(format!(
            "{GRAPH_KEY} has the checksum {found:08x}, not {stored:08x}"
        ))),
        _ => Ok(text),
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}
