//! Disks that rot, and verifies of the pool that run while everything else goes on: no difference is reported that is not
//! there, none is missed that was there all the time, and the guest is not held for longer than allowed.
//!
//! Rot is seen by comparisons and goes with the data that a member pulls; the guest is shown what was written, so that all
//! other rules stay as they are.

use std::collections::{BTreeMap, BTreeSet};

use super::disk::Running;
use super::oracle::{SECTOR, Step};
use super::world::{Check, Event, MILLISECOND, World, trace};
use super::{check_deadline, rest, step};
use crate::pool::{
    BLOCK_SIZE, Chunk, MemberId, MemberSet, VerifyOptions, VerifyOutcome, VerifyReport, VerifyState, View,
};
use crate::replica::{self, DiskOperation, DiskResult, IoId};
use crate::time::Time;

const SECTORS_PER_BLOCK: usize = (BLOCK_SIZE / SECTOR) as usize;
/// Values of sectors are below this; what stands above says how it rotted.
const VALUES: u64 = (1 << 56) - 1;

/// The value of a sector without its rot.
pub(super) const fn strip(value: u64) -> u64 {
    value & VALUES
}

/// The sectors of a disk that return something else than was written.
#[derive(Default)]
pub(super) struct Rot {
    /// How, as a mark in the upper bits, and since when.
    marks: BTreeMap<usize, (u64, Step)>,
    /// Every sector that ever began to rot, or was written anew after that, and when.
    log: Vec<(usize, Step)>,
}

impl Rot {
    /// What a read adds to the value.
    pub(super) fn mark(&self, sector: usize) -> u64 {
        self.marks.get(&sector).map_or(0, |(mark, _)| *mark)
    }

    /// The sector was written with this, perhaps with what rotted elsewhere.
    pub(super) fn written(&mut self, sector: usize, value: u64, now: Step) {
        let mark = value & !VALUES;
        if mark == 0 {
            // What rotted alike on another member cannot be told from it until here.
            if self.marks.remove(&sector).is_some() {
                self.log.push((sector, now));
            }
        } else {
            self.set(sector, mark, now);
        }
    }

    fn set(&mut self, sector: usize, mark: u64, now: Step) {
        self.marks.insert(sector, (mark, now));
        self.log.push((sector, now));
    }
}

/// A verify that is under way at a client.
struct Watched {
    host: usize,
    options: VerifyOptions,
    start: Step,
    /// Blocks of the pool when it began.
    blocks: u64,
    /// The members that were Clean all the time.
    clean: MemberSet,
    /// Blocks that the report names.
    named: BTreeSet<u64>,
}

/// A hold at a client.
struct Held {
    host: usize,
    number: u64,
    /// How often each node had been started when it began.
    lives: Vec<u32>,
    /// When a request began to wait for it.
    waiting: Option<u64>,
}

/// See the module's comment.
#[derive(Default)]
pub(super) struct Audit {
    watched: Option<Watched>,
    held: Vec<Held>,
    done: u64,
}

