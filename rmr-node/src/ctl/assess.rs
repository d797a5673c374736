//! What the answers of the nodes mean: is the data safe, and if not, what is missing and how long until it is back.
//!
//! [`merge`] puts the statuses of many nodes together by pool, the highest view first; [`assess`] is the policy, one
//! pure function. It never says SAFE of what it did not see.

use std::collections::BTreeSet;

use rmr_common::pool::{
    Attested, Cause, MemberAddress, MemberId, MemberSet, MemberState, PoolSpec, Position, StoreId, View,
};
use serde::Serialize;

use super::advice::Advice;
use super::format;
use crate::admin::api::{
    Authentication, ClientState, ClientStatus, DiskTrouble, LeftOut, PeerCondition, PoolStatus, ResyncState,
    ResyncStatus, StoreState, UnixMs,
};
use crate::admin::words::{condition_words, disk_words};

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
    /// Stores of the pool that nodes left out, with the names of the nodes.
    pub left_out: Vec<(String, LeftOut)>,
    /// Members whose nodes are at other addresses than the pool knows.
    pub moved: Vec<MemberAddress>,
    /// How to call `rmrctl` for this pool.
    pub advice: Advice,
}

impl Picture {
    /// Why the store of a member is left out, and by which node.
    fn left_out_of(&self, member: MemberId, store: StoreId) -> Option<&(String, LeftOut)> {
        let is_its = |l: &LeftOut| l.member == Some(member) && l.store.is_none_or(|found| found == store);
        self.left_out.iter().find(|(_, l)| is_its(l))
    }
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
    /// The operator keeps it out.
    pub maintenance: bool,
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
    /// Why it is not current, as the client told the others.
    pub condition: Option<PeerCondition>,
    /// What its disk has failed of late.
    pub disk: Option<DiskTrouble>,
    /// Why its node leaves its store out, where it does.
    pub left_out: Option<String>,
}

/// What [`assess`] finds.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Assessment {
    /// Whether the data is safe.
    pub level: Level,
    /// All that keeps the pool from being safe are members in maintenance.
    pub planned: bool,
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
    let key = |s: &PoolStatus| s.view.order();
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
        left_out: Vec::new(),
        moved: Vec::new(),
        advice: Advice::for_pool(&highest.spec.name),
    }
}

/// Says whether the data of a pool is safe. `all_answered`: every node that was asked answered.
///
/// | highest view v\*                              | level     |
/// |-----------------------------------------------|-----------|
/// | two nodes disagree on it                      | Unknown   |
/// | a member that is Clean in v\* was not seen    | Unknown: a newer view could be there (design.md §4) |
/// | all Clean members seen, none of them serves   | Suspended: one whose store went back in time does not serve |
/// | none of these lets a client in, none attached | Suspended |
/// | all members Clean, serving, and have v\*, and |           |
/// | their nodes have a key in common, or no keys  | Safe      |
/// | otherwise                                     | Degraded  |
#[must_use]
pub fn assess(picture: &Picture, all_answered: bool, now: UnixMs) -> Assessment {
    let clean = picture.view.clean();
    let seen: MemberSet = picture.reports.iter().map(|r| r.member).collect();
    let serving: MemberSet =
        picture.reports.iter().filter(|r| r.store_state == StoreState::Serving).map(|r| r.member).collect();
    let behind: MemberSet =
        picture.reports.iter().filter(|r| r.view.order() < picture.view.order()).map(|r| r.member).collect();
    let regressed = regressed(picture);
    let back = regressed.iter().map(|(member, ..)| *member).collect();
    let (unseen_clean, current) = (clean.without(seen), clean.intersection(serving).without(back));
    let members: Vec<_> = picture.view.members.iter().map(|m| member_line(picture, m.id, m.state)).collect();
    let copies = members.len();

    let keys = KeyTrouble::of(picture);
    let held = picture.reports.iter().any(|r| {
        picture.view.active().contains(r.member)
            && r.client.as_ref().is_some_and(|c| c.state == ClientState::Attached)
    });
    let level = if picture.contradiction.is_some() || !unseen_clean.is_empty() {
        Level::Unknown
    } else if current.is_empty() || current.without(keys.unusable).is_empty() && !held {
        Level::Suspended
    } else if keys.words.is_empty()
        && usize::try_from(current.len()) == Ok(copies)
        && clean.intersection(behind).is_empty()
    {
        Level::Safe
    } else {
        Level::Degraded
    };

    let mut parts = vec![match (level, &picture.contradiction) {
        (Level::Unknown, Some(text)) => text.clone(),
        (Level::Unknown, None) => unknown_words(&members, unseen_clean, clean, all_answered),
        (Level::Suspended, _) if current.is_empty() => "no current copy can serve".to_owned(),
        (Level::Suspended, _) => "no client is let in by any current copy".to_owned(),
        (Level::Safe, _) if copies == 1 => {
            "1 of 1 copies current, one copy only: the data is lost with its disk".to_owned()
        }
        (Level::Safe | Level::Degraded, _) => format!("{} of {copies} copies current", current.len()),
    }];
    parts.extend(members.iter().filter_map(|m| member_words(m, now)));
    parts.extend(regressed.iter().map(|found| regressed_words(&members, found)));
    parts.extend(keys.words.iter().cloned());
    let late = clean.intersection(behind);
    if level == Level::Degraded && !late.is_empty() {
        parts.push(format!("view {} is not agreed yet: {} still below it", picture.view.number, names(late)));
    }
    // A member that is Out may tell of a client that has left long ago.
    let active = picture.view.active();
    let told = picture.reports.iter().filter(|r| active.contains(r.member));
    let client = holder(told.filter_map(|r| r.client.as_ref()));
    Assessment {
        level,
        planned: level == Level::Degraded
            && late.is_empty()
            && keys.words.is_empty()
            && members
                .iter()
                .all(|m| m.maintenance || m.state == MemberState::Clean && current.contains(m.member)),
        headline: format!("{}: {}", level.word(), parts.join("; ")),
        current: current.len() as usize,
        copies,
        notes: notes(picture, &members),
        members,
        client,
    }
}

