//! What the answers of the nodes mean: is the data safe, and if not, what is missing and how long until it is back.
//!
//! [`merge`] puts the statuses of many nodes together by pool, the highest view first; [`assess`] is the policy, one
//! pure function. It never says SAFE of what it did not see.

use std::collections::BTreeSet;

use rmr_common::pool::{MemberId, MemberSet, MemberState, PoolSpec, View};
use serde::Serialize;

use super::format;
use crate::admin::api::{
    ClientState, ClientStatus, PoolStatus, ResyncState, ResyncStatus, StoreState, UnixMs,
};

/// One pool, as all nodes that answered see it.
#[derive(Clone, PartialEq, Debug)]
pub struct Picture {
    /// The specification, from the node with the highest view.
    pub spec: PoolSpec,
    /// The highest view.
    pub view: View,
    /// Statuses of stores that are members in that view, by member.
    pub reports: Vec<PoolStatus>,
    /// Statuses of stores that are not: they were replaced or removed.
    pub strays: Vec<PoolStatus>,
    /// Two nodes have different views with the same number and epoch, which must never be.
    pub contradiction: Option<String>,
}

/// Whether the data of a pool is safe.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Every copy is current.
    Safe,
    /// At least one copy is current and serves, and at least one is not.
    Degraded,
    /// No current copy can serve: requests wait.
    Suspended,
    /// Not enough members answered to tell.
    Unknown,
}

impl Level {
    /// Exit code of `rmrctl status`.
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Safe => 0,
            Self::Degraded => 3,
            Self::Suspended | Self::Unknown => 4,
        }
    }

    /// The word that begins the headline.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Safe => "SAFE",
            Self::Degraded => "DEGRADED",
            Self::Suspended => "SUSPENDED",
            Self::Unknown => "UNKNOWN",
        }
    }
}

/// The connection between the client and a member, as the member's node sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Leg {
    /// A client is attached.
    Up,
    /// A client was attached, and its connection was lost.
    Lost,
    /// No client.
    None,
    /// The member's node did not answer or was not asked.
    Unseen,
}

/// A line of the assessment: data, link and sync of one member, each on its own.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct MemberLine {
    /// The member.
    pub member: MemberId,
    /// Name of its node; absent when it did not answer.
    pub node: Option<String>,
    /// Its data address.
    pub address: String,
    /// Data: its state in the highest view.
    pub state: MemberState,
    /// Since when, where a Clean member saw it change.
    pub since_unix_ms: Option<UnixMs>,
    /// Data: what it misses, by the maps of the Clean members.
    pub missed_bytes: u64,
    /// Whether that is exact, or an upper bound by whole chunks.
    pub missed_exact: bool,
    /// Link: the client's connection to it.
    pub leg: Leg,
    /// Whether its store works; absent when its node did not answer.
    pub store_state: Option<StoreState>,
    /// Sync: what brings it up to date.
    pub resync: Option<ResyncStatus>,
}

/// What [`assess`] finds.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Assessment {
    /// Whether the data is safe.
    pub level: Level,
    /// The same in one line of words, which begins with the level.
    pub headline: String,
    /// How many copies are Clean, seen and serving.
    pub current: usize,
    /// How many copies the view has.
    pub copies: usize,
    /// The members of the view.
    pub members: Vec<MemberLine>,
    /// The client that holds the pool.
    pub client: Option<ClientStatus>,
    /// What else an operator should know.
    pub notes: Vec<String>,
}

/// Puts the statuses of several nodes together: one picture for each pool, ordered by name, then uuid.
#[must_use]
pub fn merge(mut statuses: Vec<PoolStatus>) -> Vec<Picture> {
    let key = |s: &PoolStatus| (s.view.number, s.view.epoch);
    // By pool, then the highest view first, then by member.
    statuses
        .sort_by(|a, b| (a.spec.id, key(b), a.member, a.store).cmp(&(b.spec.id, key(a), b.member, b.store)));
    // A node that was asked under two addresses counts once.
    let mut known = BTreeSet::new();
    statuses.retain(|s| known.insert((s.spec.id, s.store)));
    let mut pictures: Vec<_> = statuses.chunk_by(|a, b| a.spec.id == b.spec.id).map(picture).collect();
    pictures.sort_by(|a, b| (&a.spec.name, a.spec.id).cmp(&(&b.spec.name, b.spec.id)));
    pictures
}

