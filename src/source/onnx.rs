//! ONNX: the initializers of a model's graph, in the model file or in files beside it. The
//! file is walked field by field and never read as a whole.

use super::{
    SourceError, builder::Builder, error::ContentError, files::OpenFile, protobuf::varint,
};
use crate::{
    format::Dtype,
    plan::{EntryHeader, MAX_DIMENSIONS, MAX_ENTRY_NAME_LEN, clip},
};
use std::collections::HashMap;
use std::fs;
use std::path::{Component, Path, PathBuf};

/// Bytes that are read at once.
const WINDOW_LEN: u64 = 16 << 10;
/// Most bytes of all tensors whose numbers are stored one by one, and are decoded.
const DECODED_BYTES_MAX: u64 = 4 << 20;
/// Longest name of a file beside the model.
const MAX_LOCATION_LEN: u64 = 4096;
/// Fields of a model and how they are stored: 0 for numbers, 2 for the rest.
const MODEL_FIELDS: [(u32, u8); 11] = [
    (1, 0),
    (2, 2),
    (3, 2),
    (4, 2),
    (5, 0),
    (6, 2),
    (7, 2),
    (8, 2),
    (14, 2),
    (20, 2),
    (25, 2),
];
/// The field of a model that holds its graph.
const GRAPH: u32 = 7;

/// A run of bytes of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

impl Run {
    fn end(self) -> u64 {
        self.offset + self.len
    }
}

/// Something with bytes at positions.
pub(crate) trait Bytes {
    fn byte_len(&self) -> u64;
    /// All of a run that lies within.
    fn range(&self, run: Run) -> Result<Vec<u8>, ContentError>;
}

impl Bytes for OpenFile {
    fn byte_len(&self) -> u64 {
        OpenFile::byte_len(self)
    }

    fn range(&self, run: Run) -> Result<Vec<u8>, ContentError> {
        self.bytes_at(run.offset, run.len)
            .map_err(|error| bad(error.to_string()))
    }
}

impl Bytes for [u8] {
    fn byte_len(&self) -> u64 {
        self.len() as u64
    }

    fn range(&self, run: Run) -> Result<Vec<u8>, ContentError> {
        let bytes = self.get(run.offset as usize..run.end() as usize);
        bytes.map(<[u8]>::to_vec).ok_or_else(|| bad("out of range"))
    }
}

/// What a field holds.
#[derive(Clone, Copy, Debug)]
enum Value {
    Number(u64),
    Run(Run),
}

impl Value {
    fn number(self) -> Result<u64, ContentError> {
        match self {
            Value::Number(number) => Ok(number),
            Value::Run(_) => Err(bad("a field that should be a number is none")),
        }
    }

    fn run(self) -> Result<Run, ContentError> {
        match self {
            Value::Run(run) => Ok(run),
            Value::Number(_) => Err(bad("a field that should hold bytes does not")),
        }
    }
}

/// What is called with every field: its number, how it is stored, its content.
type Visit<'a, W> = dyn FnMut(&mut W, u32, u8, Value) -> Result<(), ContentError> + 'a;

/// Reads messages by position.
struct Walker<'a, B: Bytes + ?Sized> {
    bytes: &'a B,
    window: Vec<u8>,
    window_offset: u64,
}

impl<'a, B: Bytes + ?Sized> Walker<'a, B> {
    fn new(bytes: &'a B) -> Self {
        Walker {
            bytes,
            window: Vec::new(),
            window_offset: 0,
        }
    }

    /// Up to 10 bytes from here on, not beyond `end`.
    fn peek(&mut self, at: u64, end: u64) -> Result<&[u8], ContentError> {
        let want = (end - at).min(10);
        let has = self.window_offset..self.window_offset + self.window.len() as u64;
        if at < has.start || at + want > has.end {
            let len = WINDOW_LEN.min(self.bytes.byte_len().saturating_sub(at));
            self.window = self.bytes.range(Run { offset: at, len })?;
            self.window_offset = at;
        }
        let start = (at - self.window_offset) as usize;
        let end = (start + want as usize).min(self.window.len());
        Ok(&self.window[start..end])
    }

