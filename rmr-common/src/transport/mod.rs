//! Bindings of the message set: what carries messages between a client and a node.
//!
//! A [`Connection`] belongs to one thread, never blocks, and is driven by that thread's event loop. Messages are queued
//! while work is done and sent together by [`Connection::flush`]; data goes from and to the memory of whoever asked
//! for it. [`tcp`] binds it to TCP, with [`tls`] under it or without, and [`memory`] to a pair of buffers in one process, for tests without sockets.

pub mod connect;
pub mod memory;
mod socket;
pub mod tcp;
pub mod tls;

use std::io;
use std::os::fd::RawFd;

use thiserror::Error;

use crate::buffer::Segment;
use crate::wire::{MAX_BODY, MessageHeader, WireError};

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

    /// Takes a complete message. The payload of a message that carries data is where [`Receiver::place`] said, and
    /// `body` is empty.
    fn deliver(&mut self, header: &MessageHeader, body: &[u8]);
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

    /// Whether messages wait for the network to take them.
    fn wants_to_send(&self) -> bool;

    /// How many messages are queued or only partly sent. The owner bounds it: a peer that asks and does not listen would
    /// make it grow for ever.
    fn backlog(&self) -> usize;

    /// Whether [`Place::Wait`] is all that keeps it from receiving more. Its descriptor may be readable all the while.
    fn is_starved(&self) -> bool;

    /// What an event loop watches, if there is anything to watch.
    fn descriptor(&self) -> Option<RawFd>;
}
