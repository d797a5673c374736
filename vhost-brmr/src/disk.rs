//! What the device needs from the disk behind it, and nothing more. The virtio code knows nothing about replication,
//! and whoever implements [`Disk`] needs to know nothing about virtio.

use std::os::fd::RawFd;
use std::time::Duration;

use rmr_common::buffer::Segment;
use rmr_common::reactor::WatchChange;
use rmr_common::transport::rdma::Fabric;
use thiserror::Error;
use vmm_sys_util::epoll::EventSet;

/// Bytes of a sector, the unit of every address and length on the virtio side (virtio 1.3 §5.2.6).
pub const SECTOR_SIZE: u64 = 512;

/// Limits of a request that discards or zeroes ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeLimits {
    /// Largest range in bytes.
    pub max_length: u64,
    /// Most ranges in one request, at most [`crate::request::MAX_RANGES`].
    pub max_ranges: u32,
    /// What a range is best aligned to, in bytes; never zero.
    pub granularity: u32,
}

/// Size and limits of a disk, known before it is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size in bytes, a multiple of 512.
    pub size: u64,
    /// Smallest unit that a driver should address, in bytes: a power of two from 512 to 4096. Requests of single
    /// sectors are passed on all the same, because firmware sends them.
    pub logical_block_size: u32,
    /// Unit that is written without a read, in bytes: a power of two multiple of the logical block size.
    pub physical_block_size: u32,
    /// Length in bytes at which a request is served best; zero if there is none.
    pub optimal_io_size: u32,
    /// Most data segments in one request. The disk splits larger requests itself; this only advises the driver.
    pub max_segments: u32,
    /// Largest segment in bytes, likewise.
    pub max_segment_size: u32,
    /// Limits of discards; `None` if the disk cannot discard.
    pub discard: Option<RangeLimits>,
    /// Limits of write-zeroes; `None` if the disk cannot write zeroes without data.
    pub write_zeroes: Option<RangeLimits>,
}

/// Why a geometry is not acceptable.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum GeometryError {
    /// Size of zero, or no multiple of a sector.
    #[error("disk size is {0} bytes, expected a multiple of 512 above zero")]
    Size(u64),
    /// Block sizes that are no powers of two, or out of order.
    #[error(
        "block sizes are {logical} logical and {physical} physical, expected powers of two with 512 <= logical <= 4096, logical <= physical"
    )]
    BlockSize {
        /// Logical block size found.
        logical: u32,
        /// Physical block size found.
        physical: u32,
    },
    /// A limit that is zero, or above what a request can carry.
    #[error("limit {name} is {found}, expected {expected}")]
    Limit {
        /// Which limit.
        name: &'static str,
        /// Its value.
        found: u64,
        /// What would be right.
        expected: &'static str,
    },
}

impl Geometry {
    /// Checks the sizes and limits.
    ///
    /// # Errors
    /// The first one that is out of bounds.
    pub fn validate(&self) -> Result<(), GeometryError> {
        if self.size == 0 || !self.size.is_multiple_of(SECTOR_SIZE) {
            return Err(GeometryError::Size(self.size));
        }
        let (logical, physical) = (self.logical_block_size, self.physical_block_size);
        if !logical.is_power_of_two()
            || !physical.is_power_of_two()
            || !(512..=4096).contains(&logical)
            || physical < logical
        {
            return Err(GeometryError::BlockSize { logical, physical });
        }
        let limit = |name, found, good, expected| {
            if good { Ok(()) } else { Err(GeometryError::Limit { name, found, expected }) }
        };
        limit("max_segments", self.max_segments.into(), self.max_segments > 0, "at least 1")?;
        limit(
            "max_segment_size",
            self.max_segment_size.into(),
            self.max_segment_size >= 4096,
            "at least 4096",
        )?;
        for (ranges, what) in [(self.discard, "discard"), (self.write_zeroes, "write_zeroes")] {
            let Some(ranges) = ranges else { continue };
            let count = ranges.max_ranges;
            let most = crate::request::MAX_RANGES;
            limit(what, ranges.max_length, ranges.max_length >= SECTOR_SIZE, "a length of at least 512")?;
            limit(what, count.into(), count > 0 && count as usize <= most, "1 to 32 ranges")?;
            let granularity = ranges.granularity;
            let good = granularity > 0 && u64::from(granularity).is_multiple_of(SECTOR_SIZE);
            limit(what, granularity.into(), good, "a granularity that is a multiple of 512 above zero")?;
        }
        Ok(())
    }
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Fills the segments from the disk.
    Read,
    /// Writes the segments to the disk.
    Write,
    /// Makes everything durable that completed before this was submitted.
    Flush,
    /// Gives the range back; it may read as zeroes or as before, and the same on every leg.
    Discard,
    /// Makes the range read as zeroes.
    WriteZeroes {
        /// The space may be given back as well.
        unmap: bool,
    },
}

/// One request. Offset and length lie within the disk and are multiples of 512.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// What to do.
    pub operation: Operation,
    /// First byte on the disk.
    pub offset: u64,
    /// Length in bytes; the sum of the segments for reads and writes. Zero for a flush.
    pub length: u64,
    /// The data of reads and writes. The memory stays mapped until the request completed.
    pub segments: &'a [Segment],
}

