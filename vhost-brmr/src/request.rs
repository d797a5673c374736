//! From a descriptor chain to a request: everything a guest can put into a chain ends here as a checked request, a
//! status to answer at once, or a reason to stop the ring (virtio 1.3 §5.2.6).
//!
//! No framing is assumed (§2.7.4): the header is the first 16 device-readable bytes and the status the last
//! device-writable byte, however the driver cut them into descriptors.

use std::fmt;

use rmr_common::buffer::Segment;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::GuestAddress;

use crate::disk::{Operation, RangeLimits, SECTOR_SIZE};
use crate::memory::{self, GuestMemory, Stretch};

/// Most ranges in one discard or write-zeroes request that any disk may allow.
pub const MAX_RANGES: usize = 32;
/// Most segments of one request, both directions together: a queue full of descriptors, each across two regions. Sizes
/// the scratch lists, so that parsing never allocates.
pub const MAX_SEGMENTS: usize = 2048;
/// Length of the identification that `VIRTIO_BLK_T_GET_ID` returns.
pub const ID_LENGTH: usize = 20;

/// Length of the header: type, reserved, sector.
const HEADER_LENGTH: usize = 16;
/// Length of one range of a discard or write-zeroes request: sector, count, flags.
const RANGE_LENGTH: usize = 16;

/// Length of a descriptor in its table.
const DESCRIPTOR_LENGTH: u32 = 16;

/// What the status byte of a request says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// Failed, or refused as it stands.
    IoError = 1,
    /// Of a kind that this device does not serve.
    Unsupported = 2,
}

/// What the device accepts; what a request is checked against.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Only reads and flushes.
    pub read_only: bool,
    /// Limits of discards, if the guest negotiated them.
    pub discard: Option<RangeLimits>,
    /// Limits of write-zeroes, if the guest negotiated them.
    pub write_zeroes: Option<RangeLimits>,
}

/// A range of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// What to do with it.
    pub operation: Operation,
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

/// What a chain asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// A read or write of [`Parser::data`].
    Transfer(Range),
    /// A flush.
    Flush,
    /// Discards or zeroes [`Parser::ranges`].
    Ranges,
    /// Discards or zeroes nothing: all ranges are empty.
    Nothing,
    /// The identification, to be copied to [`Parser::data`].
    Identify,
    /// To be answered with this status, for this reason.
    Refuse(Status, Refusal),
}

/// A chain whose status byte can be written.
#[derive(Clone, Copy, Debug)]
pub struct Parsed {
    /// Where the status byte goes.
    pub status: Segment,
    /// What is asked for.
    pub action: Action,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Fewer than 16 device-readable bytes.
    ShortHeader,
    /// A buffer outside guest memory.
    OutsideMemory,
    /// More pieces than a request may have.
    TooManySegments,
    /// A type that is not served.
    UnknownType,
    /// Data of no bytes, or no multiple of a sector.
    BadLength,
    /// Beyond the end of the disk.
    OutOfRange,
    /// A change of a read-only disk.
    ReadOnly,
    /// Too many ranges, a range too long, or ranges cut short.
    BadRanges,
    /// A flag of a range that is not known, or not allowed there.
    BadFlags,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::ShortHeader => "its header is too short",
            Self::OutsideMemory => "a buffer is outside of guest memory",
            Self::TooManySegments => "it has more buffers than a request may have",
            Self::UnknownType => "its type is not served",
            Self::BadLength => "its data has no bytes, or no multiple of a sector",
            Self::OutOfRange => "it is beyond the end of the disk",
            Self::ReadOnly => "it changes a read-only disk",
            Self::BadRanges => "it has too many ranges, one too long, or one cut short",
            Self::BadFlags => "a range has a flag that is not known or not allowed",
        })
    }
}

