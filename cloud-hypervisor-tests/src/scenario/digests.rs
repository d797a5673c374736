//! A guest that changes its buffers while they are written and read, and one whose writes race for the same places: whatever
//! becomes of the data, all stores hold the same. Without data digests the first of the two leaves stores that differ.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::system::{LIMIT, patient_daemon, patient_nodes};
use super::{Counters, Counts, Effort};
use crate::lab::frontend::{self, BUFFERS, BUFFERS_END, Descriptor, flag, request};
use crate::lab::{Daemon, Frontend, FrontendBuilder, Lab, Node, Pool, PoolBuilder, Status, stores};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;
const SECTOR: u64 = 512;
/// Headers and status bytes lie below, data from here on.
const DATA: u64 = BUFFERS + MIB;
/// What nodes count when the data of a write did not arrive as its digest says.
const MISMATCHES: &str = "rmr_store_digest_mismatches_total";
/// What the daemon says when it goes on without a leg. The resync after that would hide what these scenarios look for.
const LEG_LOST: &str = "members lost";

/// Buffers that change in flight leave equal stores with digests, and different ones without.
pub(super) fn changing_buffers(lab: &Lab, effort: Effort) -> Result<Counts> {
    let nodes = patient_nodes(lab, effort, 2)?;
    let (writes, refused) = detect(lab, effort, &nodes).context("detect")?;
    bounce(lab, effort, &nodes).context("bounce")?;
    let different = off(lab, effort, &nodes).context("off")?;
    Ok(Counts::from([
        ("detect_writes".to_owned(), writes),
        ("detect_refused".to_owned(), refused),
        ("off_different_blocks".to_owned(), different),
    ]))
}

/// Mismatches were seen, and all stores are identical. Returns the number of writes, and of those that a node refused.
fn detect(lab: &Lab, effort: Effort, nodes: &[Node]) -> Result<(u64, u64)> {
    let (pool, daemon) = start(lab, effort, nodes, "detect", 1)?;
    let before = counters(nodes)?;
    let mismatches = || counters(nodes)?.since(&before, MISMATCHES);
    let mut disk = FrontendBuilder::new(daemon.socket()).connect()?;
    let mut guest = Restless::new(1, effort);
    // A mismatch is seen in the first few as a rule.
    let mut batches = 0;
    while batches < effort.batches || (mismatches()? == 0 && batches < 10 * effort.batches) {
        guest.batches(&mut disk, 1, true)?;
        batches += 1;
    }
    let seen = mismatches()?;
    ensure!(
        seen > 0,
        "no mismatch in {} writes: the buffers did not change in flight, this proved nothing",
        guest.writes
    );
    end(disk, &daemon, &pool)?;
    Ok((guest.writes, seen))
}

/// Nothing that was sent had changed, and all stores are identical.
fn bounce(lab: &Lab, effort: Effort, nodes: &[Node]) -> Result<()> {
    let (pool, daemon) = start(lab, effort, nodes, "bounce", 1)?;
    let before = counters(nodes)?;
    let mut disk = FrontendBuilder::new(daemon.socket()).connect()?;
    let mut guest = Restless::new(2, effort);
    guest.batches(&mut disk, effort.batches, true)?;
    let seen = counters(nodes)?.since(&before, MISMATCHES)?;
    ensure!(
        seen == 0,
        "nodes refused {seen} of {} writes, expected none: copies do not change",
        guest.writes
    );
    end(disk, &daemon, &pool)
}

/// The same load without digests, until the stores differ: this shows that the comparison can fail. Returns in how many blocks
/// they do. That all writes reach both stores with the same content is chance, and no failure, and is told.
fn off(lab: &Lab, effort: Effort, nodes: &[Node]) -> Result<u64> {
    const LONG_ENOUGH: Duration = Duration::from_secs(8);
    let (pool, daemon) = start(lab, effort, nodes, "off", 1)?;
    let mut disk = FrontendBuilder::new(daemon.socket()).connect()?;
    let mut guest = Restless::new(3, effort);
    let (begun, mut different) = (Instant::now(), 0);
    while different == 0 && begun.elapsed() < LONG_ENOUGH {
        guest.batches(&mut disk, effort.batches.div_ceil(4), false)?;
        ensure!(disk.flush(0)? == Status::Ok, "a flush failed");
        let areas = pool.areas()?;
        different = stores::different_blocks(&areas[0], &areas[1])?;
    }
    if different == 0 {
        // Not by eprintln!, whose output is hidden for tests that pass.
        let _ = writeln!(
            std::io::stderr(),
            "\nNOT RUN (skipped): off: the same load leaves stores that differ: {} writes all reached both stores with the \
             same content",
            guest.writes
        );
    }
    drop(disk);
    daemon.stop()?;
    no_leg_was_lost(&daemon)?;
    Ok(different as u64)
}