    fn varint(&mut self, at: &mut u64, end: u64) -> Result<u64, ContentError> {
        let start = *at;
        let bytes = self.peek(start, end)?;
        let mut rest = bytes;
        let number = varint(&mut rest).map_err(|error| bad(format!("at byte {start}: {error}")))?;
        *at += (bytes.len() - rest.len()) as u64;
        Ok(number)
    }

    /// Calls `visit` with every field of a message.
    fn for_each(&mut self, message: Run, visit: &mut Visit<'_, Self>) -> Result<(), ContentError> {
        let (mut at, end) = (message.offset, message.end());
        while at < end {
            let start = at;
            let bad = |why: String| bad(format!("at byte {start}: {why}"));
            let tag = self.varint(&mut at, end)?;
            let number = u32::try_from(tag >> 3).ok().filter(|&number| number > 0);
            let number = number.ok_or_else(|| bad("a field without a number".to_owned()))?;
            let kind = (tag & 7) as u8;
            let (value, len) = match kind {
                0 => (Value::Number(self.varint(&mut at, end)?), 0),
                1 => (Value::Run(Run { offset: at, len: 8 }), 8),
                2 => {
                    let len = self.varint(&mut at, end)?;
                    (Value::Run(Run { offset: at, len }), len)
                }
                5 => (Value::Run(Run { offset: at, len: 4 }), 4),
                kind => return Err(bad(format!("field {number} of the unknown kind {kind}"))),
            };
            let next = at.checked_add(len).filter(|&next| next <= end);
            let cut = || {
                bad(format!(
                    "field {number} has {len} bytes at {at}, what it is in ends at {end}"
                ))
            };
            at = next.ok_or_else(cut)?;
            visit(self, number, kind, value)?;
        }
        Ok(())
    }

    fn text(&self, run: Run, limit: u64) -> Result<String, ContentError> {
        if run.len > limit {
            return Err(bad(format!("a name of {} bytes, {limit} can be", run.len)));
        }
        String::from_utf8(self.bytes.range(run)?).map_err(|_| bad("a name that is not utf-8"))
    }
}

/// A tensor as the model describes it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) shape: Vec<u64>,
    pub(crate) element: u64,
    pub(crate) raw: Option<Run>,
    /// Number of the field with its elements, and where they are.
    pub(crate) typed: Option<(u32, Run)>,
    pub(crate) external: Option<External>,
}

/// Where a tensor lies outside of the model.
#[derive(Clone, Debug, Default)]
pub(crate) struct External {
    pub(crate) location: String,
    pub(crate) offset: u64,
    pub(crate) len: Option<u64>,
}

/// Whether a file is a model: fields of one and no others, a graph among them.
pub(super) fn is_model(file: &OpenFile) -> Result<bool, SourceError> {
    Ok(begins(file)? && graph_of(file).is_ok_and(|graph| graph.is_some()))
}

/// Whether a file begins like a model.
pub(super) fn begins(file: &OpenFile) -> Result<bool, SourceError> {
    // The version comes first, and is small.
    Ok(matches!(file.prefix(2)?[..], [8, 1..=64]))
}

/// Why a file that begins like a model is none.
pub(super) fn why_not(file: &OpenFile) -> SourceError {
    let error = graph_of(file).err();
    let error = error.unwrap_or_else(|| bad("a model without a graph"));
    SourceError::content(file.path(), error)
}

/// The graph of a model, if this is one.
fn graph_of<B: Bytes + ?Sized>(bytes: &B) -> Result<Option<Run>, ContentError> {
    let mut graph = None;
    let whole = Run {
        offset: 0,
        len: bytes.byte_len(),
    };
    Walker::new(bytes).for_each(whole, &mut |_, number, kind, value| {
        if !MODEL_FIELDS.contains(&(number, kind)) {
            return Err(bad(format!("a model has no field {number} of kind {kind}")));
        }
        if number == GRAPH {
            graph = Some(value.run()?);
        }
        Ok(())
    })?;
    Ok(graph)
}

