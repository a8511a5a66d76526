//! Reading numbers and blocks of an HDF5 file, within a budget.

use crate::plan::clip;
use crate::source::view::{Refusal, View};
use std::cell::Cell;

/// What reading headers may cost beyond the length of the file, in bytes read and bytes
/// kept: headers may refer to each other in a ring.
const BUDGET_BYTES: u64 = 8 << 20;

/// A file as its headers see it: addresses count from a base.
pub(super) struct Reader<'a> {
    pub(super) view: View<'a>,
    /// Bytes of an address and of a length.
    pub(super) offset_len: usize,
    pub(super) length_len: usize,
    budget: Cell<u64>,
    /// The same for what is kept in memory.
    memory: Cell<u64>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(view: View<'a>, offset_len: u8, length_len: u8) -> Result<Self, Refusal> {
        for len in [offset_len, length_len] {
            if !matches!(len, 2 | 4 | 8) {
                return Err(view.malformed(8, format!("numbers of {len} bytes")));
            }
        }
        let budget = view.byte_len().saturating_add(BUDGET_BYTES);
        Ok(Reader {
            view,
            offset_len: offset_len.into(),
            length_len: length_len.into(),
            budget: Cell::new(budget.saturating_mul(2)),
            memory: Cell::new(budget),
        })
    }

    /// A block of the file.
    pub(super) fn block(&self, address: u64, len: u64) -> Result<Block<'_, 'a>, Refusal> {
        let cost = len.saturating_add(64);
        let Some(left) = self.budget.get().checked_sub(cost) else {
            return Err(self
                .view
                .malformed(address, "its headers refer to each other too often"));
        };
        self.budget.set(left);
        let bytes = self.view.read(address, len)?;
        Ok(Block {
            reader: self,
            address,
            bytes,
            at: 0,
        })
    }

    /// Notes that bytes are kept.
    pub(super) fn keep(&self, bytes: u64, what: &str) -> Result<(), Refusal> {
        match self.memory.get().checked_sub(bytes) {
            Some(left) => self.memory.set(left),
            None => {
                let why = "its headers take more memory than the file is long";
                return Err(Refusal::unsupported(clip(what), why));
            }
        }
        Ok(())
    }

    /// The address that stands for none.
    pub(super) fn is_nowhere(&self, address: u64) -> bool {
        address == u64::MAX >> (64 - 8 * self.offset_len)
    }
}

/// Bytes that are read from front to back.
#[derive(Clone)]
pub(super) struct Block<'r, 'a> {
    reader: &'r Reader<'a>,
    /// Where the bytes are in the file.
    pub(super) address: u64,
    bytes: Vec<u8>,
    at: usize,
}

impl<'r, 'a> Block<'r, 'a> {
    /// The next bytes as a block of their own.
    pub(super) fn sub(&mut self, len: usize) -> Result<Block<'r, 'a>, Refusal> {
        let address = self.place();
        let bytes = self.take(len)?.to_vec();
        Ok(Block {
            reader: self.reader,
            address,
            bytes,
            at: 0,
        })
    }

    pub(super) fn place(&self) -> u64 {
        self.address.saturating_add(self.at as u64)
    }

    pub(super) fn rest(&self) -> usize {
        self.bytes.len() - self.at
    }

    pub(super) fn bad(&self, why: impl Into<String>) -> Refusal {
        self.reader.view.malformed(self.place(), why)
    }

    pub(super) fn take(&mut self, len: usize) -> Result<&[u8], Refusal> {
        if len > self.rest() {
            return Err(self.bad(format!("{len} bytes are needed, {} are left", self.rest())));
        }
        let start = self.at;
        self.at += len;
        Ok(self.bytes.get(start..self.at).unwrap_or_default())
    }

    pub(super) fn skip(&mut self, len: usize) -> Result<(), Refusal> {
        self.take(len).map(drop)
    }

    /// A little-endian number of so many bytes.
    pub(super) fn number(&mut self, len: usize) -> Result<u64, Refusal> {
        let mut wide = [0; 8];
        if len > 8 {
            return Err(self.bad(format!("a number of {len} bytes")));
        }
        wide[..len].copy_from_slice(self.take(len)?);
        Ok(u64::from_le_bytes(wide))
    }

    pub(super) fn u8(&mut self) -> Result<u8, Refusal> {
        Ok(self.number(1)? as u8)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Refusal> {
        Ok(self.number(2)? as u16)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Refusal> {
        Ok(self.number(4)? as u32)
    }

    pub(super) fn offset(&mut self) -> Result<u64, Refusal> {
        self.number(self.reader.offset_len)
    }

    pub(super) fn length(&mut self) -> Result<u64, Refusal> {
        self.number(self.reader.length_len)
    }

    pub(super) fn signature(&mut self, expected: &[u8; 4]) -> Result<(), Refusal> {
        if self.take(4)? != expected {
            self.at -= 4;
            let expected = String::from_utf8_lossy(expected).into_owned();
            return Err(self.bad(format!("there is no {expected} block")));
        }
        Ok(())
    }

    /// Text up to a NUL, which is passed.
    pub(super) fn text(&mut self) -> Result<Vec<u8>, Refusal> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let Some(len) = rest.iter().position(|&byte| byte == 0) else {
            return Err(self.bad("a name does not end"));
        };
        let text = self.take(len)?.to_vec();
        self.skip(1)?;
        Ok(text)
    }

    /// The bytes, all of them.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}
