//! PyTorch files (`torch.save` since 1.6): a zip archive with a pickle that describes
//! tensors and a member for every storage. See [`super::pickle`]: nothing is executed.

use super::gathered::{Gathered, Part};
use super::pickle::{self, Node, Tree, Value};
use super::view::{Refusal, View};
use super::zip::{self, Archive, Member, STORED};
use super::{SourceError, boxes, builder::Builder, files::OpenFile};
use crate::format::{Dtype, checksum};
use crate::plan::{EntryHeader, MAX_ALIASES, MAX_DIMENSIONS, MAX_ENTRIES, Order, clip};
use std::collections::HashMap;
use std::sync::Arc;

/// Deepest nesting of dicts and lists.
const MAX_DEPTH: usize = 64;
/// Values looked at: shared dicts may be reached in more ways than there are tensors.
const MAX_VISITS: u64 = 64 << 20;
/// Parts that are told apart when they are left out.
const MAX_TOLD: usize = 1000;
/// What the tree of a pickle may take beyond the length of its file, in bytes.
const TREE_BYTES: u64 = 4 << 20;
/// What a tensor takes in memory beside its names, in bytes.
const FOUND_BYTES: u64 = 400;

/// Modules whose functions reach out of Python.
const EXECUTES: [&str; 24] = [
    "os",
    "posix",
    "nt",
    "subprocess",
    "sys",
    "builtins",
    "__builtin__",
    "shutil",
    "socket",
    "runpy",
    "importlib",
    "pty",
    "webbrowser",
    "code",
    "codeop",
    "ctypes",
    "commands",
    "pip",
    "bdb",
    "pdb",
    "timeit",
    "profile",
    "asyncio",
    "multiprocessing",
];
/// What of these is only data.
const HARMLESS: [&str; 14] = [
    "set",
    "frozenset",
    "dict",
    "list",
    "tuple",
    "int",
    "float",
    "bool",
    "str",
    "bytes",
    "bytearray",
    "complex",
    "slice",
    "object",
];

/// Where the storages are.
pub(crate) trait Storages {
    /// First byte in the file and length of a storage.
    fn place(&self, key: &str) -> Option<Result<(u64, u64), Refusal>>;
}

/// A tensor of a file.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) header: EntryHeader,
    pub(crate) aliases: Vec<String>,
    /// First byte in the file.
    pub(crate) offset: u64,
    /// Bytes between neighbours, where the elements do not follow each other.
    pub(crate) steps: Option<Vec<u64>>,
}

impl Found {
    /// The whole tensor as a part of itself.
    pub(super) fn part(&self, file_index: u32) -> Option<Part> {
        let item_len = u64::from(self.header.item_len());
        let steps = match (&self.steps, self.header.order) {
            (Some(steps), _) => steps.clone(),
            (None, Order::C) => boxes::steps(&self.header.shape, item_len)?,
            (None, Order::Fortran) => {
                let turned: Vec<u64> = self.header.shape.iter().rev().copied().collect();
                let mut steps = boxes::steps(&turned, item_len)?;
                steps.reverse();
                steps
            }
        };
        Some(Part {
            start: vec![0; self.header.shape.len()],
            lens: self.header.shape.clone(),
            file_index,
            offset: self.offset,
            steps,
        })
    }
}

/// What a pickle describes.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    pub(crate) tensors: Vec<Found>,
    /// Name and reason of what is left out.
    pub(crate) skipped: Vec<(String, String)>,
    /// Numbers, texts and the like.
    pub(super) plain_count: u64,
    /// A Python object that is no container and no tensor, by its class.
    pub(super) object: Option<String>,
}

/// Adds all tensors of a file.
pub(super) fn load(file: &OpenFile, builder: &mut Builder) -> Result<(), SourceError> {
    load_some(file, builder, |_, _| true)
}