impl World<'_> {
    /// A disk request ended: what a comparison read becomes digests.
    pub(super) fn disk_ended(&mut self, node: usize, io: u32, running: &Running) -> Check {
        if running.operation != DiskOperation::Digest || running.result != DiskResult::Done {
            return self.replica(node, replica::Event::Disk(IoId(io), running.result));
        }
        let found = self.nodes[node].reads.remove(&io).unwrap_or_default();
        let block = |sectors: &[u64]| {
            let bytes: Vec<u8> = sectors.iter().flat_map(|s| s.to_le_bytes()).collect();
            crate::wire::block_digest(&bytes)
        };
        let digests: Vec<u64> = found.chunks(SECTORS_PER_BLOCK).map(block).collect();
        self.replica(node, replica::Event::Digested(IoId(io), &digests))
    }

    /// What a node's disk returns for a block.
    fn content(&self, node: usize, block: u64) -> Vec<u64> {
        let first = usize::try_from(block).unwrap_or(0) * SECTORS_PER_BLOCK;
        let disk = &self.nodes[node].disk;
        (first..first + SECTORS_PER_BLOCK).map(|s| disk.sectors[s] | disk.rot.mark(s)).collect()
    }

    /// Has the pool verified, gives a verify up, or lets a disk rot; and comes back later.
    pub(super) fn audit_some(&mut self) -> Check {
        if self.is_calm || self.profile.audits == 0 {
            return Ok(());
        }
        let pause = self.rng.range(1, 400 * MILLISECOND);
        self.after(pause, Event::Audit);
        if self.profile.rot && self.rng.percent(60) {
            self.rot_some();
        }
        let Some(host) = (0..self.hosts.len()).rev().find(|&h| self.hosts[h].is_live()) else {
            return Ok(());
        };
        let is_running = self.hosts[host].client.verify_found().is_some_and(|(_, over)| !over);
        if is_running && self.rng.percent(5) {
            self.coverage.hit("verify cancelled");
            self.hosts[host].client.cancel_verify(Time(self.now));
            self.audit.watched = None;
            self.check_verify(host)?;
            return self.client_outputs(host);
        }
        if is_running || self.audit.done >= self.profile.audits {
            return Ok(());
        }
        let members: Vec<_> = self.committed_spec.members.iter().map(|m| m.id).collect();
        let trust = self.rng.percent(50).then(|| self.rng.pick(&members));
        let options = VerifyOptions {
            repair: self.rng.percent(50),
            trust,
            bytes_per_s: self.rng.pick(&[None, None, Some(4 << 20), Some(64 << 20)]),
            from_chunk: Chunk(if self.rng.percent(80) { 0 } else { self.rng.range(0, 15) }),
        };
        self.start_audit(host, options)
    }

    fn start_audit(&mut self, host: usize, options: VerifyOptions) -> Check {
        let result = self.hosts[host].client.start_verify(options, Time(self.now));
        trace!(self, "client {host}: verify {options:?}: {result:?}");
        if result.is_ok() {
            self.audit.done += 1;
            let clean = self.hosts[host].committed.as_ref().map_or(MemberSet::EMPTY, View::clean);
            let start = self.step;
            let blocks = self.committed_spec.block_count();
            self.audit.watched =
                Some(Watched { host, options, start, blocks, clean, named: BTreeSet::new() });
        }
        self.client_outputs(host)
    }

    /// A sector returns something else, or a block was written to another place.
    fn rot_some(&mut self) {
        if self.hosts.iter().any(|h| h.client.hold_status().is_some()) {
            return; // What is being looked at may change, or not, and both are right.
        }
        let node = self.rng.index(self.nodes.len());
        let blocks = (self.nodes[node].disk.sectors.len() / SECTORS_PER_BLOCK) as u64;
        let block = if self.rng.percent(50) { self.rng.range(0, 7) } else { self.rng.range(0, blocks - 1) };
        let mark = (1 << 63) | self.rng.range(0, 127) << 56;
        let first = usize::try_from(block).unwrap_or(0) * SECTORS_PER_BLOCK;
        let is_bit = self.rng.percent(50);
        let range = if is_bit { first..first + 1 } else { first..first + SECTORS_PER_BLOCK };
        trace!(self, "node {node}: block {block} rots");
        for sector in range {
            self.nodes[node].disk.rot.set(sector, mark, self.step);
        }
    }

    /// The rules of a verify, after each event of its client.
    pub(super) fn check_verify(&mut self, host: usize) -> Check {
        self.check_report(host)?;
        self.check_hold(host)
    }

    fn check_report(&mut self, host: usize) -> Check {
        let Some((found, is_over)) = self.hosts[host].client.verify_found() else { return Ok(()) };
        let Some(mut watched) = self.audit.watched.take_if(|w| w.host == host) else { return Ok(()) };
        let clean = self.committed.as_ref().map_or(MemberSet::EMPTY, View::clean);
        let view = self.hosts[host].committed.as_ref().map_or(MemberSet::EMPTY, View::clean);
        let clean = watched.clean.intersection(clean).intersection(view);
        if clean != watched.clean {
            self.coverage.hit("verify sees a view change");
            watched.clean = clean;
        }
        if found > watched.named.len() as u64 || is_over {
            let report = self.hosts[host].client.verify_report(Time(self.now));
            let report = report.ok_or("a verify is under way and has no report")?;
            self.check_named(host, &mut watched, &report)?;
            if report.state == VerifyState::Done {
                self.coverage.hit("verify done");
                self.check_complete(&watched, &report)?;
            } else if matches!(report.state, VerifyState::Interrupted(_)) {
                self.coverage.hit("verify interrupted");
            }
        }
        self.audit.watched = (!is_over).then_some(watched);
        Ok(())
    }

    /// Nobody waits for a hold for longer than allowed.
    fn check_hold(&mut self, host: usize) -> Check {
        let status = self.hosts[host].client.hold_status();
        let index = self.audit.held.iter().position(|h| h.host == host);
        let now = self.now;
        let bound = u64::try_from(self.profile.client.verify_hold.as_nanos()).unwrap_or(u64::MAX);
        if let Some(held) = index.map(|i| &self.audit.held[i])
            && let Some(since) = held.waiting
            && now > since + bound + MILLISECOND
            && self.hosts[host].is_live()
        {
            return Err(format!("client {host} held a write for {} ns, {bound} are allowed", now - since));
        }
        let is_same = |held: &Held| status.is_some_and(|(number, _)| number == held.number);
        if let Some(index) = index.filter(|&i| !is_same(&self.audit.held[i])) {
            self.audit.held.swap_remove(index);
        }
        let Some((number, is_waited_for)) = status else { return Ok(()) };
        let index = self.audit.held.iter().position(|h| h.host == host);
        let index = index.unwrap_or_else(|| {
            let lives = self.nodes.iter().map(|n| n.life).collect();
            self.audit.held.push(Held { host, number, lives, waiting: None });
            self.coverage.hit("verify holds a range");
            self.audit.held.len() - 1
        });
        let held = &mut self.audit.held[index];
        if is_waited_for && held.waiting.is_none() {
            held.waiting = Some(now);
            self.coverage.hit("verify held a guest write");
        }
        Ok(())
    }

    /// What a report names is there. Nothing can have changed since the members were asked: writes were held.
    fn check_named(&mut self, host: usize, watched: &mut Watched, report: &VerifyReport) -> Check {
        let was_lost = self.nodes.iter().any(|n| n.replica.is_none())
            || self.audit.restarted(host, &self.nodes.iter().map(|n| n.life).collect::<Vec<_>>());
        for difference in &report.differences {
            let first = difference.offset / BLOCK_SIZE;
            for block in first..first + difference.length / BLOCK_SIZE {
                if !watched.named.insert(block) || self.hosts[host].is_fenced || was_lost {
                    continue;
                }
                if !difference.unreadable.is_empty() {
                    self.coverage.hit("verify finds an unreadable block");
                    if !self.had_errors {
                        return Err(format!("client {host}: a verify cannot read block {block}: {report:?}"));
                    }
                }
                if difference.outcome == VerifyOutcome::Undecided {
                    self.coverage.hit("verify leaves a block undecided");
                }
                self.check_differs(host, block, &difference.same)?;
            }
        }
        Ok(())
    }

    fn check_differs(&mut self, host: usize, block: u64, same: &[Vec<MemberId>]) -> Check {
        if same.len() > 1 {
            self.coverage.hit("verify finds a corrupted block");
        }
        let content = |m: &MemberId| self.content(self.node_index(*m), block);
        for (i, a) in same.iter().enumerate() {
            for b in same[..i].iter().flatten() {
                let (ours, theirs) = (content(&a[0]), content(b));
                if ours == theirs {
                    return Err(format!(
                        "client {host}: a verify says that block {block} differs on members {} and {b}; it does not",
                        a[0]
                    ));
                }
                let is_alike = ours.iter().zip(&theirs).all(|(x, y)| strip(*x) == strip(*y));
                let is_rotten = ours.iter().chain(&theirs).any(|v| strip(*v) != *v);
                if !is_alike || !is_rotten {
                    return Err(format!(
                        "client {host}: block {block} differs on Clean members {} and {b}, and no disk is to blame: \
                         {ours:x?}, {theirs:x?}",
                        a[0]
                    ));
                }
            }
        }
        Ok(())
    }

    /// A verify that is done has found all that was rotten from its start to its end, on a member that was Clean as long.
    fn check_complete(&self, watched: &Watched, report: &VerifyReport) -> Check {
        let first = watched.options.from_chunk.0 * self.spec.chunk_size.bytes() / BLOCK_SIZE;
        // Who ever had anything rotten in a block while the verify went on.
        let mut rotten: BTreeMap<u64, BTreeSet<usize>> = BTreeMap::new();
        for (index, node) in self.nodes.iter().enumerate() {
            let now = node.disk.rot.marks.keys().copied();
            let meanwhile =
                node.disk.rot.log.iter().filter(|(_, step)| *step >= watched.start).map(|(s, _)| *s);
            for sector in now.chain(meanwhile) {
                rotten.entry((sector / SECTORS_PER_BLOCK) as u64).or_default().insert(index);
            }
        }
        for (block, nodes) in rotten.range(first..watched.blocks.max(first)) {
            let [index] = nodes.iter().copied().collect::<Vec<_>>()[..] else { continue };
            let node = &self.nodes[index];
            let sectors = *block * SECTORS_PER_BLOCK as u64..(*block + 1) * SECTORS_PER_BLOCK as u64;
            let was_all_the_time = sectors.into_iter().any(|sector| {
                let mark = node.disk.rot.marks.get(&usize::try_from(sector).unwrap_or(0));
                mark.is_some_and(|(_, since)| *since < watched.start)
            });
            let is_named = watched.named.contains(block)
                || report.unsettled.iter().any(|(o, l)| (*o..*o + *l).contains(&(*block * BLOCK_SIZE)));
            let is_member = watched.clean.contains(node.member) && self.node_index(node.member) == index;
            if was_all_the_time && is_member && !is_named {
                return Err(format!(
                    "a verify is done, and did not find that node {index} has block {block} rotten"
                ));
            }
        }
        Ok(())
    }

    /// Whether a client does nothing for a verify any more.
    fn is_verified(&self, host: usize) -> bool {
        self.hosts[host].client.verify_found().is_none_or(|(_, is_over)| is_over)
    }

    /// The nodes of the members.
    fn member_nodes(&self) -> Vec<usize> {
        self.committed_spec.members.iter().map(|m| self.node_index(m.id)).collect()
    }

    /// The content of each block on each of these nodes.
    fn all_contents(&self, nodes: &[usize]) -> Vec<Vec<Vec<u64>>> {
        let blocks = self.committed_spec.block_count();
        nodes.iter().map(|&node| (0..blocks).map(|b| self.content(node, b)).collect()).collect()
    }
}

