//! A disk that carries out requests in any order, with a volatile cache if it is a write-back one.
//!
//! A write is atomic for each 4 KiB block. It takes effect some time before it is answered, so that a crash may fall
//! between the two.

use std::collections::{BTreeMap, BTreeSet};

use super::oracle::{SECTOR, Step};
use super::rng::Rng;
use super::verify::{Rot, strip};
use crate::pool::{BLOCK_SIZE, Block};
use crate::replica::{BufferToken, DiskOperation, DiskResult, IoId};

pub(super) const SECTORS_PER_BLOCK: usize = (BLOCK_SIZE / SECTOR) as usize;

/// A request that was submitted and not answered.
pub(super) struct Running {
    /// Grows with each request.
    order: u64,
    pub(super) operation: DiskOperation,
    pub(super) first: usize,
    pub(super) count: usize,
    pub(super) result: DiskResult,
    /// What a write writes.
    data: Vec<u64>,
    /// What a flush makes durable.
    snapshot: Vec<(usize, u64)>,
    is_applied: bool,
    /// Whether what it writes came from another member.
    is_pulled: bool,
}

impl Running {
    pub(super) const fn is_pulled(&self) -> bool {
        self.is_pulled
    }

    pub(super) const fn is_write(&self) -> bool {
        matches!(
            self.operation,
            DiskOperation::Write(_)
                | DiskOperation::WritePulled
                | DiskOperation::Discard
                | DiskOperation::WriteZeroes
                | DiskOperation::ZeroPulled
        )
    }
}

/// One disk, sector by sector.
pub(super) struct Disk {
    /// What reads return.
    pub(super) sectors: Vec<u64>,
    /// What a power cut leaves.
    durable: Vec<u64>,
    /// How many requests were submitted.
    submitted: u64,
    /// The first write to the sector that no flush covers yet; zero for none.
    pub(super) unflushed_since: Vec<Step>,
    /// The sector's unflushed content came from another member.
    pub(super) pulled: Vec<bool>,
    /// Blocks that were written and not discarded since. One with data counts as allocated whatever stands here.
    allocated: Vec<bool>,
    /// Where the medium returns something else than was written.
    pub(super) rot: Rot,
    pub(super) write_back: bool,
    /// Sectors whose content went with the cache in a power cut, and were not written since.
    pub(super) lost: BTreeSet<usize>,
    /// Blocks that cannot be read until they are written.
    pub(super) bad: BTreeSet<usize>,
    /// Blocks of reads that failed, or that returned other data: a client may have on record that they must be written again.
    pub(super) unread: BTreeSet<usize>,
    /// How many of them pulled data has healed.
    pub(super) healed: u64,
    pub(super) running: BTreeMap<u32, Running>,
}

impl Disk {
    /// A disk whose first sectors are zeroes, and the others whatever they were.
    pub(super) fn new(zeroes: usize, sectors: usize, write_back: bool) -> Self {
        let mut content = vec![super::operator::GARBAGE; sectors];
        content[..zeroes].fill(0);
        Self {
            durable: content.clone(),
            submitted: 0,
            sectors: content,
            unflushed_since: vec![0; sectors],
            pulled: vec![false; sectors],
            allocated: vec![false; sectors.div_ceil(SECTORS_PER_BLOCK)],
            rot: Rot::default(),
            write_back,
            lost: BTreeSet::new(),
            bad: BTreeSet::new(),
            unread: BTreeSet::new(),
            healed: 0,
            running: BTreeMap::new(),
        }
    }

    /// Notes that a read of these bytes returned other data than the disk has.
    pub(super) fn read_badly(&mut self, bytes: &std::ops::Range<u64>) {
        let block = super::oracle::SECTOR * SECTORS_PER_BLOCK as u64;
        let blocks = bytes.start / block..bytes.end.div_ceil(block);
        self.unread.extend(blocks.filter_map(|b| usize::try_from(b).ok()));
    }

    /// Another state of the store takes its place, durably.
    pub(super) fn replace(&mut self, sectors: Vec<u64>, lost: BTreeSet<usize>) {
        self.durable.clone_from(&sectors);
        self.sectors = sectors;
        self.unflushed_since.fill(0);
        self.pulled.fill(false);
        self.allocated.fill(false);
        self.lost = lost;
        self.bad.clear();
    }

