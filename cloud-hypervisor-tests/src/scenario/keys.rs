//! Keys of memory that are wrong: two ends of a verbs connection in one process, of which one answers a read with a key that
//! its owner took back, or that was good for an earlier read alone.

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rmr_common::buffer::Segment;
use rmr_common::pool::PoolId;
use rmr_common::transport::rdma::{
    Exposure, Fabric, KeyUse, RdmaConnection, RdmaListener, ReadMode, try_key,
};
use rmr_common::transport::{Connection, Place, Receiver};
use rmr_common::wire::{Kind, MessageHeader};
use rmr_node::disk::{Buffer, BufferPool};

use super::{Counters, Counts, Effort, System, not_run};
use crate::bench::load::{LoadSpec, Pattern};
use crate::lab::{DaemonBuilder, Lab, Transport, free_port};

const LIMIT: Duration = Duration::from_secs(30);
/// Bytes of the reads.
const LENGTH: u32 = 4096;
/// What the memory of the one who asks holds before.
const UNTOUCHED: u8 = 0xee;
/// What the other sends.
const SENT: u8 = 0xaa;

/// A peer with wrong keys is refused, and no byte of the guest's memory changes.
///
/// First the right key, so that what follows is known to be refused for the key alone.
pub(super) fn wrong_keys(lab: &Lab, _effort: Effort) -> Result<Counts> {
    if lab.fabric().transport() == Transport::Tcp {
        return Err(not_run("only verbs have keys of memory"));
    }
    let address = SocketAddr::new(lab.fabric().host(), free_port()?);
    let (node_fabric, client_fabric) = (Fabric::new(ReadMode::Direct), Fabric::new(ReadMode::Direct));
    // Memory of a pool stays mapped for the life of the process, so nobody need keep it for the registrations.
    let pool = BufferPool::new(1 << 20).context("memory")?;
    let (asked, sent) = (buffer(&pool, UNTOUCHED)?, buffer(&pool, SENT)?);
    let register = |fabric: &Fabric, memory: &Buffer, exposure| {
        fabric.register(memory.segment(), Arc::new(()), exposure).context("registering memory")
    };
    let _sent = register(&node_fabric, &sent, Exposure::Local)?;
    let given = register(&client_fabric, &asked, Exposure::Peers)?;
    let (mut client, mut node) = connect(&client_fabric, &node_fabric, address)?;

    ask(&mut client, &asked, 1)?;
    exchange(&mut client, &mut node, &sent, 1).context("a read with the right key")?;
    ensure!(asked.bytes().iter().all(|byte| *byte == SENT), "the data of the first read did not arrive");

    let mut asked = asked;
    asked.bytes_mut().fill(UNTOUCHED);
    ask(&mut client, &asked, 2)?;
    // The key is on its way, or there already.
    drop(given);
    let outcome = exchange(&mut client, &mut node, &sent, 2);
    let Err(refusal) = outcome else { bail!("a read with a key that was taken back was answered") };
    ensure!(
        refusal.is::<Refused>(),
        "expected the node's connection to be refused the write, found: {refusal:#}"
    );
    let changed = asked.bytes().iter().filter(|byte| **byte != UNTOUCHED).count();
    ensure!(changed == 0, "{changed} bytes were written with a key that was taken back");
    eprintln!("  refused: {refusal:#}");
    let refused = window_keys(lab.fabric().host())?;
    Ok(Counts::from([("changed_bytes".to_owned(), 0), ("window_keys_refused".to_owned(), refused)]))
}

/// The key of a window is refused by whoever has no right to it; returns how often.
///
/// Soft-RoCE of Linux 6.1 looks whether a write lies within the memory that the window was bound to a part of, and not whether it
/// lies within the window. What a device does there is told, and not demanded.
fn window_keys(host: std::net::IpAddr) -> Result<u64> {
    let mut refused = 0;
    for wrong in KeyUse::ALL {
        let outcome = try_key(host, wrong).with_context(|| format!("{wrong:?}"))?;
        let is_refused = outcome.refused.as_deref().is_some_and(|words| words.contains("remote access"));
        match wrong {
            KeyUse::Within => ensure!(
                outcome.refused.is_none() && outcome.changed == LENGTH as usize,
                "the right key: {outcome:?}"
            ),
            KeyUse::BeyondEnd | KeyUse::BeforeBegin if outcome.refused.is_none() => {
                eprintln!("  this device does not keep to the ends of windows: {wrong:?}, {outcome:?}");
            }
            _ => {
                ensure!(is_refused && outcome.changed == 0, "{wrong:?}: {outcome:?}");
                refused += 1;
            }
        }
    }
    Ok(refused)
}

