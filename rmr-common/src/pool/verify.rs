//! What an operator asks of a verify, and what it reports.

use serde::{Deserialize, Serialize};

use super::{Chunk, MemberId};

/// What a verify is to do.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VerifyOptions {
    /// Bring members in line whose blocks differ, where it is known which are wrong.
    #[serde(default)]
    pub repair: bool,
    /// The member that is right wherever members differ. Without it more than half of the Clean members are.
    #[serde(default)]
    pub trust: Option<MemberId>,
    /// Most bytes of the pool that are compared per second; `None` is no limit.
    #[serde(default)]
    pub bytes_per_s: Option<u64>,
    /// Where to begin.
    #[serde(default)]
    pub from_chunk: Chunk,
}

/// What a verify is doing.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "name", content = "reason")]
pub enum VerifyState {
    /// Chunks are compared.
    Running,
    /// Nothing can be compared now; why.
    Waiting(String),
    /// Members are being brought in line.
    Repairing,
    /// All of it was compared.
    Done,
    /// It was given up on request.
    Cancelled,
    /// It came to an end before that; why. A new one may go on from the chunk that the report names.
    Interrupted(String),
}

impl VerifyState {
    /// Whether it is over.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        matches!(self, Self::Done | Self::Cancelled | Self::Interrupted(_))
    }
}

/// What became of blocks that differ.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VerifyOutcome {
    /// They were reported only.
    Reported,
    /// They were to be repaired, and nothing says which member is right.
    Undecided,
    /// They are to be repaired.
    Pending,
    /// They are the same on all members now.
    Repaired,
    /// They were repaired and differed again.
    RepairFailed,
}

/// A range in which members differ.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VerifyDifference {
    /// First byte of the pool.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// The members that were compared: those in one list had the same content.
    pub same: Vec<Vec<MemberId>>,
    /// The members whose disks could not read it.
    pub unreadable: Vec<MemberId>,
    /// The members that are wrong, as far as that can be told.
    pub wrong: Vec<MemberId>,
    /// What became of it.
    pub outcome: VerifyOutcome,
}

/// What a verify knows of one member. Blocks are of 4 KiB.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VerifiedMember {
    /// The member.
    pub member: MemberId,
    /// Blocks that were compared.
    pub blocks_compared: u64,
    /// Blocks that others compared while this member was not Clean.
    pub blocks_not_compared: u64,
    /// Blocks in which it is wrong; or differs from another one, where it is not known which is wrong.
    pub blocks_differing: u64,
    /// Blocks that its disk could not read.
    pub blocks_unreadable: u64,
}

/// What a verify has done and found so far.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VerifyReport {
    /// What was asked for.
    pub options: VerifyOptions,
    /// What it is doing.
    pub state: VerifyState,
    /// Time since it began, or the time that it took, in milliseconds.
    pub elapsed_ms: u64,
    /// How long ago it ended, in milliseconds.
    pub ended_ms_ago: Option<u64>,
    /// Chunks of the pool.
    pub chunks: u64,
    /// The chunk from which a new verify would go on: all before it were compared.
    pub next_chunk: Chunk,
    /// Bytes of the pool that were compared.
    pub bytes_compared: u64,
    /// Bytes that are still to be compared.
    pub bytes_left: u64,
    /// Bytes compared per second, of late.
    pub bytes_per_s: u64,
    /// Time to the end at that rate.
    pub seconds_left: Option<u64>,
    /// It goes slow in favour of the guest.
    pub yielding: bool,
    /// Each member.
    pub members: Vec<VerifiedMember>,
    /// Blocks of the pool in which members differ, or that one could not read.
    pub blocks_differing: u64,
    /// Of those, blocks for which nothing says which member is right.
    pub blocks_undecided: u64,
    /// Of those, blocks that were repaired.
    pub blocks_repaired: u64,
    /// Blocks that differed at first and could not be looked at again without holding the guest for too long.
    pub blocks_unsettled: u64,
    /// The first ranges that differ.
    pub differences: Vec<VerifyDifference>,
    /// There are more than those.
    pub more_differences: bool,
    /// The first ranges that are unsettled, as first byte and length.
    pub unsettled: Vec<(u64, u64)>,
    /// What went wrong last, and was or will be tried again.
    pub last_error: Option<String>,
}

impl VerifyReport {
    /// Blocks that differ and were not repaired.
    #[must_use]
    pub const fn blocks_left_differing(&self) -> u64 {
        self.blocks_differing.saturating_sub(self.blocks_repaired)
    }
}