/// Names a request from [`Disk::submit`] to its completion; never used twice at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(pub u64);

/// Why a request failed. The guest sees an I/O error whichever it was; the words are for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum DiskError {
    /// No member could serve the request.
    #[error("the disk could not serve the request")]
    Failed,
    /// The request was given up on [`Disk::cancel`].
    #[error("the request was cancelled")]
    Cancelled,
    /// The disk waited for its members for as long as it is configured to.
    #[error("no member answered within the suspend timeout")]
    Suspended,
    /// The disk lost writes that had completed, and serves nothing until the guest resets the device.
    #[error(
        "completed writes were lost with the machines of all current members; the guest has to reset the device"
    )]
    LostWrites,
    /// Another client took the disk over.
    #[error("another client took the disk over")]
    Fenced,
    /// Guest memory of the request could not be read or written.
    #[error(
        "guest memory of the request cannot be reached: the file behind it was cut short, or has no pages left"
    )]
    Memory,
}

/// The daemon was told to stop before the disk was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("told to stop before any node answered")]
pub struct ToldToStop;

/// Where the disk stands between its first and its last request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attachment<'a> {
    /// Holds no claim on the pool.
    Detached,
    /// On the way to be attached; requests are accepted and wait.
    Attaching,
    /// In use.
    Attached,
    /// Finishing what was submitted, then giving the pool back.
    Detaching,
    /// Another client took the disk from this one, which must not serve the guest that it had: the other may have written. A
    /// [`reset`](Disk::reset) by the guest or a [`detach`](Disk::detach) ends that.
    Displaced(&'a str),
    /// Will not be attached, for a reason that an operator must see; the daemon ends with it.
    Refused(&'a str),
}

/// A disk that is driven by the event loop of one thread: nothing here blocks, and nothing happens between calls.
///
/// In every turn of the loop come, in this order: [`ready`](Self::ready) for each descriptor that has an event (it may
/// be spurious), [`completions`](Self::completions), any number of [`submit`](Self::submit)s, one
/// [`upkeep`](Self::upkeep), [`watch_changes`](Self::watch_changes), [`timeout`](Self::timeout).
pub trait Disk {
    /// Size and limits. Only the size may change after construction: a disk can be grown while it is in use.
    fn geometry(&self) -> Geometry;

    /// Begins to claim the disk; called when a guest starts its first ring, and only while [`Attachment::Detached`],
    /// which the disk is no more when this returns.
    fn attach(&mut self);

    /// Gives the disk back once all requests submitted so far completed; none will be submitted before the next
    /// [`attach`](Self::attach).
    fn detach(&mut self);

    /// The guest has reset the device: it expects nothing of what it did not flush. Called before it uses the device again.
    fn reset(&mut self);

    /// Where the disk stands.
    fn attachment(&self) -> Attachment<'_>;

    /// Takes a request. It may be kept back until [`upkeep`](Self::upkeep), so that a batch goes out at once.
    fn submit(&mut self, token: Token, request: Request<'_>);

    /// Gives up every request that is outstanding: each completes, with an error if need be, as soon as nothing touches
    /// its segments any more.
    fn cancel(&mut self);

    /// Appends what completed since the last call. The segments of these requests are not touched any more.
    fn completions(&mut self, done: &mut Vec<(Token, Result<(), DiskError>)>);

    /// Appends changes of what is watched. A descriptor that is removed stays open until the next call of any other
    /// function.
    fn watch_changes(&mut self, changes: &mut Vec<WatchChange>);

    /// A watched descriptor has these events.
    fn ready(&mut self, fd: RawFd, set: EventSet);

    /// Sends what was submitted and does what is due; called once at the end of every turn.
    fn upkeep(&mut self);

    /// How long the loop may sleep without calling [`upkeep`](Self::upkeep); zero if completions wait to be taken.
    fn timeout(&self) -> Option<Duration>;

    /// With what guest memory is to be registered before it is used, if the disk may move data by RDMA.
    fn fabric(&self) -> Option<Fabric> {
        None
    }
}

impl<D: Disk + ?Sized> Disk for Box<D> {
    fn geometry(&self) -> Geometry {
        (**self).geometry()
    }

    fn attach(&mut self) {
        (**self).attach();
    }

    fn detach(&mut self) {
        (**self).detach();
    }

    fn reset(&mut self) {
        (**self).reset();
    }

    fn attachment(&self) -> Attachment<'_> {
        (**self).attachment()
    }

    fn submit(&mut self, token: Token, request: Request<'_>) {
        (**self).submit(token, request);
    }

    fn cancel(&mut self) {
        (**self).cancel();
    }

    fn completions(&mut self, done: &mut Vec<(Token, Result<(), DiskError>)>) {
        (**self).completions(done);
    }

    fn watch_changes(&mut self, changes: &mut Vec<WatchChange>) {
        (**self).watch_changes(changes);
    }

    fn ready(&mut self, fd: RawFd, set: EventSet) {
        (**self).ready(fd, set);
    }

    fn upkeep(&mut self) {
        (**self).upkeep();
    }

    fn timeout(&self) -> Option<Duration> {
        (**self).timeout()
    }

    fn fabric(&self) -> Option<Fabric> {
        (**self).fabric()
    }
}