/// A picture of one pool from its statuses, of which the first has the highest view.
fn picture(statuses: &[PoolStatus]) -> Picture {
    let highest = &statuses[0];
    let is_member = |s: &&PoolStatus| highest.view.member(s.member).is_some_and(|m| m.store == s.store);
    let mut reports: Vec<_> = statuses.iter().filter(is_member).cloned().collect();
    reports.sort_by_key(|s| s.member);
    let differs = |s: &&PoolStatus| {
        (s.view.number, s.view.epoch) == (highest.view.number, highest.view.epoch) && s.view != highest.view
    };
    Picture {
        spec: highest.spec.clone(),
        view: highest.view.clone(),
        strays: statuses.iter().filter(|s| !is_member(s)).cloned().collect(),
        contradiction: statuses.iter().find(differs).map(|s| {
            format!(
                "{} and {} have different views with number {} and epoch {}",
                highest.node, s.node, s.view.number, s.view.epoch
            )
        }),
        reports,
    }
}

/// Says whether the data of a pool is safe. `all_answered`: every node that was asked answered.
///
/// | highest view v\*                              | level     |
/// |-----------------------------------------------|-----------|
/// | two nodes disagree on it                      | Unknown   |
/// | a member that is Clean in v\* was not seen    | Unknown: a newer view could be there (design.md §4) |
/// | all Clean members seen, none of them serves   | Suspended |
/// | all members Clean, serving, and have v\*      | Safe      |
/// | otherwise                                     | Degraded  |
#[must_use]
pub fn assess(picture: &Picture, all_answered: bool, now: UnixMs) -> Assessment {
    let clean = picture.view.clean();
    let seen: MemberSet = picture.reports.iter().map(|r| r.member).collect();
    let serving: MemberSet =
        picture.reports.iter().filter(|r| r.store_state == StoreState::Serving).map(|r| r.member).collect();
    let behind: MemberSet =
        picture.reports.iter().filter(|r| r.view.number < picture.view.number).map(|r| r.member).collect();
    let (unseen_clean, current) = (clean.without(seen), clean.intersection(serving));
    let members: Vec<_> = picture.view.members.iter().map(|m| member_line(picture, m.id, m.state)).collect();
    let copies = members.len();

    let level = if picture.contradiction.is_some() || !unseen_clean.is_empty() {
        Level::Unknown
    } else if current.is_empty() {
        Level::Suspended
    } else if usize::try_from(current.len()) == Ok(copies) && clean.intersection(behind).is_empty() {
        Level::Safe
    } else {
        Level::Degraded
    };

    let mut parts = vec![match (level, &picture.contradiction) {
        (Level::Unknown, Some(text)) => text.clone(),
        (Level::Unknown, None) => unknown_words(&members, unseen_clean, clean, all_answered),
        (Level::Suspended, _) => "no current copy can serve".to_owned(),
        (Level::Safe, _) if copies == 1 => "1 of 1 copies current (this pool has no second copy)".to_owned(),
        (Level::Safe | Level::Degraded, _) => format!("{} of {copies} copies current", current.len()),
    }];
    parts.extend(members.iter().filter_map(|m| member_words(m, now)));
    let late = clean.intersection(behind);
    if level == Level::Degraded && !late.is_empty() {
        parts.push(format!("view {} is not agreed yet: {} still below it", picture.view.number, names(late)));
    }
    let client = picture.reports.iter().filter_map(|r| r.client.clone()).max_by_key(|c| c.attached_unix_ms);
    Assessment {
        level,
        headline: format!("{}: {}", level.word(), parts.join("; ")),
        current: current.len() as usize,
        copies,
        notes: notes(picture, &members),
        members,
        client,
    }
}

fn member_line(picture: &Picture, id: MemberId, state: MemberState) -> MemberLine {
    let own = picture.reports.iter().find(|r| r.member == id);
    let chunk_size = picture.spec.chunk_size.bytes();
    // Only Clean members have complete maps of what others miss; where they differ, the worst counts.
    let clean = picture.view.clean();
    let from_clean = picture.reports.iter().filter(|r| clean.contains(r.member) && r.member != id);
    let seen = from_clean.filter_map(|r| r.peers.iter().find(|p| p.member == id));
    let worst = seen.clone().max_by_key(|p| p.missed.bytes(chunk_size)).map(|p| p.missed);
    MemberLine {
        member: id,
        node: own.map(|r| r.node.clone()),
        address: picture
            .spec
            .member(id)
            .map_or_else(|| "not in the specification".into(), |m| m.address.to_string()),
        state,
        since_unix_ms: seen.filter_map(|p| p.state_since_unix_ms).max(),
        missed_bytes: worst.map_or(0, |m| m.bytes(chunk_size)),
        missed_exact: worst.is_none_or(|m| m.blocks.is_some()),
        leg: match own.map(|r| r.client.as_ref().map(|c| c.state)) {
            None => Leg::Unseen,
            Some(None) => Leg::None,
            Some(Some(ClientState::Attached)) => Leg::Up,
            Some(Some(ClientState::Crashed)) => Leg::Lost,
        },
        store_state: own.map(|r| r.store_state.clone()),
        resync: own.and_then(|r| r.resync.clone()),
    }
}

