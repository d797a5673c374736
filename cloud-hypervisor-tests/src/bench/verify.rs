//! A writer's memory of what it was promised: for each block the values that a read may return, and a stamp in each
//! block that tells which value it is. The rule is the one of the project's promises G1, G2 and G4: the last
//! acknowledged value or an unacknowledged newer one, and once a value was read, that one and no other.

use std::fmt;

use crc_fast::{CrcAlgorithm, checksum};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::disk::{Disk, DiskError, Finished, Operation, Status};
use std::time::Duration;

const MAGIC: u64 = u64::from_le_bytes(*b"rmrblock");
const STAMP_BYTES: usize = 36;

/// What blocks hold that were never written through this memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unwritten {
    /// Unknown: anything may be read there.
    Anything,
    /// A new disk: they read as zeroes.
    Zeroes,
}

/// What one writer was promised about every block of a disk.
///
/// Writes to a block are issued one after the other, never two at once, and no read of a block is in flight together
/// with a write to it; a page cache keeps to the same rule. The memory outlives connections: it is what a disk is
/// checked against after a crash.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Promises {
    /// Tells this writer's stamps from any other's.
    salt: u64,
    unit: u32,
    unwritten: Unwritten,
    blocks: Vec<Promise>,
}

/// Allowed: the settled generation, or one from `open_from` to `issued`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Promise {
    settled: u32,
    open_from: u32,
    issued: u32,
}

/// A block that does not hold what was promised.
#[derive(Clone, Debug, Error, PartialEq, Eq, Serialize)]
#[error("block at byte {offset}: expected {expected}, found {found}")]
pub struct Violation {
    /// Where.
    pub offset: u64,
    /// The allowed values.
    pub expected: String,
    /// The value that was read.
    pub found: String,
}

/// What the bytes of a block say of themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Zeroes,
    Stamped {
        salt: u64,
        offset: u64,
        generation: u32,
    },
    /// Has a stamp, but the checksum is not the one of these bytes: a mixture.
    Torn {
        generation: u32,
    },
    Foreign,
}

impl Promises {
    /// Of a disk of `disk_bytes` in blocks of `unit` bytes, of which nothing was written yet. A `salt` of its own for
    /// each writer makes stamps of earlier ones foreign.
    #[must_use]
    pub fn new(disk_bytes: u64, unit: u32, salt: u64, unwritten: Unwritten) -> Self {
        assert!(unit >= 512 && unit.is_multiple_of(512), "a block is a multiple of 512 bytes, found {unit}");
        let count =
            usize::try_from(disk_bytes / u64::from(unit)).expect("the blocks of a disk fit the memory");
        Self { salt, unit, unwritten, blocks: vec![Promise { settled: 0, open_from: 1, issued: 0 }; count] }
    }

    /// Bytes of a block.
    #[must_use]
    pub fn unit(&self) -> u32 {
        self.unit
    }

    /// Bytes of the disk that are remembered.
    #[must_use]
    pub fn disk_bytes(&self) -> u64 {
        u64::from(self.unit) * self.blocks.len() as u64
    }

    /// A write of `bytes` from `offset` is about to be submitted: makes its new generation possible and fills
    /// `bytes`, whole blocks, with what is to be written.
    pub fn issue(&mut self, offset: u64, bytes: &mut [u8]) {
        let (salt, unit) = (self.salt, self.unit_bytes());
        let mut at = offset;
        for (promise, block) in self.range(offset, bytes.len()).iter_mut().zip(bytes.chunks_exact_mut(unit)) {
            promise.issued += 1;
            stamp(block, salt, at, promise.issued);
            at += unit as u64;
        }
    }

    /// The write of `length` bytes from `offset` that was issued last has completed without an error: from now on
    /// nothing older may be read.
    pub fn acknowledge(&mut self, offset: u64, length: u32) {
        for promise in self.range(offset, usize::try_from(length).unwrap_or(usize::MAX)) {
            settle(promise, promise.issued);
        }
    }

