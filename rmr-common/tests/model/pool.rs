//! The pool as the model checker sees it: members, two clients, and everything that can happen next. Views step by the
//! real [`View`], and clients decide by the real [`recovery`].

use rmr_common::client::recovery::{self, UnheardLosses};
use rmr_common::pool::{Epoch, MemberId, MemberSet, MemberState, StoreId, View, ViewStep};
use stateright::{Model, Property};

/// A mistake that the checker has to find.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Bug {
    None,
    /// The recovery rule is content with one Clean member.
    OneCleanMemberWillDo,
    /// The highest number wins, whoever made the view.
    OrderByNumber,
    /// A member lets another client in under the epoch that it has.
    EqualEpoch,
    /// A member answers a view that a crash can take back.
    ViewNotDurable,
    /// A view counts as committed with its first answer.
    CommitWithoutAll,
    /// A promotion that was not committed is kept when a member is lost.
    PromotionKept,
    /// The same, when the next client attaches.
    PromotionKeptByAttach,
    /// What a lost member missed is not recorded with the view.
    NothingRecorded,
    /// A member that has not heard of a loss stays Clean beside one that has, when the next client attaches.
    DeafStaysClean,
}

/// How far the checker goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) members: u8,
    pub(super) writes: u8,
    /// Crashes of members, and of the first client.
    pub(super) crashes: u8,
    pub(super) cuts: u8,
    /// Members that lose power. Above zero all stores are write-back ones, flushed only when a client attaches.
    pub(super) power: u8,
    pub(super) epoch: u64,
    /// Views that are more than so many steps from the first are not explored further.
    pub(super) view: u64,
    /// Whether the second client displaces a live one.
    pub(super) takeover: bool,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Member {
    is_up: bool,
    view: View,
    /// The view that a crash leaves; another one than `view` only with [`Bug::ViewNotDurable`].
    durable: View,
    epoch: Epoch,
    /// The attached client. Lost with the connection, and in a crash.
    holder: Option<usize>,
    /// The slot table is lost, and no view of a later attachment has dealt with that.
    tables_lost: bool,
    /// The newest write here. Writes are numbered in the order in which they were submitted.
    data: u8,
    /// What of it a loss of power leaves.
    flushed: u8,
    /// Whether a write was begun here that is not known complete everywhere.
    intent: bool,
    /// Whether the intent is on disk: until the write is known complete, and flushed.
    kept: bool,
    /// The members that missed something by this one's record; itself, while it is stale.
    dirty: MemberSet,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Phase {
    Gathering,
    Attaching { waiting: MemberSet, replied: MemberSet },
    Changing { next: View, additions: MemberSet, waiting: MemberSet, attach: bool },
    Active,
    Over,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Client {
    phase: Phase,
    epoch: Epoch,
    own_epochs: Vec<Epoch>,
    /// The committed view; before that the one that it attaches from.
    view: View,
    /// A write that is not complete, and the members that have carried it out under the present view.
    write: Option<(u8, MemberSet)>,
    /// Writes have completed in this attachment, and are not flushed.
    is_unflushed: bool,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct State {
    members: Vec<Member>,
    clients: Vec<Client>,
    /// Connections that cannot be made.
    cut: Vec<(usize, MemberId)>,
    writes: u8,
    crashes: u8,
    cuts: u8,
    power: u8,
    /// The newest write that was acknowledged.
    acknowledged: u8,
    /// The latest view that was committed.
    committed: View,
    /// A rule that the last action broke.
    broken: Option<&'static str>,
    reached: Reached,
}

/// What a run has come to: a model in which nothing happens proves nothing.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Debug)]
pub(super) struct Reached {
    lost: bool,
    promoted: bool,
    displaced: bool,
    attached_after_crash: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Action {
    Begin(usize),
    Attach(usize, MemberId),
    View(usize, MemberId),
    Lose(usize, MemberId),
    Submit(usize),
    Write(usize, MemberId),
    Rejoin(usize, MemberId),
    Pull(MemberId),
    Promote(usize, MemberId),
    Crash(MemberId),
    PowerCut(MemberId),
    Start(MemberId),
    ClientCrash,
    Cut(usize, MemberId),
    Heal(usize, MemberId),
}

pub(super) struct Pool {
    pub(super) limits: Limits,
    pub(super) bug: Bug,
}

impl Member {
    /// Whether by what it tells it may have a write that others have not, or the reverse.
    const fn is_open(&self) -> bool {
        if self.tables_lost { self.kept } else { self.intent }
    }
}

impl State {
    fn member(&self, id: MemberId) -> &Member {
        &self.members[id.index()]
    }

    fn member_mut(&mut self, id: MemberId) -> &mut Member {
        &mut self.members[id.index()]
    }

    /// Whether a member has what was acknowledged, or lost it with its cache and will say so.
    fn has_or_tells(&self, id: MemberId) -> bool {
        let member = self.member(id);
        member.data >= self.acknowledged || self.power > 0 && member.tables_lost && member.kept
    }

    fn is_linked(&self, client: usize, member: MemberId) -> bool {
        self.member(member).is_up && !self.cut.contains(&(client, member))
    }

    /// Whether the client's session at the member stands.
    fn is_attached(&self, client: usize, member: MemberId) -> bool {
        self.is_linked(client, member) && self.member(member).holder == Some(client)
    }

    /// Starts over: every connection is closed. The write is to be sent again.
    fn gather(&mut self, client: usize) {
        self.clients[client].phase = Phase::Gathering;
        if let Some((_, done)) = &mut self.clients[client].write {
            *done = MemberSet::EMPTY;
        }
        self.forget(client);
    }

    fn end(&mut self, client: usize) {
        self.clients[client].phase = Phase::Over;
        self.clients[client].write = None;
        self.forget(client);
    }

    fn forget(&mut self, client: usize) {
        for member in self.members.iter_mut().filter(|m| m.holder == Some(client)) {
            member.holder = None;
        }
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, m) in self.members.iter().enumerate() {
            writeln!(
                f,
                "member {i}: {} epoch {} data {} flushed {} dirty {} intent {} {} tables lost {} holder {:?} up {}",
                m.view,
                m.epoch,
                m.data,
                m.flushed,
                m.dirty,
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
                "client {i}: {} epoch {} own {:?} write {:?} {:?}",
                c.view, c.epoch, c.own_epochs, c.write, c.phase
            )?;
        }
        write!(f, "in force: {}, acknowledged {}, {:?}", self.committed, self.acknowledged, self.broken)
    }
}

fn ids(count: u8) -> impl Iterator<Item = MemberId> {
    (0..count).filter_map(MemberId::new)
}

impl Pool {
    fn may_attach(&self, latest: &View, reachable: MemberSet) -> bool {
        match self.bug {
            Bug::OneCleanMemberWillDo => !latest.clean().intersection(reachable).is_empty(),
            _ => recovery::may_attach(latest, reachable),
        }
    }

    fn latest<'a>(&self, views: impl Iterator<Item = &'a View>) -> Option<View> {
        match self.bug {
            Bug::OrderByNumber => views.max_by_key(|v| v.number).cloned(),
            _ => recovery::latest(views, |v| v).cloned(),
        }
    }

    /// Collects the views of the members that answer, and proposes an epoch if the recovery rule allows it.
    fn begin(&self, s: &mut State, c: usize) -> Option<()> {
        let ready: MemberSet = ids(self.limits.members).filter(|&m| s.is_linked(c, m)).collect();
        let latest = self.latest(ready.iter().map(|m| &s.member(m).view))?;
        if recovery::is_displaced(&s.clients[c].own_epochs, latest.epoch) {
            s.end(c);
            return Some(());
        }
        if !self.may_attach(&latest, ready) {
            return None;
        }
        let highest = ready.iter().map(|m| s.member(m).epoch).max()?;
        let client = &mut s.clients[c];
        client.epoch = recovery::proposed_epoch(highest, client.epoch);
        client.phase =
            Phase::Attaching { waiting: latest.active().intersection(ready), replied: MemberSet::EMPTY };
        client.view = latest;
        Some(())
    }

    fn attach(&self, s: &mut State, c: usize, m: MemberId) -> Option<()> {
        let Phase::Attaching { mut waiting, mut replied } = s.clients[c].phase.clone() else { return None };
        if !waiting.contains(m) || !s.is_linked(c, m) {
            return None;
        }
        let epoch = s.clients[c].epoch;
        let member = s.member(m);
        let is_held = member.holder.is_some_and(|h| h != c);
        // The second client may take over; the first was there before.
        if is_held && !(self.limits.takeover && c == 1) {
            s.end(c);
            return Some(());
        }
        let is_stale = if self.bug == Bug::EqualEpoch { epoch < member.epoch } else { epoch <= member.epoch };
        if is_stale {
            s.gather(c);
            return Some(());
        }
        s.reached.displaced |= is_held;
        let member = s.member_mut(m);
        (member.epoch, member.holder) = (epoch, Some(c));
        member.flushed = member.data;
        waiting.remove(m);
        replied.insert(m);
        s.clients[c].phase = Phase::Attaching { waiting, replied };
        if waiting.is_empty() {
            self.attached(s, c, replied);
        }
        Some(())
    }

    /// Every member that was asked has accepted the epoch.
    fn attached(&self, s: &mut State, c: usize, attached: MemberSet) {
        let Some(latest) = self.latest(attached.iter().map(|m| &s.member(m).view)) else { return };
        if recovery::is_displaced(&s.clients[c].own_epochs, latest.epoch) {
            return s.end(c);
        }
        if !self.may_attach(&latest, attached) {
            return s.gather(c);
        }
        let views: Vec<_> = attached.iter().map(|m| (m, s.member(m).view.clone())).collect();
        let base = self.base(&latest, &views);
        let reference = base.clean().intersection(attached).iter().max_by_key(|&m| {
            let member = s.member(m);
            (!member.tables_lost, member.data)
        });
        let Some(reference) = reference else { return s.gather(c) };
        let source = s.member(reference).clone();
        let own = s.clients[c].write.map(|(write, _)| write);
        // By slot tables where they are left; else by the intent map, unless the write is one that is sent again.
        let differs = |m: MemberId| {
            let member = s.member(m);
            let is_open = |v: u8| Some(v) != own;
            if member.tables_lost || source.tables_lost {
                member.kept || source.kept
            } else {
                member.data != source.data && (is_open(member.data) || is_open(source.data))
            }
        };
        let others = attached.without(MemberSet::only(reference));
        let stale: MemberSet = others.iter().filter(|&m| differs(m)).collect();
        let behind = views.iter().filter(|(_, v)| *v != base).map(|(m, _)| *m).collect();
        let mut lost = recovery::lost_in_attach(&base, attached, stale, behind);
        let is_first = s.clients[c].own_epochs.is_empty();
        let mut unheard = MemberSet::EMPTY;
        if is_first && self.bug != Bug::DeafStaysClean {
            let views: Vec<_> = views.iter().map(|(m, v)| (*m, v)).collect();
            match recovery::unheard_losses(&base, lost, &views) {
                UnheardLosses::None => {}
                UnheardLosses::By(deaf) => lost = lost.union(deaf),
                UnheardLosses::ByAll(members) => unheard = members,
            }
        }
        let epoch = s.clients[c].epoch;
        let Ok(next) = base.step(ViewStep::Attach(lost), epoch) else { return s.gather(c) };
        // What those who are not there miss of writes in flight goes on record too.
        let is_open = attached.iter().any(|m| s.member(m).is_open()) || s.clients[c].is_unflushed;
        let absent = if is_open || own.is_some() { base.out().union(lost) } else { MemberSet::EMPTY };
        if !is_first {
            s.clients[c].own_epochs.push(epoch);
        }
        s.clients[c].view = base;
        self.change(s, c, next, stale.union(absent).union(unheard), true);
    }

    /// The view from which a new attachment goes on.
    fn base(&self, latest: &View, views: &[(MemberId, View)]) -> View {
        match self.bug {
            Bug::PromotionKeptByAttach => latest.clone(),
            _ => recovery::base_of_attach(latest, views.iter().map(|(m, v)| (*m, v))),
        }
    }

    fn change(&self, s: &mut State, c: usize, next: View, additions: MemberSet, attach: bool) {
        let additions = if self.bug == Bug::NothingRecorded { MemberSet::EMPTY } else { additions };
        let waiting = next.active();
        s.clients[c].phase = Phase::Changing { next, additions, waiting, attach };
    }

    /// A member makes a view durable and answers.
    fn view(&self, s: &mut State, c: usize, m: MemberId) -> Option<()> {
        let Phase::Changing { next, additions, mut waiting, attach } = s.clients[c].phase.clone() else {
            return None;
        };
        if !waiting.contains(m) || !s.is_linked(c, m) {
            return None;
        }
        let member = s.member(m).clone();
        if member.epoch > s.clients[c].epoch {
            s.end(c);
            return Some(());
        }
        if member.holder != Some(c) {
            return None; // The connection is gone; the client is about to learn of it.
        }
        if !member.view.may_precede(&next) {
            s.broken = Some("a member refused a view of the attached client");
            return Some(());
        }
        let mut dirty = member.dirty;
        let was = member.view.state(m);
        let is_in_step = next.number == member.view.number.next() && next.epoch == member.view.epoch;
        let is_syncing = next.state(m) == Some(MemberState::Syncing);
        if is_syncing && !(was == Some(MemberState::Syncing) && (is_in_step || attach)) {
            // It takes the maps over from a Clean member.
            let source = s.clients[c].view.clean().iter().find(|&k| s.is_attached(c, k))?;
            dirty = s.member(source).dirty;
        }
        dirty = dirty.union(additions).without(next.clean());
        let member = s.member_mut(m);
        member.dirty = dirty;
        member.view = next.clone();
        member.tables_lost = false;
        if attach {
            (member.intent, member.kept) = (false, false);
        }
        if self.bug != Bug::ViewNotDurable {
            member.durable = next.clone();
        }
        waiting.remove(m);
        let is_committed = waiting.is_empty() || self.bug == Bug::CommitWithoutAll;
        s.clients[c].phase = Phase::Changing { next, additions, waiting, attach };
        if is_committed {
            self.commit(s, c);
        }
        Some(())
    }

    fn commit(&self, s: &mut State, c: usize) {
        let Phase::Changing { next, attach, .. } = std::mem::replace(&mut s.clients[c].phase, Phase::Active)
        else {
            return;
        };
        // News that is late: another client has attached since, without the member that answered last.
        let is_late = next.order() < s.committed.order();
        if next.active().iter().any(|m| s.member(m).durable.order() < next.order()) {
            s.broken = Some("a view was committed that is not durable on all its active members");
        }
        let client = &mut s.clients[c];
        if next.order() == s.committed.order() {
            s.broken = Some("two views of one epoch and number were committed");
        }
        if !is_late && next.clean().intersection(s.committed.clean()).is_empty() {
            s.broken = Some("a view was committed in which nobody is Clean who was so before");
        }
        s.reached.promoted |= !next.clean().is_subset(s.committed.clean());
        s.reached.lost |= !next.out().is_empty();
        s.reached.attached_after_crash |= attach && s.crashes > 0;
        client.own_epochs = vec![client.epoch];
        client.is_unflushed &= !attach;
        client.view = next.clone();
        if !is_late {
            s.committed = next;
        }
        if attach && let Some((_, done)) = &mut client.write {
            *done = MemberSet::EMPTY;
        }
        self.try_complete(s, c);
    }

    /// The client learns that a connection is gone.
    fn lose(&self, s: &mut State, c: usize, m: MemberId) -> Option<()> {
        if s.is_attached(c, m) {
            return None;
        }
        let client = &s.clients[c];
        let base = match &client.phase {
            Phase::Gathering | Phase::Over => return None,
            Phase::Attaching { waiting, replied } => {
                let is_asked = waiting.contains(m) && !s.is_linked(c, m) || replied.contains(m);
                return is_asked.then(|| s.gather(c));
            }
            Phase::Changing { next, attach: true, .. } => {
                return next.active().contains(m).then(|| s.gather(c));
            }
            Phase::Changing { next, .. } if self.bug == Bug::PromotionKept => next.clone(),
            Phase::Changing { next, .. } => next.without_promotions(client.view.clean()),
            Phase::Active => client.view.clone(),
        };
        if !base.active().contains(m) {
            return None;
        }
        match base.step(ViewStep::Lose(MemberSet::only(m)), client.epoch) {
            Ok(next) => {
                let missed = if client.write.is_some() { next.out() } else { MemberSet::EMPTY };
                // What an earlier change that was given up had told some members only.
                let earlier = match &client.phase {
                    Phase::Changing { additions, .. } => *additions,
                    _ => MemberSet::EMPTY,
                };
                let unflushed = if client.is_unflushed { MemberSet::only(m) } else { MemberSet::EMPTY };
                self.change(s, c, next, missed.union(earlier).union(unflushed), false);
            }
            Err(_) => s.gather(c),
        }
        Some(())
    }

    fn submit(&self, s: &mut State, c: usize) -> Option<()> {
        let client = &mut s.clients[c];
        if client.phase != Phase::Active || client.write.is_some() || s.writes >= self.limits.writes {
            return None;
        }
        s.writes += 1;
        client.write = Some((s.writes, MemberSet::EMPTY));
        Some(())
    }

    fn write(&self, s: &mut State, c: usize, m: MemberId) -> Option<()> {
        let client = &s.clients[c];
        let (value, mut done) = client.write?;
        let is_due = client.phase == Phase::Active && client.view.active().contains(m) && !done.contains(m);
        if !is_due || !s.is_linked(c, m) {
            return None;
        }
        let member = s.member(m);
        if member.epoch > client.epoch {
            s.end(c);
            return Some(());
        }
        if member.holder != Some(c) || member.view != client.view {
            return None;
        }
        let missing = client.view.out();
        if s.committed.epoch > client.epoch && s.committed.active().contains(m) {
            s.broken = Some("a member of the view in force took a write of a client that was displaced");
        }
        let member = s.member_mut(m);
        member.data = value;
        if self.limits.power == 0 {
            member.flushed = value;
        }
        (member.intent, member.kept) = (true, true);
        member.dirty = member.dirty.union(missing).without(MemberSet::only(m));
        done.insert(m);
        s.clients[c].write = Some((value, done));
        self.try_complete(s, c);
        Some(())
    }

    /// A write is complete when every active member of the committed view has it.
    fn try_complete(&self, s: &mut State, c: usize) {
        let client = &mut s.clients[c];
        let Some((value, done)) = client.write else { return };
        if client.phase != Phase::Active || !client.view.active().is_subset(done) {
            return;
        }
        client.write = None;
        client.is_unflushed = self.limits.power > 0;
        s.acknowledged = s.acknowledged.max(value);
        let view = client.view.clone();
        // The watermark passes it.
        for member in view.active().iter() {
            let member = s.member_mut(member);
            member.intent = false;
            // One that crashed meanwhile does not hear of it.
            member.kept &= member.flushed != member.data || member.tables_lost;
        }
    }

    /// A member that is Out is attached under the same epoch, and made Syncing behind the barrier.
    fn rejoin(&self, s: &mut State, c: usize, m: MemberId) -> Option<()> {
        let client = &s.clients[c];
        let is_due = client.phase == Phase::Active && client.view.out().contains(m) && client.write.is_none();
        if !is_due || !s.is_linked(c, m) {
            return None;
        }
        let (epoch, view) = (client.epoch, client.view.clone());
        let member = s.member(m);
        if member.epoch > epoch {
            s.gather(c);
            return Some(());
        }
        if member.epoch == epoch && member.holder.is_some_and(|h| h != c) {
            return None;
        }
        let is_left_behind = member.epoch < epoch && member.is_open();
        let next = view.step(ViewStep::Rejoin(m), epoch).ok()?;
        let member = s.member_mut(m);
        (member.epoch, member.holder) = (epoch, Some(c));
        member.flushed = member.data;
        let additions = if is_left_behind { MemberSet::only(m) } else { MemberSet::EMPTY };
        self.change(s, c, next, additions, false);
        Some(())
    }

    /// A Syncing member takes what it misses from a Clean one of the same attachment.
    fn pull(&self, s: &mut State, m: MemberId) -> Option<()> {
        let member = s.member(m);
        let is_due = member.is_up
            && member.view.state(m) == Some(MemberState::Syncing)
            && member.dirty.contains(m)
            && member.holder.is_some();
        if !is_due {
            return None;
        }
        let may_serve = |k: &MemberId| {
            let source = s.member(*k);
            source.is_up
                && source.epoch == member.epoch
                && source.view.order() >= member.view.order()
                && source.view.state(*k) == Some(MemberState::Clean)
        };
        let source = member.view.clean().iter().find(may_serve)?;
        let data = s.member(source).data;
        let member = s.member_mut(m);
        // It is flushed before it is reported.
        (member.data, member.flushed) = (data, data);
        member.dirty.remove(m);
        Some(())
    }

    fn promote(&self, s: &mut State, c: usize, m: MemberId) -> Option<()> {
        let client = &s.clients[c];
        let is_due = client.phase == Phase::Active
            && client.view.state(m) == Some(MemberState::Syncing)
            && s.is_attached(c, m)
            && s.member(m).view == client.view
            && !s.member(m).dirty.contains(m);
        if !is_due {
            return None;
        }
        let next = client.view.step(ViewStep::Promote(m), client.epoch).ok()?;
        self.change(s, c, next, MemberSet::EMPTY, false);
        Some(())
    }

    fn crash(&self, s: &mut State, m: MemberId) -> Option<()> {
        if s.crashes >= self.limits.crashes || !s.member(m).is_up {
            return None;
        }
        s.crashes += 1;
        let member = s.member_mut(m);
        member.is_up = false;
        member.holder = None;
        member.tables_lost = true;
        member.view = member.durable.clone();
        Some(())
    }

    /// A member crashes, and what was not flushed is gone. If every Clean member has lost a completed write so, it is lost.
    fn power_cut(&self, s: &mut State, m: MemberId) -> Option<()> {
        if s.power >= self.limits.power || !s.member(m).is_up {
            return None;
        }
        s.power += 1;
        let member = s.member_mut(m);
        member.is_up = false;
        member.holder = None;
        member.tables_lost = true;
        member.view = member.durable.clone();
        member.data = member.flushed;
        let best = s.committed.clean().iter().map(|m| s.member(m).data).max();
        s.acknowledged = s.acknowledged.min(best.unwrap_or(0));
        Some(())
    }

    fn client_crash(&self, s: &mut State) -> Option<()> {
        if s.crashes >= self.limits.crashes || s.clients[0].phase == Phase::Over {
            return None;
        }
        s.crashes += 1;
        s.end(0);
        Some(())
    }

    fn cut(&self, s: &mut State, c: usize, m: MemberId) -> Option<()> {
        if s.cuts >= self.limits.cuts || s.cut.contains(&(c, m)) {
            return None;
        }
        s.cuts += 1;
        s.cut.push((c, m));
        s.cut.sort_unstable();
        Some(())
    }

    /// A link is made anew only after both ends know that the old one is gone.
    fn heal(&self, s: &mut State, c: usize, m: MemberId) -> Option<()> {
        if !s.cut.contains(&(c, m)) {
            return None;
        }
        let is_used = match &s.clients[c].phase {
            Phase::Gathering | Phase::Over => false,
            Phase::Attaching { waiting, replied } => waiting.union(*replied).contains(m),
            Phase::Changing { next, .. } => next.active().union(s.clients[c].view.active()).contains(m),
            Phase::Active => s.clients[c].view.active().contains(m),
        };
        if is_used {
            return None;
        }
        s.cut.retain(|&cut| cut != (c, m));
        let member = s.member_mut(m);
        member.holder = member.holder.filter(|&h| h != c);
        Some(())
    }
}

impl Model for Pool {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let view =
            View::initial(ids(self.limits.members).map(|m| (m, StoreId::from_bytes([m.as_u8() + 1; 16]))));
        let member = Member {
            is_up: true,
            view: view.clone(),
            durable: view.clone(),
            epoch: Epoch(0),
            holder: None,
            tables_lost: false,
            data: 0,
            flushed: 0,
            intent: false,
            kept: false,
            dirty: MemberSet::EMPTY,
        };
        let client = Client {
            phase: Phase::Gathering,
            epoch: Epoch(0),
            own_epochs: Vec::new(),
            view: view.clone(),
            write: None,
            is_unflushed: false,
        };
        vec![State {
            members: vec![member; self.limits.members.into()],
            clients: vec![client; 2],
            cut: Vec::new(),
            writes: 0,
            crashes: 0,
            cuts: 0,
            power: 0,
            acknowledged: 0,
            committed: view,
            broken: None,
            reached: Reached::default(),
        }]
    }

    fn actions(&self, _: &State, actions: &mut Vec<Action>) {
        for m in ids(self.limits.members) {
            actions.extend([Action::Pull(m), Action::Crash(m), Action::PowerCut(m), Action::Start(m)]);
            for c in 0..2 {
                actions.extend([
                    Action::Attach(c, m),
                    Action::View(c, m),
                    Action::Lose(c, m),
                    Action::Write(c, m),
                ]);
                actions.extend([
                    Action::Rejoin(c, m),
                    Action::Promote(c, m),
                    Action::Cut(c, m),
                    Action::Heal(c, m),
                ]);
            }
        }
        actions.extend([
            Action::Begin(0),
            Action::Begin(1),
            Action::Submit(0),
            Action::Submit(1),
            Action::ClientCrash,
        ]);
    }

    fn next_state(&self, before: &State, action: Action) -> Option<State> {
        let mut state = before.clone();
        let s = &mut state;
        match action {
            Action::Begin(c) if s.clients[c].phase == Phase::Gathering => self.begin(s, c),
            Action::Begin(_) => None,
            Action::Attach(c, m) => self.attach(s, c, m),
            Action::View(c, m) => self.view(s, c, m),
            Action::Lose(c, m) => self.lose(s, c, m),
            Action::Submit(c) => self.submit(s, c),
            Action::Write(c, m) => self.write(s, c, m),
            Action::Rejoin(c, m) => self.rejoin(s, c, m),
            Action::Pull(m) => self.pull(s, m),
            Action::Promote(c, m) => self.promote(s, c, m),
            Action::Crash(m) => self.crash(s, m),
            Action::PowerCut(m) => self.power_cut(s, m),
            Action::Start(m) if !s.member(m).is_up => {
                s.member_mut(m).is_up = true;
                Some(())
            }
            Action::Start(_) => None,
            Action::ClientCrash => self.client_crash(s),
            Action::Cut(c, m) => self.cut(s, c, m),
            Action::Heal(c, m) => self.heal(s, c, m),
        }?;
        Some(state)
    }

    fn within_boundary(&self, state: &State) -> bool {
        let epoch = state.members.iter().map(|m| m.epoch.0).max().unwrap_or(0);
        let number = state.members.iter().map(|m| m.view.number.0).max().unwrap_or(0);
        epoch <= self.limits.epoch && number <= self.limits.view && state.broken.is_none()
            || state.broken.is_some()
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("one client at a time, and never back to an older view", |_, s: &State| {
                s.broken.is_none()
            }),
            Property::always(
                "a completed write is on every Clean member of the view in force",
                |_, s: &State| s.committed.clean().iter().all(|m| s.has_or_tells(m)),
            ),
            Property::always(
                "what an absent member misses is on record with each active one",
                |_, s: &State| {
                    let missing = |m: &MemberId| s.member(*m).data < s.acknowledged;
                    let is_on_record = |m| s.committed.active().iter().all(|k| s.member(k).dirty.contains(m));
                    s.committed.out().iter().filter(missing).all(is_on_record)
                },
            ),
            Property::always("whoever may attach finds every completed write", |pool: &Pool, s: &State| {
                // With any set of members that the rule is content with, and no client in the middle of an attach.
                let sets = 1u8..1 << pool.limits.members;
                let set = |bits: u8| ids(pool.limits.members).filter(move |m| bits & (1 << m.as_u8()) != 0);
                { sets }.all(|bits| {
                    let reachable: MemberSet = set(bits).collect();
                    let Some(latest) = pool.latest(set(bits).map(|m| &s.member(m).durable)) else {
                        return true;
                    };
                    !pool.may_attach(&latest, reachable) || latest.clean().iter().all(|m| s.has_or_tells(m))
                })
            }),
            Property::sometimes("a write completes while a member is Out", |_, s: &State| {
                s.acknowledged > 0 && !s.committed.out().is_empty()
            }),
            Property::sometimes("a member that was lost is Clean again", |_, s: &State| {
                s.reached.lost && s.reached.promoted
            }),
            Property::sometimes("a client attaches after a crash", |_, s: &State| {
                s.reached.attached_after_crash
            }),
            Property::sometimes("both clients were attached, one after the other", |_, s: &State| {
                s.clients.iter().all(|c| !c.own_epochs.is_empty())
            }),
        ]
    }
}
