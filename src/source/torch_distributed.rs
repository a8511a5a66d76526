//! A folder of `torch.distributed.checkpoint`: `.metadata` is a pickle that says which
//! part of which tensor is where in the `.distcp` files; each part there is a file of
//! `torch.save` in itself.

use super::gathered::{Gathered, Part};
use super::pickle::{self, Node, Tree, Value};
use super::view::{Refusal, View};
use super::{SourceError, boxes, builder::Builder, files::OpenFile, sharded, torch};
use crate::format::Dtype;
use crate::plan::{EntryHeader, MAX_DIMENSIONS, MAX_ENTRY_SOURCES, Order, clip};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// What the tree may take beyond the length of the pickle, in bytes.
const TREE_BYTES: u64 = 4 << 20;
/// What the tree may take for each byte of the pickle, which is all there is here.
const TREE_RATIO: u64 = 16;

/// A tensor and its parts.
#[derive(Debug)]
pub(crate) struct Planned {
    pub(crate) header: EntryHeader,
    pub(crate) parts: Vec<PlannedPart>,
}

/// Where a part of a tensor was saved.
#[derive(Debug)]
pub(crate) struct PlannedPart {
    start: Vec<u64>,
    lens: Vec<u64>,
    file_name: String,
    offset: u64,
    len: u64,
}

/// What `.metadata` says.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) tensors: Vec<Planned>,
    pub(crate) skipped: Vec<(String, &'static str)>,
}

/// Loads a folder, or says `false` when it is none of this kind.
pub(super) fn load(folder: &Path, builder: &mut Builder) -> Result<bool, SourceError> {
    let path = folder.join(".metadata");
    if !path.is_file() {
        return Ok(false);
    }
    let file = OpenFile::open(&path)?;
    if file.byte_len() > pickle::MAX_PICKLE_LEN || !file.prefix(2)?.starts_with(b"\x80") {
        return Ok(false);
    }
    let bytes = file.bytes_at(0, file.byte_len())?;
    let budget = TREE_BYTES + TREE_RATIO * file.byte_len();
    let of_metadata = |refusal: Refusal| refusal.of(file.path());
    let tree = pickle::parse(bytes, budget).map_err(|bad| {
        of_metadata(Refusal::Malformed {
            at: bad.at as u64,
            why: bad.why,
        })
    })?;
    let plan = plan(&tree).map_err(of_metadata)?;
    builder.files.add(&file, &[])?;
    let mut reader = Reader {
        folder,
        files: HashMap::new(),
    };
    for planned in plan.tensors {
        reader.add(planned, builder)?;
    }
    for (name, reason) in plan.skipped {
        builder.skip(name, reason);
    }
    builder.add_format("pytorch-distributed");
    Ok(true)
}

struct Reader<'a> {
    folder: &'a Path,
    files: HashMap<String, (OpenFile, u32)>,
}

impl Reader<'_> {
    fn add(&mut self, planned: Planned, builder: &mut Builder) -> Result<(), SourceError> {
        let header = planned.header;
        let item_len = u64::from(header.item_len());
        let (mut parts, mut sources) = (Vec::new(), Vec::new());
        for part in planned.parts {
            let found = self.part(&header, part, builder)?;
            if !sources.contains(&found.file_index) {
                sources.push(found.file_index);
            }
            parts.push(found);
        }
        if let Some(runs) = runs(&header.shape, item_len, &parts) {
            let entry = builder.add_runs(header, &runs)?;
            entry.is_optimizer = torch::is_of_optimizer(&entry.header.name);
            entry.sources = sources;
        } else {
            let Some(gathered) = Gathered::new(item_len, &header.shape, parts) else {
                let why = "its shape does not fit in 64 bits";
                return Err(SourceError::unsupported(self.folder, &header.name, why));
            };
            let entry = builder.add_derived(header, sources, Arc::new(gathered))?;
            entry.is_optimizer = torch::is_of_optimizer(&entry.header.name);
        }
        Ok(())
    }

    /// Looks into a part, which must be what was promised.
    fn part(
        &mut self,
        header: &EntryHeader,
        part: PlannedPart,
        builder: &mut Builder,
    ) -> Result<Part, SourceError> {
        if !self.files.contains_key(&part.file_name) {
            let path = self.folder.join(&part.file_name);
            let file = OpenFile::open(&path).map_err(|error| match error {
                SourceError::NotFound { .. } => {
                    let why = format!("file {:?} does not exist", clip(&part.file_name));
                    SourceError::malformed(&self.folder.join(".metadata"), why)
                }
                error => error,
            })?;
            let index = builder.files.add(&file, &[])?;
            self.files.insert(part.file_name.clone(), (file, index));
        }
        let Some((file, index)) = self.files.get(&part.file_name) else {
            return Err(SourceError::malformed(self.folder, "a file is gone"));
        };
        let read = |view: View<'_>| -> Result<Part, Refusal> {
            let view = view.part(part.offset, part.len)?;
            let (_, contents) = torch::read(view, &header.name)?;
            let other = || {
                let why = format!(
                    "this is not the part of {:?} that it should be",
                    header.name
                );
                view.malformed(0, why)
            };
            let [found] = &contents.tensors[..] else {
                return Err(other());
            };
            let is_same = found.header.dtype() == header.dtype()
                && found.header.shape == part.lens
                && !found.header.big_endian;
            let inside = found.part(*index).filter(|_| is_same).ok_or_else(other)?;
            Ok(Part {
                start: part.start.clone(),
                ..inside
            })
        };
        read(View::file(file)).map_err(|refusal| refusal.of(file.path()))
    }
}