/// Adds the tensors of a file that `wanted` wants.
pub(super) fn load_some(
    file: &OpenFile,
    builder: &mut Builder,
    mut wanted: impl FnMut(&mut Builder, &str) -> bool,
) -> Result<(), SourceError> {
    let stem = file
        .path()
        .file_stem()
        .unwrap_or_default()
        .to_string_lossy();
    let (archive, contents) =
        read(View::file(file), &stem).map_err(|refusal| refusal.of(file.path()))?;
    if let (true, Some(class)) = (contents.tensors.is_empty(), &contents.object) {
        let why = format!(
            "it holds an object of the class {class} and no tensors beside it: \
             save the state_dict() of the model"
        );
        return Err(SourceError::unsupported(file.path(), class, why));
    }
    let directory = file.bytes_at(archive.directory_offset, archive.directory_len)?;
    let index = builder.files.add(file, &directory)?;
    for mut found in contents.tensors {
        let names = std::iter::once(std::mem::take(&mut found.header.name)).chain(found.aliases);
        let mut names: Vec<String> = names.filter(|name| wanted(builder, name)).collect();
        if names.is_empty() {
            continue;
        }
        found.header.name = names.remove(0);
        found.aliases = Vec::new();
        let entry = match &found.steps {
            None => builder.add(found.header, index, found.offset)?,
            Some(_) => {
                let gathered = found.part(index).and_then(|part| {
                    let item_len = found.header.item_len().into();
                    Gathered::new(item_len, &found.header.shape, vec![part])
                });
                let Some(gathered) = gathered else {
                    let why = "its strides do not fit in 64 bits";
                    return Err(SourceError::unsupported(
                        file.path(),
                        &found.header.name,
                        why,
                    ));
                };
                builder.add_derived(found.header, vec![index], Arc::new(gathered))?
            }
        };
        entry.is_optimizer = is_of_optimizer(&entry.header.name);
        entry.aliases = names;
    }
    for (name, reason) in contents.skipped {
        builder.skip(name, reason);
    }
    if contents.plain_count > 0 {
        let what = format!("{} values of {stem}", contents.plain_count);
        builder.skip(what, "numbers, texts and the like, no tensors");
    }
    builder.add_format("pytorch");
    Ok(())
}

/// Whether a tensor lies under what training scripts call the state of their optimizer:
/// `optimizer.state.0.exp_avg`, `optimizer_state_dict.…`, `optimizers.0.…`.
pub(super) fn is_of_optimizer(name: &str) -> bool {
    let key = name.split_once('.').map(|(key, _)| key);
    key.is_some_and(|key| key.starts_with("optimizer") || key == "optim")
}

/// Whether an archive is of this kind.
pub(super) fn is_torch(archive: &Archive) -> bool {
    root_of(archive).is_some()
}

/// The folder in the archive that everything is in, with the slash behind it.
fn root_of(archive: &Archive) -> Option<&str> {
    let names = archive.members.iter().map(|member| &member.name);
    names
        .filter_map(|name| name.strip_suffix("data.pkl"))
        .find(|root| root.is_empty() || root.find('/') == Some(root.len() - 1))
}

/// Reads the description of every tensor. `name` is for a tensor that stands alone.
pub(super) fn read(view: View<'_>, name: &str) -> Result<(Archive, Contents), Refusal> {
    let archive = zip::read(view)?;
    let Some(root) = root_of(&archive) else {
        let why = "the archive has no data.pkl in a folder of its own";
        return Err(view.malformed(archive.directory_offset, why));
    };
    if archive
        .members
        .iter()
        .any(|m| m.name.strip_prefix(root) == Some("constants.pkl"))
    {
        let why = "TorchScript: save torch.jit.load(…).state_dict() with torch.save";
        return Err(Refusal::unsupported(format!("{root}constants.pkl"), why));
    }
    let is_big_endian = match archive.member(&format!("{root}byteorder")) {
        None => false,
        Some(member) => match &small(view, member)?[..] {
            b"little" => false,
            b"big" => true,
            _ => return Err(view.malformed(member.data_offset, "the byte order is no known one")),
        },
    };
    let contents = {
        let by_key = (archive.members.iter())
            .filter_map(|m| Some((m.name.strip_prefix(root)?.strip_prefix("data/")?, m)))
            .collect();
        let member = archive.member(&format!("{root}data.pkl"));
        let Some(member) = member else {
            return Err(view.malformed(0, "it has no data.pkl"));
        };
        let bytes = small(view, member)?;
        let budget = view.byte_len().saturating_add(TREE_BYTES);
        let tree = pickle::parse(bytes, budget)
            .map_err(|bad| view.malformed(member.data_offset + bad.at as u64, bad.why))?;
        contents(
            &tree,
            &Members { view, by_key },
            is_big_endian,
            name,
            budget,
        )?
    };
    Ok((archive, contents))
}

