//! A trial of what the safety of memory rests on: whether the card refuses the key of a memory window beyond the piece of
//! memory that it was bound to, from another connection, and after its end.

use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use super::endpoint::{Completion, Done, LinkEvent, Operation, Piece, QueueSizes, Slab, Verbs, WorkRequest};
use super::verbs::{self, Endpoint};
use super::{Exposure, Fabric, INLINE, KeyOutcome, KeyUse, RdmaError};
use crate::buffer::{copy_from_segments, copy_to_segments};

/// Longest wait for anything.
const LIMIT: Duration = Duration::from_secs(15);
const PAGE: usize = 4096;
/// What the memory holds before, and what is written to it.
const BEFORE: u8 = 0x11;
const WRITTEN: u8 = 0xaa;

/// Writes a page by a key of a window, between two connections of this machine at `host`, and tells what the card did.
///
/// # Errors
/// When the device has no windows, or something else went wrong than the write.
pub fn try_key(host: IpAddr, wrong: KeyUse) -> Result<KeyOutcome, RdmaError> {
    let fabric = Fabric::for_nodes();
    let (mut owner, mut writer) = pair(&fabric, host)?;
    if !owner.has_windows() {
        return Err(RdmaError::NoWindows { device: owner.domain.device.clone() });
    }
    let memory = owner.slab(3 * PAGE, Exposure::Windows)?;
    copy_to_segments(&[BEFORE; 3 * PAGE], &[memory.pages.segment(0, 3 * PAGE)]);
    let source = writer.slab(PAGE, Exposure::Local)?;
    copy_to_segments(&[WRITTEN; PAGE], &[source.pages.segment(0, PAGE)]);
    let base = memory.piece(0, PAGE).address;

    let last = owner.window()?;
    let key = last & !0xff | last.wrapping_add(1) & 0xff;
    let (at, length, region) = (base + PAGE as u64, 4096, memory.keys.local);
    done(&mut owner, 1, Operation::Bind { window: 0, key, address: at, length, memory: region }, None)?;
    if wrong == KeyUse::AfterEnd {
        done(&mut owner, 2, Operation::Invalidate { key }, None)?;
    }
    let (address, key) = match wrong {
        KeyUse::Within | KeyUse::OtherConnection | KeyUse::AfterEnd => (at, key),
        KeyUse::BeyondEnd => (at + 1, key),
        KeyUse::BeforeBegin => (at - 1, key),
        KeyUse::BeyondRegion => (at + PAGE as u64 + 1, key),
        KeyUse::KeyOfRegion => (at, memory.keys.remote),
    };
    let write = Operation::Write { address, key };
    let refused = if wrong == KeyUse::OtherConnection {
        let (_other_owner, mut other) = pair(&fabric, host)?;
        let source = other.slab(PAGE, Exposure::Local)?;
        outcome(&mut other, 1, write, Some(source.piece(0, PAGE)))?
    } else {
        outcome(&mut writer, 1, write, Some(source.piece(0, PAGE)))?
    };
    Ok(KeyOutcome { refused, changed: changed(&memory) })
}

fn changed(memory: &Slab) -> usize {
    let mut found = vec![0; 3 * PAGE];
    copy_from_segments(&[memory.pages.segment(0, 3 * PAGE)], &mut found);
    found.iter().filter(|byte| **byte != BEFORE).count()
}

/// Does work that has to succeed.
fn done(
    endpoint: &mut Endpoint,
    number: u64,
    operation: Operation,
    piece: Option<Piece>,
) -> Result<(), RdmaError> {
    match outcome(endpoint, number, operation, piece)? {
        None => Ok(()),
        Some(words) => Err(RdmaError::Event(format!("{operation}: {words}"))),
    }
}

/// Does work; returns the card's words if it failed.
fn outcome(
    endpoint: &mut Endpoint,
    number: u64,
    operation: Operation,
    piece: Option<Piece>,
) -> Result<Option<String>, RdmaError> {
    let pieces: Vec<Piece> = piece.into_iter().collect();
    let count = pieces.len();
    endpoint.post(
        &[WorkRequest { number, operation, first: 0, count, signaled: true, inline: false }],
        &pieces,
    )?;
    let (end, mut completions) = (Instant::now() + LIMIT, Vec::new());
    loop {
        endpoint.poll(&mut completions)?;
        for Completion { is_receive, done, .. } in completions.drain(..) {
            match done {
                Done::Sent => return Ok(None),
                Done::Failed { status, flushed: false } if !is_receive => return Ok(Some(status)),
                Done::Failed { .. } | Done::Received { .. } | Done::Placed { .. } => {}
            }
        }
        pause(end)?;
    }
}

/// Two ends of a connection: who owns memory, and who writes to it.
fn pair(fabric: &Fabric, host: IpAddr) -> Result<(Endpoint, Endpoint), RdmaError> {
    let sizes = QueueSizes { sends: 16, receives: 4, receive_size: 4096, inline: INLINE };
    let offer = verbs::Offer { private: &[], sizes, dead_after: LIMIT };
    let mut listener = verbs::Listener::bind(SocketAddr::new(host, 0), 1)?;
    let address = listener.local().ok_or(RdmaError::NoDevice)?;
    thread::scope(|scope| {
        let connecting =
            scope.spawn(|| verbs::connect(address, &offer, &mut |place| fabric.domain_of(place)));
        let end = Instant::now() + LIMIT;
        let request = loop {
            if let Some(request) = listener.next()? {
                break request;
            }
            pause(end)?;
        };
        let domain = fabric.domain_of(&request.place())?;
        let mut owner = request.accept(&offer, domain)?;
        let connected = connecting.join();
        let (writer, _) =
            connected.map_err(|_| RdmaError::Event("the thread that connects panicked".into()))??;
        while owner.event()? != Some(LinkEvent::Established) {
            pause(end)?;
        }
        Ok((owner, writer))
    })
}

fn pause(end: Instant) -> Result<(), RdmaError> {
    thread::sleep(Duration::from_millis(1));
    if Instant::now() > end { Err(RdmaError::Timeout) } else { Ok(()) }
}