/// Calls `visit` with every initializer of a model, and says how many sparse ones there are.
pub(crate) fn for_each_initializer<B: Bytes + ?Sized>(
    bytes: &B,
    visit: &mut dyn FnMut(Tensor) -> Result<(), ContentError>,
) -> Result<u64, ContentError> {
    let graph = graph_of(bytes)?.ok_or_else(|| bad("a model without a graph"))?;
    let mut sparse_count = 0;
    Walker::new(bytes).for_each(graph, &mut |walker, number, _, value| {
        match number {
            5 => visit(read_tensor(walker, value.run()?)?)?,
            15 => sparse_count += 1,
            _ => {}
        }
        Ok(())
    })?;
    Ok(sparse_count)
}

fn read_tensor<B: Bytes + ?Sized>(
    walker: &mut Walker<'_, B>,
    message: Run,
) -> Result<Tensor, ContentError> {
    let mut tensor = Tensor::default();
    let mut is_external = false;
    let mut external = External::default();
    walker.for_each(message, &mut |walker, number, kind, value| {
        match (number, kind) {
            (1, 0) => push_dim(&mut tensor.shape, value.number()?)?,
            (1, 2) => {
                let run = value.run()?;
                let mut at = run.offset;
                while at < run.end() {
                    push_dim(&mut tensor.shape, walker.varint(&mut at, run.end())?)?;
                }
            }
            (2, _) => tensor.element = value.number()?,
            (4 | 5 | 7 | 10 | 11, 2) => {
                let earlier = tensor.typed.replace((number, value.run()?));
                if earlier.is_some() {
                    return Err(bad("elements of a tensor in several places"));
                }
            }
            (4 | 5 | 7 | 10 | 11, _) => {
                return Err(bad("elements that are stored one by one, not packed"));
            }
            (8, _) => tensor.name = walker.text(value.run()?, MAX_ENTRY_NAME_LEN as u64)?,
            (9, _) => tensor.raw = Some(value.run()?),
            (13, _) => read_external(walker, value.run()?, &mut external)?,
            (14, _) => is_external = value.number()? == 1,
            _ => {}
        }
        Ok(())
    })?;
    if tensor.name.is_empty() {
        let why = format!("at byte {}: a tensor without a name", message.offset);
        return Err(bad(why));
    }
    tensor.external = is_external.then_some(external);
    Ok(tensor)
}

fn push_dim(shape: &mut Vec<u64>, dim: u64) -> Result<(), ContentError> {
    if shape.len() == MAX_DIMENSIONS {
        return Err(bad(format!(
            "a tensor of more than {MAX_DIMENSIONS} dimensions"
        )));
    }
    if dim.cast_signed() < 0 {
        return Err(bad(format!("a dimension of {}", dim.cast_signed())));
    }
    shape.push(dim);
    Ok(())
}

/// One of the keys that say where a tensor lies.
fn read_external<B: Bytes + ?Sized>(
    walker: &mut Walker<'_, B>,
    message: Run,
    external: &mut External,
) -> Result<(), ContentError> {
    let (mut key, mut value) = (String::new(), String::new());
    walker.for_each(message, &mut |walker, number, _, field| {
        match number {
            1 => key = walker.text(field.run()?, MAX_LOCATION_LEN)?,
            2 => value = walker.text(field.run()?, MAX_LOCATION_LEN)?,
            _ => {}
        }
        Ok(())
    })?;
    let number = || {
        // A sign would pass as well.
        let digits = value.bytes().all(|byte| byte.is_ascii_digit());
        let number = value.parse::<u64>().ok().filter(|_| digits);
        number.ok_or_else(|| bad(format!("{key} {:?} of a tensor is no number", clip(&value))))
    };
    match &key[..] {
        "offset" => external.offset = number()?,
        "length" => external.len = Some(number()?),
        "location" => external.location = value,
        _ => {}
    }
    Ok(())
}