/// The members whose store shows less than another one knows that it had, and is not on record as stale for it yet: what it had,
/// and what it shows.
fn regressed(picture: &Picture) -> Vec<(MemberId, Position, Position)> {
    let mut known = Attested::default();
    for report in &picture.reports {
        known.merge(&picture.view, &report.history.attested, &report.view);
    }
    let shown = picture.reports.iter().map(|r| (r.member, *known.of(r.member), r.history.position));
    let is_told = |m: MemberId| {
        known.regressed.contains(m) && picture.view.state(m).is_some_and(|s| s != MemberState::Clean)
    };
    shown.filter(|(m, known, shown)| shown.is_behind(known) && !is_told(*m)).collect()
}

fn regressed_words(members: &[MemberLine], (id, known, shown): &(MemberId, Position, Position)) -> String {
    let line = members.iter().find(|m| m.member == *id);
    let node = line.map(|m| m.node.as_ref().unwrap_or(&m.address).clone()).unwrap_or_default();
    format!(
        "the store of member {id} ({node}) went back in time (restored from a copy or a snapshot?): it was at {known} and shows \
         {shown}; put the right store back, or it is copied over in full when a client attaches"
    )
}

/// The client that holds the pool. Each member tells since when the client has it, as the client said when it attached there;
/// where that differs, as clocks do, the first of these moments counts.
fn holder<'a>(told: impl Iterator<Item = &'a ClientStatus> + Clone) -> Option<ClientStatus> {
    let latest = told.clone().max_by_key(|c| (c.state == ClientState::Attached, c.attached_unix_ms))?;
    let of_it = told.filter(|c| c.id == latest.id);
    Some(ClientStatus { attached_unix_ms: of_it.filter_map(|c| c.attached_unix_ms).min(), ..latest.clone() })
}

/// What stands against a client being let in by every member.
struct KeyTrouble {
    /// Members that let nobody in.
    unusable: MemberSet,
    /// All of it in words.
    words: Vec<String>,
}

impl KeyTrouble {
    fn of(picture: &Picture) -> Self {
        let name = |r: &PoolStatus| format!("member {} ({})", r.member, format::plain(&r.node));
        let (mut unusable, mut words) = (MemberSet::default(), Vec::new());
        // How many members let a client in that has this key, or none.
        let mut admits: Vec<(Option<&str>, usize)> = Vec::new();
        let mut note = |key| match admits.iter_mut().find(|(known, _)| *known == key) {
            Some((_, count)) => *count += 1,
            None => admits.push((key, 1)),
        };
        let mut told = Vec::new();
        for report in &picture.reports {
            match (&report.authentication, &report.key_fingerprints[..]) {
                (Authentication::Unusable { reason }, _) => {
                    unusable.insert(report.member);
                    words.push(format!("{} lets nobody in: {}", name(report), format::plain(reason)));
                    continue;
                }
                (Authentication::None, _) => {
                    note(None);
                    told.push(format!("{} has no key", name(report)));
                }
                // A node that does not tell which keys it has.
                (Authentication::Key | Authentication::Rotating, []) => continue,
                (Authentication::Key | Authentication::Rotating, keys) => {
                    keys.iter().for_each(|key| note(Some(key)));
                    told.push(format!("{} has {}", name(report), format::plain(&keys.join(" and "))));
                }
            }
        }
        if !told.is_empty() && admits.iter().all(|(_, count)| *count < told.len()) {
            words.push(format!(
                "the nodes have different keys, so that no client is let in by all: {}",
                told.join(", ")
            ));
        }
        Self { unusable, words }
    }
}