    /// Whether a block takes space. A power cut may undo a discard, and bring data back.
    pub(super) fn is_allocated(&self, block: usize) -> bool {
        let sectors = block * SECTORS_PER_BLOCK..(block + 1) * SECTORS_PER_BLOCK;
        self.allocated[block] || self.sectors[sectors].iter().any(|&value| value != 0)
    }

    /// Makes room: these sectors read as zeroes, durably.
    pub(super) fn zero(&mut self, first: usize, end: usize) {
        self.sectors[first..end].fill(0);
        self.durable[first..end].fill(0);
    }

    /// Starts a request. Fails when that breaks a rule of the replica.
    pub(super) fn submit(
        &mut self,
        io: IoId,
        operation: DiskOperation,
        (offset, length): (u64, u32),
        data: Vec<u64>,
        result: DiskResult,
        is_pulled: bool,
    ) -> Result<(), String> {
        let first = usize::try_from(offset / SECTOR).unwrap_or(usize::MAX);
        let count = usize::try_from(u64::from(length) / SECTOR).unwrap_or(usize::MAX);
        let snapshot = if operation == DiskOperation::Flush {
            let unflushed = self.unflushed_since.iter().enumerate().filter(|(_, step)| **step > 0);
            unflushed.map(|(i, _)| (i, self.sectors[i])).collect()
        } else {
            Vec::new()
        };
        self.submitted += 1;
        let order = self.submitted;
        let running =
            Running { order, operation, first, count, result, data, snapshot, is_applied: false, is_pulled };
        if running.is_write() {
            let clash = |other: &&Running| {
                other.is_write() && other.first < first + count && first < other.first + other.count
            };
            if let Some(other) = self.running.values().find(clash) {
                return Err(format!(
                    "a write to sectors {first}+{count} was submitted while one to {}+{} is under way",
                    other.first, other.count
                ));
            }
        }
        if self.running.insert(io.0, running).is_some() {
            return Err(format!("disk request {} was submitted twice", io.0));
        }
        Ok(())
    }

    /// Whether a range has a block that cannot be read.
    pub(super) fn is_bad(&self, offset: u64, length: u32) -> bool {
        let block = |at: u64| usize::try_from(at / BLOCK_SIZE).unwrap_or(usize::MAX);
        length > 0 && self.bad.range(block(offset)..=block(offset + u64::from(length) - 1)).next().is_some()
    }

    /// A request takes effect. Returns what a read found.
    pub(super) fn apply(&mut self, io: u32, now: Step, rng: &mut Rng) -> Vec<u64> {
        let Some(running) = self.running.get_mut(&io).filter(|r| !r.is_applied) else { return Vec::new() };
        running.is_applied = true;
        let (first, count, failed) = (running.first, running.count, running.result != DiskResult::Done);
        match running.operation {
            DiskOperation::Read | DiskOperation::Digest => {
                (first..first + count).map(|s| self.sectors[s] | self.rot.mark(s)).collect()
            }
            DiskOperation::Flush => {
                let order = running.order;
                let flushed = if failed { Vec::new() } else { std::mem::take(&mut running.snapshot) };
                // What is durable now does not become older again when an earlier flush is slower.
                let sectors: BTreeSet<_> = flushed.iter().map(|(sector, _)| *sector).collect();
                for earlier in self.running.values_mut().filter(|r| r.order < order) {
                    earlier.snapshot.retain(|(sector, _)| !sectors.contains(sector));
                }
                for (sector, value) in flushed {
                    self.durable[sector] = value;
                    if self.sectors[sector] == value {
                        self.unflushed_since[sector] = 0;
                    } else {
                        self.unflushed_since[sector] = now;
                    }
                }
                Vec::new()
            }
            DiskOperation::Write(_)
            | DiskOperation::WritePulled
            | DiskOperation::Discard
            | DiskOperation::WriteZeroes
            | DiskOperation::ZeroPulled => {
                let is_discard =
                    matches!(running.operation, DiskOperation::Discard | DiskOperation::ZeroPulled);
                let data = std::mem::take(&mut running.data);
                let is_pulled = running.is_pulled;
                self.pulled[first..first + count].fill(is_pulled && self.write_back);
                self.change(first, count, &data, now, |_| failed && rng.percent(50));
                if is_discard {
                    // One that failed may have given back what it made zero.
                    let whole = first.div_ceil(SECTORS_PER_BLOCK)..(first + count) / SECTORS_PER_BLOCK;
                    whole.for_each(|block| self.allocated[block] = false);
                } else {
                    let touched = first / SECTORS_PER_BLOCK..(first + count).div_ceil(SECTORS_PER_BLOCK);
                    self.allocated[touched].fill(true);
                }
                if !failed {
                    let whole = first.div_ceil(SECTORS_PER_BLOCK)..(first + count) / SECTORS_PER_BLOCK;
                    let healed = whole.filter(|block| self.bad.remove(block)).count();
                    self.healed += if is_pulled { healed as u64 } else { 0 };
                }
                Vec::new()
            }
        }
    }