/// Adds the initializers of a model.
pub(super) fn load(path: &Path, file: &OpenFile, builder: &mut Builder) -> Result<(), SourceError> {
    let content = |error| SourceError::content(file.path(), error);
    let mut tensors = Vec::new();
    let sparse_count = for_each_initializer(file, &mut |tensor| {
        if tensors.len() as u64 == crate::plan::MAX_ENTRIES {
            return Err(bad("too many tensors"));
        }
        tensors.push(tensor);
        Ok(())
    })
    .map_err(content)?;
    if sparse_count > 0 {
        builder.skip(
            format!("{sparse_count} sparse initializers"),
            "they are not dense arrays",
        );
    }
    // The folder of the name, not of what a link leads to: data are beside it.
    let folder = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let mut reader = Reader {
        file,
        model_file: builder.files.add(file, &[])?,
        root: fs::canonicalize(folder)
            .map_err(|error| SourceError::io("resolve", folder, error))?,
        outside: HashMap::new(),
        decoded_bytes: 0,
        builder,
    };
    for tensor in tensors {
        reader.add(tensor)?;
    }
    reader.builder.add_format("onnx");
    Ok(())
}

struct Reader<'a> {
    file: &'a OpenFile,
    model_file: u32,
    root: PathBuf,
    /// File numbers of what lies beside the model.
    outside: HashMap<String, (u32, u64)>,
    decoded_bytes: u64,
    builder: &'a mut Builder,
}

impl Reader<'_> {
    fn add(&mut self, tensor: Tensor) -> Result<(), SourceError> {
        let path = self.file.path();
        if tensor.element == 8 {
            self.builder.skip(tensor.name, "it holds texts");
            return Ok(());
        }
        let dtype = dtype_of(tensor.element).ok_or_else(|| {
            let why = format!("elements of type {} are not known", tensor.element);
            SourceError::unsupported(path, &tensor.name, why)
        })?;
        let header = EntryHeader::tensor(tensor.name, dtype, &tensor.shape)?;
        let wrong = |len: u64| {
            let why = format!(
                "{:?} has {len} bytes, but {} by shape and type",
                clip(&header.name),
                header.byte_len
            );
            SourceError::malformed(path, why)
        };
        if let Some(external) = &tensor.external {
            let (index, file_len) = self.open_outside(external)?;
            let rest = file_len.saturating_sub(external.offset);
            let len = external.len.unwrap_or_else(|| rest.min(header.byte_len));
            if len != header.byte_len {
                return Err(wrong(len));
            }
            let entry = self.builder.add(header, index, external.offset)?;
            entry.sources.push(self.model_file);
            return Ok(());
        }
        match (tensor.raw, tensor.typed) {
            (Some(run), None) if run.len == header.byte_len => {
                self.builder.add(header, self.model_file, run.offset)?;
            }
            (Some(run), None) => return Err(wrong(run.len)),
            // Packed floats are what they are elsewhere.
            (None, Some((4 | 10, run))) if is_float_field(tensor.typed, dtype) => {
                if run.len != header.byte_len {
                    return Err(wrong(run.len));
                }
                self.builder.add(header, self.model_file, run.offset)?;
            }
            (None, Some((number, run))) => self.add_decoded(header, dtype, number, run)?,
            (None, None) if header.byte_len == 0 => {
                self.builder.add(header, self.model_file, 0)?;
            }
            (None, None) => return Err(wrong(0)),
            (Some(_), Some(_)) => {
                let why = format!("{:?} has its elements in two places", clip(&header.name));
                return Err(SourceError::malformed(path, why));
            }
        }
        Ok(())
    }

    /// Numbers of variable length: kept in memory as what they stand for.
    fn add_decoded(
        &mut self,
        header: EntryHeader,
        dtype: Dtype,
        number: u32,
        run: Run,
    ) -> Result<(), SourceError> {
        let path = self.file.path();
        let unsupported = |why: String| SourceError::unsupported(path, &header.name, why);
        let fits = match number {
            5 => {
                dtype.bits() <= 32
                    && !dtype.is_packed()
                    && dtype != Dtype::F32
                    && dtype != Dtype::U32
            }
            7 => dtype == Dtype::I64,
            11 => matches!(dtype, Dtype::U32 | Dtype::U64),
            _ => false,
        };
        if !fits {
            return Err(unsupported(format!(
                "its elements are in the field {number}, where {dtype} is not expected"
            )));
        }
        self.decoded_bytes = self.decoded_bytes.saturating_add(header.byte_len);
        if self.decoded_bytes > DECODED_BYTES_MAX || run.len > 10 * DECODED_BYTES_MAX {
            return Err(unsupported(format!(
                "more than {DECODED_BYTES_MAX} bytes are stored as single numbers: save the model with raw data"
            )));
        }
        let encoded = self.file.bytes_at(run.offset, run.len)?;
        let (mut rest, item_len) = (&encoded[..], header.item_len() as usize);
        let mut bytes = Vec::with_capacity(header.byte_len as usize);
        while !rest.is_empty() && (bytes.len() as u64) < header.byte_len {
            let number = varint(&mut rest).map_err(|error| SourceError::content(path, error))?;
            bytes.extend_from_slice(&number.to_le_bytes()[..item_len]);
        }
        if bytes.len() as u64 != header.byte_len || !rest.is_empty() {
            let why = format!(
                "{:?} has more or fewer elements than its shape",
                clip(&header.name)
            );
            return Err(SourceError::malformed(path, why));
        }
        self.builder.add_memory(header, bytes, self.model_file)?;
        Ok(())
    }

    /// Opens a file beneath the folder of the model, and only there.
    fn open_outside(&mut self, external: &External) -> Result<(u32, u64), SourceError> {
        let location = &external.location;
        if let Some(&known) = self.outside.get(location) {
            return Ok(known);
        }
        let outside = || {
            let why = format!(
                "data at {:?}, which is not beneath its folder",
                clip(location)
            );
            SourceError::malformed(self.file.path(), why)
        };
        let relative = Path::new(location);
        let is_plain = relative
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
        if location.is_empty() || !is_plain || location.contains(['\0', '\\']) {
            return Err(outside());
        }
        let opened = OpenFile::open(&self.root.join(relative)).map_err(|error| match error {
            SourceError::NotFound { .. } => {
                let why = format!("its data {:?} do not exist", clip(location));
                SourceError::malformed(self.file.path(), why)
            }
            error => error,
        })?;
        // A link may still have led elsewhere.
        if !opened.path().starts_with(&self.root) {
            return Err(outside());
        }
        let index = self.builder.files.add(&opened, &[])?;
        self.outside
            .insert(location.clone(), (index, opened.byte_len()));
        Ok((index, opened.byte_len()))
    }
}

