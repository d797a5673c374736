//! Memory windows: keys for the peer that each reach one piece of our memory, for the time of one request. A window is
//! bound in the order of the work, so the key is good when the peer hears of it; it is bound again only when the card has
//! said that its last key is invalid.

use super::{Access, Ended, Grant, Held, Lent, Link, Operation, ReadUnderWay};
use crate::transport::rdma::endpoint::{Keys, Verbs};
use crate::transport::rdma::{MAX_WINDOWS, RdmaError};
use crate::wire::MessageHeader;

/// A window that is bound.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Bound {
    window: usize,
    key: u32,
}

/// The windows of a connection, made as they are needed. A card holds some 64 bytes for each.
pub(super) struct Pool {
    /// The last key of each.
    keys: Vec<u32>,
    free: Vec<usize>,
    most: usize,
}

impl Default for Pool {
    fn default() -> Self {
        Self { keys: Vec::new(), free: Vec::new(), most: MAX_WINDOWS }
    }
}

impl Pool {
    /// Most places that one request can ever have.
    pub(super) const fn most(&self) -> usize {
        self.most
    }

    pub(super) const fn free(&self) -> usize {
        self.free.len()
    }

    #[cfg(test)]
    pub(super) const fn in_use(&self) -> usize {
        self.keys.len() - self.free.len()
    }

    /// Makes windows until so many are free, as far as the card has them: a connection can do with few, but not with none.
    pub(super) fn provide<V: Verbs>(&mut self, verbs: &mut V, wanted: usize) -> Result<(), RdmaError> {
        while self.free.len() < wanted && self.keys.len() < self.most {
            match verbs.window() {
                Ok(key) => {
                    self.free.push(self.keys.len());
                    self.keys.push(key);
                }
                Err(error) if self.keys.is_empty() => return Err(error),
                Err(error) => {
                    tracing::warn!("{} memory windows must do for a connection: {error}", self.keys.len());
                    self.most = self.keys.len();
                }
            }
        }
        Ok(())
    }

    /// Takes a window that is free, and the key that it is to be bound by: the number of the window, and another last byte.
    fn take(&mut self) -> Option<Bound> {
        let window = self.free.pop()?;
        let last = self.keys[window];
        let key = last & !0xff | last.wrapping_add(1) & 0xff;
        self.keys[window] = key;
        Some(Bound { window, key })
    }

    /// The card says that the key is invalid.
    fn give_back(&mut self, bound: Bound) {
        self.free.push(bound.window);
    }
}

impl<V: Verbs> Link<V> {
    /// Binds a window to a piece of memory, if there is one free; returns the key for the peer.
    pub(super) fn bind(&mut self, address: u64, length: u32, memory: Keys) -> Option<Bound> {
        let bound = self.pool.take()?;
        let Bound { window, key } = bound;
        self.push(Operation::Bind { window, key, address, length, memory: memory.local }, &[], None, false);
        self.counters.windows_bound += 1;
        Some(bound)
    }

    /// A read is over, or given up for another of its name: its keys are to be made invalid before anybody hears of it.
    pub(super) fn end_read(&mut self, answer: Option<(MessageHeader, Vec<u8>)>, read: ReadUnderWay) {
        if read.windows.is_empty() {
            if let Some(staged) = read.staged {
                self.unstage(staged);
            }
            return;
        }
        self.ending.push_back(Ended::Read { answer, read });
    }

    /// Binds a window to each piece of memory that is to be lent, as far as the send queue has room; what tells the peer of
    /// its key goes behind that.
    pub(super) fn bind_lent(&mut self) {
        while self.room() > 2
            && let Some(window) = self.to_lend.pop_front()
        {
            let Some(Lent { memory, keys, .. }) = self.lent.get(&window) else { continue };
            let (address, keys) = (memory.base() as u64, *keys);
            let length = u32::try_from(memory.length()).unwrap_or(u32::MAX);
            let Some(bound) = self.bind(address, length, keys) else {
                return self.to_lend.push_front(window);
            };
            if let Some(lent) = self.lent.get_mut(&window) {
                lent.access = Access::Window(bound);
            }
            self.grants.push_back(Grant { window, length, key: bound.key, address });
        }
    }

    /// Has the card make the keys of what is over invalid, as far as the send queue has room.
    pub(super) fn invalidate(&mut self) {
        while let Some(ended) = self.ending.front()
            && self.room() >= ended.keys().len()
        {
            let Some(ended) = self.ending.pop_front() else { return };
            let mut number = self.next_number;
            for bound in ended.keys() {
                number = self.push(Operation::Invalidate { key: bound.key }, &[], None, false);
            }
            self.counters.windows_invalidated += ended.keys().len() as u64;
            self.hold(number, Held::Ended(Box::new(ended)));
        }
    }

    /// The card says that the keys are invalid: the windows are free.
    pub(super) fn free_windows(&mut self, ended: &Ended) {
        for bound in ended.keys() {
            self.pool.give_back(*bound);
        }
    }
}

impl Ended {
    fn keys(&self) -> &[Bound] {
        match self {
            Self::Read { read, .. } => &read.windows,
            Self::Lent { bound, .. } => std::slice::from_ref(bound),
        }
    }
}

impl Bound {
    pub(super) const fn key(self) -> u32 {
        self.key
    }
}