/// Why a chain cannot even be answered, so that the ring must be stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// A loop, a link out of the table, an unreadable table, or more than 4 GiB of buffers.
    Chain,
    /// A device-readable descriptor after a device-writable one.
    Order,
    /// No device-writable byte within guest memory where the status belongs.
    NoStatus,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Chain => "the descriptor chain loops, leaves its table, or cannot be read",
            Self::Order => "a device-readable descriptor follows a device-writable one",
            Self::NoStatus => "there is no writable byte in guest memory for the status",
        })
    }
}

/// Walks one chain, through an indirect table if there is one (virtio 1.3 §2.7.5). Own code rather than
/// `virtio_queue::DescriptorChain`, which cannot begin at a head that is not on the avail ring, as recovery after a crash
/// must, and ends silently where a chain is damaged.
#[derive(Clone, Copy, Debug)]
pub struct Chain<'m> {
    memory: &'m GuestMemory,
    /// The table of descriptors, if it begins in guest memory.
    table: Option<Stretch<'m>>,
    size: u32,
    next: Option<u16>,
    /// How many descriptors may still come: a chain is never longer than its table, or it loops.
    left: u32,
    bytes: u32,
    indirect: bool,
}

impl<'m> Chain<'m> {
    /// The chain from `head` in a table of `size` descriptors.
    #[must_use]
    pub fn new(memory: &'m GuestMemory, table: GuestAddress, size: u16, head: u16) -> Self {
        let size = u32::from(size);
        let table = Stretch::new(memory, table);
        Self { memory, table, size, next: Some(head), left: size, bytes: 0, indirect: false }
    }

    /// The next descriptor; `None` after the last one.
    ///
    /// # Errors
    /// When the chain is damaged.
    fn next(&mut self) -> Result<Option<Descriptor>, Broken> {
        let Some(index) = self.next else { return Ok(None) };
        let mut descriptor = self.descriptor(index)?;
        if descriptor.refers_to_indirect_table() {
            let length = descriptor.len();
            let size = length / DESCRIPTOR_LENGTH;
            // A table within a table, or one that is no array of descriptors.
            if self.indirect || !length.is_multiple_of(DESCRIPTOR_LENGTH) || size > u32::from(u16::MAX) {
                return Err(Broken::Chain);
            }
            self.table = Stretch::new(self.memory, descriptor.addr());
            (self.size, self.left, self.indirect) = (size, size, true);
            descriptor = self.descriptor(0)?;
            if descriptor.refers_to_indirect_table() {
                return Err(Broken::Chain);
            }
        }
        self.left -= 1;
        self.bytes = self.bytes.checked_add(descriptor.len()).ok_or(Broken::Chain)?;
        self.next = descriptor.has_next().then(|| descriptor.next());
        Ok(Some(descriptor))
    }

    fn descriptor(&self, index: u16) -> Result<Descriptor, Broken> {
        if u32::from(index) >= self.size || self.left == 0 {
            return Err(Broken::Chain);
        }
        let at = u64::from(index) * u64::from(DESCRIPTOR_LENGTH);
        let bytes: [u8; 16] = self.table.and_then(|table| table.read(at)).ok_or(Broken::Chain)?;
        let (length, flags, next) = (u32_at(&bytes, 8), u16_at(&bytes, 12), u16_at(&bytes, 14));
        Ok(Descriptor::new(u64_at(&bytes, 0), length, flags, next))
    }
}

/// Parses chains into lists that it keeps, so that no request allocates.
#[derive(Debug)]
pub struct Parser {
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    ranges: Vec<Range>,
    /// Where the data is, once a chain is parsed.
    data: Data,
}

#[derive(Clone, Copy, Debug)]
enum Data {
    /// In `readable`, from this index.
    Out(usize),
    /// In `writable`.
    In,
}

impl Default for Parser {
    fn default() -> Self {
        Self {
            readable: Vec::with_capacity(MAX_SEGMENTS + memory::MAX_REGIONS),
            writable: Vec::with_capacity(MAX_SEGMENTS + memory::MAX_REGIONS),
            ranges: Vec::with_capacity(MAX_RANGES),
            data: Data::In,
        }
    }
}