fn member_line(picture: &Picture, id: MemberId, state: MemberState) -> MemberLine {
    let own = picture.reports.iter().find(|r| r.member == id);
    let chunk_size = picture.spec.chunk_size.bytes();
    let store = picture.view.member(id).map(|m| m.store);
    let left_out = store.filter(|_| own.is_none()).and_then(|store| picture.left_out_of(id, store));
    // Only Clean members have complete maps of what others miss; where they differ, the worst counts.
    let clean = picture.view.clean();
    let from_clean = picture.reports.iter().filter(|r| clean.contains(r.member) && r.member != id);
    let seen = from_clean.filter_map(|r| r.peers.iter().find(|p| p.member == id));
    let worst = seen.clone().max_by_key(|p| p.missed.bytes(chunk_size)).map(|p| p.missed);
    let missed = worst.map_or(0, |m| m.bytes(chunk_size));
    MemberLine {
        member: id,
        node: own.map(|r| &r.node).or(left_out.map(|(node, _)| node)).cloned(),
        address: picture
            .spec
            .member(id)
            .map_or_else(|| "not in the specification".into(), |m| m.address.to_string()),
        state,
        maintenance: picture.spec.member(id).is_some_and(|m| m.maintenance),
        // Whoever saw it longest is right: it has not been current for moments only since.
        since_unix_ms: seen.clone().filter_map(|p| p.state_since_unix_ms).min(),
        missed_bytes: missed,
        missed_exact: worst.is_none_or(|m| m.blocks.is_some()),
        leg: match own.map(|r| r.client.as_ref().map(|c| c.state)) {
            None => Leg::Unseen,
            Some(None) => Leg::None,
            Some(Some(ClientState::Attached)) => Leg::Up,
            // A member that was taken out does not hear how its client left.
            Some(Some(ClientState::Crashed)) if state == MemberState::Out => Leg::None,
            Some(Some(ClientState::Crashed)) => Leg::Lost,
        },
        store_state: own.map(|r| r.store_state.clone()),
        // By its own maps nothing may be left before it has taken over what others know that it missed, or while it cannot flush
        // what it has.
        resync: own.and_then(|r| r.resync.clone()).map(|resync| match resync.blocks_left {
            0 => ResyncStatus { blocks_left: missed.div_ceil(rmr_common::pool::BLOCK_SIZE), ..resync },
            _ => resync,
        }),
        condition: seen.filter_map(|p| p.condition.clone()).max_by_key(|c| c.failures),
        disk: own.and_then(|r| r.disk.clone()),
        left_out: left_out.map(|(_, l)| left_out_words(l)),
    }
}

/// Why a store is left out, with its path.
fn left_out_words(entry: &LeftOut) -> String {
    let state = if entry.closed { "closed: " } else { "" };
    let path = entry.path.display().to_string();
    let path = if entry.reason.contains(&path) { String::new() } else { format!("{path}: ") };
    format::plain(&format!("{path}{state}{}", entry.reason))
}

fn unknown_words(members: &[MemberLine], unseen: MemberSet, clean: MemberSet, all_answered: bool) -> String {
    let seen = clean.len() - unseen.len();
    let (left_out, unseen): (Vec<&MemberLine>, Vec<_>) =
        members.iter().filter(|m| unseen.contains(m.member)).partition(|m| m.left_out.is_some());
    let mut parts: Vec<String> = left_out.iter().filter_map(|m| left_out_by(m)).collect();
    let head = format!("only {seen} of {} current copies seen", clean.len());
    if unseen.is_empty() {
        parts.insert(0, head);
        return parts.join("; ");
    }
    let missing: Vec<_> = unseen.iter().map(|m| format!("member {} ({})", m.member, m.address)).collect();
    let why = if all_answered { "was not asked; give its admin address with --node" } else { "was not seen" };
    let why =
        if missing.len() > 1 { why.replace("was", "were").replace("its", "their") } else { why.to_owned() };
    parts.splice(0..0, [head, format!("{} {why}", missing.join(", "))]);
    parts.join("; ")
}

/// That a node leaves the store of a member out.
fn left_out_by(line: &MemberLine) -> Option<String> {
    let reason = line.left_out.as_ref()?;
    let node = line.node.as_ref().unwrap_or(&line.address);
    Some(format!("member {}: {node} left it out: {reason}", line.member))
}

