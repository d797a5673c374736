//! The pool as the model checker sees it: members, two clients, and everything that can happen next. Views step by the
//! real [`View`], and clients decide by the real [`recovery`].

use rmr_common::client::recovery::{self, UnheardLosses};
use rmr_common::pool::{MemberId, MemberSet, MemberState, View, ViewStep};

use crate::rules::Reached;
use crate::state::{Client, Epochs, Known, Phase, State};

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
    /// A member that was started anew hands out data before a client has attached to it.
    SourceStartedAnew,
}

/// How far the checker goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) members: u8,
    pub(super) writes: u8,
    /// Crashes of members, and of the first client.
    pub(super) crashes: u8,
    /// Links between a client and a member that are cut.
    pub(super) cuts: u8,
    /// Members that lose power. Above zero all stores are write-back ones, flushed only when a client attaches.
    pub(super) power: u8,
    pub(super) epoch: u64,
    /// Views that are more than so many steps from the first are not explored further.
    pub(super) view: u64,
    /// Whether the second client displaces a live one.
    pub(super) takeover: bool,
}

/// What happens next: at which client (0 or 1), and with which member. Where a last member is named, it is the one that is
/// taken of several that would do: as the reference of an attachment, or to take maps or data from. It is the same as the
/// first where there is nothing to choose.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Action {
    Begin(u8),
    Attach(u8, MemberId, MemberId),
    View(u8, MemberId, MemberId),
    Lose(u8, MemberId),
    Submit(u8),
    Write(u8, MemberId),
    Rejoin(u8, MemberId),
    Pull(MemberId, MemberId),
    Promote(u8, MemberId),
    Crash(MemberId),
    PowerCut(MemberId),
    Start(MemberId),
    ClientCrash,
    Cut(u8, MemberId),
    Heal(u8, MemberId),
}

pub(super) struct Pool {
    pub(super) limits: Limits,
    pub(super) bug: Bug,
    pub(super) reached: Reached,
    /// Whether states that differ in the names of members only are one.
    pub(super) is_nameless: bool,
}

impl Pool {
    pub(super) fn may_attach(&self, latest: &View, reachable: MemberSet) -> bool {
        match self.bug {
            Bug::OneCleanMemberWillDo => !latest.clean().intersection(reachable).is_empty(),
            _ => recovery::may_attach(latest, reachable),
        }
    }

    pub(super) fn latest(&self, views: impl Iterator<Item = Known>) -> Option<Known> {
        match self.bug {
            Bug::OrderByNumber => views.max_by_key(|v| v.number),
            _ => recovery::latest(views, |v| v.get()),
        }
    }

    /// What the action leads to, or `None` where it cannot happen.
    pub(super) fn after(&self, before: &State, action: Action) -> Option<State> {
        let mut state = *before;
        let s = &mut state;
        match action {
            Action::Begin(c) => self.begin(s, c),
            Action::Attach(c, m, reference) => self.attach(s, c, m, reference),
            Action::View(c, m, source) => self.view(s, c, m, source),
            Action::Lose(c, m) => self.lose(s, c, m),
            Action::Submit(c) => self.submit(s, c),
            Action::Write(c, m) => self.write(s, c, m),
            Action::Rejoin(c, m) => self.rejoin(s, c, m),
            Action::Pull(m, source) => self.pull(s, m, source),
            Action::Promote(c, m) => self.promote(s, c, m),
            Action::Crash(m) => self.crash(s, m),
            Action::PowerCut(m) => self.power_cut(s, m),
            Action::Start(m) => start(s, m),
            Action::ClientCrash => self.client_crash(s),
            Action::Cut(c, m) => self.cut(s, c, m),
            Action::Heal(c, m) => heal(s, c, m),
        }?;
        s.tidy();
        Some(state)
    }