    /// Checks `bytes`, whole blocks that were read from `offset`, and remembers for each what it was seen to be.
    pub fn check(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Violation> {
        let (salt, unit, unwritten) = (self.salt, self.unit_bytes(), self.unwritten);
        let mut at = offset;
        for (promise, block) in self.range(offset, bytes.len()).iter_mut().zip(bytes.chunks_exact(unit)) {
            check_block(promise, block, at, salt, unwritten)?;
            at += unit as u64;
        }
        Ok(())
    }

    /// Reads the whole disk and checks every block; up to `limit` violations are returned in full.
    pub fn check_disk(&mut self, disk: &mut Disk, limit: usize) -> Result<DiskCheck, DiskError> {
        self.check_range(disk, 0, self.disk_bytes(), limit)
    }

    /// Reads `length` bytes from `offset`, both multiples of the block, and checks every block.
    pub fn check_range(
        &mut self,
        disk: &mut Disk,
        offset: u64,
        length: u64,
        limit: usize,
    ) -> Result<DiskCheck, DiskError> {
        let end = (offset + length).min(self.disk_bytes()).min(disk.capacity());
        let step = disk.buffer_size() / self.unit * self.unit;
        assert!(step > 0, "the disk's buffers hold at least one block of {} bytes", self.unit);
        let mut check = DiskCheck::default();
        let mut reads = vec![(0_u64, 0_u32); usize::try_from(disk.depth()).expect("a depth fits the memory")];
        let mut bytes = vec![0_u8; usize::try_from(step).expect("a buffer fits the memory")];
        let mut finished: Vec<Finished> = Vec::new();
        let mut next = offset;
        loop {
            while next < end {
                let Some(slot) = disk.take() else { break };
                let length = u32::try_from((end - next).min(u64::from(step))).expect("at most a buffer");
                reads[slot.index()] = (next, length);
                disk.submit(slot, Operation::Read, next, length);
                next += u64::from(length);
            }
            disk.kick()?;
            disk.reap(&mut finished)?;
            if finished.is_empty() {
                if disk.in_flight() == 0 {
                    return Ok(check);
                }
                disk.sleep(Duration::from_secs(1))?;
            }
            for done in finished.drain(..) {
                let (at, length) = reads[done.slot.index()];
                let bytes = &mut bytes[..usize::try_from(length).expect("at most a buffer")];
                disk.copy_out(done.slot, 0, bytes);
                disk.release(done.slot);
                if done.status != Status::Ok {
                    check.unreadable += 1;
                    continue;
                }
                for (index, block) in (0_u64..).zip(bytes.chunks_exact(self.unit_bytes())) {
                    check.blocks += 1;
                    if let Err(violation) = self.check(at + index * u64::from(self.unit), block) {
                        check.violation_count += 1;
                        if check.violations.len() < limit {
                            check.violations.push(violation);
                        }
                    }
                }
            }
        }
    }

    fn unit_bytes(&self) -> usize {
        usize::try_from(self.unit).expect("a block fits the address space")
    }

    fn range(&mut self, offset: u64, length: usize) -> &mut [Promise] {
        let unit = self.unit_bytes();
        assert!(
            offset.is_multiple_of(u64::from(self.unit)) && length.is_multiple_of(unit),
            "only whole blocks of {unit} bytes are remembered, found {length} bytes at {offset}"
        );
        let first = usize::try_from(offset / u64::from(self.unit)).unwrap_or(usize::MAX);
        &mut self.blocks[first..first + length / unit]
    }
}

/// Outcome of reading a disk and comparing it with what was promised.
#[derive(Clone, Debug, Default, Serialize)]
pub struct DiskCheck {
    /// Blocks that were read.
    pub blocks: u64,
    /// Read requests that ended with an error.
    pub unreadable: u64,
    /// Blocks that do not hold what was promised.
    pub violation_count: u64,
    /// The first of them.
    pub violations: Vec<Violation>,
}

impl DiskCheck {
    /// Whether every block was readable and as promised.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.unreadable == 0 && self.violation_count == 0
    }
}

