//! What a connection needs from verbs, in plain terms: work to post, completions to take. [`super::verbs::Endpoint`] is
//! the real thing; tests have a scripted one.

use std::any::Any;
use std::os::fd::RawFd;
use std::sync::Arc;

use super::memory::Pages;
use super::{Exposure, RdmaError};
use crate::buffer::Segment;

/// By which memory is named to the card: in work of our own, and in work of a peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Keys {
    pub(super) local: u32,
    pub(super) remote: u32,
}

/// A piece of local memory in a work request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Piece {
    pub(super) address: u64,
    pub(super) length: u32,
    pub(super) key: u32,
}

/// What a work request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Operation {
    /// Into a receive buffer of the peer.
    Send,
    /// Into memory that the peer has named.
    Write { address: u64, key: u32 },
    /// The same, and the peer is told a number.
    WriteWithImmediate { address: u64, key: u32, immediate: u32 },
    /// No data: from now on the peer may write to this piece of our memory, registered by the key `memory`, by the new
    /// `key` of a window.
    Bind { window: usize, key: u32, address: u64, length: u32, memory: u32 },
    /// No data: the key of a window that was bound is good for nothing any more.
    Invalidate { key: u32 },
}

impl std::fmt::Display for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Send => "send",
            Self::Write { .. } => "write to the peer's memory",
            Self::WriteWithImmediate { .. } => "write to the peer's memory with a number",
            Self::Bind { .. } => "binding of a memory window",
            Self::Invalidate { .. } => "invalidation of a memory window",
        })
    }
}

/// Work to post. Its memory is `count` pieces from `first` of the list that goes with it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct WorkRequest {
    pub(super) number: u64,
    pub(super) operation: Operation,
    pub(super) first: usize,
    pub(super) count: usize,
    pub(super) signaled: bool,
    /// The card takes a copy while the work is posted.
    pub(super) inline: bool,
}

/// How work ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Done {
    /// What was sent has arrived.
    Sent,
    /// A receive buffer was filled so far.
    Received { length: u32 },
    /// The peer has written to our memory, and tells this number.
    Placed { immediate: u32 },
    /// It failed, and the connection with it. `flushed`: only because something before it had.
    Failed { status: String, flushed: bool },
}

/// The end of some work: of a receive buffer by its number, or of all that was sent up to a number.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Completion {
    pub(super) is_receive: bool,
    pub(super) number: u64,
    pub(super) done: Done,
}

/// What happened to a connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum LinkEvent {
    Established,
    Lost(String),
}

/// Sizes of a connection's queues.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct QueueSizes {
    pub(super) sends: u32,
    pub(super) receives: u32,
    pub(super) receive_size: u32,
    /// Most bytes that are sent inline.
    pub(super) inline: u32,
}

/// Registered pages of a connection's own.
pub(super) struct Slab {
    /// Ends before the pages go.
    _registration: Option<Box<dyn Any + Send + Sync>>,
    pub(super) pages: Arc<Pages>,
    pub(super) keys: Keys,
}

impl Slab {
    pub(super) fn new(
        pages: Arc<Pages>,
        keys: Keys,
        registration: Option<Box<dyn Any + Send + Sync>>,
    ) -> Self {
        Self { _registration: registration, pages, keys }
    }

    /// A piece for the card.
    pub(super) fn piece(&self, offset: usize, length: usize) -> Piece {
        let segment = self.pages.segment(offset, length);
        Piece {
            address: segment.base() as u64,
            length: u32::try_from(segment.length()).unwrap_or(u32::MAX),
            key: self.keys.local,
        }
    }
}

/// A connected queue pair, as a connection sees it.
pub(super) trait Verbs {
    fn sizes(&self) -> QueueSizes;

    /// Most pieces in a work request.
    fn max_pieces(&self) -> usize;

    /// Descriptors that become readable: for completions, and for events of the connection.
    fn descriptors(&self) -> [RawFd; 2];

    /// Registered memory for the connection's own use.
    fn slab(&mut self, length: usize, exposure: Exposure) -> Result<Slab, RdmaError>;

    /// Whether the device has windows that belong to one connection. They are what lets a peer in, then.
    fn has_windows(&self) -> bool;

    /// Lets peers write to memory where there are no windows: registers it once more, for as long as what is returned
    /// beside the key is kept. It stays mapped meanwhile, as whoever lends it has promised.
    fn expose(&mut self, memory: &Segment) -> Result<(u32, Box<dyn Any + Send + Sync>), RdmaError>;

    /// Makes a memory window for this connection's peer alone, bound to nothing yet; returns its key. Their numbers count
    /// from 0. The connection's end is theirs.
    fn window(&mut self) -> Result<u32, RdmaError>;

    /// Posts work as one chain.
    fn post(&mut self, requests: &[WorkRequest], pieces: &[Piece]) -> Result<(), RdmaError>;

    /// Posts a receive buffer.
    fn post_receive(&mut self, number: u32) -> Result<(), RdmaError>;

    /// Posts a receive buffer for others, if it is shared with any. The connection is over.
    fn give_back(&mut self, number: u32);

    /// The pages, the place and the room of a receive buffer.
    fn receive_buffer(&self, number: u32) -> Option<(Arc<Pages>, usize, usize)>;

    /// Appends completions; returns how many.
    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<usize, RdmaError>;

    /// Makes the descriptor for completions unreadable until [`Verbs::arm`] and the next completion.
    fn quench(&mut self);

    /// Has the next completion make the descriptor readable. One that came before does not.
    fn arm(&mut self) -> Result<(), RdmaError>;

    /// The next thing that happened to the connection.
    fn event(&mut self) -> Result<Option<LinkEvent>, RdmaError>;

    /// Ends the connection: when this returns, no work of it touches any memory any more, here or from the peer.
    fn close(&mut self);
}
