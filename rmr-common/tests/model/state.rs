//! The state of the modelled pool: plain numbers that are copied and compared cheaply, and kept in one form where names and
//! leftovers make no difference.

use std::collections::hash_map::DefaultHasher;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::Deref;
use std::sync::OnceLock;

use rmr_common::pool::{Epoch, MemberId, MemberSet, MemberState, MemberView, StoreId, View, ViewNumber};

/// As many members as a model may have.
pub(super) const MAX_MEMBERS: usize = 3;

/// Bits of a [`Known`] for the states of members, two for each and zero where there is none; then come epoch and number.
const STATE_BITS: u16 = 6;
const EPOCH_BITS: u16 = 4;
const NUMBER_BITS: u16 = 5;

static VIEWS: [OnceLock<View>; 1 << (STATE_BITS + EPOCH_BITS + NUMBER_BITS)] =
    [const { OnceLock::new() }; 1 << (STATE_BITS + EPOCH_BITS + NUMBER_BITS)];

/// One of the few thousand views that a model can come to: a real [`View`], by number.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Known(u16);

impl Known {
    pub(super) fn get(self) -> &'static View {
        VIEWS[usize::from(self.0)].get_or_init(|| View {
            number: ViewNumber((self.0 >> (STATE_BITS + EPOCH_BITS)).into()),
            epoch: Epoch((self.0 >> STATE_BITS & ((1 << EPOCH_BITS) - 1)).into()),
            members: (0..3).filter_map(|i| self.line(i)).collect(),
        })
    }

    fn line(self, index: u8) -> Option<MemberView> {
        let state = MemberState::from_code(u8::try_from(self.0 >> (2 * index) & 3).ok()?)?;
        Some(MemberView { id: MemberId::new(index)?, store: StoreId::from_bytes([index + 1; 16]), state })
    }

    fn renamed(self, names: Names) -> Self {
        let states = (0..MAX_MEMBERS).map(|i| (self.0 >> (2 * i) & 3) << (2 * names[i]));
        Self(states.fold(self.0 >> STATE_BITS << STATE_BITS, |all, one| all | one))
    }
}

impl From<View> for Known {
    fn from(view: View) -> Self {
        let number = u16::try_from(view.number.0).expect("a small number");
        let epoch = u16::try_from(view.epoch.0).expect("a small epoch");
        assert!(number < 1 << NUMBER_BITS && epoch < 1 << EPOCH_BITS, "the limits are too high: {view}");
        let states = view.members.iter().map(|m| (m.state as u16) << (2 * m.id.index()));
        let states = states.fold(0, |all, one| all | one);
        let known = Self(number << (STATE_BITS + EPOCH_BITS) | epoch << STATE_BITS | states);
        assert_eq!(known.get(), &view, "another view than those of models");
        known
    }
}

impl Deref for Known {
    type Target = View;

    fn deref(&self) -> &View {
        self.get()
    }
}