impl Promise {
    fn allows(self, generation: u32) -> bool {
        generation == self.settled || (self.open_from..=self.issued).contains(&generation)
    }
}

impl fmt::Display for Promise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.settled {
            0 => f.write_str("what was there before")?,
            settled => write!(f, "generation {settled}")?,
        }
        match self.issued {
            issued if issued < self.open_from => Ok(()),
            issued if issued == self.open_from => write!(f, " or {issued}"),
            issued => write!(f, " or one of {} to {issued}", self.open_from),
        }
    }
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zeroes => f.write_str("zeroes"),
            Self::Stamped { salt, offset, generation } => {
                write!(f, "generation {generation} of byte {offset} by writer {salt:#x}")
            }
            Self::Torn { generation } => write!(f, "a mixture whose head is of generation {generation}"),
            Self::Foreign => f.write_str("bytes of no writer"),
        }
    }
}

/// One value is settled: whatever else was possible can no longer be read.
fn settle(promise: &mut Promise, generation: u32) {
    promise.settled = generation;
    promise.open_from = promise.issued + 1;
}

fn check_block(
    promise: &mut Promise,
    block: &[u8],
    offset: u64,
    salt: u64,
    unwritten: Unwritten,
) -> Result<(), Violation> {
    let content = content_of(block);
    let seen = match content {
        Content::Stamped { salt: writer, offset: place, generation } if writer == salt => {
            (place == offset && promise.allows(generation)).then_some(generation)
        }
        Content::Zeroes => (promise.settled == 0).then_some(0),
        // What was there before is unknown, so it may even look like a mixture.
        _ => (promise.settled == 0 && unwritten == Unwritten::Anything).then_some(0),
    };
    match seen {
        Some(generation) => {
            settle(promise, generation);
            Ok(())
        }
        None => Err(Violation { offset, expected: promise.to_string(), found: content.to_string() }),
    }
}

/// Fills a block: checksum, magic, salt, offset, generation, then bytes that no other generation has and that do not
/// compress.
fn stamp(block: &mut [u8], salt: u64, offset: u64, generation: u32) {
    let mut state = salt ^ offset.rotate_left(17) ^ u64::from(generation).rotate_left(43);
    for word in block.chunks_exact_mut(8) {
        // splitmix64: one multiplication chain per word, and words are independent of each other.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word.copy_from_slice(&(mixed ^ (mixed >> 31)).to_le_bytes());
    }
    block[8..16].copy_from_slice(&MAGIC.to_le_bytes());
    block[16..24].copy_from_slice(&salt.to_le_bytes());
    block[24..32].copy_from_slice(&offset.to_le_bytes());
    block[32..STAMP_BYTES].copy_from_slice(&generation.to_le_bytes());
    let crc = crc_of(block);
    block[..8].copy_from_slice(&crc.to_le_bytes());
}

fn content_of(block: &[u8]) -> Content {
    let word = |at: usize| u64::from_le_bytes(block[at..at + 8].try_into().expect("eight bytes"));
    if word(8) != MAGIC {
        return if block.iter().all(|byte| *byte == 0) { Content::Zeroes } else { Content::Foreign };
    }
    let generation = u32::from_le_bytes(block[32..STAMP_BYTES].try_into().expect("four bytes"));
    if word(0) != crc_of(block) {
        return Content::Torn { generation };
    }
    Content::Stamped { salt: word(16), offset: word(24), generation }
}