    /// Collects the views of the members that answer, and proposes an epoch if the recovery rule allows it.
    fn begin(&self, s: &mut State, c: u8) -> Option<()> {
        if client(s, c).phase != Phase::Gathering {
            return None;
        }
        let ready: MemberSet = s.ids().filter(|&m| s.is_linked(c, m)).collect();
        let latest = self.latest(ready.iter().map(|m| s.member(m).view))?;
        if recovery::is_displaced(&client(s, c).own_epochs.list(), latest.epoch) {
            s.end(c);
            return Some(());
        }
        if !self.may_attach(&latest, ready) {
            return None;
        }
        let highest = ready.iter().map(|m| s.member(m).epoch).max()?;
        let waiting = latest.active().intersection(ready);
        let client = client_mut(s, c);
        client.epoch = recovery::proposed_epoch(highest, client.epoch);
        client.phase = Phase::Attaching { waiting, replied: MemberSet::EMPTY };
        Some(())
    }

    fn attach(&self, s: &mut State, c: u8, m: MemberId, reference: MemberId) -> Option<()> {
        let Phase::Attaching { mut waiting, mut replied } = client(s, c).phase else { return None };
        let is_last = waiting == MemberSet::only(m);
        if !waiting.contains(m) || !s.is_linked(c, m) || !is_last && reference != m {
            return None;
        }
        let epoch = client(s, c).epoch;
        let member = s.member_mut(m);
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
        (member.epoch, member.holder) = (epoch, Some(c));
        member.flushed = member.data;
        waiting.remove(m);
        replied.insert(m);
        client_mut(s, c).phase = Phase::Attaching { waiting, replied };
        if is_last { self.attached(s, c, replied, reference) } else { Some(()) }
    }

    /// Every member that was asked has accepted the epoch.
    fn attached(&self, s: &mut State, c: u8, attached: MemberSet, reference: MemberId) -> Option<()> {
        let latest = self.latest(attached.iter().map(|m| s.member(m).view))?;
        let own_epochs = client(s, c).own_epochs;
        if recovery::is_displaced(&own_epochs.list(), latest.epoch) {
            s.end(c);
            return Some(());
        }
        if !self.may_attach(&latest, attached) {
            s.gather(c);
            return Some(());
        }
        let views: Vec<_> = attached.iter().map(|m| (m, s.member(m).view.get())).collect();
        let base = self.base(&latest, &views);
        let worth = |m: MemberId| (!s.member(m).tables_lost, s.member(m).data);
        let candidates = base.clean().intersection(attached);
        let Some(best) = candidates.iter().map(worth).max() else {
            s.gather(c);
            return Some(());
        };
        if !candidates.contains(reference) || worth(reference) != best {
            return None;
        }
        let source = *s.member(reference);
        let own = client(s, c).write.map(|(write, _)| write);
        // By slot tables where they are left, but for a write of this client's own, which is sent again; else by what is on
        // disk of intents.
        let differs = |m: MemberId| {
            let member = s.member(m);
            if member.tables_lost || source.tables_lost {
                member.kept || source.kept
            } else {
                member.data != source.data && Some(member.data) != own && Some(source.data) != own
            }
        };
        let others = attached.without(MemberSet::only(reference));
        let stale: MemberSet = others.iter().filter(|&m| differs(m)).collect();
        let behind = views.iter().filter(|(_, v)| **v != base).map(|(m, _)| *m).collect();
        let mut lost = recovery::lost_in_attach(&base, attached, stale, behind);
        let is_first = own_epochs.is_empty();
        let mut unheard = MemberSet::EMPTY;
        if is_first && self.bug != Bug::DeafStaysClean {
            match recovery::unheard_losses(&base, lost, &views) {
                UnheardLosses::None => {}
                UnheardLosses::By(deaf) => lost = lost.union(deaf),
                UnheardLosses::ByAll(members) => unheard = members,
            }
        }
        let epoch = client(s, c).epoch;
        let Ok(next) = base.step(ViewStep::Attach(lost), epoch) else {
            s.gather(c);
            return Some(());
        };
        // What those who are not there miss of writes in flight goes on record too.
        let is_open = attached.iter().any(|m| s.member(m).intent) || client(s, c).is_unflushed;
        let absent = if is_open || own.is_some() { base.out().union(lost) } else { MemberSet::EMPTY };
        let client = client_mut(s, c);
        if !is_first {
            client.own_epochs.push(epoch);
        }
        client.view = base.into();
        self.change(s, c, next, stale.union(absent).union(unheard), true);
        Some(())
    }

