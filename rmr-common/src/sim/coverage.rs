//! Which situations a run came to. A campaign that never reached one of them has proved nothing about it.

use std::collections::BTreeMap;

/// How often each situation was reached.
#[derive(Clone, Default, Debug)]
pub struct Coverage(BTreeMap<&'static str, u64>);

/// Every situation that a campaign must reach.
pub const SITUATIONS: &[&str] = &[
    "a link lost while connecting",
    "a link lost while suspended",
    "a link lost while attaching",
    "a link lost while changing the view",
    "a link lost while active",
    "a link lost while detaching",
    "attach refused: held",
    "attach refused: stale epoch",
    "attach waits for disk requests of the one before",
    "attach waits for a Clean member",
    "cache lost in a power cut",
    "client crashed with writes in flight",
    "client detached",
    "client fenced",
    "client started after a detach",
    "disk error shown to the guest",
    "dirty bit set for an absent member",
    "flush round shared",
    "intent cleared",
    "leg lost by its timeout",
    "metadata failed",
    "node crashed with disk requests under way",
    "node crashed with metadata under way",
    "node restarted",
    "overlapping write waited",
    "pool of eight",
    "pool of one",
    "read repeated on another leg",
    "request failed after the suspend timeout",
    "request split",
    "resumed",
    "second view while the first is pending",
    "suspended",
    "takeover",
    "unflushed blocks counted as missed",
    "view change superseded by a further loss",
    "write of a fenced client failed",
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