/// A member that is read whole, and whose sum must be right where it has one.
fn small(view: View<'_>, member: &Member) -> Result<Vec<u8>, Refusal> {
    if member.method != STORED {
        return Err(deflated(member));
    }
    if member.byte_len > pickle::MAX_PICKLE_LEN {
        let why = format!(
            "{} bytes are more than {}",
            member.byte_len,
            pickle::MAX_PICKLE_LEN
        );
        return Err(view.malformed(member.data_offset, why));
    }
    let bytes = view.read(member.data_offset, member.byte_len)?;
    let found = checksum::crc32(&bytes);
    if member.crc32 != 0 && found != member.crc32 {
        let why = format!(
            "crc-32 of {:?} is {found:08x}, not {:08x}",
            clip(&member.name),
            member.crc32
        );
        return Err(view.malformed(member.data_offset, why));
    }
    Ok(bytes)
}

fn deflated(member: &Member) -> Refusal {
    let why = "torch.save never compresses: save the file again, or pack it with zip -0";
    Refusal::unsupported(clip(&member.name), why)
}

/// The storages of an archive.
struct Members<'a> {
    view: View<'a>,
    by_key: HashMap<&'a str, &'a Member>,
}

impl Storages for Members<'_> {
    fn place(&self, key: &str) -> Option<Result<(u64, u64), Refusal>> {
        let member = self.by_key.get(key)?;
        if member.method != STORED {
            return Some(Err(deflated(member)));
        }
        Some(Ok((
            self.view.absolute(member.data_offset),
            member.byte_len,
        )))
    }
}

/// What a pickle describes.
pub(crate) fn contents(
    tree: &Tree,
    storages: &dyn Storages,
    is_big_endian: bool,
    name: &str,
    budget: u64,
) -> Result<Contents, Refusal> {
    refuse_programs(tree)?;
    let mut walk = Walk {
        tree,
        storages,
        is_big_endian,
        contents: Contents::default(),
        seen: HashMap::new(),
        visits: 0,
        budget,
    };
    match tree.node(tree.root) {
        Some(Node::Call { .. }) if items_of(tree, tree.root).is_none() => {
            walk.visit(tree.root, name, 0)?;
        }
        _ => walk.visit(tree.root, "", 0)?,
    }
    Ok(walk.contents)
}

/// A pickle that would run a program is no checkpoint, though nothing is run here.
pub(super) fn refuse_programs(tree: &Tree) -> Result<(), Refusal> {
    for (module, name) in tree.globals() {
        let top = module.split('.').next().unwrap_or_default();
        let is_builtin = matches!(top, "builtins" | "__builtin__");
        if EXECUTES.contains(&top) && !(is_builtin && HARMLESS.contains(&name)) {
            let what = format!("{}.{}", clip(module), clip(name));
            let why = "loading this pickle in Python would call it; nothing was executed. \
                       If the file is to be trusted, save its tensors as safetensors";
            return Err(Refusal::unsupported(what, why));
        }
    }
    Ok(())
}

/// A view of a storage, as a pickle describes it.
#[derive(Debug)]
struct Strided {
    dtype: Dtype,
    key: String,
    /// In elements.
    offset: u64,
    shape: Vec<u64>,
    strides: Vec<u64>,
}

/// Why something that is a tensor is left out.
type Without<T> = Result<T, String>;

struct Walk<'a> {
    tree: &'a Tree,
    storages: &'a dyn Storages,
    is_big_endian: bool,
    contents: Contents,
    /// Numbers of the tensors by where they lie and how.
    seen: HashMap<(u64, Dtype, Vec<u64>, Vec<u64>), usize>,
    visits: u64,
    /// Bytes that what was found may still take.
    budget: u64,
}