    /// The view from which a new attachment goes on.
    fn base(&self, latest: &View, views: &[(MemberId, &View)]) -> View {
        match self.bug {
            Bug::PromotionKeptByAttach => latest.clone(),
            _ => recovery::base_of_attach(latest, views.iter().copied()),
        }
    }

    fn change(&self, s: &mut State, c: u8, next: View, additions: MemberSet, attach: bool) {
        let additions = if self.bug == Bug::NothingRecorded { MemberSet::EMPTY } else { additions };
        let waiting = next.active();
        client_mut(s, c).phase = Phase::Changing { next: next.into(), additions, waiting, attach };
    }

    /// A member makes a view durable and answers.
    fn view(&self, s: &mut State, c: u8, m: MemberId, source: MemberId) -> Option<()> {
        let Phase::Changing { next, additions, mut waiting, attach } = client(s, c).phase else {
            return None;
        };
        if !waiting.contains(m) || !s.is_linked(c, m) {
            return None;
        }
        let member = *s.member(m);
        if member.epoch > client(s, c).epoch {
            s.end(c);
            return (source == m).then_some(());
        }
        if member.holder != Some(c) {
            return None; // The connection is gone; the client is about to learn of it.
        }
        if !member.view.may_precede(&next) {
            s.broken = Some("a member refused a view of the attached client");
            return (source == m).then_some(());
        }
        let (mut dirty, mut struck_off) = (member.dirty, member.struck_off);
        let was = member.view.state(m);
        let is_in_step = next.number == member.view.number.next() && next.epoch == member.view.epoch;
        let is_syncing = next.state(m) == Some(MemberState::Syncing);
        if is_syncing && !(was == Some(MemberState::Syncing) && (is_in_step || attach)) {
            // It takes the maps over from a Clean member.
            if !client(s, c).view.clean().contains(source) || !s.is_attached(c, source) {
                return None;
            }
            (dirty, struck_off) = (s.member(source).dirty, s.member(source).struck_off);
        } else if source != m {
            return None;
        }
        dirty = dirty.union(additions);
        struck_off = struck_off.without(additions).union(dirty.intersection(next.clean()));
        let member = s.member_mut(m);
        member.dirty = dirty.without(next.clean());
        member.struck_off = struck_off.without(MemberSet::only(m));
        member.view = next;
        member.tables_lost = false;
        if attach {
            (member.intent, member.kept) = (false, false);
        }
        if self.bug != Bug::ViewNotDurable {
            member.durable = next;
        }
        waiting.remove(m);
        let is_committed = waiting.is_empty() || self.bug == Bug::CommitWithoutAll;
        client_mut(s, c).phase = Phase::Changing { next, additions, waiting, attach };
        if is_committed {
            self.commit(s, c, next, attach);
        }
        Some(())
    }

    fn commit(&self, s: &mut State, c: u8, next: Known, attach: bool) {
        // News that is late: another client has attached since, without the member that answered last.
        let is_late = next.order() < s.committed.order();
        if next.active().iter().any(|m| s.member(m).durable.order() < next.order()) {
            s.broken = Some("a view was committed that is not durable on all its active members");
        }
        if next.order() == s.committed.order() {
            s.broken = Some("two views of one epoch and number were committed");
        }
        if !is_late && next.clean().intersection(s.committed.clean()).is_empty() {
            s.broken = Some("a view was committed in which nobody is Clean who was so before");
        }
        if attach && !is_late {
            let own = client(s, c).write.map(|(write, _)| write);
            s.broken = s.broken.or_else(|| s.disagreement(next, own));
        }
        let client = client_mut(s, c);
        client.phase = Phase::Active;
        client.own_epochs = Epochs::only(client.epoch);
        client.is_unflushed &= !attach;
        client.view = next;
        if attach && let Some((_, done)) = &mut client.write {
            *done = MemberSet::EMPTY;
        }
        if !is_late {
            s.committed = next;
            for m in next.active().iter() {
                let member = s.member_mut(m);
                member.struck_off = member.struck_off.without(next.clean());
            }
        }
        self.try_complete(s, c);
    }

