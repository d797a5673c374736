//! The driver's side of a split virtqueue (virtio 1.3 §2.7) over shared memory, with indirect descriptors and EVENT_IDX
//! as a Linux guest uses them. `virtio-driver` lays the ring out and tells the device of it, but knows no indirect
//! descriptors, without which 512 requests do not fit a queue of 1024; so the ring is driven here.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use super::sys::SharedMemory;

/// Size of one descriptor.
pub(super) const DESCRIPTOR_BYTES: usize = 16;

const FLAG_NEXT: u16 = 1;
const FLAG_WRITE: u16 = 2;
const FLAG_INDIRECT: u16 = 4;
const USED_NO_NOTIFY: u16 = 1;

/// One piece of guest memory of a request.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    /// Where, as the device knows it.
    pub(super) address: u64,
    /// How long.
    pub(super) length: u32,
    /// Whether the device writes it.
    pub(super) device_writes: bool,
}

/// Where the parts of a ring are in the shared memory.
#[derive(Clone, Copy)]
pub(super) struct RingPlace {
    pub(super) descriptors: usize,
    pub(super) available: usize,
    pub(super) used: usize,
    /// Entries, a power of two.
    pub(super) size: u16,
}

/// One virtqueue, driver's side.
pub(super) struct Ring {
    place: RingPlace,
    event_idx: bool,
    next_available: Wrapping<u16>,
    next_used: Wrapping<u16>,
    /// Available index at the last decision about a kick.
    decided: Wrapping<u16>,
}

impl Ring {
    pub(super) fn new(place: RingPlace, event_idx: bool) -> Self {
        Self { place, event_idx, next_available: Wrapping(0), next_used: Wrapping(0), decided: Wrapping(0) }
    }

    /// Makes descriptor `head` stand for the indirect table of `entries` descriptors at `table` of the memory.
    pub(super) fn point_to_table(&self, memory: &SharedMemory, head: u16, table: u64, entries: u32) {
        let bytes = entries * u32::try_from(DESCRIPTOR_BYTES).expect("16 fits");
        let at = self.place.descriptors + usize::from(head) * DESCRIPTOR_BYTES;
        memory.write(at, &descriptor(table, bytes, FLAG_INDIRECT, 0));
    }

    /// Writes `pieces` as consecutive chained descriptors from `head` of the ring's own table.
    pub(super) fn write_chain(&self, memory: &SharedMemory, head: u16, pieces: &[Piece]) {
        write_table(memory, self.place.descriptors + usize::from(head) * DESCRIPTOR_BYTES, head, pieces);
    }

    /// Offers the request that starts at descriptor `head` to the device.
    pub(super) fn publish(&mut self, memory: &SharedMemory, head: u16) {
        let slot = usize::from(self.next_available.0 & (self.place.size - 1));
        memory.atomic_u16(self.place.available + 4 + 2 * slot).store(head.to_le(), Ordering::Relaxed);
        self.next_available += 1;
        memory.atomic_u16(self.place.available + 2).store(self.next_available.0.to_le(), Ordering::Release);
    }

    /// Whether the device wants to be told of what was published since the last call (virtio 1.3 §2.7.10).
    pub(super) fn kick_is_due(&mut self, memory: &SharedMemory) -> bool {
        let before = std::mem::replace(&mut self.decided, self.next_available);
        if before == self.next_available {
            return false;
        }
        // The index must be visible before the device's wish is read, or both sides may wait for each other.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event_at = self.place.used + 4 + 8 * usize::from(self.place.size);
            let event = Wrapping(u16::from_le(memory.atomic_u16(event_at).load(Ordering::Relaxed)));
            self.next_available - event - Wrapping(1) < self.next_available - before
        } else {
            u16::from_le(memory.atomic_u16(self.place.used).load(Ordering::Relaxed)) & USED_NO_NOTIFY == 0
        }
    }

    /// Takes the next finished request: the descriptor it started at, as the device says it.
    pub(super) fn take_used(&mut self, memory: &SharedMemory) -> Option<u32> {
        if !self.has_used(memory) {
            return None;
        }
        let slot = usize::from(self.next_used.0 & (self.place.size - 1));
        let mut head = [0_u8; 4];
        memory.read(self.place.used + 4 + 8 * slot, &mut head);
        self.next_used += 1;
        Some(u32::from_le_bytes(head))
    }

    /// Asks for an interrupt with the next finished request. True when one is there already: do not sleep.
    pub(super) fn arm(&self, memory: &SharedMemory) -> bool {
        if self.event_idx {
            let event_at = self.place.available + 4 + 2 * usize::from(self.place.size);
            memory.atomic_u16(event_at).store(self.next_used.0.to_le(), Ordering::Relaxed);
        }
        // The wish must be visible before the used index is read once more: the mirror image of `kick_is_due`.
        fence(Ordering::SeqCst);
        self.has_used(memory)
    }

    fn has_used(&self, memory: &SharedMemory) -> bool {
        let index = memory.atomic_u16(self.place.used + 2).load(Ordering::Acquire);
        u16::from_le(index) != self.next_used.0
    }
}

/// Writes `pieces` as an indirect table at offset `at` of the memory.
pub(super) fn write_indirect(memory: &SharedMemory, at: usize, pieces: &[Piece]) {
    write_table(memory, at, 0, pieces);
}

fn write_table(memory: &SharedMemory, at: usize, first: u16, pieces: &[Piece]) {
    let mut next = first;
    for (index, piece) in pieces.iter().enumerate() {
        next += 1;
        let more = if index + 1 < pieces.len() { FLAG_NEXT } else { 0 };
        let writes = if piece.device_writes { FLAG_WRITE } else { 0 };
        let bytes = descriptor(piece.address, piece.length, more | writes, next);
        memory.write(at + index * DESCRIPTOR_BYTES, &bytes);
    }
}

fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> [u8; DESCRIPTOR_BYTES] {
    let mut bytes = [0; DESCRIPTOR_BYTES];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&length.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}
