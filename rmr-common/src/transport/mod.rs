//! Bindings of the message set: what carries messages between a client and a node.
//!
//! A [`Connection`] belongs to one thread, never blocks, and is driven by that thread's event loop. Messages are queued
//! while work is done and sent together by [`Connection::flush`]; data goes from and to the memory of whoever asked
//! for it. [`tcp`] binds it to TCP, with [`tls`] under it or without, [`rdma`] to verbs, and [`memory`] to a pair of buffers
//! in one process, for tests without sockets. [`Wire`] is a connection of either of the first two kinds.

pub mod connect;
pub mod memory;
#[cfg(feature = "rdma")]
pub mod rdma;
#[cfg(not(feature = "rdma"))]
#[path = "no_rdma.rs"]
pub mod rdma;
mod rdma_terms;
mod socket;
pub mod tcp;
pub mod tls;
mod unsent;
mod wire;

use std::io;
use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::buffer::Segment;
use crate::pool::{Sequence, Slot};
use crate::wire::{MAX_BODY, MAX_IO, MessageHeader, WireError};

pub use wire::{Listener, Wire};

/// Why a connection is over. The owner closes it, whatever the reason.
#[derive(Debug, Error)]
pub enum ConnectionError {
    /// The peer closed it.
    #[error("the peer closed the connection")]
    Closed,
    /// The network failed.
    #[error("connection lost: {0}")]
    Io(#[from] io::Error),
    /// The peer sent what is no message.
    #[error("protocol error: {0}")]
    Protocol(#[from] WireError),
    /// The peer breaks a rule of the binding.
    #[error("protocol error: {0}")]
    Broken(&'static str),
    /// The network card gave up, or its manager says that the connection is over.
    #[error("connection lost: {0}")]
    Link(String),
}

impl ConnectionError {
    /// Whether the two sides do not trust each other's certificates, or do not both speak TLS: see [`tls::Distrust`].
    #[must_use]
    pub fn is_distrust(&self) -> bool {
        matches!(self, Self::Io(error) if error.get_ref().is_some_and(|e| e.is::<tls::Distrust>()))
    }
}

/// What a connection did so far: system calls and work for the network, and what was copied on the way.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Counters {
    /// Bytes given to the kernel by a TCP connection, which copies them.
    pub tcp_sent_bytes: u64,
    /// Bytes taken from the kernel by a TCP connection, which copies them.
    pub tcp_received_bytes: u64,
    /// Bytes of data that the processor copied for RDMA, because their memory is not registered or no key may leave the host.
    pub data_copied_bytes: u64,
    /// Bytes of control messages that were copied to and from buffers for RDMA.
    pub body_copied_bytes: u64,
    /// Sends posted: requests without data, answers, control messages.
    pub sends: u64,
    /// RDMA writes posted: data of reads, and parts of writes that have many segments.
    pub writes: u64,
    /// RDMA writes posted that end a write: data with its header.
    pub writes_with_immediate: u64,
    /// Memory windows bound: keys that reach one piece of memory, and were given to a peer.
    pub windows_bound: u64,
    /// Such keys that were made invalid again.
    pub windows_invalidated: u64,
    /// Receive buffers that were used.
    pub receives: u64,
    /// Chains of work handed to the card.
    pub posts: u64,
}

impl std::ops::AddAssign for Counters {
    fn add_assign(&mut self, other: Self) {
        self.tcp_sent_bytes += other.tcp_sent_bytes;
        self.tcp_received_bytes += other.tcp_received_bytes;
        self.data_copied_bytes += other.data_copied_bytes;
        self.body_copied_bytes += other.body_copied_bytes;
        self.sends += other.sends;
        self.writes += other.writes;
        self.writes_with_immediate += other.writes_with_immediate;
        self.windows_bound += other.windows_bound;
        self.windows_invalidated += other.windows_invalidated;
        self.receives += other.receives;
        self.posts += other.posts;
    }
}

/// Where the data of an arriving message goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// To the segments that were added; together they are as long as the payload.
    Data,
    /// Nowhere: nobody waits for it any more.
    Discard,
    /// There is no memory for it now. Nothing more is received until [`Connection::receive`] is called again.
    Wait,
}

/// Takes what arrives on a connection.
pub trait Receiver {
    /// Says where the payload of a message that carries data goes, before any of it is received.
    fn place(&mut self, header: &MessageHeader, segments: &mut Vec<Segment>) -> Place;