    /// The client learns that a connection is gone.
    fn lose(&self, s: &mut State, c: u8, m: MemberId) -> Option<()> {
        if s.is_attached(c, m) {
            return None;
        }
        let client = *client(s, c);
        let base = match client.phase {
            Phase::Gathering | Phase::Over => return None,
            Phase::Attaching { waiting, replied } => {
                let is_asked = waiting.contains(m) && !s.is_linked(c, m) || replied.contains(m);
                return is_asked.then(|| s.gather(c));
            }
            Phase::Changing { next, attach: true, .. } => {
                return next.active().contains(m).then(|| s.gather(c));
            }
            Phase::Changing { next, .. } if self.bug == Bug::PromotionKept => next.get().clone(),
            Phase::Changing { next, .. } => next.without_promotions(client.view.clean()),
            Phase::Active => client.view.get().clone(),
        };
        if !base.active().contains(m) {
            return None;
        }
        match base.step(ViewStep::Lose(MemberSet::only(m)), client.epoch) {
            Ok(next) => {
                let missed = if client.write.is_some() { next.out() } else { MemberSet::EMPTY };
                // What an earlier change that was given up had told some members only.
                let earlier = match client.phase {
                    Phase::Changing { additions, .. } => additions,
                    _ => MemberSet::EMPTY,
                };
                let unflushed = if client.is_unflushed { MemberSet::only(m) } else { MemberSet::EMPTY };
                self.change(s, c, next, missed.union(earlier).union(unflushed), false);
            }
            Err(_) => s.gather(c),
        }
        Some(())
    }

    fn submit(&self, s: &mut State, c: u8) -> Option<()> {
        if client(s, c).phase != Phase::Active
            || client(s, c).write.is_some()
            || s.writes >= self.limits.writes
        {
            return None;
        }
        s.writes += 1;
        client_mut(s, c).write = Some((s.writes, MemberSet::EMPTY));
        Some(())
    }

    fn write(&self, s: &mut State, c: u8, m: MemberId) -> Option<()> {
        let client = *client(s, c);
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
        if s.committed.epoch > client.epoch && s.committed.active().contains(m) {
            s.broken = Some("a member of the view in force took a write of a client that was displaced");
        }
        let member = s.member_mut(m);
        member.data = value;
        if self.limits.power == 0 {
            member.flushed = value;
        }
        (member.intent, member.kept) = (true, true);
        member.dirty = member.dirty.union(client.view.out()).without(MemberSet::only(m));
        member.struck_off = member.struck_off.without(client.view.out());
        done.insert(m);
        client_mut(s, c).write = Some((value, done));
        self.try_complete(s, c);
        Some(())
    }

    /// A write is complete when every active member of the committed view has it.
    fn try_complete(&self, s: &mut State, c: u8) {
        let client = client_mut(s, c);
        let active = client.view.active();
        let Some((value, done)) = client.write else { return };
        if client.phase != Phase::Active || !active.is_subset(done) {
            return;
        }
        client.write = None;
        client.is_unflushed = self.limits.power > 0;
        // What every Clean member has lost between its answer and the last one is lost, as in `power_cut`.
        let clean = client.view.clean();
        if s.power == 0 || clean.iter().any(|m| s.member(m).data >= value) {
            s.acknowledged = s.acknowledged.max(value);
        }
        // The watermark passes it. One that crashed meanwhile does not hear of it.
        for m in active.iter().filter(|&m| !s.member(m).tables_lost).collect::<MemberSet>().iter() {
            let member = s.member_mut(m);
            member.intent = false;
            member.kept &= member.flushed != member.data;
        }
    }