/// Overlapping writes that race on four queues leave equal stores.
pub(super) fn racing_writes(lab: &Lab, effort: Effort) -> Result<Counts> {
    let nodes = patient_nodes(lab, effort, 2)?;
    let mut counts = Counts::new();
    for (seed, mode) in [(4, "off"), (5, "detect")] {
        let written = raced(lab, effort, &nodes, seed, mode).context(mode)?;
        counts.insert(format!("{mode}_sectors"), written);
    }
    Ok(counts)
}

/// Every sector is of one write, the same in all stores. Returns how many were written.
fn raced(lab: &Lab, effort: Effort, nodes: &[Node], seed: u64, mode: &str) -> Result<u64> {
    let (pool, daemon) = start(lab, effort, nodes, mode, RACING_QUEUES)?;
    let mut disk = FrontendBuilder::new(daemon.socket()).queues(RACING_QUEUES.into()).connect()?;
    race(&mut disk, seed, effort.batches)?;
    let (status, data) = disk.read(0, 0, u32::try_from(RACED)?)?;
    ensure!(status == Status::Ok, "reading what was written: {status:?}");
    let mut written = 0;
    for (number, sector) in data.chunks(usize::try_from(SECTOR)?).enumerate() {
        let stamp = &sector[..8];
        ensure!(
            sector.chunks(8).all(|other| other == stamp),
            "sector {number} is of more than one write: {sector:?}"
        );
        written += u64::from(stamp != [0; 8]);
    }
    ensure!(written > 0, "nothing was written");
    end(disk, &daemon, &pool)?;
    Ok(written)
}

/// A guest that keeps a queue full of large requests while a thread of its own changes their buffers.
struct Restless {
    random: SmallRng,
    /// Blocks of the smallest and the largest of the large ones.
    large: (u64, u64),
    /// Blocks of the disk.
    blocks: u64,
    writes: u64,
}

impl Restless {
    const BUFFER: u64 = MIB;
    const BUFFERS: u64 = (BUFFERS_END - DATA) / Self::BUFFER;

    fn new(seed: u64, effort: Effort) -> Self {
        let largest = effort.large_blocks.min(Self::BUFFER / BLOCK);
        let (large, blocks) = ((largest / 4, largest), effort.pool_mib * MIB / BLOCK);
        Self { random: SmallRng::seed_from_u64(seed), large, blocks, writes: 0 }
    }

    /// Submits so many batches of writes at random places, with one read in each if so wished, and waits for them all.
    fn batches(&mut self, disk: &mut Frontend, count: u32, and_reads: bool) -> Result<()> {
        let memory = disk.memory();
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            let changing = scope.spawn(|| change_buffers(&memory, &is_over));
            let result = (0..count).try_for_each(|_| self.batch(disk, and_reads));
            is_over.store(true, Ordering::Relaxed);
            match changing.join() {
                Ok(changed) => result.and(changed),
                Err(_) => bail!("the thread that changes buffers panicked"),
            }
        })
    }

    fn batch(&mut self, disk: &mut Frontend, and_reads: bool) -> Result<()> {
        for number in 0..Self::BUFFERS {
            let blocks = match number {
                0 | 1 => self.random.random_range(1..=16),
                _ => self.random.random_range(self.large.0..=self.large.1),
            };
            let first = self.random.random_range(0..=self.blocks - blocks);
            let kind = if and_reads && number == 2 { request::IN } else { request::OUT };
            self.writes += u64::from(kind == request::OUT);
            let buffer = Buffer::new(number, Self::BUFFER);
            let length = u32::try_from(blocks * BLOCK)?;
            buffer.submit(disk, 0, u16::try_from(number)?, kind, first * BLOCK / SECTOR, length)?;
        }
        (0..Self::BUFFERS).try_for_each(|_| reap(disk, 0, |chain| Buffer::new(chain.into(), Self::BUFFER)))
    }
}

/// Changes a few bytes of each block of all buffers again and again. It rests now and then, so that some writes are sent as
/// they were and others change between one leg and the next: members are to see both.
fn change_buffers(memory: &GuestMemoryMmap, is_over: &AtomicBool) -> Result<()> {
    let mut random = SmallRng::seed_from_u64(0);
    let mut generation = 0_u64;
    while !is_over.load(Ordering::Relaxed) {
        generation += 1;
        let within = generation % (BLOCK / 8) * 8;
        for block in DATA / BLOCK..BUFFERS_END / BLOCK {
            let place = GuestAddress(block * BLOCK + within);
            memory.store(generation, place, Ordering::Relaxed).context("changing a buffer")?;
        }
        if random.random_ratio(1, 16) {
            thread::sleep(Duration::from_micros(random.random_range(50..1000)));
        }
    }
    Ok(())
}