impl Parser {
    /// Parses one chain.
    ///
    /// # Errors
    /// When no status byte can be reached.
    pub fn parse(&mut self, chain: Chain<'_>, limits: &Limits) -> Result<Parsed, Broken> {
        let memory = chain.memory;
        let refusal = self.collect(chain, memory)?;
        let status = self.split_status()?;
        let action = match refusal {
            Some(refusal) => Action::Refuse(Status::IoError, refusal),
            None => self.action(limits).unwrap_or_else(|(status, refusal)| Action::Refuse(status, refusal)),
        };
        Ok(Parsed { status, action })
    }

    /// The data of the chain parsed last: after the header of a write, before the status of a read.
    #[must_use]
    pub fn data(&self) -> &[Segment] {
        match self.data {
            Data::Out(start) => &self.readable[start..],
            Data::In => &self.writable,
        }
    }

    /// The ranges of the chain parsed last; not empty after [`Action::Ranges`].
    #[must_use]
    pub fn ranges(&self) -> &[Range] {
        &self.ranges
    }

    /// Collects the segments of both directions. A refusal is reported only after the whole chain was walked, because
    /// the status byte is at its end.
    fn collect(&mut self, mut chain: Chain<'_>, memory: &GuestMemory) -> Result<Option<Refusal>, Broken> {
        self.readable.clear();
        self.writable.clear();
        let mut refusal = None;
        while let Some(descriptor) = chain.next()? {
            let complete = !descriptor.has_next();
            let list = if descriptor.is_write_only() {
                &mut self.writable
            } else if self.writable.is_empty() {
                &mut self.readable
            } else {
                return Err(Broken::Order);
            };
            if list.len() + 2 >= MAX_SEGMENTS {
                // Room is kept for the last descriptor, which holds the status.
                list.truncate(1);
                refusal = refusal.or(Some(Refusal::TooManySegments));
            }
            let before = list.len();
            if !memory::translate(memory, descriptor.addr().0, descriptor.len(), list) {
                list.truncate(before);
                refusal = refusal.or(Some(Refusal::OutsideMemory));
                if descriptor.is_write_only() && complete {
                    // The status alone may still be within guest memory.
                    let end = descriptor.addr().0.checked_add(u64::from(descriptor.len()) - 1);
                    if !end.is_some_and(|end| memory::translate(memory, end, 1, list)) {
                        return Err(Broken::NoStatus);
                    }
                }
            }
        }
        Ok(refusal)
    }

    /// Takes the last writable byte off the list.
    fn split_status(&mut self) -> Result<Segment, Broken> {
        let last = self.writable.pop().ok_or(Broken::NoStatus)?;
        let rest = last.length() - 1;
        if rest > 0 {
            self.writable.push(last.part(0, rest));
        }
        Ok(last.part(rest, 1))
    }

    /// Takes the header off the readable list; the index at which the data starts.
    fn split_header(&mut self) -> Option<([u8; HEADER_LENGTH], usize)> {
        let mut header = [0; HEADER_LENGTH];
        if memory::copy_from(&self.readable, &mut header) < HEADER_LENGTH {
            return None;
        }
        let mut left = HEADER_LENGTH;
        for (index, segment) in self.readable.iter_mut().enumerate() {
            if left < segment.length() {
                *segment = segment.part(left, segment.length());
                return Some((header, index));
            }
            left -= segment.length();
        }
        Some((header, self.readable.len()))
    }

