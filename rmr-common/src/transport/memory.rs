//! A pair of connected ends in one process, for tests of what stands on a connection without sockets.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::rc::Rc;

use super::{Connection, ConnectionError, Place, Receiver};
use crate::buffer::Segment;
use crate::wire::MessageHeader;

type Queue = Rc<RefCell<VecDeque<(MessageHeader, Vec<u8>)>>>;

/// One end of a pair. What one end flushes, the other receives, in order.
pub struct MemoryConnection {
    queued: VecDeque<(MessageHeader, Vec<u8>)>,
    outgoing: Queue,
    incoming: Queue,
    sent: Vec<u32>,
    starved: bool,
}

impl MemoryConnection {
    /// Two connected ends.
    #[must_use]
    pub fn pair() -> (Self, Self) {
        let (a, b): (Queue, Queue) = (Rc::default(), Rc::default());
        let end = |outgoing: &Queue, incoming: &Queue| Self {
            queued: VecDeque::new(),
            outgoing: Rc::clone(outgoing),
            incoming: Rc::clone(incoming),
            sent: Vec::new(),
            starved: false,
        };
        (end(&a, &b), end(&b, &a))
    }

    fn peer_is_gone(&self) -> bool {
        Rc::strong_count(&self.outgoing) == 1
    }
}

impl Connection for MemoryConnection {
    fn queue(&mut self, header: &MessageHeader, body: Option<Vec<u8>>) {
        self.queued.push_back((*header, body.unwrap_or_default()));
    }

    fn queue_data(
        &mut self,
        header: &MessageHeader,
        tag: Option<u32>,
        gather: &mut dyn FnMut(&mut Vec<Segment>),
    ) {
        let mut segments = Vec::new();
        gather(&mut segments);
        let mut data = Vec::with_capacity(header.payload as usize);
        for segment in segments {
            // SAFETY: the memory is readable by the promise made when the segment was created.
            data.extend_from_slice(unsafe { std::slice::from_raw_parts(segment.base(), segment.length()) });
        }
        self.queued.push_back((*header, data));
        self.sent.extend(tag);
    }

    fn flush(&mut self) -> Result<(), ConnectionError> {
        if self.peer_is_gone() {
            return Err(ConnectionError::Closed);
        }
        self.outgoing.borrow_mut().append(&mut self.queued);
        Ok(())
    }

    fn receive(&mut self, receiver: &mut dyn Receiver) -> Result<(), ConnectionError> {
        self.starved = false;
        loop {
            let next = self.incoming.borrow_mut().pop_front();
            let Some((header, data)) = next else {
                return if self.peer_is_gone() { Err(ConnectionError::Closed) } else { Ok(()) };
            };
            if !header.kind.carries_data() || data.is_empty() {
                receiver.deliver(&header, &data);
                continue;
            }
            let mut segments = Vec::new();
            match receiver.place(&header, &mut segments) {
                Place::Wait => {
                    self.incoming.borrow_mut().push_front((header, data));
                    self.starved = true;
                    return Ok(());
                }
                Place::Discard => {}
                Place::Data => scatter(&data, &segments),
            }
            receiver.deliver(&header, &[]);
        }
    }

    fn take_sent(&mut self, tags: &mut Vec<u32>) {
        tags.append(&mut self.sent);
    }

    fn wants_to_send(&self) -> bool {
        !self.queued.is_empty()
    }

    fn backlog(&self) -> usize {
        self.queued.len()
    }

    fn is_starved(&self) -> bool {
        self.starved
    }

    fn descriptor(&self) -> Option<RawFd> {
        None
    }
}

fn scatter(mut data: &[u8], segments: &[Segment]) {
    for segment in segments {
        let (part, rest) = data.split_at(segment.length().min(data.len()));
        // SAFETY: the memory is writable by the promise made when the segment was created, and is not `data`.
        unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), segment.base(), part.len()) };
        data = rest;
    }
}
