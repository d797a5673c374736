//! What a run does to its pool: requests of a restless guest, and faults of every kind.

use super::oracle::SECTOR;
use super::peers::pair;
use super::world::{Check, Event, MILLISECOND, World, trace};
use crate::client::{self, Operation};
use crate::pool::{MemberState, View};

impl World<'_> {
    /// Submits a few requests, and comes back later.
    pub(super) fn work(&mut self) -> Check {
        if self.is_calm {
            return Ok(());
        }
        let pause = self.rng.range(1, self.profile.pause);
        self.after(pause, Event::Work);
        let is_guest = |h: &usize| self.hosts[*h].is_live() && !self.hosts[*h].is_admin;
        let live: Vec<_> = (0..self.hosts.len()).filter(is_guest).collect();
        let Some(&newest) = live.last() else {
            self.start_some_host();
            return Ok(());
        };
        for _ in 0..self.rng.range(1, self.profile.burst) {
            let host = if self.rng.percent(80) { newest } else { self.rng.pick(&live) };
            let is_ready = self.hosts[host].client.spec().is_some();
            if self.submitted >= self.profile.requests || self.hosts[host].requests.len() > 64 || !is_ready {
                break;
            }
            self.submitted += 1;
            self.submit_any(host)?;
        }
        Ok(())
    }

    /// The guest is busy just when a member is being brought back in.
    pub(super) fn burst(&mut self, host: usize) -> Check {
        for _ in 0..self.rng.range(2, 8) {
            let is_ready = self.hosts[host].is_live()
                && !self.hosts[host].is_admin
                && self.hosts[host].requests.len() < 64;
            if is_ready && !self.is_calm {
                self.submit_any(host)?;
            }
        }
        Ok(())
    }

    /// The guest is busy a moment from now.
    pub(super) fn burst_soon(&mut self, host: usize) {
        let delay = self.rng.range(1, self.profile.network_delay * 3);
        self.after(delay, Event::Burst(host));
    }

    fn start_some_host(&mut self) {
        let id = u8::try_from(self.rng.range(1, 3)).unwrap_or(1);
        let takeover = self.rng.percent(50);
        if self.profile.client_crashes && self.rng.percent(20) {
            // Two at the same time, for one place.
            self.start_host(id % 3 + 1, true);
        }
        let last = self.hosts.last().and_then(|h| h.client.over());
        if last == Some(&client::OverReason::Detached) {
            self.coverage.hit("client started after a detach");
        }
        self.start_host(id, takeover);
    }

    fn submit_any(&mut self, host: usize) -> Check {
        let operation = match self.rng.range(0, 99) {
            0..=79 if self.rng.percent(self.profile.reads) => Operation::Read,
            0..=79 => Operation::Write,
            80..=89 => Operation::Flush,
            90..=94 => Operation::Discard,
            _ => Operation::WriteZeroes,
        };
        if operation == Operation::Flush {
            return self.submit(host, operation, 0, 0);
        }
        // What the guest was told, and no more than is committed.
        let told = self.hosts[host].client.spec().map_or(0, |s| s.size);
        let sectors = usize::try_from(told.min(self.committed_spec.size) / SECTOR).unwrap_or(0);
        if sectors == 0 {
            return Ok(());
        }
        let length = match self.rng.range(0, 99) {
            0..=39 => self.rng.range(1, 16),
            40..=79 => self.rng.range(1, 8) * 8,
            80..=97 => self.rng.range(1, 256),
            _ => self.rng.range(1, sectors as u64),
        };
        let length = usize::try_from(length).unwrap_or(1);
        let in_flight: Vec<_> = self.hosts[host].requests.values().filter(|r| r.write.is_some()).collect();
        if !in_flight.is_empty() && self.rng.percent(25) {
            let near = &in_flight[self.rng.index(in_flight.len())];
            let (first, count) = (near.first, near.count);
            let count = if self.rng.percent(50) { count } else { length.min(sectors - first) };
            self.cover_submit(operation, count);
            return self.submit(host, operation, first, count);
        }
        // Most requests go to few places, so that they meet.
        let first = match self.rng.range(0, 9) {
            _ if self.profile.spread => self.rng.index(sectors),
            0..=5 => self.rng.index(48),
            6..=7 => self.rng.pick(&[100, 120, 250, 380]) + self.rng.index(16),
            _ => self.rng.index(sectors),
        };
        let first = first.min(sectors - length);
        self.cover_submit(operation, length);
        if operation == Operation::Read && self.rng.percent(2) {
            self.scribbles += 1;
        }
        self.submit(host, operation, first, length)
    }

    /// One fault, and the time of the next.
    pub(super) fn fault(&mut self) -> Check {
        if self.is_calm || self.faults >= self.profile.faults {
            return Ok(());
        }
        self.faults += 1;
        let pause = self.rng.range(1, self.profile.fault_pause);
        // Faults like company: the second often strikes while the first is dealt with.
        let pause = if self.rng.percent(30) { self.rng.range(1, self.profile.network_delay) } else { pause };
        self.after(pause, Event::Fault);
        let node = self.rng.index(self.nodes.len());
        let live: Vec<_> = (0..self.hosts.len()).filter(|&h| self.hosts[h].is_live()).collect();
        let Some(&host) = live.last() else { return Ok(()) };
        let timeout = u64::try_from(self.profile.client.leg_timeout.as_nanos()).unwrap_or(u64::MAX);
        if self.aiming.aim == super::aim::Aim::Sick && self.rng.percent(50) {
            return self.sicken(node);
        }
        match self.rng.range(0, 22) {
            0..=1 => self.cut_some(host, Some(node)),
            2 => self.cut_some(host, None),
            3 => {
                trace!(self, "client {host} and node {node} are parted");
                self.hosts[host].partitioned[node] = true;
                self.cut_some(host, Some(node));
                let delay = self.rng.range(1, timeout * 4);
                self.after(delay, Event::Heal { host, node });
            }
            4..=5 => {
                trace!(self, "messages between client {host} and node {node} stand still");
                self.hosts[host].stalled_until[node] = self.now + self.rng.range(timeout / 2, timeout * 2);
            }
            6 if self.rng.percent(50) => self.stop_node(node)?,
            6..=7 => self.crash_node(node, false)?,
            8 => self.crash_node(node, true)?,
            9 => {
                let power = self.rng.percent(30);
                for node in 0..self.nodes.len() {
                    self.crash_node(node, power)?;
                }
            }
            10 if self.profile.client_crashes => {
                self.burst(host)?;
                let delay = self.rng.range(1, self.profile.network_delay * 3);
                self.after(delay, Event::HostCrash(host));
            }
            11 => {
                if self.rng.percent(25) {
                    self.fail_flush(node);
                }
                self.client(host, client::Event::Detach)?;
            }
            12 => {
                let takeover = self.profile.client_crashes && self.rng.percent(60);
                let id = self.hosts[host].id % 3 + 1;
                for _ in 0..self.rng.range(0, 3) {
                    self.burst_soon(host);
                }
                self.start_host(id, takeover);
                if self.profile.client_crashes && self.rng.percent(40) {
                    let id = if self.rng.percent(50) { id } else { id % 3 + 1 };
                    self.start_host(id, true);
                }
            }
            13 => {
                trace!(self, "the disk of node {node} has errors");
                self.had_errors = true;
                match self.rng.percent(70) {
                    true => self.nodes[node].disk_errors = self.rng.pick(&[2, 20, 60]),
                    false => self.nodes[node].flush_errors = 60,
                }
                let delay = self.rng.range(1, self.profile.fault_pause * 4);
                self.after(delay, Event::ErrorsEnd(node));
            }
            14 => self.nodes[node].metadata_fails = true,
            15 => self.links_of(node).into_iter().for_each(|link| self.cut_peer(link)),
            16 => {
                let other = self.rng.index(self.nodes.len());
                trace!(self, "nodes {node} and {other} are parted");
                let (pair, delay) = (pair(node, other), self.rng.range(1, timeout * 4));
                let is_for_good = self.rng.percent(25);
                self.parted.insert(pair);
                let is_cut =
                    |p: &super::peers::Peer| p.is_open() && super::peers::pair(p.stale, p.source) == pair;
                let links: Vec<_> = (0..self.peers.len()).filter(|&i| is_cut(&self.peers[i])).collect();
                links.into_iter().for_each(|link| self.cut_peer(link));
                if !is_for_good {
                    self.after(delay, Event::HealNodes(node, other));
                }
            }
            17 => {
                let other = self.rng.index(self.nodes.len());
                trace!(self, "messages between nodes {node} and {other} stand still");
                let until = self.now + self.rng.range(timeout / 2, timeout * 2);
                self.stalled.insert(pair(node, other), until);
            }
            18 => self.crash_in_resync()?,
            19 => {
                // Some blocks of one disk cannot be read; where the guest is most of the time, as likely as not.
                trace!(self, "blocks of node {node} become unreadable");
                self.had_errors = true;
                let blocks = usize::try_from(self.committed_spec.block_count()).unwrap_or(1);
                for _ in 0..self.rng.range(1, 4) {
                    let most = if self.rng.percent(70) { 6 } else { blocks };
                    let block = self.rng.index(most.min(blocks));
                    self.nodes[node].disk.bad.insert(block);
                }
            }
            20..=21 => {
                self.fail_flush(node);
                if self.rng.percent(20) {
                    (0..self.nodes.len()).for_each(|node| self.fail_flush(node));
                }
            }
            _ => {
                // A new client, as a daemon that is started again.
                if self.profile.client_crashes && self.can_die(host) {
                    let id = self.hosts[host].id;
                    self.burst(host)?;
                    self.crash_host(host);
                    self.start_host(id, false);
                }
            }
        }
        Ok(())
    }

    /// The next flush of a disk fails. What it covered may be gone, and the flush after it says that all is well.
    pub(super) fn fail_flush(&mut self, node: usize) {
        trace!(self, "the next flush of node {node} fails");
        self.had_errors = true;
        self.nodes[node].flush_fails = true;
    }

    /// Whether a flush that begins now is to fail: most do harm only if there is something to lose.
    pub(super) fn fails_flush(&mut self, node: usize) -> bool {
        let fails_once = std::mem::take(&mut self.nodes[node].flush_fails);
        if self.is_known_faintly() {
            return false; // Else the pool could not notice the store that went back.
        }
        let disk = &self.nodes[node].disk;
        if self.is_calm || self.profile.lost_flushes == 0 || !disk.has_unflushed(false) {
            return fails_once;
        }
        let (is_pulled, is_aimed) = (disk.has_unflushed(true), self.aiming.aim == super::aim::Aim::Flushes);
        let percent = if is_pulled && is_aimed { 40 } else { self.profile.lost_flushes };
        let fails = fails_once || self.rng.percent(percent);
        self.had_errors |= fails;
        fails
    }

    /// A flush has failed: what was not flushed is gone, or not, block by block; and no later flush says so.
    pub(super) fn drop_unflushed(&mut self, node: usize) {
        self.nodes[node].has_failed_flush = true;
        self.rollback_table_lost(node);
        if self.nodes[node].disk.has_unflushed(true) {
            self.coverage.hit("flush of pulled data failed");
        }
        if self.nodes[node].disk.lose_cache(&mut self.rng) {
            trace!(self, "node {node} has lost what a failed flush covered");
            self.coverage.hit("failed flush lost what it covered");
            self.undo_failed_writes(node);
        }
    }

    /// Lets the oracle accept that failed writes are undone on a Clean member that lost its cache. The client reports only lost writes
    /// that it had acknowledged.
    fn undo_failed_writes(&mut self, index: usize) {
        let node = &self.nodes[index];
        let is_clean = |v: &View| v.has_store(node.member, node.store) && v.clean().contains(node.member);
        if !self.committed.as_ref().is_some_and(is_clean) {
            return;
        }
        let sectors = self.oracle.len();
        let lost: Vec<_> = node.disk.lost.iter().map(|&sector| (sector, node.value(sector))).collect();
        for (sector, value) in lost.into_iter().filter(|(s, _)| *s < sectors) {
            self.oracle.undo_failed(sector, value);
        }
    }

    pub(super) fn cut_some(&mut self, host: usize, node: Option<usize>) {
        let open = |c: &super::network::Connection| {
            c.host == host && !c.is_cut && !c.client_closed && node.is_none_or(|n| n == c.node)
        };
        let found: Vec<_> = (0..self.connections.len()).filter(|&i| open(&self.connections[i])).collect();
        found.into_iter().for_each(|index| self.cut(index));
    }

    /// Ends a node's process, or cuts its machine's power, and starts it again some time later.
    pub(super) fn crash_node(&mut self, index: usize, power: bool) -> Check {
        self.cover_crash(index);
        if self.nodes[index].replica.is_some() {
            self.before_crash(index)?;
        }
        let Some(replica) = self.nodes[index].replica.take() else { return Ok(()) };
        let is_failed = replica.flush_failed();
        self.cover_command("node crashed", None);
        trace!(self, "node {index} crashes, with its machine: {power}");
        let node = &mut self.nodes[index];
        if !node.disk.running.is_empty() {
            self.coverage.hit("node crashed with disk requests under way");
        }
        node.life += 1;
        // What is known of a failed flush is lost with the process for as long as the mark is on its way to the disk. That is not
        // expected to be noticed, so it comes with the machine's end only.
        let is_unmarked = is_failed && !node.durable.flush_failed;
        node.lost_power |= power || is_unmarked;
        node.buffers.clear();
        node.reads.clear();
        node.pulled.clear();
        let step = self.step;
        let metadata = std::mem::take(&mut node.metadata);
        node.disk.abandon(step, &mut self.rng);
        for (target, queue) in metadata {
            if let Some((_, content)) = queue.writing {
                self.coverage.hit("node crashed with metadata under way");
                if self.rng.percent(50) {
                    self.make_durable(index, target, content)?;
                }
            }
        }
        for connection in 0..self.connections.len() {
            if self.connections[connection].node == index {
                self.cut(connection);
            }
        }
        self.links_of(index).into_iter().for_each(|link| self.cut_peer(link));
        let most = self.profile.fault_pause * 8 + 10 * MILLISECOND;
        let delay = self.rng.range(1, most);
        self.after(delay, Event::NodeStart(index));
        Ok(())
    }

    /// Starts a node again. After a power cut its cache is gone.
    pub(super) fn restart(&mut self, index: usize) {
        let member = self.nodes[index].member;
        let loses = self.nodes[index].durable.view.state(member) != Some(MemberState::Syncing)
            && !self.resyncs.is_unflushed_unknown;
        if self.nodes[index].lost_power && loses && self.nodes[index].disk.lose_cache(&mut self.rng) {
            trace!(self, "node {index} has lost its cache");
            self.coverage.hit("cache lost in a power cut");
            self.undo_failed_writes(index);
            if self.committed.as_ref().is_some_and(|v| v.clean().contains(member)) {
                self.coverage.hit("cache of a Clean member lost in a power cut");
            }
        }
        self.coverage.hit("node restarted");
        self.start_node(index);
    }

    /// The guest resets its device: it knows that writes were lost.
    pub(super) fn guest_reset(&mut self, host: usize) {
        if self.hosts[host].is_live() && std::mem::take(&mut self.hosts[host].has_lost_writes) {
            trace!(self, "the guest of client {host} resets its device");
            self.hosts[host].client.acknowledge_loss();
        }
    }

    /// A member that is being brought back in is struck, or its source.
    pub(super) fn strike(&mut self, host: usize, node: usize) -> Check {
        if self.is_calm {
            return Ok(());
        }
        let timeout = u64::try_from(self.profile.client.leg_timeout.as_nanos()).unwrap_or(u64::MAX);
        match self.rng.range(0, 12) {
            0..=2 => self.cut_some(host, Some(node)),
            3..=4 => self.links_of(node).into_iter().for_each(|link| self.cut_peer(link)),
            5 => self.crash_node(node, false)?,
            6 => {
                // Its source, as likely as not.
                let other = self.rng.index(self.nodes.len());
                self.cut_some(host, Some(other));
            }
            7 => {
                let node = if self.rng.percent(50) { node } else { self.rng.index(self.nodes.len()) };
                self.hosts[host].stalled_until[node] = self.now + self.rng.range(timeout / 4, timeout * 2);
            }
            8 => self.cut_some(host, None),
            12 => self.fail_flush(node),
            11 => {
                // What it pulls stays in its cache.
                self.had_errors = true;
                self.nodes[node].flush_errors = 100;
                let delay = self.rng.range(100, 1000) * MILLISECOND;
                self.after(delay, Event::ErrorsEnd(node));
            }
            9 if self.profile.client_crashes => {
                self.burst(host)?;
                if self.rng.percent(50) {
                    self.crash_node(node, false)?;
                }
                self.after(1, Event::HostCrash(host));
            }
            _ => self.crash_in_resync()?,
        }
        Ok(())
    }

    /// Faults strike where a resync is under way: its member, or its source.
    fn crash_in_resync(&mut self) -> Check {
        let open: Vec<_> = self.peers.iter().filter(|p| p.is_open()).map(|p| (p.stale, p.source)).collect();
        if open.is_empty() {
            return Ok(());
        }
        let (stale, source) = self.rng.pick(&open);
        match self.rng.range(0, 4) {
            0 => self.crash_node(stale, false)?,
            1 => self.crash_node(source, false)?,
            2 => self.crash_node(stale, true)?,
            3 => self.nodes[stale].metadata_fails = true,
            _ => {
                self.had_errors = true;
                match self.rng.percent(50) {
                    true => self.nodes[stale].disk_errors = self.rng.pick(&[20, 60]),
                    false => self.nodes[stale].flush_errors = 60,
                }
                let delay = self.rng.range(1, self.profile.fault_pause * 4);
                self.after(delay, Event::ErrorsEnd(stale));
            }
        }
        Ok(())
    }

    /// A client dies, and is started anew.
    pub(super) fn doom(&mut self, host: usize) {
        if self.is_calm || !self.can_die(host) {
            return;
        }
        let (id, is_admin) = (self.hosts[host].id, self.hosts[host].is_admin);
        self.crash_host(host);
        if !is_admin {
            self.start_host(id, false);
        }
    }

    /// Whether a client may die now. While a write whose memory was taken away is not repeated, members may have different data under one
    /// sequence. Only this client knows that, so it must live until then.
    pub(super) fn can_die(&self, host: usize) -> bool {
        self.hosts[host].is_live() && !self.hosts[host].requests.values().any(|r| r.faulted)
    }

    pub(super) fn crash_host(&mut self, host: usize) {
        trace!(self, "client {host} crashes");
        self.cover_command("client crashed", Some(host));
        self.hosts[host].is_crashed = true;
        self.resyncs.is_unflushed_unknown = true;
        let requests = std::mem::take(&mut self.hosts[host].requests);
        if requests.values().any(|r| r.write.is_some()) {
            self.coverage.hit("client crashed with writes in flight");
        }
        let step = self.step;
        requests.values().filter_map(|r| r.write).for_each(|write| self.oracle_of(host).fail(write, step));
        for connection in 0..self.connections.len() {
            if self.connections[connection].host == host && !self.connections[connection].client_closed {
                if self.rng.percent(50) {
                    self.cut(connection);
                } else {
                    self.client_closes(connection);
                }
            }
        }
    }

    /// No more faults: what is down comes up, what is parted meets.
    pub(super) fn calm(&mut self) -> Check {
        trace!(self, "no more faults");
        self.is_calm = true;
        self.parted.clear();
        self.stalled.clear();
        for host in &mut self.hosts {
            host.partitioned.iter_mut().for_each(|p| *p = false);
            host.stalled_until.iter_mut().for_each(|s| *s = 0);
        }
        self.give_up_forces();
        let patience = self.timeout() * 10;
        self.await_right_stores(patience);
        // One that knows nobody who is still there would look for the pool for ever.
        for host in 0..self.hosts.len() {
            if self.hosts[host].is_live() && self.hosts[host].client.spec().is_none() {
                self.crash_host(host);
            }
        }
        for index in 0..self.nodes.len() {
            self.nodes[index].disk_errors = 0;
            self.nodes[index].flush_errors = 0;
            self.nodes[index].flush_fails = false;
            self.nodes[index].disk.bad.clear();
            self.nodes[index].metadata_fails = false;
            self.nodes[index].is_deaf_to_views = false;
            if self.nodes[index].replica.as_ref().is_some_and(|r| r.status().broken) {
                self.crash_node(index, false)?;
            }
            if self.nodes[index].stops {
                self.crash_node(index, false)?;
            }
            if self.nodes[index].replica.is_none() && !self.nodes[index].is_gone {
                self.restart(index);
            }
        }
        Ok(())
    }
}