/// What is wrong with a member, or `None`.
fn member_words(line: &MemberLine, now: UnixMs) -> Option<String> {
    let name = format!("member {} ({})", line.member, line.node.as_ref().unwrap_or(&line.address));
    let since =
        line.since_unix_ms.map(|t| format!(" since {}", format::utc_with_age(t, now))).unwrap_or_default();
    let about = if line.missed_exact { "" } else { "up to " };
    let mut words = match line.state {
        MemberState::Clean => Vec::new(),
        MemberState::Out if line.maintenance => {
            let missed = format::bytes(line.missed_bytes);
            vec![format!("{name} is in maintenance{since}, by plan, missed {about}{missed}")]
        }
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
    match line.condition.as_ref().filter(|_| !line.maintenance) {
        Some(condition) if line.state == MemberState::Out => {
            words.push(format!("member {}: {}", line.member, condition_words(condition, now)));
        }
        Some(condition) => words.push(format!(
            "member {} was lost, or not brought in, {} times in a row before, the last time because {}",
            line.member, condition.failures, condition.cause
        )),
        None => {}
    }
    // Of a Clean one the headline says so already.
    if line.state != MemberState::Clean {
        words.extend(left_out_by(line));
    }
    if let Some(StoreState::Waiting { reason } | StoreState::Failed { reason }) = &line.store_state {
        words.push(format!("the store of {name} does not serve: {reason}"));
    }
    if let Some(disk) = &line.disk {
        words.push(format!("the disk of {name}: {}", disk_words(disk)));
    }
    (!words.is_empty()).then(|| words.join("; "))
}

/// The progress of a resync in words.
#[must_use]
pub fn resync_words(resync: &ResyncStatus) -> String {
    let left = format::bytes(resync.blocks_left.saturating_mul(rmr_common::pool::BLOCK_SIZE));
    let mut words = match resync.state {
        ResyncState::Running | ResyncState::Yielding if resync.blocks_left == 0 => {
            "nothing left, about to be current".to_owned()
        }
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
    for line in members.iter().filter(|l| l.maintenance) {
        notes.push(format!(
            "member {} stays out until its maintenance is over: {}",
            line.member,
            picture.advice.maintenance_off(line.member)
        ));
    }
    for line in members.iter().filter(|l| !l.maintenance) {
        let Some(condition) = &line.condition else { continue };
        let is_left_out = condition.cause == Cause::ReadErrorLimit;
        if is_left_out {
            notes.push(format!(
                "member {} stays out until you bring it back: {}",
                line.member,
                picture.advice.resync()
            ));
        } else if condition.failures > 2 && line.state != MemberState::Clean {
            notes.push(format!(
                "member {} is tried ever more seldom; when it is well again: {}",
                line.member,
                picture.advice.resync()
            ));
        }
    }
    let waits = |l: &&MemberLine| l.state == MemberState::Out && !l.maintenance && l.store_state.is_some();
    let waiting: MemberSet = members.iter().filter(waits).map(|l| l.member).collect();
    if !waiting.is_empty() && up.is_empty() {
        notes.push(format!(
            "{} will be brought up to date when a client is attached, or by: {}",
            names(waiting),
            picture.advice.resync()
        ));
    }
    let smaller = picture.reports.iter().filter(|r| r.spec.size < picture.spec.size);
    for report in smaller {
        notes.push(format!(
            "the store of member {} has room for {} yet, and grows when it is brought in",
            report.member,
            format::bytes(report.spec.size)
        ));
    }
    for new in &picture.moved {
        let old = picture.spec.member(new.member).map(|m| m.address.to_string()).unwrap_or_default();
        notes.push(format!(
            "the node of member {} is at {}, and the pool has {old}: {}",
            new.member,
            new.address,
            picture.advice.member_address()
        ));
    }
    let is_member =
        |l: &LeftOut| l.store.is_none_or(|store| picture.view.members.iter().any(|m| m.store == store));
    for (node, entry) in picture.left_out.iter().filter(|(_, l)| !is_member(l)) {
        notes.push(format!("{node} left out a store that is no member: {}", format::plain(&entry.words())));
    }
    for stray in picture.strays.iter().filter(|s| s.is_prepared()) {
        notes.push(format!(
            "store {} ({} on {}) was made for member {}, which has not joined: run the command again that made it",
            stray.store,
            stray.path.display(),
            stray.node,
            stray.member
        ));
    }
    for stray in picture.strays.iter().filter(|s| !s.is_prepared()) {
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

#[cfg(test)]
mod tests {
    use rmr_common::pool::{Epoch, Mark};

    use super::*;
    use crate::admin::api::Missed;
    use crate::admin::fake::{client, member, pool_status, set_state};

    const NOW: UnixMs = UnixMs(1_000_000);

    /// Statuses of a pool with these member states, as every member sees it.
    fn statuses(states: &[MemberState]) -> Vec<PoolStatus> {
        let count = u8::try_from(states.len()).unwrap();
        let of = |id| {
            let mut status = pool_status("vm-1", count, id);
            for (i, &state) in (0u8..).zip(states) {
                set_state(&mut status, i, state);
            }
            status
        };
        (0..count).map(of).collect()
    }

    fn one(statuses: Vec<PoolStatus>) -> Picture {
        let mut pictures = merge(statuses);
        assert_eq!(pictures.len(), 1);
        pictures.remove(0)
    }

    fn headline(statuses: Vec<PoolStatus>) -> String {
        assess(&one(statuses), true, NOW).headline
    }

    #[test]
    fn a_store_that_went_back_in_time_is_not_current_whatever_the_view_says() {
        use MemberState::{Clean, Out};
        let position =
            |epoch, mark| Position { epoch: Epoch(epoch), mark: Mark(mark), ..Position::default() };
        let mut pool = statuses(&[Clean, Clean]);
        for status in &mut pool {
            status.history.position = position(3, 7);
            status.history.attested.note(member(0), &position(3, 7));
            status.history.attested.note(member(1), &position(3, 7));
        }
        assert!(headline(pool.clone()).starts_with("SAFE"));
        pool[0].history.position = position(2, 7);
        let words = headline(pool.clone());
        assert!(words.starts_with("DEGRADED: 1 of 2 copies current"), "{words}");
        assert!(words.contains("the store of member 0 (n0) went back in time"), "{words}");
        // Nor does the last one serve.
        let mut alone = pool.clone();
        alone.iter_mut().for_each(|s| set_state(s, 1, Out));
        assert!(headline(alone).starts_with("SUSPENDED"));
        // A client has dealt with it: it is Out, and all of it on record.
        for status in &mut pool {
            set_state(status, 0, Out);
            status.history.attested.regressed = MemberSet::only(member(0));
        }
        let words = headline(pool);
        assert!(words.starts_with("DEGRADED") && !words.contains("went back"), "{words}");
    }

    #[test]
    fn the_level_follows_the_documented_table() {
        use Level::{Degraded, Safe, Suspended, Unknown};
        use MemberState::{Clean, Out, Syncing};
        // States in the view; which members answered; which of those have a failed store; what follows.
        type Row<'a> = (&'a [MemberState], &'a [u8], &'a [u8], Level);
        let table: &[Row<'_>] = &[
            (&[Clean], &[0], &[], Safe),
            (&[Clean], &[0], &[0], Suspended),
            (&[Clean, Clean], &[0, 1], &[], Safe),
            (&[Clean, Clean], &[0], &[], Unknown),
            (&[Clean, Clean], &[1], &[], Unknown),
            (&[Clean, Clean], &[1], &[1], Unknown),
            (&[Clean, Clean], &[0, 1], &[1], Degraded),
            (&[Clean, Clean], &[0, 1], &[0, 1], Suspended),
            (&[Clean, Out], &[0, 1], &[], Degraded),
            (&[Clean, Out], &[0], &[], Degraded),
            (&[Clean, Out], &[1], &[], Unknown),
            (&[Clean, Out], &[0, 1], &[0], Suspended),
            (&[Clean, Out], &[0], &[0], Suspended),
            (&[Clean, Syncing], &[0, 1], &[], Degraded),
            (&[Clean, Syncing], &[0], &[], Degraded),
            (&[Clean, Syncing], &[1], &[], Unknown),
            (&[Clean, Clean, Clean], &[0, 1, 2], &[], Safe),
            (&[Clean, Clean, Clean], &[0, 2], &[], Unknown),
            (&[Clean, Clean, Out], &[0, 1], &[], Degraded),
            (&[Clean, Clean, Out], &[0, 2], &[], Unknown),
            (&[Clean, Out, Syncing], &[0], &[], Degraded),
            (&[Clean, Out, Syncing], &[1, 2], &[], Unknown),
        ];
        for (states, answered, failed, level) in table {
            let mut found = statuses(states);
            for &i in *failed {
                found[usize::from(i)].store_state = StoreState::Failed { reason: "broken".into() };
            }
            found.retain(|s| answered.contains(&s.member.as_u8()));
            let assessment = assess(&one(found), true, NOW);
            assert_eq!(
                assessment.level, *level,
                "{states:?} {answered:?} {failed:?}: {}",
                assessment.headline
            );
            assert!(assessment.headline.starts_with(&format!("{}: ", level.word())));
        }
    }

    #[test]
    fn headlines_are_in_words() {
        use MemberState::{Clean, Out, Syncing};
        assert_eq!(headline(statuses(&[Clean, Clean])), "SAFE: 2 of 2 copies current");
        assert_eq!(
            headline(statuses(&[Clean])),
            "SAFE: 1 of 1 copies current, one copy only: the data is lost with its disk"
        );

        let mut lost = statuses(&[Clean, Out]);
        lost[0].peers[0].missed = Missed { chunks: 20, blocks: Some(3200) };
        lost[0].peers[0].state_since_unix_ms = Some(UnixMs(700_000));
        assert_eq!(
            headline(lost.clone()),
            "DEGRADED: 1 of 2 copies current; member 1 (n1) is Out since 1970-01-01T00:11:40Z (5 min ago), \
             missed 12.5 MiB"
        );
        lost.truncate(1);
        lost[0].peers[0].missed.blocks = None;
        assert_eq!(
            headline(lost),
            "DEGRADED: 1 of 2 copies current; member 1 (tcp://n1:7700) is Out since 1970-01-01T00:11:40Z \
             (5 min ago), missed up to 20 MiB"
        );

        let mut syncing = statuses(&[Clean, Syncing]);
        let mut resync = ResyncStatus {
            state: ResyncState::Running,
            reason: "was Out".into(),
            since_unix_ms: UnixMs(0),
            source: Some(member(0)),
            blocks_left: 256,
            bytes_per_s: 512 << 10,
            seconds_left: Some(2),
            last_error: None,
        };
        syncing[1].resync = Some(resync.clone());
        let start = "DEGRADED: 1 of 2 copies current; member 1 (n1) is Syncing, 1 MiB left, ";
        assert_eq!(headline(syncing.clone()), format!("{start}512 KiB/s, 2 s to go"));
        resync.state = ResyncState::Backoff;
        (resync.bytes_per_s, resync.seconds_left, resync.last_error) = (0, None, Some("timed out".into()));
        syncing[1].resync = Some(resync);
        assert_eq!(
            headline(syncing),
            format!("{start}will be tried again after an error, last error: timed out")
        );

        let mut broken = statuses(&[Clean, Out]);
        broken[0].store_state = StoreState::Waiting { reason: "member 1 must come first".into() };
        assert!(headline(broken).starts_with(
            "SUSPENDED: no current copy can serve; the store of member 0 (n0) does not serve: \
                 member 1 must come first; member 1 (n1) is Out"
        ));
    }

    #[test]
    fn why_a_member_is_not_current_since_when_and_what_to_do_is_in_the_headline() {
        use MemberState::{Clean, Out, Syncing};
        let mut found = statuses(&[Clean, Out]);
        let condition = PeerCondition {
            cause: Cause::DiskFull,
            text: String::new(),
            failures: 7,
            since_unix_ms: Some(UnixMs(700_000)),
            retry_unix_ms: Some(UnixMs(1_064_000)),
        };
        found[0].peers[0].condition = Some(condition.clone());
        found[0].peers[0].state_since_unix_ms = Some(UnixMs(700_000));
        found[1].disk = Some(DiskTrouble {
            cause: Cause::DiskFull,
            text: "write of 4096 bytes at 0: No space left on device".into(),
            since_unix_ms: UnixMs(1),
            last_unix_ms: UnixMs(2),
            errors: 9,
        });
        let assessment = assess(&one(found.clone()), true, NOW);
        assert_eq!(
            assessment.headline,
            "DEGRADED: 1 of 2 copies current; member 1 (n1) is Out since 1970-01-01T00:11:40Z (5 min ago), missed 0 B; member 1: its \
             disk is full, failed 7 times in a row, next try in 64 s; free space on its file system, or replace its store; the disk of \
             member 1 (n1): its disk is full (9 times, last: write of 4096 bytes at 0: No space left on device); free space on its \
             file system, or replace its store"
        );
        assert!(
            assessment.notes.iter().any(|n| n.contains("rmrctl pool resync vm-1")),
            "{:?}",
            assessment.notes
        );
        found[0].peers[0].condition =
            Some(PeerCondition { cause: Cause::ReadErrorLimit, retry_unix_ms: None, ..condition.clone() });
        let assessment = assess(&one(found), true, NOW);
        assert!(assessment.headline.contains("member 1: left out by the read-error limit"));
        assert!(assessment.notes.iter().any(|n| n.contains("stays out until you bring it back")));
        let mut found = statuses(&[Clean, Syncing]);
        found[0].peers[0].condition = Some(condition);
        found[0].peers[0].missed.blocks = Some(256);
        found[1].resync = Some(ResyncStatus {
            state: ResyncState::Running,
            reason: String::new(),
            since_unix_ms: UnixMs(0),
            source: Some(member(0)),
            blocks_left: 0,
            bytes_per_s: 0,
            seconds_left: None,
            last_error: None,
        });
        assert_eq!(
            headline(found),
            "DEGRADED: 1 of 2 copies current; member 1 (n1) is Syncing, 1 MiB left; member 1 was lost, or not brought in, 7 times in \
             a row before, the last time because its disk is full"
        );
    }

    #[test]
    fn what_was_not_seen_is_named_and_why() {
        let mut found = statuses(&[MemberState::Clean, MemberState::Clean]);
        found.remove(0);
        let picture = one(found);
        assert_eq!(
            assess(&picture, true, NOW).headline,
            "UNKNOWN: only 1 of 2 current copies seen; member 0 (tcp://n0:7700) was not asked; give its admin \
             address with --node"
        );
        assert_eq!(
            assess(&picture, false, NOW).headline,
            "UNKNOWN: only 1 of 2 current copies seen; member 0 (tcp://n0:7700) was not seen"
        );
    }

    #[test]
    fn the_highest_view_wins_over_what_a_returned_member_believes() {
        let mut found = statuses(&[MemberState::Clean, MemberState::Clean]);
        set_state(&mut found[0], 1, MemberState::Out);
        let picture = one(found.into_iter().rev().collect());
        assert_eq!(picture.view.state(member(1)), Some(MemberState::Out));
        let assessment = assess(&picture, true, NOW);
        assert_eq!((assessment.level, assessment.current), (Level::Degraded, 1));
        assert!(assessment.headline.starts_with("DEGRADED: 1 of 2"), "{}", assessment.headline);
    }

    #[test]
    fn a_view_that_a_clean_member_has_not_yet_is_not_safe() {
        let mut found = statuses(&[MemberState::Clean, MemberState::Syncing]);
        set_state(&mut found[1], 1, MemberState::Clean);
        let number = found[1].view.number;
        assert_eq!(
            headline(found),
            format!(
                "DEGRADED: 2 of 2 copies current; view {number} is not agreed yet: member 0 still below it"
            )
        );
    }

    #[test]
    fn two_views_with_one_number_are_a_contradiction() {
        let mut found = statuses(&[MemberState::Clean, MemberState::Clean]);
        set_state(&mut found[0], 1, MemberState::Out);
        set_state(&mut found[1], 0, MemberState::Out);
        let number = found[0].view.number;
        assert!(headline(found.clone()).starts_with(&format!(
            "UNKNOWN: n0 and n1 have different views with number {number} and epoch 0"
        )));
        // A later epoch decides: the other one is merely old.
        found[1].view.epoch = Epoch(1);
        let picture = one(found);
        assert_eq!((picture.contradiction, picture.view.epoch), (None, Epoch(1)));
    }

    #[test]
    fn a_replaced_store_is_no_copy() {
        let mut found = statuses(&[MemberState::Clean, MemberState::Clean]);
        found[1].store = StoreId::from_bytes([9; 16]);
        let assessment = assess(&one(found), true, NOW);
        assert_eq!(assessment.level, Level::Unknown);
        assert!(assessment.notes[0].contains("is no longer in the view"), "{:?}", assessment.notes);
    }

    #[test]
    fn a_node_asked_twice_counts_once() {
        let mut found = statuses(&[MemberState::Clean, MemberState::Clean]);
        found.push(found[0].clone());
        assert_eq!(one(found).reports.len(), 2);
    }

    #[test]
    fn links_are_told_apart_from_data() {
        let mut found = statuses(&[MemberState::Clean, MemberState::Clean]);
        found[0].client = Some(client(5));
        let a = assess(&one(found.clone()), true, NOW);
        assert_eq!((a.level, a.members[0].leg, a.members[1].leg), (Level::Safe, Leg::Up, Leg::None));
        assert_eq!(a.notes, ["the client is attached to member 0 and not to member 1"]);

        found[0].client.as_mut().unwrap().state = ClientState::Crashed;
        let a = assess(&one(found.clone()), true, NOW);
        assert_eq!((a.level, a.members[0].leg), (Level::Safe, Leg::Lost));
        assert!(a.notes[0].starts_with("the client was lost without a detach"), "{:?}", a.notes);

        found[0].client = Some(client(5));
        found[1].client = Some(ClientStatus { id: rmr_common::pool::ClientId::random(), ..client(6) });
        let a = assess(&one(found), true, NOW);
        assert!(a.notes[0].starts_with("2 clients say"), "{:?}", a.notes);
        assert_eq!(a.client.unwrap().attached_unix_ms, Some(UnixMs(6)));
    }

    #[test]
    fn a_pool_whose_nodes_let_no_client_in_everywhere_is_not_safe() {
        use Authentication::{Key, None, Rotating};
        let unusable = || Authentication::Unusable { reason: "mode 0644".into() };
        let table = [
            ((None, &[][..]), (None, &[][..]), Level::Safe),
            ((Key, &["a"][..]), (Key, &["a"][..]), Level::Safe),
            ((Rotating, &["b", "a"]), (Key, &["a"]), Level::Safe),
            ((Rotating, &["b", "a"]), (Key, &["b"]), Level::Safe),
            ((Key, &["a"]), (Key, &["b"]), Level::Degraded),
            ((Rotating, &["b", "a"]), (Key, &["c"]), Level::Degraded),
            ((Key, &["a"]), (None, &[]), Level::Degraded),
            // A node of an older version.
            ((Key, &[]), (Key, &["a"]), Level::Safe),
            ((Key, &["a"]), (unusable(), &[]), Level::Degraded),
            ((unusable(), &[]), (unusable(), &[]), Level::Suspended),
        ];
        for (first, second, level) in table {
            let mut found = statuses(&[MemberState::Clean, MemberState::Clean]);
            for (status, (state, keys)) in found.iter_mut().zip([&first, &second]) {
                status.authentication = state.clone();
                status.key_fingerprints = keys.iter().map(|&key| key.to_owned()).collect();
            }
            let a = assess(&one(found.clone()), true, NOW);
            assert_eq!(a.level, level, "{first:?} {second:?}: {}", a.headline);
            assert!(!a.planned);
            // Who is in stays in.
            found[0].client = Some(client(5));
            let held = assess(&one(found), true, NOW).level;
            assert_eq!(held == Level::Safe, level == Level::Safe, "{first:?} {second:?}");
            assert_ne!(held, Level::Suspended);
        }
        let mut found = statuses(&[MemberState::Clean, MemberState::Clean]);
        found[0].authentication = Key;
        found[0].key_fingerprints = vec!["01ff".into()];
        assert_eq!(
            headline(found),
            "DEGRADED: 2 of 2 copies current; the nodes have different keys, so that no client is let in by all: \
             member 0 (n0) has 01ff, member 1 (n1) has no key"
        );
    }

    #[test]
    fn a_client_that_a_member_out_of_the_view_lost_is_no_loss() {
        let mut found = statuses(&[MemberState::Clean, MemberState::Out]);
        found[1].client = Some(ClientStatus { state: ClientState::Crashed, ..client(5) });
        let a = assess(&one(found.clone()), true, NOW);
        assert_eq!((a.members[1].leg, a.client), (Leg::None, None));
        assert!(!a.notes.iter().any(|note| note.contains("lost")), "{:?}", a.notes);
        // Where it is not out, it is one.
        let mut found = statuses(&[MemberState::Clean, MemberState::Clean]);
        found[1].client = Some(ClientStatus { state: ClientState::Crashed, ..client(5) });
        let a = assess(&one(found), true, NOW);
        assert!(a.notes[0].starts_with("the client was lost"), "{:?}", a.notes);
    }

    #[test]
    fn the_client_is_the_one_that_active_members_tell_of() {
        use MemberState::{Clean, Out, Syncing};
        // States in the view; which client is shown when member 0 tells of one attached at 5, and member 1 at 6.
        // To member 1 it is attached again since 6.
        let table = [([Clean, Clean], 5), ([Clean, Syncing], 5), ([Clean, Out], 5), ([Out, Clean], 6)];
        for (states, shown) in table {
            let mut found = statuses(&states);
            found[0].client = Some(client(5));
            found[1].client = Some(client(6));
            let a = assess(&one(found), true, NOW);
            assert_eq!(a.client.map(|c| c.attached_unix_ms), Some(Some(UnixMs(shown))), "{states:?}");
        }
        // A member whose node was started since knows no time, and says less than one that does.
        let mut found = statuses(&[Clean, Clean]);
        found[0].client = Some(ClientStatus { attached_unix_ms: None, ..client(9) });
        found[1].client = Some(client(6));
        let a = assess(&one(found.clone()), true, NOW);
        assert_eq!(a.client.map(|c| c.attached_unix_ms), Some(Some(UnixMs(6))));
        found[1].client = None;
        let a = assess(&one(found), true, NOW);
        assert_eq!(a.client.map(|c| c.attached_unix_ms), Some(None));
        let mut found = statuses(&[Clean, Out]);
        found[1].client = Some(client(6));
        assert_eq!(assess(&one(found), true, NOW).client, None);
    }
}