/// The parts as runs of the tensor in order, where each of them is one: length in bytes,
/// file and offset.
fn runs(shape: &[u64], item_len: u64, parts: &[Part]) -> Option<Vec<(u64, u32, u64)>> {
    let steps = boxes::steps(shape, item_len)?;
    let mut runs = Vec::with_capacity(parts.len());
    for part in parts {
        // Whole along all dimensions but the first.
        let is_run = part.lens.iter().zip(shape).skip(1).all(|(a, b)| a == b)
            && (part.steps.iter().zip(&steps).zip(&part.lens))
                .all(|((a, b), len)| a == b || *len == 1);
        let byte_len = part.lens.iter().product::<u64>() * item_len;
        if !is_run {
            return None;
        }
        if byte_len > 0 {
            let at = boxes::place(&part.start, &steps);
            runs.push((at, (byte_len, part.file_index, part.offset)));
        }
    }
    // The parts tile the tensor, as was checked.
    runs.sort_by_key(|&(at, _)| at);
    Some(runs.into_iter().map(|(_, run)| run).collect())
}

/// Reads what `.metadata` says.
pub(crate) fn plan(tree: &Tree) -> Result<Plan, Refusal> {
    torch::refuse_programs(tree)?;
    let malformed = |why: &str| Refusal::Malformed {
        at: 0,
        why: why.to_owned(),
    };
    let Some(items) = items(tree, field(tree, tree.root, "state_dict_metadata")) else {
        return Err(malformed(
            "it is no Metadata of torch.distributed.checkpoint",
        ));
    };
    let places = places(tree).ok_or_else(|| malformed("its storage_data are no dict"))??;
    let mut plan = Plan::default();
    for &(name, value) in items {
        let Some(name) = tree.text(name) else {
            return Err(malformed("the name of a tensor is no text"));
        };
        let chunks = tree.members(field(tree, value, "chunks"));
        let Some(chunks) = chunks else {
            plan.skipped
                .push((clip(name), "python object, which is not built"));
            continue;
        };
        let bad = |why: String| Refusal::unsupported(clip(name), why);
        let dtype = dtype(tree, field(tree, value, "properties"))
            .ok_or_else(|| bad("its element type has no counterpart".to_owned()))?;
        let shape = numbers(tree, field(tree, value, "size"))
            .ok_or_else(|| bad("its shape is described in an unknown way".to_owned()))?;
        let header = EntryHeader::tensor(name, dtype, &shape)?;
        debug_assert_eq!(header.order, Order::C);
        if chunks.len() > MAX_ENTRY_SOURCES {
            let why = format!("{} parts are more than {MAX_ENTRY_SOURCES}", chunks.len());
            return Err(bad(why));
        }
        let mut parts = Vec::new();
        for &chunk in chunks {
            let start = numbers(tree, field(tree, chunk, "offsets"));
            let lens = numbers(tree, field(tree, chunk, "sizes"));
            let (Some(start), Some(lens)) = (start, lens) else {
                return Err(bad("a part of it is described in an unknown way".to_owned()));
            };
            let place = places.get(&(name, start.clone())).or_else(|| {
                // One part need not say where it is.
                (chunks.len() == 1).then(|| places.get(&(name, Vec::new())))?
            });
            let Some(&(file_name, offset, len)) = place else {
                return Err(bad(format!("no file has its part at {start:?}")));
            };
            let file_name = file_name.to_owned();
            parts.push(PlannedPart {
                start,
                lens,
                file_name,
                offset,
                len,
            });
        }
        if let Err(why) = check_cover(&shape, &parts) {
            return Err(bad(why));
        }
        plan.tensors.push(Planned { header, parts });
    }
    Ok(plan)
}