fn is_float_field(typed: Option<(u32, Run)>, dtype: Dtype) -> bool {
    matches!(
        (typed, dtype),
        (Some((4, _)), Dtype::F32 | Dtype::C64) | (Some((10, _)), Dtype::F64 | Dtype::C128)
    )
}

fn dtype_of(element: u64) -> Option<Dtype> {
    Some(match element {
        1 => Dtype::F32,
        2 => Dtype::U8,
        3 => Dtype::I8,
        4 => Dtype::U16,
        5 => Dtype::I16,
        6 => Dtype::I32,
        7 => Dtype::I64,
        9 => Dtype::Bool,
        10 => Dtype::F16,
        11 => Dtype::F64,
        12 => Dtype::U32,
        13 => Dtype::U64,
        14 => Dtype::C64,
        15 => Dtype::C128,
        16 => Dtype::Bf16,
        17 => Dtype::F8E4m3fn,
        18 => Dtype::F8E4m3fnuz,
        19 => Dtype::F8E5m2,
        20 => Dtype::F8E5m2fnuz,
        21 => Dtype::U4Packed,
        22 => Dtype::I4Packed,
        23 => Dtype::F4E2m1fn,
        24 => Dtype::F8E8m0fnu,
        _ => return None,
    })
}

fn bad(why: impl Into<String>) -> ContentError {
    ContentError::Malformed(why.into())
}