    fn action(&mut self, limits: &Limits) -> Result<Action, (Status, Refusal)> {
        let refuse = |refusal| Err((Status::IoError, refusal));
        let Some((header, data)) = self.split_header() else { return refuse(Refusal::ShortHeader) };
        self.data = Data::In;
        let sector = u64_at(&header, 8);
        match u32_at(&header, 0) {
            VIRTIO_BLK_T_IN => {
                let range = transfer(Operation::Read, sector, &self.writable, limits)?;
                Ok(Action::Transfer(range))
            }
            VIRTIO_BLK_T_OUT if limits.read_only => refuse(Refusal::ReadOnly),
            VIRTIO_BLK_T_OUT => {
                self.data = Data::Out(data);
                let range = transfer(Operation::Write, sector, &self.readable[data..], limits)?;
                Ok(Action::Transfer(range))
            }
            VIRTIO_BLK_T_FLUSH => Ok(Action::Flush),
            VIRTIO_BLK_T_GET_ID if self.writable.is_empty() => refuse(Refusal::BadLength),
            VIRTIO_BLK_T_GET_ID => Ok(Action::Identify),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if limits.read_only => refuse(Refusal::ReadOnly),
            VIRTIO_BLK_T_DISCARD => self.parse_ranges(data, limits.discard, limits, |flags| {
                (flags == 0).then_some(Operation::Discard)
            }),
            VIRTIO_BLK_T_WRITE_ZEROES => self.parse_ranges(data, limits.write_zeroes, limits, |flags| {
                let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
                (flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP == 0).then_some(Operation::WriteZeroes { unmap })
            }),
            _ => Err((Status::Unsupported, Refusal::UnknownType)),
        }
    }

    fn parse_ranges(
        &mut self,
        data: usize,
        allowed: Option<RangeLimits>,
        limits: &Limits,
        operation: impl Fn(u32) -> Option<Operation>,
    ) -> Result<Action, (Status, Refusal)> {
        let Some(allowed) = allowed else { return Err((Status::Unsupported, Refusal::UnknownType)) };
        let bad = (Status::IoError, Refusal::BadRanges);
        let most = MAX_RANGES.min(allowed.max_ranges as usize);
        // One byte more than may be there shows that there are too many.
        let mut bytes = [0; MAX_RANGES * RANGE_LENGTH + 1];
        let length = memory::copy_from(&self.readable[data..], &mut bytes);
        if length == 0 || !length.is_multiple_of(RANGE_LENGTH) || length / RANGE_LENGTH > most {
            return Err(bad);
        }
        self.ranges.clear();
        for bytes in bytes[..length].chunks_exact(RANGE_LENGTH) {
            let operation = operation(u32_at(bytes, 12)).ok_or((Status::Unsupported, Refusal::BadFlags))?;
            let length = u64::from(u32_at(bytes, 8)) * SECTOR_SIZE;
            if length > allowed.max_length {
                return Err(bad);
            }
            let offset = in_disk(u64_at(bytes, 0), length, limits)?;
            if length > 0 {
                self.ranges.push(Range { operation, offset, length });
            }
        }
        Ok(if self.ranges.is_empty() { Action::Nothing } else { Action::Ranges })
    }
}

/// Checks a read or write of all of `data`.
fn transfer(
    operation: Operation,
    sector: u64,
    data: &[Segment],
    limits: &Limits,
) -> Result<Range, (Status, Refusal)> {
    let length: u64 = data.iter().map(|segment| segment.length() as u64).sum();
    if length == 0 || !length.is_multiple_of(SECTOR_SIZE) {
        return Err((Status::IoError, Refusal::BadLength));
    }
    Ok(Range { operation, offset: in_disk(sector, length, limits)?, length })
}

/// The byte offset of a sector, if `length` bytes from there lie on the disk.
fn in_disk(sector: u64, length: u64, limits: &Limits) -> Result<u64, (Status, Refusal)> {
    sector
        .checked_mul(SECTOR_SIZE)
        .filter(|offset| offset.checked_add(length).is_some_and(|end| end <= limits.size))
        .ok_or((Status::IoError, Refusal::OutOfRange))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(value)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}
