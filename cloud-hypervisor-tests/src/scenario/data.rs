//! What is carried, and at what cost: verified I/O of all shapes, more of it than there is memory for, and a resync.

use anyhow::{Context, Result, ensure};

use super::system::LIMIT;
use super::{Counters, Counts, Effort, System};
use crate::bench::load::{LoadSpec, Pattern};
use crate::lab::frontend::{self, BUFFERS, Descriptor, flag, request};
use crate::lab::{Frontend, FrontendBuilder, Lab, Status, Transport, stores};

/// The largest request of a guest, on both transports.
const LARGEST: u32 = 1 << 20;
/// Its segments.
const SEGMENTS: u16 = 128;
/// Bytes of each.
const SEGMENT_BYTES: usize = 8 << 10;

/// Every block that is read holds what was written, and all copies are the same.
pub(super) fn io(lab: &Lab, effort: Effort) -> Result<Counts> {
    let mut system = System::on_disk(lab, effort, 2)?;
    let daemon = system.daemon(lab, "daemon")?;
    let load = LoadSpec {
        size: Some(effort.span),
        verify_at_end: true,
        ..System::spec(Pattern::RandRw, 16, Some(effort.requests))
    };
    let report = system.load(&daemon, &load)?;
    system.pool.assert_identical_within(LIMIT)?;
    daemon.stop()?;
    Ok(Counts::from([
        ("requests".to_owned(), report.requests),
        ("verified_blocks".to_owned(), report.verified_blocks),
    ]))
}

/// A request costs the messages, work requests and copies that the design says.
///
/// Per 4 KiB write and leg: one RDMA write of the client, one send of the node. Per 4 KiB read: one send of the client,
/// one RDMA write and one send of the node. Nothing is copied by a processor. Over TCP, every byte is copied once by the
/// kernel on either side, and nothing else is.
pub(super) fn counts(lab: &Lab, effort: Effort) -> Result<Counts> {
    let mut system = System::on_disk(lab, effort, 2)?;
    let legs = system.nodes.len() as u64;
    let requests = effort.requests / 2;
    // One daemon for each direction, since a daemon tells its counters when its guest has gone.
    let (writes, by_writer, for_writes) = counted(lab, &mut system, "writer", Pattern::Write, requests)?;
    let (reads, by_reader, for_reads) = counted(lab, &mut system, "reader", Pattern::Read, requests)?;
    let count = |counters: &Counters, name: &str| counters.get(name);

    let written = count(&for_writes, "rmr_store_writes_total")?;
    ensure!(written == writes * legs, "{writes} writes on {legs} legs became {written}");
    let read = count(&for_reads, "rmr_store_reads_total")?;
    ensure!(read == reads, "{reads} reads became {read} at the nodes");

    let mut counts =
        Counts::from([("writes".to_owned(), writes), ("reads".to_owned(), reads), ("legs".to_owned(), legs)]);
    for (side, counters) in [
        ("client_for_writes", &by_writer),
        ("nodes_for_writes", &for_writes),
        ("client_for_reads", &by_reader),
        ("nodes_for_reads", &for_reads),
    ] {
        counters.each(|name, value| counts.insert(format!("{side}.{name}"), value));
    }
    match lab.fabric().transport() {
        Transport::Tcp => {
            let sent = count(&by_writer, "tcp_sent_bytes")?;
            ensure!(
                sent >= writes * legs * 4096,
                "{sent} bytes were sent for {writes} writes on {legs} legs"
            );
            for counters in [&by_writer, &by_reader] {
                ensure!(count(counters, "sends")? == 0, "TCP alone, and verbs were used: {counters:?}");
            }
        }
        Transport::Rdma => {
            for (name, counters) in [
                ("data_copied_bytes", &by_writer),
                ("data_copied_bytes", &by_reader),
                ("tcp_sent_bytes", &by_writer),
                ("tcp_received_bytes", &by_reader),
                ("rmr_rdma_data_copied_bytes_total", &for_writes),
                ("rmr_rdma_data_copied_bytes_total", &for_reads),
                ("rmr_tcp_received_bytes_total", &for_writes),
                ("rmr_tcp_sent_bytes_total", &for_reads),
            ] {
                let found = count(counters, name)?;
                ensure!(found == 0, "expected nothing under {name}, found {found}: {counters:?}");
            }
            exactly(&by_writer, "writes_with_immediate", writes * legs)?;
            exactly(&by_writer, "writes", 0)?;
            nearly(&for_writes, "rmr_rdma_sends_total", writes * legs)?;
            exactly(&for_writes, "rmr_rdma_writes_total", 0)?;
            nearly(&by_reader, "sends", reads)?;
            exactly(&by_reader, "writes_with_immediate", 0)?;
            exactly(&for_reads, "rmr_rdma_writes_total", reads)?;
            nearly(&for_reads, "rmr_rdma_sends_total", reads)?;
        }
    }
    Ok(counts)
}