fn unknown_words(members: &[MemberLine], unseen: MemberSet, clean: MemberSet, all_answered: bool) -> String {
    let seen = clean.len() - unseen.len();
    let missing: Vec<_> = members
        .iter()
        .filter(|m| unseen.contains(m.member))
        .map(|m| format!("member {} ({})", m.member, m.address))
        .collect();
    let why = if all_answered { "was not asked; give its admin address with --node" } else { "was not seen" };
    let why =
        if missing.len() > 1 { why.replace("was", "were").replace("its", "their") } else { why.to_owned() };
    format!("only {seen} of {} current copies seen; {} {why}", clean.len(), missing.join(", "))
}

/// What is wrong with a member, or `None`.
fn member_words(line: &MemberLine, now: UnixMs) -> Option<String> {
    let name = format!("member {} ({})", line.member, line.node.as_ref().unwrap_or(&line.address));
    let since =
        line.since_unix_ms.map(|t| format!(" since {}", format::utc_with_age(t, now))).unwrap_or_default();
    let about = if line.missed_exact { "" } else { "up to " };
    let mut words = match line.state {
        MemberState::Clean => Vec::new(),
        MemberState::Out => {
            vec![format!("{name} is Out{since}, missed {about}{}", format::bytes(line.missed_bytes))]
        }
        MemberState::Syncing => {
            let progress = line
                .resync
                .as_ref()
                .map_or_else(|| format!("{about}{} left", format::bytes(line.missed_bytes)), resync_words);
            vec![format!("{name} is Syncing{since}, {progress}")]
        }
    };
    if let Some(StoreState::Waiting { reason } | StoreState::Failed { reason }) = &line.store_state {
        words.push(format!("the store of {name} does not serve: {reason}"));
    }
    (!words.is_empty()).then(|| words.join("; "))
}

/// The progress of a resync in words.
#[must_use]
pub fn resync_words(resync: &ResyncStatus) -> String {
    let left = format::bytes(resync.blocks_left.saturating_mul(rmr_common::pool::BLOCK_SIZE));
    let mut words = match resync.state {
        ResyncState::Running => format!("{left} left"),
        ResyncState::Waiting => format!("{left} left, waiting"),
        ResyncState::Yielding => format!("{left} left, yielding to the guest"),
        ResyncState::Backoff => format!("{left} left, will be tried again after an error"),
    };
    if resync.bytes_per_s > 0 {
        words += &format!(", {}/s", format::bytes(resync.bytes_per_s));
    }
    if let Some(seconds) = resync.seconds_left {
        words += &format!(", {} to go", format::duration(seconds));
    }
    if let Some(error) = &resync.last_error {
        words += &format!(", last error: {error}");
    }
    words
}

fn names(members: MemberSet) -> String {
    let list: Vec<_> = members.iter().map(|m| m.to_string()).collect();
    format!("member{} {}", if list.len() == 1 { "" } else { "s" }, list.join(", "))
}

fn notes(picture: &Picture, members: &[MemberLine]) -> Vec<String> {
    let mut notes = Vec::new();
    let with = |leg: Leg| members.iter().filter(|m| m.leg == leg).map(|m| m.member).collect::<MemberSet>();
    let (up, lost) = (with(Leg::Up), with(Leg::Lost));
    let active_without = picture.view.active().intersection(with(Leg::None).union(lost));
    if !up.is_empty() && !active_without.is_empty() {
        notes.push(format!("the client is attached to {} and not to {}", names(up), names(active_without)));
    } else if up.is_empty() && !lost.is_empty() {
        notes.push(
            "the client was lost without a detach; the next attach makes the copies agree on its last writes"
                .into(),
        );
    }
    let mut holders: Vec<_> = picture
        .reports
        .iter()
        .filter_map(|r| r.client.as_ref().filter(|c| c.state == ClientState::Attached))
        .map(|c| c.id)
        .collect();
    holders.sort();
    holders.dedup();
    if holders.len() > 1 {
        notes.push(format!(
            "{} clients say that they are attached; only the one with the highest epoch can write",
            holders.len()
        ));
    }
    for stray in &picture.strays {
        notes.push(format!(
            "store {} ({} on {}) was member {} and is no longer in the view",
            stray.store,
            stray.path.display(),
            stray.node,
            stray.member
        ));
    }
    notes
}