/// In the read mode window each read has a key of its own, which is refused when the read is over.
///
/// First the whole system: as many keys as reads, all of them invalid in the end, and no byte copied. Then two ends, of
/// which one writes by the key of a read that the other has given up, while its memory is registered as before.
pub(super) fn windows(lab: &Lab, effort: Effort) -> Result<Counts> {
    if lab.fabric().transport() == Transport::Tcp {
        return Err(not_run("only verbs have memory windows"));
    }
    let mut counts = counted_windows(lab, effort)?;
    counts.insert("changed_bytes".to_owned(), old_key(lab)?);
    Ok(counts)
}

fn counted_windows(lab: &Lab, effort: Effort) -> Result<Counts> {
    let mut system = System::on_disk(lab, effort, 2)?;
    let daemon = DaemonBuilder::new(&system.pool)
        .name("windows")
        .arguments(["--rdma-read-mode", "window"])
        .start(lab)
        .context("the daemon in the read mode window")?;
    let before = system.counters()?;
    let load = LoadSpec {
        size: Some(effort.span),
        verify_at_end: true,
        ..System::spec(Pattern::RandRw, 16, Some(effort.requests))
    };
    let report = system.load(&daemon, &load)?;
    let by_daemon = Counters::of_daemon(&daemon)?;
    let at_nodes = system.counters()?.minus(&before)?;
    daemon.stop()?;
    let bound = by_daemon.get("windows_bound")?;
    let invalidated = by_daemon.get("windows_invalidated")?;
    let copied = by_daemon.get("data_copied_bytes")?;
    let (reads, writes) = (at_nodes.get("rmr_store_reads_total")?, at_nodes.get("rmr_rdma_writes_total")?);
    ensure!(bound > 0 && bound == reads, "{reads} reads of one place each, and {bound} windows were bound");
    ensure!(bound == invalidated, "{bound} windows were bound, and {invalidated} made invalid");
    ensure!(writes == reads, "{reads} reads, and the nodes wrote {writes} times into guest memory");
    ensure!(copied == 0, "{copied} bytes were copied");
    Ok(Counts::from([
        ("requests".to_owned(), report.requests),
        ("windows_bound".to_owned(), bound),
        ("windows_invalidated".to_owned(), invalidated),
        ("verified_blocks".to_owned(), report.verified_blocks),
    ]))
}

/// Returns how many bytes a key changed that was good for a read before.
fn old_key(lab: &Lab) -> Result<u64> {
    let address = SocketAddr::new(lab.fabric().host(), free_port()?);
    let (node_fabric, client_fabric) = (Fabric::new(ReadMode::Direct), Fabric::new(ReadMode::Window));
    let pool = BufferPool::new(1 << 20).context("memory")?;
    let (mut asked, sent) = (buffer(&pool, UNTOUCHED)?, buffer(&pool, SENT)?);
    let register = |fabric: &Fabric, memory: &Buffer, exposure| {
        fabric.register(memory.segment(), Arc::new(()), exposure).context("registering memory")
    };
    let _sent = register(&node_fabric, &sent, Exposure::Local)?;
    let _asked = register(&client_fabric, &asked, client_fabric.exposure())?;
    let (mut client, mut node) = connect(&client_fabric, &node_fabric, address)?;
    for number in 1..=3 {
        ask(&mut client, &asked, number)?;
        exchange(&mut client, &mut node, &sent, number)
            .with_context(|| format!("read {number} by a window"))?;
        ensure!(asked.bytes().iter().all(|byte| *byte == SENT), "the data of read {number} did not arrive");
        asked.bytes_mut().fill(UNTOUCHED);
    }
    let counters = client.counters();
    ensure!(
        (counters.windows_bound, counters.windows_invalidated, counters.data_copied_bytes) == (3, 3, 0),
        "expected three windows, bound and made invalid, found {counters:?}"
    );

    // The node knows the key of a read that the client has then asked for anew, by another key.
    ask(&mut client, &asked, 4)?;
    let end = Instant::now() + LIMIT;
    let mut at_node = Arrivals::default();
    while !at_node.has(Kind::Read, 4) {
        ensure!(Instant::now() < end, "no request within {LIMIT:?}");
        client.flush().context("asking")?;
        node.receive(&mut at_node).context("the request")?;
        thread::sleep(Duration::from_millis(1));
    }
    ask(&mut client, &asked, 4)?;
    let mut at_client = Arrivals::default();
    for _ in 0..50 {
        client.receive(&mut at_client).context("the end of the first key")?;
        thread::sleep(Duration::from_millis(2));
    }
    let reply = MessageHeader { payload: LENGTH, ..header(Kind::IoReply, 4) };
    node.queue_data(&reply, Some(1), &mut |segments: &mut Vec<Segment>| segments.push(sent.segment()));
    let refusal = loop {
        ensure!(Instant::now() < end, "a write by an old key was neither done nor refused within {LIMIT:?}");
        if let Err(error) = node.flush().and_then(|()| node.receive(&mut Arrivals::default())) {
            break error;
        }
        // It answers as well, if it was not refused.
        let _ = client.receive(&mut at_client);
        ensure!(!at_client.has(Kind::IoReply, 4), "a read by a key that was invalid was answered");
        thread::sleep(Duration::from_millis(1));
    };
    let changed = asked.bytes().iter().filter(|byte| **byte != UNTOUCHED).count();
    ensure!(changed == 0, "{changed} bytes were written by a key that was invalid");
    eprintln!("  refused: {refusal}");
    Ok(0)
}

