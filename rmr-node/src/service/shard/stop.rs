//! The end of a shard: what was answered is flushed, clients are told, disks are drained, stores are closed in order.

use std::os::fd::AsRawFd;
use std::time::Duration;

use rmr_common::reactor::WatchChange;

use super::super::member::Member;
use super::{Phase, STOP_GRACE, Shard};

impl Shard {
    /// Goes through the graceful stop, within its time limit.
    pub(super) fn advance_shutdown(&mut self) {
        match self.phase {
            Phase::Serving if self.shutdown.requested() => {
                self.changes.push(WatchChange::Remove(self.shutdown.as_raw_fd()));
                let listeners = std::mem::take(&mut self.listeners);
                self.changes.extend(listeners.iter().map(|l| WatchChange::Remove(l.as_raw_fd())));
                // Kept until the loop does not watch them any more; no connection is accepted meanwhile.
                self.closed_listeners = listeners;
                // What clients were answered is flushed before they are told, so that nobody counts it as missed.
                let deadline = self.now + self.shared.config.stop_timeout;
                let until = self.now + self.shared.config.stop_timeout / 2;
                self.phase = Phase::Leaving { until, deadline };
                for index in 0..self.members.len() {
                    if let Some(member) = &mut self.members[index] {
                        member.replica.leave();
                    }
                    self.activate(index);
                }
                self.next_tick = self.now;
            }
            Phase::Leaving { until, deadline } => {
                let now = self.now;
                let has_left = |m: &Member| !m.active && m.replica.has_left(now);
                if !self.members.iter().flatten().all(has_left) && now < until {
                    self.next_tick = self.next_tick.min(now + Duration::from_millis(5));
                    return;
                }
                self.phase = Phase::Draining { deadline, closed: false };
                self.say_goodbye();
                self.next_tick = now;
            }
            Phase::Draining { deadline, closed } => {
                let busy = !self.peers.is_empty()
                    || self.members.iter().flatten().any(|m| m.replica.is_busy() || !m.metadata_idle())
                    || self.deletions.iter().any(|d| d.is_under_way().is_some());
                if busy && self.now < deadline {
                    self.next_tick = self.next_tick.min(self.now + Duration::from_millis(20));
                    return;
                }
                if busy && !closed {
                    // Nothing may be written behind the mark of a clean shutdown.
                    self.close_all("the node is stopping, and the client did not leave in time");
                    self.phase = Phase::Draining { deadline: self.now + STOP_GRACE, closed: true };
                    self.next_tick = self.now;
                    return;
                }
                for index in 0..self.members.len() {
                    let Some(member) = &mut self.members[index] else { continue };
                    if member.replica.is_busy() {
                        let pool = &member.replica.spec().name;
                        tracing::error!(%pool, "stopping with requests under way: the store is not marked clean");
                        self.unmarked += 1;
                    } else {
                        member.mark_clean();
                        self.activate(index);
                    }
                }
                // Clients that left late take nothing of the time of the disks.
                self.phase = Phase::Marking { deadline: deadline.max(self.now + STOP_GRACE) };
                self.next_tick = self.now;
            }
            Phase::Marking { deadline } => {
                if self.members.iter().flatten().all(Member::metadata_idle) {
                    self.unmarked += self.members.iter().flatten().filter(|m| m.metadata_failed()).count();
                    if self.unmarked == 0 {
                        tracing::info!(shard = self.index, "all stores are closed in order");
                    }
                    self.phase = Phase::Done;
                } else if self.now >= deadline {
                    tracing::error!(
                        shard = self.index,
                        "a disk did not finish in time: some stores are not marked clean"
                    );
                    self.unmarked += self.members.iter().flatten().filter(|m| !m.metadata_idle()).count();
                    self.phase = Phase::Done;
                } else {
                    self.next_tick = self.next_tick.min(self.now + Duration::from_millis(20));
                }
            }
            Phase::Serving | Phase::Done => {}
        }
    }
}