    /// A member that is Out is attached under the same epoch, and made Syncing behind the barrier.
    fn rejoin(&self, s: &mut State, c: u8, m: MemberId) -> Option<()> {
        let client = client(s, c);
        let is_due = client.phase == Phase::Active && client.write.is_none() && client.view.out().contains(m);
        if !is_due || !s.is_linked(c, m) {
            return None;
        }
        let (epoch, view) = (client.epoch, client.view);
        let member = s.member(m);
        if member.epoch > epoch {
            s.gather(c);
            return Some(());
        }
        if member.epoch == epoch && member.holder.is_some_and(|h| h != c) {
            return None;
        }
        // One that has a view of this attachment was lost under it, and what it misses went on record then.
        let is_left_behind = member.view.epoch != epoch && member.intent;
        let next = view.step(ViewStep::Rejoin(m), epoch).ok()?;
        let member = s.member_mut(m);
        (member.epoch, member.holder) = (epoch, Some(c));
        member.flushed = member.data;
        let additions = if is_left_behind { MemberSet::only(m) } else { MemberSet::EMPTY };
        self.change(s, c, next, additions, false);
        Some(())
    }

    /// A Syncing member takes what it misses from a Clean one of the same attachment.
    fn pull(&self, s: &mut State, m: MemberId, source: MemberId) -> Option<()> {
        let member = s.member(m);
        let is_due = member.is_up
            && member.view.state(m) == Some(MemberState::Syncing)
            && member.dirty.contains(m)
            && member.holder.is_some()
            && member.view.clean().contains(source);
        let other = s.member(source);
        let may_serve = other.is_up
            && other.epoch == member.epoch
            && other.view.order() >= member.view.order()
            && other.view.state(source) == Some(MemberState::Clean)
            && (!other.tables_lost || self.bug == Bug::SourceStartedAnew);
        if !is_due || !may_serve {
            return None;
        }
        let data = other.data;
        let member = s.member_mut(m);
        // It is flushed before it is reported.
        (member.data, member.flushed) = (data, data);
        member.dirty.remove(m);
        Some(())
    }

    fn promote(&self, s: &mut State, c: u8, m: MemberId) -> Option<()> {
        let client = client(s, c);
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
        stop(s, m);
        Some(())
    }

    /// A member crashes, and what was not flushed is gone. If every Clean member has lost a completed write so, it is lost.
    fn power_cut(&self, s: &mut State, m: MemberId) -> Option<()> {
        if s.power >= self.limits.power || !s.member(m).is_up {
            return None;
        }
        s.power += 1;
        stop(s, m);
        let member = s.member_mut(m);
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

    /// For a client that is over it would make no difference.
    fn cut(&self, s: &mut State, c: u8, m: MemberId) -> Option<()> {
        let client = client(s, c);
        if s.cuts >= self.limits.cuts || client.cut.contains(m) || client.phase == Phase::Over {
            return None;
        }
        client_mut(s, c).cut.insert(m);
        s.cuts += 1;
        Some(())
    }
}

fn client(s: &State, c: u8) -> &Client {
    &s.clients[usize::from(c)]
}

fn client_mut(s: &mut State, c: u8) -> &mut Client {
    &mut s.clients[usize::from(c)]
}

/// What is volatile is lost. Of intents the ones on disk are left.
fn stop(s: &mut State, m: MemberId) {
    let member = s.member_mut(m);
    member.is_up = false;
    member.holder = None;
    member.tables_lost = true;
    member.intent = member.kept;
    member.view = member.durable;
}

fn start(s: &mut State, m: MemberId) -> Option<()> {
    let member = s.member_mut(m);
    if member.is_up {
        return None;
    }
    member.is_up = true;
    Some(())
}

/// A link is made anew only after both ends know that the old one is gone.
fn heal(s: &mut State, c: u8, m: MemberId) -> Option<()> {
    let client = client_mut(s, c);
    if !client.cut.contains(m) {
        return None;
    }
    let is_used = match client.phase {
        Phase::Gathering | Phase::Over => false,
        Phase::Attaching { waiting, replied } => waiting.union(replied).contains(m),
        Phase::Changing { next, .. } => next.active().union(client.view.active()).contains(m),
        Phase::Active => client.view.active().contains(m),
    };
    if is_used {
        return None;
    }
    client.cut.remove(m);
    let member = s.member_mut(m);
    member.holder = member.holder.filter(|&h| h != c);
    Some(())
}