/// A load of one direction by a daemon of its own: its requests, what the daemon counted, what the nodes counted.
fn counted(
    lab: &Lab,
    system: &mut System,
    name: &str,
    pattern: Pattern,
    requests: u64,
) -> Result<(u64, Counters, Counters)> {
    let daemon = system.daemon(lab, name)?;
    let before = system.counters()?;
    let report = system.load(&daemon, &System::spec(pattern, 1, Some(requests)))?;
    let by_daemon = Counters::of_daemon(&daemon)?;
    let at_nodes = system.counters()?.minus(&before)?;
    daemon.stop()?;
    Ok((report.requests, by_daemon, at_nodes))
}

fn exactly(counters: &Counters, name: &str, expected: u64) -> Result<()> {
    let found = counters.get(name)?;
    ensure!(found == expected, "expected {expected} under {name}, found {found}: {counters:?}");
    Ok(())
}

/// As many as `expected`, and those of connecting, attaching, pings and flushes besides.
fn nearly(counters: &Counters, name: &str, expected: u64) -> Result<()> {
    /// Far fewer than requests, so that another message for each one is noticed.
    const BESIDES: u64 = 120;
    let found = counters.get(name)?;
    ensure!(
        (expected..=expected + BESIDES).contains(&found),
        "expected {expected} and at most {BESIDES} more under {name}, found {found}: {counters:?}"
    );
    Ok(())
}

/// Requests of 1 MiB in 128 segments are carried whole.
///
/// The segments have gaps between them, so that nobody can take two for one. They are more than the device recommends,
/// which a guest may do.
pub(super) fn segments(lab: &Lab, effort: Effort) -> Result<Counts> {
    let system = System::new(lab, effort, 2, "")?;
    let daemon = system.daemon(lab, "daemon")?;
    let mut disk = FrontendBuilder::new(daemon.socket()).queue_size(256).connect()?;
    let rounds = effort.requests.div_ceil(64).min(effort.pool_mib);
    for round in 0..rounds {
        let data: Vec<u8> = (0..u64::from(LARGEST)).map(|at| pattern(round, at)).collect();
        for (segment, bytes) in (0..).zip(data.chunks(SEGMENT_BYTES)) {
            disk.put(segment_address(segment), bytes)?;
        }
        large_request(&mut disk, request::OUT, round)?;
        for segment in 0..SEGMENTS {
            disk.put(segment_address(segment), &[0xee; SEGMENT_BYTES])?;
        }
        large_request(&mut disk, request::IN, round)?;
        for (segment, bytes) in (0..).zip(data.chunks(SEGMENT_BYTES)) {
            let (found, after) = (
                disk.get(segment_address(segment), SEGMENT_BYTES)?,
                disk.get(segment_address(segment) + SEGMENT_BYTES as u64, 64)?,
            );
            ensure!(found == bytes, "round {round}: segment {segment} does not hold what was written");
            ensure!(after == [0; 64], "round {round}: bytes behind segment {segment} were changed");
        }
    }
    drop(disk);
    system.pool.assert_identical_within(LIMIT)?;
    daemon.stop()?;
    Ok(Counts::from([("requests".to_owned(), 2 * rounds), ("segments".to_owned(), u64::from(SEGMENTS))]))
}

/// A byte that tells the round and the place that it belongs to.
fn pattern(round: u64, at: u64) -> u8 {
    let [low, high, ..] = (at ^ (at >> 13)).wrapping_mul(0x9e37_79b9).wrapping_add(round).to_le_bytes();
    low ^ high
}

fn segment_address(segment: u16) -> u64 {
    /// Room of a segment, with a gap behind it.
    const STRIDE: u64 = SEGMENT_BYTES as u64 + 4096;
    BUFFERS + 4096 + u64::from(segment) * STRIDE
}

/// A request for the whole of the `round`th MiB of the disk; the device has to answer it with success.
fn large_request(disk: &mut Frontend, kind: u32, round: u64) -> Result<()> {
    const STATUS: u64 = BUFFERS + 64;
    disk.put(BUFFERS, &frontend::header(kind, round * u64::from(LARGEST) / 512))?;
    disk.put(STATUS, &[0xff])?;
    let direction = if kind == request::IN { flag::WRITE } else { 0 };
    let mut chain = vec![Descriptor { address: BUFFERS, length: 16, flags: flag::NEXT, next: 1 }];
    for segment in 0..SEGMENTS {
        let address = segment_address(segment);
        let (length, flags) = (u32::try_from(SEGMENT_BYTES)?, flag::NEXT | direction);
        chain.push(Descriptor { address, length, flags, next: segment + 2 });
    }
    chain.push(Descriptor { address: STATUS, length: 1, flags: flag::WRITE, next: 0 });
    disk.put_chain(0, 0, &chain)?;
    disk.publish(0, 0)?;
    let used = disk.wait_used(0, LIMIT)?;
    let status = Status::from(disk.get(STATUS, 1)?[0]);
    ensure!(
        used.is_some() && status == Status::Ok,
        "request type {kind} of round {round}: {used:?}, {status:?}"
    );
    Ok(())
}

