//! Which situations a run came to. A campaign that never reached one of them has proved nothing about it.

use std::collections::BTreeMap;

/// How often each situation was reached.
#[derive(Clone, Default, Debug)]
pub struct Coverage(BTreeMap<&'static str, u64>);

/// Every situation that a campaign must reach.
pub const SITUATIONS: &[&str] = &[
    "node asked over another binding",
    "add: done",
    "add: client crashed",
    "add: node crashed",
    "add: leg cut",
    "remove: done",
    "remove: client crashed",
    "remove: node crashed",
    "remove: leg cut",
    "replace: done",
    "replace: client crashed",
    "replace: node crashed",
    "replace: leg cut",
    "maintenance: done",
    "maintenance: client crashed",
    "maintenance: node crashed",
    "maintenance: leg cut",
    "grow: done",
    "grow: client crashed",
    "grow: node crashed",
    "grow: leg cut",
    "command by an administrative coordinator",
    "command through a node",
    "command refused: last Clean member",
    "command refused: suspended",
    "command refused: node of the new store unreachable",
    "command refused: no room",
    "command lost with its client",
    "planned absence with nothing lost",
    "a removed store is met by a client",
    "a replaced store is met by a client",
    "a member that was away makes room",
    "a new member is brought in",
    "Syncing member crashed",
    "Syncing member never gets to see a view",
    "another source named after one failed",
    "a link lost while connecting",
    "a link lost while suspended",
    "a link lost while attaching",
    "a link lost while changing the view",
    "a link lost while active",
    "a link lost while detaching",
    "attach refused: held",
    "attach refused: stale epoch",
    "attach tells of a write that the disk failed",
    "attach waits for disk requests of the one before",
    "attached with a Syncing member",
    "attached where each member has writes that the other has not",
    "attached after a view that some had not heard of, with writes in flight",
    "all disks fail at once",
    "attachment breaks down at once",
    "member failed four times in a row",
    "members hear why others are not current",
    "node stopped in order, and had flushed",
    "rejoin failed: view not answered in time",
    "rejoin failed: too slow",
    "resync: done",
    "attach waits for a Clean member",
    "block pulled",
    "cache lost in a power cut",
    "cache of a Clean member lost in a power cut",
    "chunks done while a view changes",
    "client crashed with writes in flight",
    "client detached",
    "client fenced",
    "client started after a detach",
    "data damaged on its way",
    "disk error shown to the guest",
    "dirty bit set for an absent member",
    "dirty bit cleared by a report",
    "every Clean leg lost unflushed writes",
    "flush failed at a Syncing member",
    "power of a source fails unheard",
    "flush of pulled data failed",
    "force: a client attaches to an older branch",
    "force: a client of an older branch meets a later one",
    "force: a client of an older branch reads",
    "force: a client of an older branch writes",
    "force: a client of the older branch lives",
    "force: a member is forced into use",
    "force: a member is taken from a live client of an older branch",
    "force: a member of an older branch is brought back in",
    "force: an attach waits for the later branch",
    "force: another member is forced into use after that",
    "force: from a member that had not heard of the last one",
    "force: from a member that was not Clean",
    "force: its client died before it knew that it was done",
    "force: refused, because a client lives",
    "flush round shared",
    "guest changed memory in flight",
    "guest write failed at a Syncing member",
    "guest write made stale blocks fresh",
    "guest write waits for a pulled write",
    "handover failed",
    "intent cleared",
    "leg left out after too many read errors",
    "leg left the view after read errors",
    "leg lost by its timeout",
    "link to a source lost",
    "link to a source refused",
    "member lost in a rejoin: attaching",
    "member lost in a rejoin: changing",
    "member lost in a rejoin: preparing",
    "member lost in a rejoin: quiescing",
    "metadata failed",
    "node crashed with disk requests under way",
    "node crashed with metadata under way",
    "node restarted",
    "overlapping write waited",
    "partial write waits for an urgent pull",
    "pool of eight",
    "pool of one",
    "promotion",
    "pulled block skipped for a guest write under way",
    "pulled block was fresh already",
    "pulled from a source that was restarted",
    "pulled write failed",
    "read over a write that a view change caught",
    "read repeated on another leg",
    "read repeated for its digest",
    "rejoin",
    "rejoin of a member with writes of an earlier client",
    "rejoin of a member that lost its table and writes of an earlier client",
    "rejoin anew after one that broke off",
    "request refused after writes were lost",
    "request failed after the suspend timeout",
    "request split",
    "resumed",
    "resync moved what was missed",
    "second member rejoins while another syncs",
    "second view while the first is pending",
    "source changed in a resync",
    "source lost in a resync",
    "suspended",
    "suspended with a Syncing member",
    "takeover",
    "unflushed blocks counted as missed",
    "verify cancelled",
    "verify done",
    "verify finds a corrupted block",
    "verify finds an unreadable block",
    "verify held a guest write",
    "verify holds a range",
    "verify interrupted",
    "verify leaves a block undecided",
    "verify repairs",
    "verify sees a view change",
    "unreadable block healed by a resync",
    "view change superseded by a further loss",
    "write of a fenced client failed",
    "write refused for its digest",
    "write sent from a copy",
];

impl Coverage {
    pub(super) fn hit(&mut self, situation: &'static str) {
        debug_assert!(SITUATIONS.contains(&situation), "{situation} is not in the list");
        *self.0.entry(situation).or_default() += 1;
    }

    /// Adds the counts of another run.
    pub fn add(&mut self, other: &Self) {
        for (situation, count) in &other.0 {
            *self.0.entry(situation).or_default() += count;
        }
    }

    /// How often a situation was reached.
    #[must_use]
    pub fn count(&self, situation: &str) -> u64 {
        self.0.get(situation).copied().unwrap_or(0)
    }

    /// The situations that were never reached.
    #[must_use]
    pub fn missing(&self) -> Vec<&'static str> {
        SITUATIONS.iter().filter(|s| self.count(s) == 0).copied().collect()
    }
}
