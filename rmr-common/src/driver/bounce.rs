//! Copies of data in flight, and digests of what is sent: what keeps the legs the same although a guest may change its memory
//! while it is being written.

use crate::buffer::{self, Segment};
use crate::pool::{Epoch, Sequence, Slot, ViewNumber};
use crate::wire::{MessageHeader, data_digest};

/// Buffers that are kept for use again, at most.
const MAX_SPARE: usize = 64;

struct Copy {
    data: Vec<u8>,
    digest: u32,
}

/// A way to copy a part of a request's memory.
type CopyOut = fn(&[Segment], usize, usize, &mut Vec<u8>);

/// The message that a digest is for, on whichever leg.
type Key = (Slot, Sequence, Epoch, ViewNumber);

/// The copies, by slot.
#[derive(Default)]
pub(super) struct Bounces {
    copies: Vec<Option<Copy>>,
    spare: Vec<Vec<u8>>,
    last: Option<(Key, u32)>,
}

impl Bounces {
    /// The digest of what a message carries: computed once for all legs, which are sent it one after the other.
    pub(super) fn digest(&mut self, header: &MessageHeader, segments: &[Segment], offset: usize) -> u32 {
        let key = (header.slot, header.sequence, header.epoch, header.view);
        if let Some((last, digest)) = self.last
            && last == key
        {
            return digest;
        }
        let digest = buffer::digest(segments, offset, header.payload as usize);
        self.last = Some((key, digest));
        digest
    }

    /// The copy of what a message carries, made when the slot has none, and its digest.
    pub(super) fn copy(
        &mut self,
        header: &MessageHeader,
        segments: &[Segment],
        offset: usize,
        copy_out: CopyOut,
    ) -> (Segment, u32) {
        if self.get(header.slot).is_none() {
            let mut data = self.spare.pop().unwrap_or_default();
            data.clear();
            copy_out(segments, offset, header.payload as usize, &mut data);
            let digest = data_digest(&data);
            self.put(header.slot, Copy { data, digest });
        }
        match self.get(header.slot) {
            Some(copy) => (buffer::segment_of_bytes(&mut copy.data), copy.digest),
            None => (buffer::segment_of_bytes(&mut []), 0),
        }
    }

    /// Room for the data of an answer.
    pub(super) fn room(&mut self, header: &MessageHeader) -> Segment {
        let mut data = self.release(header.slot).or_else(|| self.spare.pop()).unwrap_or_default();
        data.clear();
        data.resize(header.payload as usize, 0);
        let segment = buffer::segment_of_bytes(&mut data);
        self.put(header.slot, Copy { data, digest: 0 });
        segment
    }

    /// What arrived there.
    pub(super) fn data(&self, slot: Slot) -> &[u8] {
        self.copies.get(usize::from(slot.0)).and_then(Option::as_ref).map_or(&[], |copy| &copy.data)
    }

    /// The copy is not needed any more.
    pub(super) fn end(&mut self, slot: Slot) {
        if let Some(data) = self.release(slot)
            && self.spare.len() < MAX_SPARE
        {
            self.spare.push(data);
        }
    }

    fn get(&mut self, slot: Slot) -> Option<&mut Copy> {
        self.copies.get_mut(usize::from(slot.0))?.as_mut()
    }

    fn put(&mut self, slot: Slot, copy: Copy) {
        let index = usize::from(slot.0);
        if self.copies.len() <= index {
            self.copies.resize_with(index + 1, || None);
        }
        self.copies[index] = Some(copy);
    }

    fn release(&mut self, slot: Slot) -> Option<Vec<u8>> {
        self.copies.get_mut(usize::from(slot.0)).and_then(Option::take).map(|copy| copy.data)
    }
}