/// A guest that asks for more than a node has memory for waits, and gets it all.
pub(super) fn exhaustion(lab: &Lab, effort: Effort) -> Result<Counts> {
    /// Where the load works: all requests in flight have room beside one another.
    const EXHAUSTING: u64 = 16 << 20;
    // The least that a node may have; the requests in flight need half as much again.
    let mut system = System::new(lab, effort, 2, "buffer_memory = \"8M\"\n")?;
    let daemon = system.daemon(lab, "daemon")?;
    let load = LoadSpec {
        block_size: 128 << 10,
        segment_size: Some(32 << 10),
        size: Some(EXHAUSTING),
        verify_at_end: true,
        ..System::spec(Pattern::RandRw, 96, Some(effort.requests / 2))
    };
    let report = system.load(&daemon, &load)?;
    system.pool.assert_identical_within(LIMIT)?;
    daemon.stop()?;
    Ok(Counts::from([("requests".to_owned(), report.requests)]))
}

/// A member that was away is brought up to date by exactly what it missed, from node to node.
///
/// Over verbs no processor copies any of it: what is copied are maps, views and lists of blocks.
pub(super) fn resync(lab: &Lab, effort: Effort) -> Result<Counts> {
    let mut system = System::new(lab, effort, 2, "")?;
    let daemon = system.daemon(lab, "daemon")?;
    let load = System::spec(Pattern::RandWrite, 16, Some(effort.requests / 2));
    let mut disk = System::attach(&daemon, &load)?;
    system.load_on(&mut disk, &load)?;
    system.nodes[1].kill()?;
    system.load_on(&mut disk, &LoadSpec { seed: 2, ..load })?;
    let areas = system.pool.areas()?;
    let missed = stores::different_blocks(&areas[0], &areas[1])? as u64;
    ensure!(missed > 0, "nothing was written while node b was away");
    let before = Counters::of(&system.nodes[0])?;
    system.nodes[1].restart(lab)?;
    system.pool.wait_for_level("safe", LIMIT).context("node b is back")?;
    // The node that was started again counts from nothing.
    let (source, stale) = (Counters::of(&system.nodes[0])?.minus(&before)?, Counters::of(&system.nodes[1])?);
    exactly(&stale, "rmr_store_resync_written_blocks_total", missed)?;
    exactly(&stale, "rmr_store_writes_total", 0)?;
    for (counters, name) in
        [(&source, "rmr_store_resync_sent_bytes_total"), (&stale, "rmr_store_resync_received_bytes_total")]
    {
        let (moved, least) = (counters.get(name)?, missed * 4096);
        ensure!(
            (least..=least + least / 100).contains(&moved),
            "{missed} blocks were missed, and {name} is {moved}: expected {least} bytes and at most 1 % more"
        );
    }
    drop(disk);
    system.check_everything(&daemon)?;
    daemon.stop()?;
    check_resync(lab.fabric().transport(), missed, &source, &stale)
}

/// What processors copied for a resync of so many blocks, by the counters of both nodes.
fn check_resync(transport: Transport, missed: u64, source: &Counters, stale: &Counters) -> Result<Counts> {
    let mut counts = Counts::from([("missed_blocks".to_owned(), missed)]);
    for (side, counters) in [("source", source), ("stale", stale)] {
        for name in [
            "rmr_rdma_data_copied_bytes_total",
            "rmr_rdma_body_copied_bytes_total",
            "rmr_rdma_writes_total",
            "rmr_tcp_sent_bytes_total",
            "rmr_tcp_received_bytes_total",
        ] {
            counts.insert(format!("{side}.{name}"), counters.get(name)?);
        }
        if transport == Transport::Rdma {
            exactly(counters, "rmr_rdma_data_copied_bytes_total", 0)?;
            exactly(counters, "rmr_tcp_received_bytes_total", 0)?;
            let (copied, data) = (counters.get("rmr_rdma_body_copied_bytes_total")?, missed * 4096);
            ensure!(
                copied < data / 8,
                "for {data} bytes of data the {side} node copied {copied} of messages: {counts:?}"
            );
        }
    }
    if transport == Transport::Rdma {
        ensure!(source.get("rmr_rdma_writes_total")? > 0, "no data went by RDMA writes: {counts:?}");
    }
    Ok(counts)
}