fn crc_of(block: &[u8]) -> u64 {
    checksum(CrcAlgorithm::Crc32Iscsi, &block[8..])
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: u32 = 4096;

    fn promises(unwritten: Unwritten) -> Promises {
        Promises::new(1 << 20, UNIT, 0xfeed, unwritten)
    }

    fn write(promises: &mut Promises, offset: u64) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        promises.issue(offset, &mut bytes);
        bytes
    }

    #[test]
    fn an_acknowledged_write_is_read_or_it_is_a_violation() {
        let mut memory = promises(Unwritten::Anything);
        let first = write(&mut memory, 4096);
        memory.acknowledge(4096, UNIT);
        let second = write(&mut memory, 4096);
        memory.acknowledge(4096, UNIT);
        memory.check(4096, &second).unwrap();
        let violation = memory.check(4096, &first).unwrap_err();
        assert_eq!(violation.expected, "generation 2");
        assert!(violation.found.contains("generation 1"), "{violation}");
        assert!(memory.check(4096, &vec![0; 4096]).unwrap_err().found.contains("zeroes"));
    }

    #[test]
    fn an_unacknowledged_write_may_be_read_or_not_but_stays_what_it_was_first_read_as() {
        let mut memory = promises(Unwritten::Anything);
        let first = write(&mut memory, 0);
        memory.acknowledge(0, UNIT);
        let second = write(&mut memory, 0);
        let mut saw_new = memory.clone();
        saw_new.check(0, &second).unwrap();
        saw_new.check(0, &first).unwrap_err();
        memory.check(0, &first).unwrap();
        memory.check(0, &second).unwrap_err();
        let third = write(&mut memory, 0);
        memory.check(0, &third).unwrap();
    }

    #[test]
    fn a_value_that_an_acknowledged_write_replaced_never_comes_back() {
        let mut memory = promises(Unwritten::Anything);
        let failed = write(&mut memory, 0);
        let good = write(&mut memory, 0);
        memory.acknowledge(0, UNIT);
        assert!(memory.check(0, &failed).unwrap_err().to_string().contains("expected generation 2"));
        memory.check(0, &good).unwrap();
    }

    #[test]
    fn a_block_of_half_old_and_half_new_is_a_violation() {
        let mut memory = promises(Unwritten::Zeroes);
        let first = write(&mut memory, 0);
        memory.acknowledge(0, UNIT);
        let mut mixed = write(&mut memory, 0);
        mixed[2048..].copy_from_slice(&first[2048..]);
        assert!(memory.check(0, &mixed).unwrap_err().found.contains("mixture"));
    }

    #[test]
    fn data_of_another_place_or_another_writer_is_a_violation() {
        let mut memory = promises(Unwritten::Zeroes);
        let elsewhere = write(&mut memory, 8192);
        let mut other = Promises::new(1 << 20, UNIT, 0xbeef, Unwritten::Zeroes);
        let foreign = write(&mut other, 0);
        write(&mut memory, 0);
        assert!(memory.check(0, &elsewhere).unwrap_err().found.contains("byte 8192"));
        assert!(memory.check(0, &foreign).unwrap_err().found.contains("writer 0xbeef"));
    }

    #[test]
    fn a_new_disk_reads_as_zeroes_and_an_old_one_as_anything() {
        let junk = vec![7; 4096];
        promises(Unwritten::Anything).check(0, &junk).unwrap();
        promises(Unwritten::Zeroes).check(0, &[0; 8192]).unwrap();
        let violation = promises(Unwritten::Zeroes).check(0, &junk).unwrap_err();
        assert_eq!(violation.expected, "what was there before");
    }

    #[test]
    fn a_request_of_many_blocks_is_remembered_block_by_block() {
        let mut memory = promises(Unwritten::Zeroes);
        let mut whole = vec![0; 65536];
        memory.issue(65536, &mut whole);
        memory.acknowledge(65536, 65536);
        memory.check(65536, &whole).unwrap();
        let newer = write(&mut memory, 65536 + 12288);
        memory.acknowledge(65536 + 12288, UNIT);
        assert_eq!(memory.check(65536, &whole).unwrap_err().offset, 65536 + 12288);
        whole[12288..16384].copy_from_slice(&newer);
        memory.check(65536, &whole).unwrap();
    }
}
