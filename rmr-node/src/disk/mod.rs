//! Disk I/O of a shard: requests in, completions out, no thread and no lock. [`DiskEngine`] carries several disks on one
//! io_uring and executes at once what lies in memory; [`BufferPool`] is the memory that I/O goes to and from.

mod buddy;
mod buffer;
mod engine;
#[doc(hidden)]
pub mod faults;
mod file;
mod inline;
mod part;
pub(crate) mod sys;
mod uring;
mod zero;

use std::os::fd::RawFd;

use rmr_common::buffer::{Segment, digest as buffer_digest};
use rmr_common::wire::data_digest;
use thiserror::Error;

pub use buffer::{AlignedPage, Buffer, BufferPool, MAX_BUFFER, MIN_BUFFER};
pub use engine::{DiskEngine, EngineChoice, EngineOptions};
pub use file::{DiskFile, Medium};
pub use part::{Part, Returned};
pub(crate) use zero::first_other;

/// A disk of an engine.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct DiskId(pub u16);

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IoKind {
    /// Read into the payload.
    Read,
    /// Write the payload.
    Write,
    /// Make durable every write that completed before this was submitted. Offset and length mean nothing. It is tried once: after
    /// a failure the kernel counts the pages as written, and another flush would succeed without having written them.
    Flush,
    /// The same, through the disk's other open file description: see [`DiskFile::with_metadata`].
    FlushMetadata,
    /// Make the range read as zeroes and give its space back where that is possible.
    Discard,
    /// Make the range read as zeroes; with `unmap`, as [`IoKind::Discard`], without, it stays allocated.
    WriteZeroes {
        /// Whether the space may be given back.
        unmap: bool,
    },
    /// As [`IoKind::Discard`], and nothing at all where the range reads as zeroes already.
    EnsureZero,
}

/// Memory of an [`Io`]. The engine holds it until the completion gives it back, so owned memory cannot go away early.
#[derive(Debug, Default)]
pub enum Payload {
    /// None, for all kinds but reads and writes.
    #[default]
    None,
    /// Memory of somebody else, in one piece. Its maker promised that it stays (see [`Segment::new`]).
    Segment(Segment),
    /// Memory of somebody else, in pieces.
    Segments(Box<[Segment]>),
    /// One buffer of a pool.
    Buffer(Buffer),
    /// Several buffers of a pool.
    Buffers(Vec<Buffer>),
    /// A part of a buffer that a client has filled.
    Part(Part),
    /// A metadata page.
    Page(Box<AlignedPage>),
}

/// One request to a disk.
#[derive(Debug)]
pub struct Io {
    /// Which disk.
    pub disk: DiskId,
    /// Comes back in the completion; the engine gives it no meaning.
    pub id: u64,
    /// What to do.
    pub kind: IoKind,
    /// Where, in bytes of the device.
    pub offset: u64,
    /// How much, in bytes; the payload of a read or write has exactly this length.
    pub length: u64,
    /// The memory.
    pub payload: Payload,
}

/// The end of an [`Io`].
#[derive(Debug)]
pub struct Completion {
    /// Which disk.
    pub disk: DiskId,
    /// The `id` of the request.
    pub id: u64,
    /// Whether all of it was done. After an error any part of it may have been done.
    pub result: Result<(), DiskError>,
    /// The memory of the request.
    pub payload: Payload,
}

/// Why a request to a disk failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum DiskError {
    /// The kernel refused or failed it.
    #[error("{what} of {length} bytes at {offset}: {}", std::io::Error::from_raw_os_error(*errno))]
    Errno {
        /// Which operation.
        what: &'static str,
        /// The error number.
        errno: i32,
        /// Where the request began, in bytes.
        offset: u64,
        /// Length of the request in bytes.
        length: u64,
    },
    /// The range is not within the disk.
    #[error("{length} bytes at {offset} reach past the end of the disk, which has {size} bytes")]
    OutOfRange {
        /// Where the request began, in bytes.
        offset: u64,
        /// Length of the request in bytes.
        length: u64,
        /// Size of the disk in bytes.
        size: u64,
    },
    /// Offset, length or memory is not aligned as the disk needs it.
    #[error("{length} bytes at {offset}: offset, length and memory must be multiples of {alignment}")]
    Misaligned {
        /// Where the request began, in bytes.
        offset: u64,
        /// Length of the request in bytes.
        length: u64,
        /// What would do, in bytes.
        alignment: u32,
    },
    /// The payload has another length than the request.
    #[error("the request is for {expected} bytes and its memory has {found}")]
    PayloadLength {
        /// Length of the request in bytes.
        expected: u64,
        /// Length of the payload in bytes.
        found: u64,
    },
    /// The file ended early: somebody truncated it.
    #[error("the file ended at {offset}, within its recorded size of {size} bytes: it was truncated")]
    Truncated {
        /// Where reading stopped, in bytes.
        offset: u64,
        /// Size of the disk when it was opened, in bytes.
        size: u64,
    },
    /// The disk was removed from the engine, or never added.
    #[error("disk {} is not part of this engine", .0.0)]
    NoSuchDisk(DiskId),
}

