//! What a replica tells operators about itself.

use std::time::Duration;

use serde::Serialize;

use super::{ConnectionId, Output, Replica};
use crate::pool::{Attested, Condition, MemberId, Position, View};
use crate::time::Time;
use crate::wire::{Conditions, Kind, MessageHeader, Status};

/// Requests so far.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq, Serialize)]
pub struct ReplicaCounters {
    /// Reads answered well.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes answered well.
    pub writes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Discards and write-zeroes answered well.
    pub zeroes: u64,
    /// Flushes answered well.
    pub flushes: u64,
    /// Blocks handed to members that missed them.
    pub pulled_out_blocks: u64,
    /// Missed blocks pulled from other members and written here.
    pub pulled_in_blocks: u64,
    /// Blocks read for comparisons of members.
    pub digested_blocks: u64,
    /// Requests that the disk failed.
    pub errors: u64,
    /// Reads among them, and those for other members.
    pub read_errors: u64,
    /// Writes whose data did not fit their digest.
    pub digest_mismatches: u64,
    /// Flushes that the disk failed, of clients and of the member's own.
    pub failed_flushes: u64,
    /// Requests refused: another epoch or view, or a broken rule.
    pub refused: u64,
}

impl ReplicaCounters {
    pub(super) fn count(&mut self, header: &MessageHeader, status: Status) {
        let length = u64::from(header.length);
        match (status, header.kind) {
            (Status::Ok, Kind::Read) => {
                self.reads += 1;
                self.read_bytes += length;
            }
            (Status::Ok, Kind::Flush) => self.flushes += 1,
            (Status::Ok, Kind::Discard | Kind::WriteZeroes) => self.zeroes += 1,
            (Status::Ok, _) => {
                self.writes += 1;
                self.written_bytes += length;
            }
            (_, kind) => {
                self.errors += 1;
                self.read_errors += u64::from(kind == Kind::Read);
            }
        }
    }
}

/// The client that has the pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HolderStatus {
    /// Who it is, in words.
    pub description: String,
    /// Whether its connection stands.
    pub connected: bool,
    /// When it attached.
    #[serde(skip)]
    pub since: Time,
    /// For how long it had the pool then, as it says itself.
    #[serde(skip)]
    pub held: Duration,
}

/// What another member has missed, as far as this one knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MissedStatus {
    /// The other member.
    pub member: MemberId,
    /// Blocks of 4 KiB.
    pub blocks: u64,
    /// Chunks.
    pub chunks: u64,
}

/// One member as it sees itself and its pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ReplicaStatus {
    /// The member.
    pub member: MemberId,
    /// Its view.
    pub view: View,
    /// The highest epoch it accepted.
    pub epoch: u64,
    /// The client that has the pool, if any.
    pub holder: Option<HolderStatus>,
    /// The client that had it last, when none has it: who, and whether it left in good order.
    pub last_client: Option<(String, bool)>,
    /// What the others have missed; those with nothing missed are not listed.
    pub missed: Vec<MissedStatus>,
    /// Chunks that may hold writes not known complete everywhere.
    pub intent_chunks: u64,
    /// Disk requests under way.
    pub in_flight: usize,
    /// The resync that brings this member up to date, if one is needed.
    pub resync: Option<super::ResyncStatus>,
    /// Requests so far.
    pub counters: ReplicaCounters,
    /// How far its store has come.
    pub position: Position,
    /// What it remembers of all members.
    pub attested: Attested,
    /// Whether the member has stopped to serve because its metadata cannot be written.
    pub broken: bool,
    /// Whether a flush failed, and no view of a later session is known to be committed.
    pub flush_failed: bool,
    /// Why other members are not current, as the client said at [`ReplicaStatus::told_at`].
    pub conditions: Vec<Condition>,
    /// When it said so.
    #[serde(skip)]
    pub told_at: Time,
}

impl Replica {
    /// What the member knows of itself and its pool.
    #[must_use]
    pub fn status(&self) -> ReplicaStatus {
        let missed = MemberId::all().filter_map(|member| {
            let (blocks, chunks) = self.maps.missed(member);
            (blocks > 0).then_some(MissedStatus { member, blocks, chunks })
        });
        let holder = self.holder.as_ref().map(|h| HolderStatus {
            description: h.description.clone(),
            connected: h.connection.is_some(),
            since: h.since,
            held: h.held,
        });
        ReplicaStatus {
            member: self.member,
            view: self.view.clone(),
            epoch: self.epoch.0,
            last_client: self.last_client.as_ref().map(|c| (c.description.clone(), !c.attached)),
            holder,
            missed: missed.collect(),
            intent_chunks: self.maps.intent().count(),
            in_flight: self.ios.len() - self.free_ios.len(),
            resync: self.resync_status(),
            counters: self.counters,
            position: self.position(),
            attested: self.history.attested,
            broken: self.broken,
            flush_failed: self.flush_failed,
            conditions: self.conditions.1.clone(),
            told_at: self.conditions.0,
        }
    }

    /// The client tells why other members are not current. It is told to operators and used for nothing else.
    pub(super) fn note_conditions(&mut self, connection: ConnectionId, header: &MessageHeader, body: &[u8]) {
        if self.holder_connection() != Some(connection) || header.epoch != self.epoch {
            return;
        }
        match Conditions::decode(body) {
            Ok(Conditions(list)) => self.conditions = (self.now, list),
            Err(_) => self.outputs.push_back(Output::Close(connection, "conditions that do not decode")),
        }
    }
}
