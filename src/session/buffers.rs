//! Memory: one budget of bytes in flight, and buffers that are used again.

use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes per permit: keeps the count within what a semaphore can hold.
const UNIT_BYTES: u64 = 1024;

/// Bytes that may be in flight in one role. Cloning shares it.
#[derive(Clone, Debug)]
pub(crate) struct Budget {
    permits: Arc<Semaphore>,
    total_units: u32,
}

/// A part of a budget; dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Reserved {
    _permit: Option<OwnedSemaphorePermit>,
}

impl Budget {
    /// A budget of this many bytes.
    pub(crate) fn new(bytes: u64) -> Self {
        let units = (bytes / UNIT_BYTES).clamp(1, u64::from(u32::MAX >> 4)) as u32;
        Budget {
            permits: Arc::new(Semaphore::new(units as usize)),
            total_units: units,
        }
    }

    /// What it was made with, rounded down to what it counts in.
    pub(crate) fn total_bytes(&self) -> u64 {
        u64::from(self.total_units) * UNIT_BYTES
    }

    /// Waits for `bytes`. More than the whole budget counts as the whole, so that
    /// one chunk can always move.
    pub(crate) async fn reserve(&self, bytes: u64) -> Reserved {
        let permit = Arc::clone(&self.permits)
            .acquire_many_owned(self.units(bytes))
            .await;
        // The semaphore is never closed.
        Reserved {
            _permit: permit.ok(),
        }
    }

    fn units(&self, bytes: u64) -> u32 {
        u32::try_from(bytes.div_ceil(UNIT_BYTES))
            .unwrap_or(u32::MAX)
            .clamp(1, self.total_units)
    }
}

/// Buffers of one length, given back when the last byte was sent.
#[derive(Clone, Debug)]
pub(crate) struct BufferPool {
    free: Arc<Mutex<Vec<Vec<u8>>>>,
    buffer_len: usize,
    max_free: usize,
}

/// A buffer of a pool together with its share of the budget.
#[derive(Debug)]
pub(crate) struct PooledBuffer {
    bytes: Vec<u8>,
    len: usize,
    pool: BufferPool,
    reserved: Arc<Reserved>,
}

impl PooledBuffer {
    /// Its share of the budget, which stays taken as long as anybody holds it.
    pub(crate) fn reserved(&self) -> Arc<Reserved> {
        Arc::clone(&self.reserved)
    }
}

impl BufferPool {
    /// A pool that keeps at most `max_bytes` of unused buffers.
    pub(crate) fn new(buffer_len: usize, max_bytes: u64) -> Self {
        BufferPool {
            free: Arc::default(),
            buffer_len,
            max_free: (max_bytes / buffer_len.max(1) as u64) as usize,
        }
    }

    /// Length of the buffers that are used again, in bytes.
    pub(crate) fn buffer_len(&self) -> usize {
        self.buffer_len
    }

    /// A buffer of `len` bytes with arbitrary content. Short ones are not pooled:
    /// a small tensor must not pin a whole chunk.
    pub(crate) fn take(&self, len: usize, reserved: Reserved) -> PooledBuffer {
        let bytes = if len * 2 > self.buffer_len && len <= self.buffer_len {
            let reused = self
                .free
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .pop();
            reused.unwrap_or_else(|| vec![0; self.buffer_len])
        } else {
            vec![0; len]
        };
        PooledBuffer {
            bytes,
            len,
            pool: self.clone(),
            reserved: Arc::new(reserved),
        }
    }
}

impl AsRef<[u8]> for PooledBuffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl AsMut<[u8]> for PooledBuffer {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

impl Drop for PooledBuffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        if bytes.len() == self.pool.buffer_len {
            let mut free = self
                .pool
                .free
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if free.len() < self.pool.max_free {
                free.push(bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_buffer_gives_back_its_budget_and_itself() {
        let budget = Budget::new(4096);
        let pool = BufferPool::new(4096, 8192);
        let buffer = pool.take(4000, budget.reserve(4096).await);
        assert_eq!(
            (buffer.as_ref().len(), budget.permits.available_permits()),
            (4000, 0)
        );
        drop(buffer);
        assert_eq!(budget.permits.available_permits(), 4);
        assert_eq!(pool.free.lock().unwrap().len(), 1);
        drop(pool.take(10, budget.reserve(10).await));
        assert_eq!(pool.free.lock().unwrap().len(), 1);
        // More than everything is everything.
        drop(budget.reserve(1 << 40).await);
    }
}