    /// Longest body that is taken now, in bytes; a longer one ends the connection before any memory is set aside for it.
    fn longest_body(&self) -> u32 {
        MAX_BODY
    }

    /// Work that a message makes beyond its bytes, as a number of bytes. Bytes, messages and this together are what one call
    /// of [`Connection::receive`] takes in before it is others' turn.
    fn weight(&self, _header: &MessageHeader) -> usize {
        0
    }

    /// Says that the data of a write, whose header this is, lies in memory that the owner has lent: `offset` bytes into
    /// the window. True if the owner keeps it, and will release the mark. Called before the message is delivered.
    fn placed(&mut self, _header: &MessageHeader, _window: u16, _offset: u32, _mark: u32) -> bool {
        false
    }

    /// Takes a complete message. The payload of a message that carries data is where [`Receiver::place`] said, and
    /// `body` is empty.
    fn deliver(&mut self, header: &MessageHeader, body: &[u8]);

    /// Takes a complete message, some of whose data went nowhere, because the place for it cannot be written: its owner has taken
    /// the memory away. False ends the connection.
    fn deliver_faulted(&mut self, _header: &MessageHeader) -> bool {
        false
    }
}

/// One connection between a client and a node.
pub trait Connection {
    /// Queues a message without data.
    fn queue(&mut self, header: &MessageHeader, body: Option<Vec<u8>>);

    /// Queues a message with data: `gather` adds segments of `header.payload` bytes. Their memory must stay as it is
    /// until the peer has answered, or, with a `tag`, until [`Connection::take_sent`] returns the tag.
    fn queue_data(
        &mut self,
        header: &MessageHeader,
        tag: Option<u32>,
        gather: &mut dyn FnMut(&mut Vec<Segment>),
    );

    /// Queues a read: `gather` adds segments of `header.length` bytes, into which the answer's data may go by itself. Their
    /// memory must stay until the answer was delivered, or the connection was shut down.
    fn queue_read(&mut self, header: &MessageHeader, _gather: &mut dyn FnMut(&mut Vec<Segment>)) {
        self.queue(header, None);
    }

    /// Most bytes of data in one message.
    fn max_io(&self) -> u32 {
        MAX_IO
    }

    /// Sends as much of what is queued as the network takes.
    ///
    /// # Errors
    /// When the connection is over.
    fn flush(&mut self) -> Result<(), ConnectionError>;

    /// Receives what has arrived, up to a bound that keeps one connection from starving others.
    ///
    /// # Errors
    /// When the connection is over.
    fn receive(&mut self, receiver: &mut dyn Receiver) -> Result<(), ConnectionError>;

    /// Moves the tags of data that was sent to `tags`.
    fn take_sent(&mut self, tags: &mut Vec<u32>);

    /// Moves the writes whose memory could not be read to `faults`: the peer was or will be sent filler in place of it, and may
    /// carry that out. To be called after each [`Connection::flush`], before an answer can arrive.
    fn take_faults(&mut self, _faults: &mut Vec<(Slot, Sequence)>) {}

    /// Whether messages wait for the network to take them.
    fn wants_to_send(&self) -> bool;

    /// How many messages are queued or only partly sent. The owner bounds it: a peer that asks and does not listen would
    /// make it grow for ever.
    fn backlog(&self) -> usize;

    /// Bytes of bodies that are queued or only partly sent. Data does not count: it lies in memory that has an owner.
    fn backlog_bytes(&self) -> usize {
        0
    }

    /// Whether [`Place::Wait`] is all that keeps it from receiving more. Its descriptor may be readable all the while.
    fn is_starved(&self) -> bool;

    /// What an event loop watches, if there is anything to watch.
    fn descriptor(&self) -> Option<RawFd>;
}
