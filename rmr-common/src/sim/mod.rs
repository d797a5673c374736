//! A deterministic simulator: the real client and replica machines in one thread, with virtual time.
//!
//! One seed is one run: pool, requests, delays, faults and crashes all come from it. Every rule of `docs/simulator.md`
//! is checked when it could be broken, and a run that breaks one ends with words that say which.

mod aim;
mod ambush;
mod attach;
mod check;
mod coverage;
mod disk;
mod fault;
mod force;
mod host;
mod liar;
mod network;
mod node;
mod operator;
mod oracle;
mod peers;
mod profile;
mod resync;
mod rng;
mod rollback;
mod sick;
mod verify;
mod world;

use std::io::Write;

pub use coverage::{Coverage, SITUATIONS};

use crate::client;
use world::{Check, World};

/// What a good run did.
#[derive(Clone, Debug)]
pub struct Report {
    /// The situations that it came to.
    pub coverage: Coverage,
    /// How many things happened.
    pub steps: u64,
    /// Requests of the guest.
    pub requests: u64,
}

/// A rule that a run broke.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "seed {seed}, step {step}: {rule}\nreplay: cargo run -p rmr-common --example simulate -- --seed {seed} --trace"
)]
pub struct Violation {
    /// The run.
    pub seed: u64,
    /// Where in it.
    pub step: u64,
    /// What was expected and found.
    pub rule: String,
}

/// Seeds that leave the same remainder by this are runs of one kind: some are aimed at what chance comes to too seldom.
pub const KINDS: u64 = 16;

/// Among them, runs where members are at one binding, and clients are told another one to find the pool.
const ASKS_OTHERWISE: u64 = 6;
/// More events than any good run has.
const MAX_STEPS: u64 = 2_000_000;
/// Virtual time in which a pool must come to rest after the last fault, in nanoseconds.
const MAX_REST: u64 = 300_000 * world::MILLISECOND;

/// Runs one seed. Each event becomes a line of `trace`.
///
/// # Errors
/// The first rule that is broken.
pub fn run(seed: u64, trace: Option<&mut dyn Write>) -> Result<Report, Violation> {
    let mut world = World::new(seed, trace);
    match play(&mut world) {
        Ok(()) => {
            let requests = world.next_token - 1;
            Ok(Report { coverage: world.coverage, steps: world.step, requests })
        }
        Err(rule) => Err(Violation { seed, step: world.step, rule }),
    }
}

fn play(world: &mut World<'_>) -> Check {
    let is_under_way = |w: &World<'_>| {
        w.submitted < w.profile.requests || w.faults < w.profile.faults || !w.forces.is_content()
    };
    while is_under_way(world) {
        step(world)?;
    }
    world.calm()?;
    let deadline = world.now + MAX_REST;
    loop {
        let host = rest(world, deadline)?;
        read_all(world, host, deadline)?;
        // A power cut may be noticed only now, and with it that writes are lost.
        if !world.hosts[host].has_lost_writes {
            break;
        }
    }
    // What was lost without being noticed is found out by the flush.
    let host = rest(world, deadline)?;
    let host = verify::audit_end(world, host, deadline)?;
    world.check_data()?;
    world.client(host, client::Event::Detach)?;
    let is_busy = |world: &World<'_>| {
        world.hosts[host].is_live()
            || world.nodes.iter().any(|n| n.replica.as_ref().is_some_and(crate::replica::Replica::is_busy))
    };
    while is_busy(world) {
        step(world)?;
        check_deadline(world, deadline)?;
    }
    world.check_idle()?;
    world.check_data()?;
    world.check_all_clean()?;
    world.cover_end();
    Ok(())
}

fn step(world: &mut World<'_>) -> Check {
    if !world.advance()? {
        return Err("nothing is left to happen".into());
    }
    if world.step > MAX_STEPS {
        return Err(format!(
            "more than {MAX_STEPS} events, with {} of {} requests and {} of {} faults, calm: {}",
            world.submitted, world.profile.requests, world.faults, world.profile.faults, world.is_calm
        ));
    }
    Ok(())
}

/// Lets the pool come to rest with one client. Returns that client.
fn rest(world: &mut World<'_>, deadline: u64) -> Check<usize> {
    loop {
        let live: Vec<_> = (0..world.hosts.len()).filter(|&h| world.hosts[h].is_live()).collect();
        match live[..] {
            [] => world.start_host(9, true),
            [host] if world.hosts[host].has_lost_writes => world.guest_reset(host),
            [host] if world.is_healed(host) && !world.is_astray(host) => {
                return Ok(host);
            }
            // It may never meet anybody of the latest branch: one who was removed from its own was forced into use. Or it waits for one who
            // was removed from the latest, and the others hear of that from a client of the latest.
            [host]
                if world.is_astray(host)
                    && (world.hosts[host].client.is_active() || world.now + MAX_REST * 4 / 5 > deadline) =>
            {
                world.start_host(9, true);
            }
            // Nor may one that is in use beside the latest. Its operator gives it up when that one is whole.
            [one, other] if world.never_meet(one, other) => world.stop_astray(one, other),
            // What keeps a leg out that failed too often is a new attachment.
            [host] if world.leaves_a_leg_out(host) => world.client(host, client::Event::Detach)?,
            _ => {} // Not yet.
        }
        step(world)?;
        check_deadline(world, deadline)?;
    }
}

/// Reads the whole pool and flushes it.
fn read_all(world: &mut World<'_>, host: usize, deadline: u64) -> Check {
    world.is_verifying = true;
    let sectors = world.sectors();
    world.submit(host, client::Operation::Read, 0, sectors)?;
    world.submit(host, client::Operation::Flush, 0, 0)?;
    while !world.hosts[host].requests.is_empty() {
        step(world)?;
        check_deadline(world, deadline)?;
    }
    world.is_verifying = false;
    Ok(())
}

fn check_deadline(world: &World<'_>, deadline: u64) -> Check {
    if world.now <= deadline {
        return Ok(());
    }
    let states: Vec<_> = world
        .hosts
        .iter()
        .map(|h| format!("{} {} with {}", h.client.status().state, h.id, h.requests.len()))
        .collect();
    let view = world.committed.as_ref().map(ToString::to_string).unwrap_or_default();
    Err(format!("the pool does not come to rest; {view}; clients: {}", states.join(", ")))
}