    fn change(
        &mut self,
        first: usize,
        count: usize,
        data: &[u64],
        now: Step,
        mut skip: impl FnMut(usize) -> bool,
    ) {
        let mut skipped = (usize::MAX, false);
        for i in 0..count {
            let sector = first + i;
            let block = sector / SECTORS_PER_BLOCK;
            if skipped.0 != block {
                skipped = (block, skip(block));
            }
            if skipped.1 {
                continue;
            }
            let value = data.get(i).copied().unwrap_or(0);
            self.sectors[sector] = strip(value);
            self.rot.written(sector, value, now);
            self.lost.remove(&sector);
            if self.write_back {
                let since = &mut self.unflushed_since[sector];
                *since = if *since == 0 { now } else { *since };
            } else {
                self.durable[sector] = self.sectors[sector];
            }
        }
    }

    /// The process that submitted the requests is gone: what is under way happens or not, block by block.
    pub(super) fn abandon(&mut self, now: Step, rng: &mut Rng) {
        for running in std::mem::take(&mut self.running).into_values() {
            if running.is_write() && !running.is_applied {
                self.change(running.first, running.count, &running.data, now, |_| rng.percent(50));
            }
        }
    }

    /// The power was cut: unflushed blocks are lost, or not. True if something was.
    pub(super) fn lose_cache(&mut self, rng: &mut Rng) -> bool {
        let mut lost = false;
        for block in 0..self.sectors.len() / SECTORS_PER_BLOCK {
            let range = block * SECTORS_PER_BLOCK..(block + 1) * SECTORS_PER_BLOCK;
            if self.unflushed_since[range.clone()].iter().all(|&step| step == 0) {
                continue;
            }
            let drop = rng.percent(70);
            for sector in range {
                if drop {
                    if self.sectors[sector] != self.durable[sector] {
                        lost = true;
                        self.lost.insert(sector);
                    }
                    self.sectors[sector] = self.durable[sector];
                } else {
                    self.durable[sector] = self.sectors[sector];
                }
                self.unflushed_since[sector] = 0;
            }
        }
        lost
    }

    /// Whether something is not flushed; of what came from another member, if that is asked.
    pub(super) fn has_unflushed(&self, is_pulled: bool) -> bool {
        self.unflushed_since
            .iter()
            .zip(&self.pulled)
            .any(|(since, pulled)| *since > 0 && (*pulled || !is_pulled))
    }

    /// Whether a write of a client to this block is under way.
    pub(super) fn is_written_by_guest(&self, block: Block) -> bool {
        let first = usize::try_from(block.0).unwrap_or(usize::MAX).saturating_mul(SECTORS_PER_BLOCK);
        self.running.values().any(|r| {
            r.is_write() && !r.is_pulled && r.first < first + SECTORS_PER_BLOCK && first < r.first + r.count
        })
    }

    /// The buffer of a write that is under way.
    pub(super) fn uses(&self, buffer: BufferToken) -> bool {
        self.running.values().any(|r| r.operation == DiskOperation::Write(buffer))
    }
}