impl DiskError {
    /// The error number that says it best.
    #[must_use]
    pub const fn errno(&self) -> i32 {
        match self {
            Self::Errno { errno, .. } => *errno,
            Self::OutOfRange { .. } | Self::Misaligned { .. } | Self::PayloadLength { .. } => libc::EINVAL,
            Self::Truncated { .. } => libc::EIO,
            Self::NoSuchDisk(_) => libc::ENODEV,
        }
    }

    /// Whether it was a flush that failed.
    #[must_use]
    pub fn is_of_flush(&self) -> bool {
        matches!(self, Self::Errno { what, .. } if *what == IoKind::Flush.name())
    }

    /// Whether there was no space left: nothing is broken, and writing again may succeed later.
    #[must_use]
    pub const fn is_no_space(&self) -> bool {
        matches!(self.errno(), libc::ENOSPC | libc::EDQUOT)
    }
}

/// Bounds of an engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Requests that the kernel gets at a time; more wait inside the engine, in order.
    pub queue_depth: u32,
    /// Most disks.
    pub disks: u16,
}

/// What carries [`Io`]s to disks. A shard has one; the simulator has its own.
pub trait Engine {
    /// Takes a request. Requests run in any order: who needs an order waits for the completion. The engine queues
    /// whatever comes; the caller bounds what it submits.
    fn submit(&mut self, io: Io);

    /// Hands everything that was submitted to the kernel; to be called once after a batch of `submit`.
    fn flush_submissions(&mut self);

    /// Appends what completed to `out`. Call it when [`Engine::fd`] is readable, and also once after each
    /// [`Engine::flush_submissions`], since a disk in memory completes at once and makes nothing readable.
    fn completions(&mut self, out: &mut Vec<Completion>);

    /// Readable (level-triggered) while there are completions that [`Engine::completions`] has not given yet; `None`
    /// when all requests complete at once.
    fn fd(&self) -> Option<RawFd>;

    /// Requests taken and not yet given back.
    fn in_flight(&self) -> usize;

    /// The bounds of the engine.
    fn limits(&self) -> Limits;
}

impl IoKind {
    /// The word for messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::FlushMetadata => "flush of metadata",
            Self::Discard => "discard",
            Self::WriteZeroes { .. } => "write zeroes",
            Self::EnsureZero => "make a hole",
        }
    }

    const fn makes_zeroes(self) -> bool {
        matches!(self, Self::Discard | Self::WriteZeroes { .. } | Self::EnsureZero)
    }

    const fn is_flush(self) -> bool {
        matches!(self, Self::Flush | Self::FlushMetadata)
    }

    const fn has_payload(self) -> bool {
        matches!(self, Self::Read | Self::Write)
    }
}

impl Payload {
    /// Length in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        let length: usize = match self {
            Self::None => 0,
            Self::Segment(segment) => segment.length(),
            Self::Segments(segments) => segments.iter().map(Segment::length).sum(),
            Self::Buffer(buffer) => buffer.length(),
            Self::Buffers(buffers) => buffers.iter().map(Buffer::length).sum(),
            Self::Part(part) => part.segment().length(),
            Self::Page(_) => 4096,
        };
        length as u64
    }

    /// CRC32C of the memory as it is now. Not to be called while I/O into it is under way.
    #[must_use]
    pub fn digest(&self) -> u32 {
        let mut list: Vec<Segment> = Vec::new();
        match self {
            Self::None => {}
            Self::Page(page) => return data_digest(page.bytes()),
            Self::Segment(segment) => list.push(*segment),
            Self::Segments(segments) => list.extend_from_slice(segments),
            Self::Buffer(buffer) => list.push(buffer.segment()),
            Self::Buffers(buffers) => list.extend(buffers.iter().map(Buffer::segment)),
            Self::Part(part) => list.push(part.segment()),
        }
        buffer_digest(&list, 0, list.iter().map(Segment::length).sum())
    }

    /// Appends the memory to `list`; the segments are valid for as long as the payload is held.
    fn segments(&mut self, list: &mut Vec<Segment>) {
        match self {
            Self::None => {}
            Self::Segment(segment) => list.push(*segment),
            Self::Segments(segments) => list.extend_from_slice(segments),
            Self::Buffer(buffer) => list.push(buffer.segment()),
            Self::Buffers(buffers) => list.extend(buffers.iter().map(Buffer::segment)),
            Self::Part(part) => list.push(part.segment()),
            Self::Page(page) => list.push(page.segment()),
        }
    }
}

impl Io {
    fn failed(self, error: DiskError) -> Completion {
        self.complete(Err(error))
    }

    fn complete(self, result: Result<(), DiskError>) -> Completion {
        Completion { disk: self.disk, id: self.id, result, payload: self.payload }
    }

    fn errno(&self, errno: i32) -> DiskError {
        DiskError::Errno { what: self.kind.name(), errno, offset: self.offset, length: self.length }
    }
}

#[cfg(test)]
pub(crate) mod tests;