impl Walk<'_> {
    fn visit(&mut self, value: Value, name: &str, depth: usize) -> Result<(), Refusal> {
        self.visits += 1;
        if self.visits > MAX_VISITS || depth > MAX_DEPTH {
            let why = format!("nested deeper than {MAX_DEPTH}, or more than {MAX_VISITS} values");
            return Err(Refusal::unsupported(clip(name), why));
        }
        let tree = self.tree;
        if let Some(items) = items_of(tree, value) {
            for &(key, value) in items {
                let key = match key {
                    Value::Int(number) => number.to_string(),
                    Value::Text(_) => match self.tree.text(key) {
                        Some(text) => text.to_owned(),
                        None => {
                            self.skip(name, "a key in it is not utf-8");
                            continue;
                        }
                    },
                    _ => {
                        self.skip(name, "a key in it is neither text nor number");
                        continue;
                    }
                };
                self.visit(value, &joined(name, &key), depth + 1)?;
            }
            return Ok(());
        }
        if let Some(members) = tree.members(value) {
            for (index, &member) in members.iter().enumerate() {
                self.visit(member, &joined(name, &index.to_string()), depth + 1)?;
            }
            return Ok(());
        }
        match self.tree.node(value) {
            Some(&Node::Call { callee, args, .. }) => self.call(callee, args, name),
            _ => {
                self.contents.plain_count += 1;
                Ok(())
            }
        }
    }

    fn call(&mut self, callee: Value, args: Value, name: &str) -> Result<(), Refusal> {
        match self.tensor(callee, args, 0) {
            Some(Ok(strided)) => self.add(strided, name),
            Some(Err(why)) => {
                self.skip(name, &why);
                Ok(())
            }
            None => {
                let class = match self.tree.global(callee) {
                    Some((module, class)) => format!("{}.{}", clip(module), clip(class)),
                    None => "of some kind".to_owned(),
                };
                self.skip(name, &format!("python object {class}, which is not built"));
                self.contents.object.get_or_insert(class);
                Ok(())
            }
        }
    }

    fn skip(&mut self, name: &str, why: &str) {
        if self.contents.skipped.len() < MAX_TOLD {
            self.contents.skipped.push((clip(name), why.to_owned()));
        } else {
            self.contents.plain_count += 1;
        }
    }

    /// The tensor that a call makes; `None` when it makes something else.
    fn tensor(&self, callee: Value, args: Value, depth: usize) -> Option<Without<Strided>> {
        let (module, function) = self.tree.global(callee)?;
        let args = self.tree.members(args)?;
        let arg = |index: usize| args.get(index).copied().unwrap_or(Value::None);
        if !matches!(module, "torch._utils" | "torch._tensor" | "torch") || depth > 8 {
            return None;
        }
        let inner = |value| match self.tree.node(value) {
            Some(&Node::Call { callee, args, .. }) => self.tensor(callee, args, depth + 1),
            _ => None,
        };
        Some(match function {
            "_rebuild_tensor" => self.strided(args, None),
            "_rebuild_tensor_v2" => self.plain(arg(6)).and_then(|()| self.strided(args, None)),
            "_rebuild_tensor_v3" => self
                .plain(arg(7))
                .and_then(|()| self.strided(args, Some(arg(6)))),
            "_rebuild_parameter" | "_rebuild_parameter_with_state" => return inner(arg(0)),
            "_rebuild_from_type_v2" => return self.tensor(arg(0), arg(2), depth + 1),
            other if other.starts_with("_rebuild_") => Err(format!(
                "a tensor that {} makes has no plain bytes",
                clip(other)
            )),
            _ => return None,
        })
    }

    /// Bits that say that the bytes are not the values.
    fn plain(&self, metadata: Value) -> Without<()> {
        let Some(Node::Dict(items)) = self.tree.node(metadata) else {
            return Ok(());
        };
        let is_set = |&(key, value): &(Value, Value)| {
            matches!(self.tree.text(key), Some("conj" | "neg")) && value == Value::Bool(true)
        };
        match items.iter().any(is_set) {
            true => Err("it is a lazy conjugate or negative: save a clone".to_owned()),
            false => Ok(()),
        }
    }

    /// storage, offset, size, stride, …
    fn strided(&self, args: &[Value], dtype: Option<Value>) -> Without<Strided> {
        let [storage, offset, size, stride, ..] = *args else {
            return Err("its description has too few parts".to_owned());
        };
        let Some(&Node::Persistent(id)) = self.tree.node(storage) else {
            return Err("its storage is described in an unknown way".to_owned());
        };
        // ("storage", class, key, location, length)
        let id = self.tree.members(id).unwrap_or_default();
        let [kind, class, key, location, ..] = *id else {
            return Err("its storage is described in an unknown way".to_owned());
        };
        let class = self.tree.global(class).map_or("", |(_, class)| class);
        let key = match (self.tree.text(kind), self.tree.text(key), key) {
            (Some("storage"), Some(key), _) => key.to_owned(),
            (Some("storage"), None, Value::Int(key)) => key.to_string(),
            _ => return Err("its storage is described in an unknown way".to_owned()),
        };
        if self.tree.text(location) == Some("meta") {
            return Err("it is a tensor on the meta device, which has no bytes".to_owned());
        }
        let dtype = match dtype {
            Some(dtype) => match self.tree.global(dtype) {
                Some(("torch", name)) => dtype_of(name).ok_or_else(|| clip(name)),
                _ => Err("described in an unknown way".to_owned()),
            },
            None => dtype_of_storage(class).ok_or_else(|| clip(class)),
        };
        let dtype = dtype.map_err(|what| format!("element type {what} has no counterpart"))?;
        let numbers = |value| -> Without<Vec<u64>> {
            let numbers = self.tree.members(self.size(value)).unwrap_or_default();
            if numbers.len() > MAX_DIMENSIONS {
                return Err(format!("it has {} dimensions", numbers.len()));
            }
            numbers.iter().map(|&number| self.number(number)).collect()
        };
        let (shape, strides) = (numbers(size)?, numbers(stride)?);
        if shape.len() != strides.len() {
            return Err(format!(
                "{} dimensions, {} strides",
                shape.len(),
                strides.len()
            ));
        }
        let offset = self.number(offset)?;
        Ok(Strided {
            dtype,
            key,
            offset,
            shape,
            strides,
        })
    }

    /// The tuple in a `torch.Size`.
    fn size(&self, value: Value) -> Value {
        match self.tree.node(value) {
            Some(&Node::Call { callee, args, .. })
                if self.tree.global(callee) == Some(("torch", "Size")) =>
            {
                let first = self.tree.members(args).and_then(|args| args.first());
                first.copied().unwrap_or(args)
            }
            _ => value,
        }
    }

    fn number(&self, value: Value) -> Without<u64> {
        match value {
            Value::Int(number) => {
                u64::try_from(number).map_err(|_| format!("{number} is negative"))
            }
            _ => Err("a size in its description is no number".to_owned()),
        }
    }

    /// One dict may be reached in more ways than there is memory for.
    fn spend(&mut self, name: &str) -> Result<(), Refusal> {
        match self.budget.checked_sub(name.len() as u64 + FOUND_BYTES) {
            Some(left) => self.budget = left,
            None => {
                let why = "its names take more memory than its file is long";
                return Err(Refusal::unsupported(clip(name), why));
            }
        }
        Ok(())
    }

    fn add(&mut self, strided: Strided, name: &str) -> Result<(), Refusal> {
        self.spend(name)?;
        let Strided {
            dtype,
            key,
            offset,
            shape,
            strides,
        } = strided;
        let mut header = EntryHeader::tensor(name, dtype, &shape)?;
        header.big_endian = self.is_big_endian && dtype.bits() > 8;
        let (start, storage_len) = match self.storages.place(&key) {
            Some(place) => place?,
            None => {
                let why = format!("storage {:?} of it is not in the archive", clip(&key));
                return Err(Refusal::unsupported(clip(name), why));
            }
        };
        let item_len = u64::from(header.item_len());
        let outside = || {
            let why = format!(
                "{:?} ends behind the {storage_len} bytes of storage {:?}",
                clip(name),
                clip(&key)
            );
            Refusal::Malformed { at: start, why }
        };
        if header.big_endian && !dtype.can_be_big_endian() {
            let why =
                format!("big-endian {dtype} has no counterpart in .npy: save it little-endian");
            return Err(Refusal::unsupported(clip(name), why));
        }
        let first = offset.checked_mul(item_len).filter(|&o| o <= storage_len);
        let first = start + first.ok_or_else(outside)?;
        let mut steps = Vec::with_capacity(strides.len());
        for &stride in &strides {
            steps.push(stride.checked_mul(item_len).ok_or_else(outside)?);
        }
        let mut found = Found {
            header,
            aliases: Vec::new(),
            offset: first,
            steps: None,
        };
        if found.header.byte_len > 0 {
            found.header.order = order_of(&shape, &steps, item_len, &mut found.steps);
            let part = found.part(0).ok_or_else(outside)?;
            if part
                .end(item_len)
                .is_none_or(|end| end > start + storage_len)
            {
                return Err(outside());
            }
        }
        let key = (first, dtype, shape, steps);
        if let Some(known) = self
            .seen
            .get(&key)
            .and_then(|&at| self.contents.tensors.get_mut(at))
            && known.header.byte_len > 0
            && known.aliases.len() < MAX_ALIASES
        {
            known.aliases.push(name.to_owned());
            return Ok(());
        }
        if self.contents.tensors.len() as u64 == MAX_ENTRIES {
            let why = format!("more than {MAX_ENTRIES} tensors");
            return Err(Refusal::unsupported(clip(name), why));
        }
        self.seen.insert(key, self.contents.tensors.len());
        self.contents.tensors.push(found);
        Ok(())
    }
}

