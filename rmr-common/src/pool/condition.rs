//! Why a member of a pool is not current, as its coordinator knows it, and what an operator can do about it.
//!
//! The coordinator tells the members ([`crate::wire::Kind::Conditions`]), so that every node's status, health and metrics
//! say the same, also where no log of the client's machine can be read.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::MemberId;

/// Why a member left the view, or does not come back.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Cause {
    /// The connection to its node was lost, or cannot be made.
    Unreachable = 1,
    /// Its node is connected and did not answer a request within the leg timeout.
    Silent = 2,
    /// Its node was stopped in order.
    NodeStopped = 3,
    /// Its disk or file system has no space left.
    DiskFull = 4,
    /// Its disk fails writes.
    WriteErrors = 5,
    /// Its disk fails flushes.
    FlushErrors = 6,
    /// Its disk failed reads that another member served.
    ReadErrors = 7,
    /// Its disk failed reads more often than the read-error limit allows.
    ReadErrorLimit = 8,
    /// Its metadata cannot be written, so its store does not serve.
    MetadataErrors = 9,
    /// It did not take the view of its rejoin in the time for which requests may be held.
    ViewNotAnswered = 10,
    /// It takes longer to make a change durable than requests may be held, or it delayed requests for too long altogether.
    TooSlow = 11,
    /// Its node cannot take over the maps of what is missed from another member.
    HandoverFailed = 12,
    /// Its store cannot hold the pool at its present size.
    NoRoom = 13,
    /// A verify found blocks in which it is wrong.
    Differs = 14,
    /// An operator took it out, or replaced its store.
    Operator = 15,
    /// It answered with something else than was expected, or refuses for another reason.
    Refused = 16,
    /// It was not current, or could not be reached, when the client attached.
    BeforeAttach = 17,
    /// A cause of a newer version.
    #[serde(other)]
    Unknown = 255,
}

impl Cause {
    /// The cause that stands as `code` on the wire.
    #[must_use]
    pub const fn from_code(code: u8) -> Self {
        match code {
            1 => Self::Unreachable,
            2 => Self::Silent,
            3 => Self::NodeStopped,
            4 => Self::DiskFull,
            5 => Self::WriteErrors,
            6 => Self::FlushErrors,
            7 => Self::ReadErrors,
            8 => Self::ReadErrorLimit,
            9 => Self::MetadataErrors,
            10 => Self::ViewNotAnswered,
            11 => Self::TooSlow,
            12 => Self::HandoverFailed,
            13 => Self::NoRoom,
            14 => Self::Differs,
            15 => Self::Operator,
            16 => Self::Refused,
            17 => Self::BeforeAttach,
            _ => Self::Unknown,
        }
    }

    /// Name of the cause for programs, as in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::Silent => "silent",
            Self::NodeStopped => "node_stopped",
            Self::DiskFull => "disk_full",
            Self::WriteErrors => "write_errors",
            Self::FlushErrors => "flush_errors",
            Self::ReadErrors => "read_errors",
            Self::ReadErrorLimit => "read_error_limit",
            Self::MetadataErrors => "metadata_errors",
            Self::ViewNotAnswered => "view_not_answered",
            Self::TooSlow => "too_slow",
            Self::HandoverFailed => "handover_failed",
            Self::NoRoom => "no_room",
            Self::Differs => "differs",
            Self::Operator => "operator",
            Self::Refused => "refused",
            Self::BeforeAttach => "before_attach",
            Self::Unknown => "unknown",
        }
    }

    /// Every cause that has a code.
    pub fn all() -> impl Iterator<Item = Self> {
        (1..=17).map(Self::from_code)
    }

    /// Whether a member that leaves for this reason has not failed: somebody wanted it to, or its read errors, which have a limit of
    /// their own, are to be healed.
    #[must_use]
    pub const fn is_planned(self) -> bool {
        matches!(
            self,
            Self::NodeStopped | Self::ReadErrors | Self::ReadErrorLimit | Self::Differs | Self::Operator
        )
    }

    /// What an operator can do, as a clause; `None` where nothing has to be done.
    #[must_use]
    pub const fn next_step(self) -> Option<&'static str> {
        match self {
            Self::Unreachable => Some("look at its node and at the network between the client and it"),
            Self::Silent => {
                Some("look at the load of its node and disk, and at the network (a smaller MTU on the way?)")
            }
            Self::DiskFull => Some("free space on its file system, or replace its store"),
            Self::WriteErrors | Self::FlushErrors | Self::ReadErrors => {
                Some("look at its disk, and replace it")
            }
            Self::ReadErrorLimit => Some("replace its disk; it stays out until an operator brings it back"),
            Self::MetadataErrors => Some("replace its disk, or restart its node once the disk is well"),
            Self::ViewNotAnswered | Self::TooSlow => Some("look at the load of its node and disk"),
            Self::HandoverFailed => {
                Some("look at the network between its node and the other nodes (a smaller MTU on the way?)")
            }
            Self::NoRoom => Some("make its disk or file system larger, or replace its store"),
            Self::Refused => Some("look at the log of its node"),
            Self::NodeStopped | Self::Differs | Self::Operator | Self::BeforeAttach | Self::Unknown => None,
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unreachable => "its node cannot be reached",
            Self::Silent => "its node did not answer in time",
            Self::NodeStopped => "its node was stopped",
            Self::DiskFull => "its disk is full",
            Self::WriteErrors => "its disk fails writes",
            Self::FlushErrors => "its disk fails flushes",
            Self::ReadErrors => "its disk failed reads",
            Self::ReadErrorLimit => "left out by the read-error limit",
            Self::MetadataErrors => "its metadata cannot be written, or its disk cannot be flushed",
            Self::ViewNotAnswered => "it did not take the view of its rejoin in time",
            Self::TooSlow => "it is too slow",
            Self::HandoverFailed => "it cannot take over the maps of what it missed",
            Self::NoRoom => "its store has no room for the pool",
            Self::Differs => "a verify found blocks in which it is wrong",
            Self::Operator => "an operator took it out",
            Self::Refused => "it refuses",
            Self::BeforeAttach => "it was not current when the client attached",
            Self::Unknown => "for a reason that this version does not know",
        })
    }
}

/// What the coordinator knows of a member that is not current, or was not until a moment ago.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Condition {
    /// The member.
    pub member: MemberId,
    /// Why it left the view last, or was not brought back in.
    pub cause: Cause,
    /// The same in the words of whoever noticed it; may be empty.
    pub text: String,
    /// Number of losses and failed rejoins in a row, without a time in service between that lasted.
    pub failures: u32,
    /// Milliseconds since the first of them.
    pub age_ms: u64,
    /// Milliseconds until the next rejoin is tried; `None` if the client does not try by itself.
    pub retry_in_ms: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_names_of_causes_are_their_own() {
        let mut names = std::collections::BTreeSet::new();
        for cause in Cause::all() {
            assert_eq!(Cause::from_code(cause as u8), cause);
            assert_eq!(serde_json::to_string(&cause).unwrap(), format!("\"{}\"", cause.name()));
            assert!(names.insert(cause.to_string()), "{cause} is said of two causes");
        }
        assert_eq!(names.len(), 17);
        assert_eq!(Cause::from_code(200), Cause::Unknown);
        assert_eq!(serde_json::from_str::<Cause>("\"made_up\"").unwrap(), Cause::Unknown);
    }
}