impl fmt::Debug for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}]", self.get())
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Member {
    pub(super) is_up: bool,
    pub(super) view: Known,
    /// The view that a crash leaves; another one than `view` only with a planted mistake.
    pub(super) durable: Known,
    pub(super) epoch: Epoch,
    /// The attached client. Lost with the connection, and in a crash.
    pub(super) holder: Option<u8>,
    /// The slot table is lost, and no view of a later attachment has dealt with that.
    pub(super) tables_lost: bool,
    /// The newest write here. Writes are numbered in the order in which they were submitted.
    pub(super) data: u8,
    /// What of it a loss of power leaves.
    pub(super) flushed: u8,
    /// Whether by what this one tells a write was begun here that others may not have, or the reverse: by its slot table, and
    /// once that is lost by what it had of intents on disk.
    pub(super) intent: bool,
    /// Whether the intent is on disk: until the write is known complete, and flushed.
    pub(super) kept: bool,
    /// The members that missed something by this one's record; itself, while it is stale.
    pub(super) dirty: MemberSet,
    /// The others that were struck off that record because a view has them Clean which is not known to be committed. They
    /// missed nothing any more, so another member that still has them on record knows no better.
    pub(super) struck_off: MemberSet,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Phase {
    Gathering,
    Attaching { waiting: MemberSet, replied: MemberSet },
    Changing { next: Known, additions: MemberSet, waiting: MemberSet, attach: bool },
    Active,
    Over,
}

/// Epochs in ascending order.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Debug)]
pub(super) struct Epochs(u16);

impl Epochs {
    pub(super) fn only(epoch: Epoch) -> Self {
        Self(1 << epoch.0)
    }

    pub(super) fn push(&mut self, epoch: Epoch) {
        self.0 |= 1 << epoch.0;
    }

    pub(super) const fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(super) fn list(self) -> Vec<Epoch> {
        (0..16).filter(|e| self.0 & (1 << e) != 0).map(Epoch).collect()
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Client {
    pub(super) phase: Phase,
    pub(super) epoch: Epoch,
    pub(super) own_epochs: Epochs,
    /// The committed view; before that the one that it attaches from.
    pub(super) view: Known,
    /// A write that is not complete, and the members that have carried it out under the present view.
    pub(super) write: Option<(u8, MemberSet)>,
    /// Writes have completed in this attachment, and are not flushed.
    pub(super) is_unflushed: bool,
    /// Members to which no connection can be made.
    pub(super) cut: MemberSet,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct State {
    /// Those behind `count` stay as they were made.
    pub(super) members: [Member; MAX_MEMBERS],
    pub(super) count: u8,
    pub(super) clients: [Client; 2],
    pub(super) writes: u8,
    pub(super) crashes: u8,
    pub(super) cuts: u8,
    pub(super) power: u8,
    /// The newest write that was acknowledged.
    pub(super) acknowledged: u8,
    /// The latest view that was committed.
    pub(super) committed: Known,
    /// A rule that the last action broke.
    pub(super) broken: Option<&'static str>,
}

/// A state as the checker tells states apart: two that differ in the names of members only are one.
///
/// That is sound because every event treats members alike. Where the code takes one of several, which it does by number, all
/// of them are tried; `what_may_happen_does_not_depend_on_names` checks it on states.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Nameless {
    pub(super) state: State,
    /// False makes states with other names other states.
    pub(super) is_nameless: bool,
}

/// The new index of each member.
pub(super) type Names = [usize; MAX_MEMBERS];

/// All renamings of so many members.
pub(super) const fn renamings(count: u8) -> &'static [Names] {
    match count {
        3 => &[[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]],
        2 => &[[0, 1, 2], [1, 0, 2]],
        _ => &[[0, 1, 2]],
    }
}

fn renamed(set: MemberSet, names: Names) -> MemberSet {
    MemberSet((0..MAX_MEMBERS).fold(0, |all, i| all | (set.0 >> i & 1) << names[i]))
}

impl State {
    pub(super) fn new(count: u8) -> Self {
        let ids = (0..count).filter_map(MemberId::new);
        let view = View::initial(ids.map(|m| (m, StoreId::from_bytes([m.as_u8() + 1; 16])))).into();
        let member = Member {
            is_up: true,
            view,
            durable: view,
            epoch: Epoch(0),
            holder: None,
            tables_lost: false,
            data: 0,
            flushed: 0,
            intent: false,
            kept: false,
            dirty: MemberSet::EMPTY,
            struck_off: MemberSet::EMPTY,
        };
        let client = Client {
            phase: Phase::Gathering,
            epoch: Epoch(0),
            own_epochs: Epochs::default(),
            view,
            write: None,
            is_unflushed: false,
            cut: MemberSet::EMPTY,
        };
        Self {
            members: [member; MAX_MEMBERS],
            count,
            clients: [client; 2],
            writes: 0,
            crashes: 0,
            cuts: 0,
            power: 0,
            acknowledged: 0,
            committed: view,
            broken: None,
        }
    }

    pub(super) fn member(&self, id: MemberId) -> &Member {
        &self.members[id.index()]
    }

    pub(super) fn member_mut(&mut self, id: MemberId) -> &mut Member {
        &mut self.members[id.index()]
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = MemberId> + use<> {
        (0..self.count).filter_map(MemberId::new)
    }

    /// Whether a member has what was acknowledged, or lost it with its cache and will say so.
    pub(super) fn has_or_tells(&self, id: MemberId) -> bool {
        let member = self.member(id);
        member.data >= self.acknowledged || self.power > 0 && member.tables_lost && member.intent
    }

    /// What Clean members differ in that have just begun to work for a client. Its own unfinished write is sent again.
    pub(super) fn disagreement(&self, view: Known, own: Option<u8>) -> Option<&'static str> {
        let clean = || view.clean().iter().map(|m| self.member(m));
        let pairs = || clean().flat_map(|a| clean().map(move |b| (a, b)));
        let is_own = |data: u8| Some(data) == own;
        let differ = |a: &Member, b: &Member| a.data != b.data && !is_own(a.data) && !is_own(b.data);
        if pairs().any(|(a, b)| differ(a, b)) {
            return Some("two Clean members differ after an attach");
        }
        let knows = |a: &Member| a.dirty.union(a.struck_off);
        let is_less = |(a, b): (&Member, &Member)| !b.dirty.intersection(view.out()).is_subset(knows(a));
        pairs()
            .any(is_less)
            .then_some("a Clean member has not on record what another has that an absent one misses")
    }

    pub(super) fn is_linked(&self, client: u8, member: MemberId) -> bool {
        self.member(member).is_up && !self.clients[usize::from(client)].cut.contains(member)
    }

    /// Whether the client's session at the member stands.
    pub(super) fn is_attached(&self, client: u8, member: MemberId) -> bool {
        self.is_linked(client, member) && self.member(member).holder == Some(client)
    }

    /// Starts over: every connection is closed. The write is to be sent again.
    pub(super) fn gather(&mut self, client: u8) {
        let c = &mut self.clients[usize::from(client)];
        c.phase = Phase::Gathering;
        if let Some((_, done)) = &mut c.write {
            *done = MemberSet::EMPTY;
        }
        self.forget(client);
    }

    pub(super) fn end(&mut self, client: u8) {
        self.clients[usize::from(client)].phase = Phase::Over;
        self.forget(client);
    }

    fn forget(&mut self, client: u8) {
        for member in self.members.iter_mut().filter(|m| m.holder == Some(client)) {
            member.holder = None;
        }
    }

    /// Wipes what nothing can depend on any more, so that states that differ in it only become one: all that a client knew
    /// that is over; the view of one that will take another before it looks at it; answers to a write of members that are
    /// not active.
    pub(super) fn tidy(&mut self) {
        let initial = Self::new(self.count).clients[0];
        for client in &mut self.clients {
            match client.phase {
                Phase::Over => *client = Client { phase: Phase::Over, ..initial },
                Phase::Gathering | Phase::Attaching { .. } => client.view = initial.view,
                Phase::Active => {
                    let active = client.view.active();
                    client.write = client.write.map(|(value, done)| (value, done.intersection(active)));
                }
                Phase::Changing { .. } => {}
            }
        }
    }

    pub(super) fn renamed(&self, names: Names) -> Self {
        let mut new = *self;
        for (i, member) in self.members.iter().enumerate() {
            new.members[names[i]] = Member {
                view: member.view.renamed(names),
                durable: member.durable.renamed(names),
                dirty: renamed(member.dirty, names),
                struck_off: renamed(member.struck_off, names),
                ..*member
            };
        }
        for client in &mut new.clients {
            client.view = client.view.renamed(names);
            client.write = client.write.map(|(value, done)| (value, renamed(done, names)));
            client.cut = renamed(client.cut, names);
            match &mut client.phase {
                Phase::Attaching { waiting, replied } => {
                    (*waiting, *replied) = (renamed(*waiting, names), renamed(*replied, names));
                }
                Phase::Changing { next, additions, waiting, .. } => {
                    (*next, *additions) = (next.renamed(names), renamed(*additions, names));
                    *waiting = renamed(*waiting, names);
                }
                Phase::Gathering | Phase::Active | Phase::Over => {}
            }
        }
        new.committed = self.committed.renamed(names);
        new
    }

    /// Something about a member that does not depend on names; members for which it differs have an order by it.
    fn mark(&self, index: usize) -> u64 {
        let m = &self.members[index];
        let bit = |set: MemberSet| u64::from(set.0 >> index & 1);
        let mut mark = m.epoch.0;
        let mut add = |value: u64, bits: u32| mark = mark << bits | value;
        add((m.view.0 >> STATE_BITS).into(), 9);
        add((m.view.0 >> (2 * index) & 3).into(), 2);
        add(u64::from(m.is_up) << 1 | u64::from(m.tables_lost), 2);
        add(m.holder.map_or(0, |h| u64::from(h) + 1), 2);
        add((m.data << 2 | m.flushed).into(), 4);
        add(u64::from(m.intent) << 1 | u64::from(m.kept), 2);
        add(bit(m.dirty) << 2 | u64::from(m.dirty.len()), 3);
        for client in &self.clients {
            add(bit(client.cut), 1);
            add(client.write.map_or(0, |(_, done)| bit(done)), 1);
            let (one, other) = match client.phase {
                Phase::Attaching { waiting, replied } => (waiting, replied),
                Phase::Changing { additions, waiting, .. } => (waiting, additions),
                _ => (MemberSet::EMPTY, MemberSet::EMPTY),
            };
            add(bit(one) << 1 | bit(other), 2);
        }
        mark
    }
}

impl Hash for Nameless {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        if !self.is_nameless {
            return self.state.hash(hasher);
        }
        let marks: [u64; MAX_MEMBERS] = std::array::from_fn(|i| self.state.mark(i));
        let is_ordered = |names: &&Names| {
            let count = usize::from(self.state.count);
            (0..count).all(|i| (0..count).all(|k| names[i] > names[k] || marks[i] <= marks[k]))
        };
        // Of members with one mark each order is tried, and the least fingerprint is that of all of them.
        let print = |names: &Names| {
            let mut hasher = DefaultHasher::new();
            self.state.renamed(*names).hash(&mut hasher);
            hasher.finish()
        };
        renamings(self.state.count).iter().filter(is_ordered).map(print).min().hash(hasher);
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, m) in self.members.iter().take(self.count.into()).enumerate() {
            writeln!(
                f,
                "member {i}: {} epoch {} data {} flushed {} dirty {} without {} intent {} {} tables lost {} holder {:?} up {}",
                *m.view,
                m.epoch,
                m.data,
                m.flushed,
                m.dirty,
                m.struck_off,
                m.intent,
                m.kept,
                m.tables_lost,
                m.holder,
                m.is_up
            )?;
        }
        for (i, c) in self.clients.iter().enumerate() {
            writeln!(
                f,
                "client {i}: {} epoch {} own {:?} write {:?} cut {} {:?}",
                *c.view,
                c.epoch,
                c.own_epochs.list(),
                c.write,
                c.cut,
                c.phase
            )?;
        }
        write!(f, "in force: {}, acknowledged {}, {:?}", *self.committed, self.acknowledged, self.broken)
    }
}