/// Whether the parts of a tensor are the tensor, and nothing twice.
fn check_cover(shape: &[u64], parts: &[PlannedPart]) -> Result<(), String> {
    let count = |lens: &[u64]| lens.iter().try_fold(1u64, |n, &len| n.checked_mul(len));
    let mut covered = 0u64;
    for (index, part) in parts.iter().enumerate() {
        let fits = part.start.len() == shape.len()
            && part.lens.len() == shape.len()
            && (part.start.iter().zip(&part.lens).zip(shape)).all(|((start, len), size)| {
                start.checked_add(*len).is_some_and(|end| end <= *size)
            });
        if !fits {
            let (start, lens) = (&part.start, &part.lens);
            return Err(format!(
                "its part {lens:?} at {start:?} is not inside {shape:?}"
            ));
        }
        let whole = (&part.start[..], &part.lens[..]);
        let earlier = parts[..index].iter();
        if earlier
            .map(|other| (&other.start[..], &other.lens[..]))
            .any(|other| !shape.is_empty() && boxes::common(whole, other).is_some())
        {
            return Err(format!("its part at {:?} overlaps another", part.start));
        }
        covered = count(&part.lens)
            .and_then(|n| covered.checked_add(n))
            .unwrap_or(u64::MAX);
    }
    match count(shape) {
        Some(all) if all == covered => Ok(()),
        all => Err(format!(
            "its parts have {covered} elements, not {}",
            all.unwrap_or(u64::MAX)
        )),
    }
}

/// File, offset and length of every part, by name and first index.
type Places<'a> = HashMap<(&'a str, Vec<u64>), (&'a str, u64, u64)>;

fn places(tree: &Tree) -> Option<Result<Places<'_>, Refusal>> {
    let items = items(tree, field(tree, tree.root, "storage_data"))?;
    let mut places = HashMap::new();
    for &(index, info) in items {
        let Some(name) = tree.text(field(tree, index, "fqn")) else {
            continue;
        };
        let start = numbers(tree, field(tree, index, "offset")).unwrap_or_default();
        let number = |name| match field(tree, info, name) {
            Value::Int(number) => u64::try_from(number).ok(),
            _ => None,
        };
        let file_name = tree.text(field(tree, info, "relative_path"));
        let (Some(file_name), Some(offset), Some(len)) =
            (file_name, number("offset"), number("length"))
        else {
            continue;
        };
        if !sharded::is_base_name(file_name) {
            let why = format!("file {:?} is not a plain file name", clip(file_name));
            return Some(Err(Refusal::Malformed { at: 0, why }));
        }
        let transforms = field(tree, info, "transform_descriptors");
        if tree
            .members(transforms)
            .is_some_and(|list| !list.is_empty())
        {
            let why = "it was saved compressed: save it without an extension";
            return Some(Err(Refusal::unsupported(clip(name), why)));
        }
        places.insert((name, start), (file_name, offset, len));
    }
    Some(Ok(places))
}

fn items(tree: &Tree, value: Value) -> Option<&[(Value, Value)]> {
    match tree.node(value)? {
        Node::Dict(items) => Some(items),
        _ => None,
    }
}

/// A field of an object.
fn field(tree: &Tree, object: Value, name: &str) -> Value {
    let state = match tree.node(object) {
        Some(Node::Call { state, .. }) => items(tree, *state),
        _ => None,
    };
    let fields = state.unwrap_or_default().iter();
    let mut found = fields.filter(|(key, _)| tree.text(*key) == Some(name));
    found.next().map_or(Value::None, |(_, value)| *value)
}

/// The numbers of a `torch.Size`.
fn numbers(tree: &Tree, value: Value) -> Option<Vec<u64>> {
    let value = match tree.node(value)? {
        Node::Call { callee, args, .. } if tree.global(*callee) == Some(("torch", "Size")) => {
            tree.members(*args)?.first().copied().unwrap_or(*args)
        }
        _ => value,
    };
    let numbers = tree.members(value)?.iter().map(|number| match number {
        Value::Int(number) => u64::try_from(*number).ok(),
        _ => None,
    });
    numbers.take(MAX_DIMENSIONS + 1).collect()
}

/// The element type out of `TensorProperties`.
fn dtype(tree: &Tree, properties: Value) -> Option<Dtype> {
    let Node::Call { state, .. } = tree.node(properties)? else {
        return None;
    };
    let value = match tree.members(*state) {
        Some(members) => *members.first()?,
        None => field(tree, properties, "dtype"),
    };
    match tree.global(value)? {
        ("torch", name) => torch::dtype_of(name),
        _ => None,
    }
}