impl Audit {
    /// Whether a node was started anew since the hold began that ended just now.
    fn restarted(&self, host: usize, lives: &[u32]) -> bool {
        self.held.iter().find(|h| h.host == host).is_some_and(|h| h.lives != lives)
    }
}

/// At quiet: a verify with repair leaves the members as they should be, and another one finds what is left.
pub(super) fn audit_end(world: &mut World<'_>, host: usize, deadline: u64) -> Check<usize> {
    if world.profile.audits == 0 || world.committed_spec.members.len() < 2 {
        return Ok(host);
    }
    world.hosts[host].client.cancel_verify(Time(world.now));
    world.audit.watched = None;
    world.client_outputs(host)?;
    let host = rest(world, deadline)?;
    let nodes = world.member_nodes();
    let count = nodes.len();
    let rotten = |w: &World<'_>, n: usize| w.nodes[nodes[n]].disk.rot.marks.len();
    let best = (0..count).min_by_key(|&n| rotten(world, n)).unwrap_or(0);
    let trust = (count < 3 || world.rng.percent(30)).then(|| world.nodes[nodes[best]].member);
    let before = world.all_contents(&nodes);
    let options = VerifyOptions { repair: true, trust, bytes_per_s: None, from_chunk: Chunk(0) };
    let host = run(world, host, options, deadline)?;
    let blocks = usize::try_from(world.committed_spec.block_count()).unwrap_or(0);
    let mut left = Vec::new();
    for block in 0..blocks {
        let contents: Vec<_> = before.iter().map(|node| &node[block]).collect();
        let votes = |content: &Vec<u64>| contents.iter().filter(|c| ***c == *content).count();
        let right = match trust {
            Some(_) => Some(contents[best]),
            None => contents.iter().copied().find(|c| votes(c) * 2 > count),
        };
        if right.is_none() {
            left.push(block as u64);
        }
        for (node, content) in nodes.iter().copied().zip(&contents) {
            let expected = right.unwrap_or(content);
            if world.content(node, block as u64) != *expected {
                return Err(format!(
                    "after the repair by {options:?}, block {block} of node {node} is {:x?}, expected {expected:x?}",
                    world.content(node, block as u64)
                ));
            }
        }
        if right.is_some_and(|right| contents.iter().any(|c| **c != *right)) {
            world.coverage.hit("verify repairs");
        }
    }
    let host = run(world, host, VerifyOptions::default(), deadline)?;
    let report = world.hosts[host].client.verify_report(Time(world.now)).ok_or("no report")?;
    let found: Vec<u64> = report
        .differences
        .iter()
        .flat_map(|d| d.offset / BLOCK_SIZE..(d.offset + d.length) / BLOCK_SIZE)
        .collect();
    if found != left || report.blocks_unsettled > 0 {
        return Err(format!("at quiet blocks {left:?} differ, and a verify found {found:?}: {report:?}"));
    }
    Ok(host)
}

/// Runs a verify to its end, and lets the pool come to rest.
fn run(world: &mut World<'_>, host: usize, options: VerifyOptions, deadline: u64) -> Check<usize> {
    world.hosts[host]
        .client
        .verify_report(Time(world.now))
        .filter(|r| !r.state.is_over())
        .map_or(Ok(()), |r| Err(format!("a verify goes on at quiet: {r:?}")))?;
    world.start_audit(host, options)?;
    if world.is_verified(host) {
        return Err(format!("at quiet a verify is refused: {options:?}"));
    }
    while !world.is_verified(host) {
        step(world)?;
        check_deadline(world, deadline)?;
    }
    let report = world.hosts[host].client.verify_report(Time(world.now)).ok_or("no report")?;
    if report.state != VerifyState::Done {
        return Err(format!("at quiet a verify ends {report:?}"));
    }
    rest(world, deadline)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_whole_again() {
        let mut rot = Rot::default();
        rot.set(3, 1 << 63, 1);
        assert_eq!(strip(7 | rot.mark(3)), 7);
        rot.written(3, 9, 2);
        assert_eq!((rot.mark(3), rot.log.len()), (0, 2), "when it rots, and when it is whole again");
    }
}