/// The order in which elements follow each other; `rest` gets the steps when they do not.
fn order_of(shape: &[u64], steps: &[u64], item_len: u64, rest: &mut Option<Vec<u64>>) -> Order {
    let follow = |axes: &mut dyn Iterator<Item = (&u64, &u64)>| {
        let mut next = Some(item_len);
        axes.filter(|(len, _)| **len != 1).all(|(&len, &step)| {
            let fits = next == Some(step);
            next = step.checked_mul(len);
            fits
        })
    };
    if follow(&mut shape.iter().zip(steps).rev()) {
        Order::C
    } else if follow(&mut shape.iter().zip(steps)) {
        Order::Fortran
    } else {
        *rest = Some(steps.to_vec());
        Order::C
    }
}

/// What is in a dict, or in something like one.
fn items_of(tree: &Tree, value: Value) -> Option<&[(Value, Value)]> {
    match tree.node(value)? {
        Node::Dict(items) => Some(items),
        Node::Call { callee, items, .. } => match tree.global(*callee)? {
            ("collections", "OrderedDict" | "defaultdict" | "Counter") => Some(items),
            _ => None,
        },
        _ => None,
    }
}

fn joined(name: &str, key: &str) -> String {
    match name {
        "" => key.to_owned(),
        _ => format!("{name}.{key}"),
    }
}

