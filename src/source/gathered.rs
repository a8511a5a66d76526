//! A tensor put together of boxes of elements that lie in other orders, or in several
//! files: views with strides, tensors that were saved in parts.

use super::derived::Derived;
use super::{SourceError, boxes, files::FileTable};

/// Most bytes read ahead of what is needed.
const MAX_READ_LEN: u64 = 256 << 10;
/// Fewest bytes read: a page.
const MIN_READ_LEN: u64 = 4 << 10;

/// A box of elements and where they lie.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    /// Index in the tensor of its first element.
    pub(crate) start: Vec<u64>,
    /// Elements along each dimension.
    pub(crate) lens: Vec<u64>,
    /// Number of the file.
    pub(crate) file_index: u32,
    /// Place of its first element in the file.
    pub(crate) offset: u64,
    /// Bytes from one element to its neighbour along each dimension.
    pub(crate) steps: Vec<u64>,
}

impl Part {
    /// First byte behind the last element, counted from the start of the file; `None`
    /// where that is no number.
    pub(crate) fn end(&self, item_len: u64) -> Option<u64> {
        let mut end = self.offset.checked_add(item_len)?;
        for (&len, &step) in self.lens.iter().zip(&self.steps) {
            end = end.checked_add(len.checked_sub(1)?.checked_mul(step)?)?;
        }
        Some(end)
    }
}

/// The parts of a tensor, which cover it.
#[derive(Debug)]
pub(crate) struct Gathered {
    item_len: u64,
    shape: Vec<u64>,
    /// Bytes from one element to its neighbour in the tensor.
    steps: Vec<u64>,
    parts: Vec<Part>,
}

impl Gathered {
    /// `None` where the shape has no length in bytes.
    pub(crate) fn new(item_len: u64, shape: &[u64], parts: Vec<Part>) -> Option<Self> {
        let steps = boxes::steps(shape, item_len)?;
        let shape = shape.to_vec();
        Some(Gathered {
            item_len,
            shape,
            steps,
            parts,
        })
    }
}

impl Derived for Gathered {
    fn read_at(&self, files: &FileTable, offset: u64, buf: &mut [u8]) -> Result<(), SourceError> {
        // Whole elements first: cells are cut at any byte.
        let item_len = self.item_len.max(1);
        let end = offset + buf.len() as u64;
        let (first, last) = (offset / item_len, end.div_ceil(item_len));
        if offset.is_multiple_of(item_len) && end.is_multiple_of(item_len) {
            return self.elements(files, first, last, buf);
        }
        let mut whole = vec![0; ((last - first) * item_len) as usize];
        self.elements(files, first, last, &mut whole)?;
        let skip = (offset - first * item_len) as usize;
        buf.copy_from_slice(&whole[skip..skip + buf.len()]);
        Ok(())
    }
}

impl Gathered {
    fn elements(
        &self,
        files: &FileTable,
        first: u64,
        end: u64,
        buf: &mut [u8],
    ) -> Result<(), SourceError> {
        let base = first * self.item_len;
        boxes::cut(&self.shape, first, end, &mut |start, lens| {
            for part in &self.parts {
                let wanted = boxes::common((start, lens), (&part.start, &part.lens));
                if let Some((start, lens)) = wanted {
                    let inside = start.iter().zip(&part.start).map(|(a, b)| a - b);
                    let inside: Vec<u64> = inside.collect();
                    let from = part.offset + boxes::place(&inside, &part.steps);
                    let to = boxes::place(&start, &self.steps) - base;
                    let mut window = Window::of_file(files, part.file_index);
                    let item_len = self.item_len;
                    boxes::runs(
                        &lens,
                        item_len,
                        &part.steps,
                        &self.steps,
                        &mut |f, t, len| {
                            let to = (to + t) as usize;
                            window.copy(from + f, &mut buf[to..to + len as usize])
                        },
                    )?;
                }
            }
            Ok(())
        })
    }
}

/// Reads small runs of bytes from front to back, many at once where they are near.
pub(super) struct Window<R> {
    read: R,
    byte_len: u64,
    start: u64,
    bytes: Vec<u8>,
    next_len: u64,
}

impl Window<()> {
    pub(super) fn of_file(
        files: &FileTable,
        file_index: u32,
    ) -> Window<impl FnMut(u64, &mut [u8]) -> Result<(), SourceError>> {
        Window::new(files.byte_len(file_index), move |offset, buf: &mut [u8]| {
            files.read_at(file_index, offset, buf)
        })
    }
}

impl<R: FnMut(u64, &mut [u8]) -> Result<(), SourceError>> Window<R> {
    /// Of `byte_len` bytes, which `read` gives from an offset on.
    pub(super) fn new(byte_len: u64, read: R) -> Self {
        let (start, bytes, next_len) = (0, Vec::new(), MIN_READ_LEN);
        Window {
            read,
            byte_len,
            start,
            bytes,
            next_len,
        }
    }

    pub(super) fn copy(&mut self, offset: u64, to: &mut [u8]) -> Result<(), SourceError> {
        let len = to.len() as u64;
        if len >= MAX_READ_LEN {
            return (self.read)(offset, to);
        }
        let end = self.start + self.bytes.len() as u64;
        if offset < self.start || offset + len > end {
            // Near what was read last: there will be more.
            let is_near = offset >= self.start && offset <= end + MIN_READ_LEN;
            self.next_len = match is_near {
                true => (self.next_len * 2).min(MAX_READ_LEN),
                false => MIN_READ_LEN,
            };
            let read_len = self
                .next_len
                .max(len)
                .min(self.byte_len.saturating_sub(offset))
                .max(len);
            self.bytes.resize(read_len as usize, 0);
            self.start = offset;
            (self.read)(offset, &mut self.bytes)?;
        }
        let at = (offset - self.start) as usize;
        to.copy_from_slice(&self.bytes[at..at + to.len()]);
        Ok(())
    }
}