const RACING_QUEUES: u16 = 4;
/// What all writes of a race aim at: small, so that most of them overlap others that are in flight.
const RACED: u64 = MIB;

/// Writes of random ranges within [`RACED`], in sectors, sixteen at a time on each queue; each repeats a stamp of its own.
fn race(disk: &mut Frontend, seed: u64, batches: u32) -> Result<()> {
    const DEPTH: u16 = 16;
    const BUFFER: u64 = 64 << 10;
    let mut random = SmallRng::seed_from_u64(seed);
    let mut stamp = 0_u64;
    let buffer = |queue: u16, chain: u16| Buffer::new(u64::from(queue * DEPTH + chain), BUFFER);
    for _ in 0..batches {
        for chain in 0..DEPTH {
            for queue in 0..RACING_QUEUES {
                stamp += 1;
                let sectors = random.random_range(1..=BUFFER / SECTOR);
                let first = random.random_range(0..=RACED / SECTOR - sectors);
                let buffer = buffer(queue, chain);
                let length = u32::try_from(sectors * SECTOR)?;
                disk.put(buffer.data, &stamp.to_le_bytes().repeat(length as usize / 8))?;
                buffer.submit(disk, queue, chain, request::OUT, first, length)?;
            }
        }
        for queue in 0..RACING_QUEUES {
            (0..DEPTH).try_for_each(|_| reap(disk, queue.into(), |chain| buffer(queue, chain)))?;
        }
    }
    Ok(())
}

/// Header, status and data of one of several requests at once.
#[derive(Clone, Copy)]
struct Buffer {
    header: u64,
    status: u64,
    data: u64,
}

impl Buffer {
    fn new(number: u64, size: u64) -> Self {
        let header = BUFFERS + number * 64;
        Self { header, status: header + 32, data: DATA + number * size }
    }

    fn submit(
        self,
        disk: &mut Frontend,
        queue: u16,
        chain: u16,
        kind: u32,
        sector: u64,
        length: u32,
    ) -> Result<()> {
        disk.put(self.header, &frontend::header(kind, sector))?;
        disk.put(self.status, &[0xee])?;
        let first = chain * 3;
        let data_flags = flag::NEXT | if kind == request::IN { flag::WRITE } else { 0 };
        let entries = [
            Descriptor { address: self.header, length: 16, flags: flag::NEXT, next: first + 1 },
            Descriptor { address: self.data, length, flags: data_flags, next: first + 2 },
            Descriptor { address: self.status, length: 1, flags: flag::WRITE, next: 0 },
        ];
        disk.put_chain(queue.into(), first, &entries)?;
        disk.publish(queue.into(), first)
    }
}

/// Waits for one completion on a queue and demands that it was none of an error.
fn reap(disk: &mut Frontend, queue: usize, buffer: impl Fn(u16) -> Buffer) -> Result<()> {
    let used = disk.wait_used(queue, LIMIT)?;
    let used = used.with_context(|| format!("no completion on queue {queue} within {LIMIT:?}"))?;
    let status = disk.get(buffer(u16::try_from(used.head / 3)?).status, 1)?[0];
    ensure!(
        Status::from(status) == Status::Ok,
        "chain {} of queue {queue} ended with {status:#x}",
        used.head
    );
    Ok(())
}

/// A pool of its own for each mode, and a daemon for it.
fn start(lab: &Lab, effort: Effort, nodes: &[Node], mode: &str, queues: u16) -> Result<(Pool, Daemon)> {
    let pool = PoolBuilder::new(mode).size_mib(effort.pool_mib).block_size(512);
    let pool = nodes.iter().fold(pool, PoolBuilder::member).create(lab)?;
    let daemon =
        patient_daemon(&pool, effort).queues(queues).arguments(["--data-digest", mode]).start(lab)?;
    Ok((pool, daemon))
}

/// Flushes, stops and compares.
fn end(mut disk: Frontend, daemon: &Daemon, pool: &Pool) -> Result<()> {
    ensure!(disk.flush(0)? == Status::Ok, "the last flush failed");
    drop(disk);
    daemon.stop()?;
    no_leg_was_lost(daemon)?;
    pool.assert_identical()
}

fn no_leg_was_lost(daemon: &Daemon) -> Result<()> {
    let log = daemon.process().log_text();
    ensure!(!log.contains(LEG_LOST), "a leg was lost, its resync would hide differences:\n{log}");
    Ok(())
}

fn counters(nodes: &[Node]) -> Result<Counters> {
    nodes.iter().map(Counters::of).try_fold(Counters::default(), |sum, one| Ok(sum.plus(&one?)))
}