fn dtype_of_storage(class: &str) -> Option<Dtype> {
    Some(match class {
        "DoubleStorage" => Dtype::F64,
        "FloatStorage" => Dtype::F32,
        "HalfStorage" => Dtype::F16,
        "BFloat16Storage" => Dtype::Bf16,
        "LongStorage" => Dtype::I64,
        "IntStorage" => Dtype::I32,
        "ShortStorage" => Dtype::I16,
        "CharStorage" => Dtype::I8,
        "ByteStorage" => Dtype::U8,
        "BoolStorage" => Dtype::Bool,
        "ComplexDoubleStorage" => Dtype::C128,
        "ComplexFloatStorage" => Dtype::C64,
        _ => return None,
    })
}

/// The element type that `torch.` calls by this name.
pub(super) fn dtype_of(name: &str) -> Option<Dtype> {
    Some(match name {
        "double" => Dtype::F64,
        "float" => Dtype::F32,
        "half" => Dtype::F16,
        "chalf" => Dtype::C32,
        "cfloat" => Dtype::C64,
        "cdouble" => Dtype::C128,
        "long" => Dtype::I64,
        "int" => Dtype::I32,
        "short" => Dtype::I16,
        "float64" | "float32" | "float16" | "bfloat16" | "complex32" | "complex64"
        | "complex128" | "int64" | "int32" | "int16" | "int8" | "uint64" | "uint32" | "uint16"
        | "uint8" | "bool" | "float8_e4m3fn" | "float8_e5m2" | "float8_e4m3fnuz"
        | "float8_e5m2fnuz" | "float8_e8m0fnu" => return Dtype::from_name(name),
        _ => return None,
    })
}