/// The card or the peer's card ended the connection.
#[derive(Debug, thiserror::Error)]
#[error("the connection ended: {0}")]
struct Refused(String);

fn buffer(pool: &BufferPool, byte: u8) -> Result<Buffer> {
    let mut buffer = pool.try_acquire(LENGTH as usize).context("no buffer is free")?;
    buffer.bytes_mut().fill(byte);
    Ok(buffer)
}

fn connect(client: &Fabric, node: &Fabric, address: SocketAddr) -> Result<(RdmaConnection, RdmaConnection)> {
    let mut listener = RdmaListener::bind(node, address, LIMIT).context("listening")?;
    let fabric = client.clone();
    let connecting = thread::spawn(move || RdmaConnection::connect(&fabric, address, LIMIT));
    let end = Instant::now() + LIMIT;
    let accepted = loop {
        if let Some((accepted, _)) = listener.accept().context("accepting")? {
            break accepted;
        }
        ensure!(Instant::now() < end, "no connection came within {LIMIT:?}");
        thread::sleep(Duration::from_millis(10));
    };
    let connected = connecting.join().map_err(|_| anyhow::anyhow!("connecting panicked"))?;
    Ok((connected.context("connecting")?, accepted))
}

fn header(kind: Kind, number: u64) -> MessageHeader {
    let mut header = MessageHeader::new(kind, PoolId(uuid::Uuid::nil()));
    header.sequence.0 = number;
    header.length = LENGTH;
    header
}

fn ask(client: &mut RdmaConnection, memory: &Buffer, number: u64) -> Result<()> {
    client.queue_read(&header(Kind::Read, number), &mut |segments| segments.push(memory.segment()));
    client.flush().context("asking")
}

/// Carries one read to the node and its answer back.
fn exchange(
    client: &mut RdmaConnection,
    node: &mut RdmaConnection,
    sent: &Buffer,
    number: u64,
) -> Result<()> {
    let ended = |error: rmr_common::transport::ConnectionError| Refused(error.to_string());
    let end = Instant::now() + LIMIT;
    let mut at_node = Arrivals::default();
    let mut at_client = Arrivals::default();
    let mut answered = false;
    while !at_client.has(Kind::IoReply, number) {
        ensure!(Instant::now() < end, "no answer and no error within {LIMIT:?}");
        client.flush().map_err(ended)?;
        node.receive(&mut at_node).map_err(ended)?;
        if at_node.has(Kind::Read, number) && !answered {
            answered = true;
            let reply = MessageHeader { payload: LENGTH, ..header(Kind::IoReply, number) };
            node.queue_data(&reply, Some(1), &mut |segments: &mut Vec<Segment>| {
                segments.push(sent.segment())
            });
        }
        node.flush().map_err(ended)?;
        client.receive(&mut at_client).map_err(ended)?;
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// What came.
#[derive(Default)]
struct Arrivals(Vec<MessageHeader>);

impl Arrivals {
    fn has(&self, kind: Kind, number: u64) -> bool {
        self.0.iter().any(|header| header.kind == kind && header.sequence.0 == number)
    }
}

impl Receiver for Arrivals {
    fn place(&mut self, _header: &MessageHeader, _segments: &mut Vec<Segment>) -> Place {
        // Data comes by itself, or not at all.
        Place::Discard
    }

    fn deliver(&mut self, header: &MessageHeader, _body: &[u8]) {
        self.0.push(*header);
    }
}
