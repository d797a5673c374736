//! Views: numbered records of which member is in which state, and the table of legal steps between them.
//!
//! ```text
//!                 rejoin                      promotion
//!      ┌─────┐ ───────────▶ ┌─────────┐ ──────────────▶ ┌───────┐
//!      │ Out │              │ Syncing │                 │ Clean │
//!      └─────┘ ◀─────────── └─────────┘                 └───────┘
//!      │  ▲ ▲      failure                                  │
//!      │  │ └───────────────────────────────────────────────┘
//! remove add, wholly stale    failure, maintenance (never the last Clean member)
//! ```

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Epoch, MAX_MEMBERS, MemberId, MemberSet, StoreId, ViewNumber};

/// How far the view number jumps when the operator forces a pool into use.
pub(crate) const FORCED_JUMP: u64 = 1 << 32;

impl Epoch {
    /// How far a forced attachment is above any other: a second, as the time of the decision counts, and more than attaches
    /// that come to nothing add up to in ten years.
    pub const FORCED_JUMP: u64 = 1 << 30;

    /// Latest time of an operator's decision in nanoseconds since 1970. A clock that shows more is wrong, and must not use the
    /// epochs up.
    pub const LAST_DECISION_NS: u64 = 1 << 61;

    /// Whether a view or an attachment is of an older branch than one of epoch `known`: the operator has forced a member into
    /// use since. Without the operator epochs grow one by one, and a member that accepted one so much higher has met a
    /// client of the later branch, though it may not have a view of it.
    #[must_use]
    pub const fn is_of_older_branch(self, known: Self) -> bool {
        known.0 >= self.0.saturating_add(Self::FORCED_JUMP)
    }
}

/// Highest epoch and view number that an honest history comes to, however many attachments and decisions of operators it
/// has: twice the highest time of a decision.
const HIGHEST_HONEST: u64 = 2 * Epoch::LAST_DECISION_NS;

/// Whether a party that knows of `known` may believe a number that another one names. A member of an old branch is brought
/// back in under any epoch that the operator's decisions may have led to; above those, numbers grow in small steps only. So
/// no message uses the numbers up, after which nothing could follow.
const fn may_follow(known: u64, named: u64, step: u64) -> bool {
    named <= HIGHEST_HONEST || named <= known.saturating_add(step)
}

impl Epoch {
    /// Whether a member with this epoch may take `next` for that of an attachment or of a forced view.
    #[must_use]
    pub const fn may_be_followed_by(self, next: Self) -> bool {
        may_follow(self.0, next.0, 2 * Self::FORCED_JUMP)
    }
}

impl ViewNumber {
    /// Whether a member that has the view of this number may take `next` for the number of a later one.
    #[must_use]
    pub const fn may_be_followed_by(self, next: Self) -> bool {
        may_follow(self.0, next.0, 2 * FORCED_JUMP)
    }
}

/// State of a member's data.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum MemberState {
    /// Has every completed write.
    Clean = 1,
    /// Gets every new write; some older blocks are stale, and it is known which.
    Syncing = 2,
    /// Gets nothing; every member in the view records what it misses.
    Out = 3,
}

impl MemberState {
    /// The state that stands as `code` in messages and on disk.
    #[must_use]
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Clean),
            2 => Some(Self::Syncing),
            3 => Some(Self::Out),
            _ => None,
        }
    }
}

impl fmt::Display for MemberState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Clean => "Clean",
            Self::Syncing => "Syncing",
            Self::Out => "Out",
        })
    }
}

/// One member's line in a [`View`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct MemberView {
    /// Index of the member.
    pub id: MemberId,
    /// The store that is this member in this view.
    pub store: StoreId,
    /// State of its data.
    pub state: MemberState,
}

/// A numbered record of which member is in which state.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct View {
    /// Grows by one with every step.
    pub number: ViewNumber,
    /// The attachment that made the view; zero for the first view, made when the pool was created.
    pub epoch: Epoch,
    /// The members, ordered by id; never empty.
    pub members: Vec<MemberView>,
}

/// One legal change from a view to the next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ViewStep {
    /// A client attached: the members stay as they are, but for those that did not answer it, which become Out.
    Attach(MemberSet),
    /// The operator's override: this member is Clean, whatever it was, and all others are Out. The number jumps, so that
    /// nobody takes it for that of a view which was made without the operator's knowledge. Which one is later says the epoch.
    Force(MemberId),
    /// Members leave: each Clean or Syncing becomes Out. At least one Clean member must stay.
    Lose(MemberSet),
    /// An Out member comes back with its stale blocks known: Out becomes Syncing.
    Rejoin(MemberId),
    /// A Syncing member has nothing stale and has flushed: Syncing becomes Clean.
    Promote(MemberId),
    /// A new member, or a new store under an absent one: it starts as Out, and has missed everything.
    Add(MemberId, StoreId),
    /// An Out member is forgotten.
    Remove(MemberId),
    /// The pool's specification changes: its size, an address, a maintenance. The members stay as they are.
    Amend,
}

impl fmt::Display for ViewStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Attach(lost) => write!(f, "attach without {lost}"),
            Self::Force(member) => write!(f, "force from member {member}"),
            Self::Lose(members) => write!(f, "lose {members}"),
            Self::Rejoin(member) => write!(f, "rejoin of member {member}"),
            Self::Promote(member) => write!(f, "promotion of member {member}"),
            Self::Add(member, store) => write!(f, "addition of member {member} with store {store}"),
            Self::Remove(member) => write!(f, "removal of member {member}"),
            Self::Amend => f.write_str("amendment"),
        }
    }
}

/// Why a [`ViewStep`] may not be taken from a view.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum IllegalStep {
    /// The step names a member that the view does not have.
    #[error("member {0} is not in the view")]
    NoSuchMember(MemberId),
    /// The member is not in the state from which this step starts.
    #[error("member {member} is {state}, which this step does not start from")]
    WrongState {
        /// The member that the step names.
        member: MemberId,
        /// Its state in the view.
        state: MemberState,
    },
    /// No Clean member would be left.
    #[error("no Clean member would be left")]
    NoCleanLeft,
    /// The step changes nothing.
    #[error("the step names no member")]
    Empty,
    /// The pool has as many members as it may have.
    #[error("the pool has 8 members already")]
    Full,
    /// The store is a member already.
    #[error("store {0} is a member already")]
    StoreInUse(StoreId),
}

/// Why a list of members is no [`View`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum ViewError {
    /// No members or more than [`MAX_MEMBERS`].
    #[error("a view has 1 to 8 members, not {0}")]
    MemberCount(usize),
    /// Ids are not strictly ascending, or a store is named twice.
    #[error("member {0} is out of order or its store is named twice")]
    Order(MemberId),
    /// No member is Clean.
    #[error("no member is Clean")]
    NoClean,
}

impl View {
    /// The first view of a pool: every member Clean, number 1, epoch 0.
    #[must_use]
    pub fn initial(members: impl IntoIterator<Item = (MemberId, StoreId)>) -> Self {
        let clean = |(id, store)| MemberView { id, store, state: MemberState::Clean };
        Self { number: ViewNumber(1), epoch: Epoch(0), members: members.into_iter().map(clean).collect() }
    }

    /// The view of a store that was made for a pool in use, before it is part of it: lower than any that a client made, and
    /// the store has nothing by it.
    #[must_use]
    pub fn unjoined(members: impl IntoIterator<Item = (MemberId, StoreId)>, joining: MemberId) -> Self {
        let mut view = Self { number: ViewNumber(0), ..Self::initial(members) };
        for member in view.members.iter_mut().filter(|m| m.id == joining) {
            member.state = MemberState::Out;
        }
        view
    }

    /// Checks what every view keeps: 1 to 8 members in order, no store twice, at least one Clean.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn validate(&self) -> Result<(), ViewError> {
        if !(1..=MAX_MEMBERS).contains(&self.members.len()) {
            return Err(ViewError::MemberCount(self.members.len()));
        }
        for (i, member) in self.members.iter().enumerate() {
            if self.members[..i].iter().any(|m| m.id >= member.id || m.store == member.store) {
                return Err(ViewError::Order(member.id));
            }
        }
        if self.clean().is_empty() { Err(ViewError::NoClean) } else { Ok(()) }
    }

    /// The line of this member.
    #[must_use]
    pub fn member(&self, id: MemberId) -> Option<&MemberView> {
        self.members.iter().find(|m| m.id == id)
    }

    /// Whether this store is this member here.
    #[must_use]
    pub fn has_store(&self, id: MemberId, store: StoreId) -> bool {
        self.member(id).is_some_and(|m| m.store == store)
    }

    /// Whether both have the same members with the same stores.
    #[must_use]
    pub fn has_stores_of(&self, other: &Self) -> bool {
        self.members.iter().map(|m| (m.id, m.store)).eq(other.members.iter().map(|m| (m.id, m.store)))
    }

    /// State of this member, or `None` when it is not in the view.
    #[must_use]
    pub fn state(&self, id: MemberId) -> Option<MemberState> {
        self.member(id).map(|m| m.state)
    }

    /// The members in `state`.
    #[must_use]
    pub fn in_state(&self, state: MemberState) -> MemberSet {
        self.members.iter().filter(|m| m.state == state).map(|m| m.id).collect()
    }

    /// The members that have every completed write.
    #[must_use]
    pub fn clean(&self) -> MemberSet {
        self.in_state(MemberState::Clean)
    }

    /// The members that get writes: Clean and Syncing.
    #[must_use]
    pub fn active(&self) -> MemberSet {
        self.members.iter().filter(|m| m.state != MemberState::Out).map(|m| m.id).collect()
    }

    /// The members that get nothing.
    #[must_use]
    pub fn out(&self) -> MemberSet {
        self.in_state(MemberState::Out)
    }

    /// The view after `step`, made by the attachment `epoch`.
    ///
    /// # Errors
    /// When the table of legal steps does not have it; the view stays as it is.
    pub fn step(&self, step: ViewStep, epoch: Epoch) -> Result<Self, IllegalStep> {
        let mut next = Self { number: self.number.next(), epoch, members: self.members.clone() };
        match step {
            ViewStep::Lose(members) if members.is_empty() => return Err(IllegalStep::Empty),
            ViewStep::Lose(members) | ViewStep::Attach(members) => {
                for member in members.iter() {
                    next.change(member, &[MemberState::Clean, MemberState::Syncing], MemberState::Out)?;
                }
            }
            ViewStep::Force(id) => {
                self.state(id).ok_or(IllegalStep::NoSuchMember(id))?;
                next.number = ViewNumber(self.number.0 + FORCED_JUMP);
                for member in &mut next.members {
                    member.state = if member.id == id { MemberState::Clean } else { MemberState::Out };
                }
            }
            ViewStep::Rejoin(member) => next.change(member, &[MemberState::Out], MemberState::Syncing)?,
            ViewStep::Promote(member) => next.change(member, &[MemberState::Syncing], MemberState::Clean)?,
            ViewStep::Add(id, store) => next.add(id, store)?,
            ViewStep::Amend => {}
            ViewStep::Remove(id) => {
                let state = self.state(id).ok_or(IllegalStep::NoSuchMember(id))?;
                if state != MemberState::Out {
                    return Err(IllegalStep::WrongState { member: id, state });
                }
                next.members.retain(|m| m.id != id);
            }
        }
        if next.clean().is_empty() { Err(IllegalStep::NoCleanLeft) } else { Ok(next) }
    }

    /// Which of two views is later: that of the later attachment, and of one attachment that with the higher number.
    ///
    /// An attachment begins above every view that was committed before it, because the members that could commit more have
    /// refused the older one by then. A view that an older client proposed without committing it may have any number.
    #[must_use]
    pub const fn order(&self) -> (Epoch, ViewNumber) {
        (self.epoch, self.number)
    }

    /// The same view with those members Syncing again that are Clean in it and not in `clean`, the Clean ones of the view
    /// that was committed last.
    #[must_use]
    pub fn without_promotions(&self, clean: MemberSet) -> Self {
        let mut view = self.clone();
        for member in view.members.iter_mut().filter(|m| m.state == MemberState::Clean) {
            if !clean.contains(member.id) {
                member.state = MemberState::Syncing;
            }
        }
        view
    }

    /// Whether a member that has this view may accept `next` as its successor: a later one, and, where it follows
    /// directly, no member that becomes Clean without having been Syncing.
    #[must_use]
    pub fn may_precede(&self, next: &Self) -> bool {
        let direct = next.number == self.number.next() && next.epoch == self.epoch;
        let sudden = |m: &MemberView| {
            let is_other = |old: &MemberView| old.state == MemberState::Out || old.store != m.store;
            m.state == MemberState::Clean && self.member(m.id).is_none_or(is_other)
        };
        next.validate().is_ok() && next.order() > self.order() && !(direct && next.members.iter().any(sudden))
    }

    fn change(&mut self, id: MemberId, from: &[MemberState], to: MemberState) -> Result<(), IllegalStep> {
        let member = self.members.iter_mut().find(|m| m.id == id).ok_or(IllegalStep::NoSuchMember(id))?;
        if !from.contains(&member.state) {
            return Err(IllegalStep::WrongState { member: id, state: member.state });
        }
        member.state = to;
        Ok(())
    }

    fn add(&mut self, id: MemberId, store: StoreId) -> Result<(), IllegalStep> {
        if self.members.iter().any(|m| m.store == store) {
            return Err(IllegalStep::StoreInUse(store));
        }
        let line = MemberView { id, store, state: MemberState::Out };
        let full = self.members.len() >= MAX_MEMBERS;
        match self.members.iter_mut().find(|m| m.id == id) {
            // A new store under an absent member: the disk was replaced.
            Some(old) if old.state == MemberState::Out => *old = line,
            Some(old) => return Err(IllegalStep::WrongState { member: id, state: old.state }),
            None if full => return Err(IllegalStep::Full),
            None => {
                self.members.push(line);
                self.members.sort_by_key(|m| m.id);
            }
        }
        Ok(())
    }
}

impl fmt::Display for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "view {} (epoch {}):", self.number, self.epoch)?;
        for member in &self.members {
            write!(f, " {}={}", member.id, member.state)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::MemberState::{Clean, Out, Syncing};
    use super::*;

    fn id(index: u8) -> MemberId {
        MemberId::new(index).unwrap()
    }

    fn view(states: &[MemberState]) -> View {
        let line = |(i, &state): (usize, &MemberState)| MemberView {
            id: id(u8::try_from(i).unwrap()),
            store: StoreId::random(),
            state,
        };
        View {
            number: ViewNumber(7),
            epoch: Epoch(3),
            members: states.iter().enumerate().map(line).collect(),
        }
    }

    #[test]
    fn the_table_of_single_member_steps_is_exactly_the_documented_one() {
        // Member 1 takes the step; member 0 is Clean and stays. The second column is its state afterwards.
        let table = [
            (Clean, ViewStep::Lose(MemberSet::only(id(1))), Some(Out)),
            (Syncing, ViewStep::Lose(MemberSet::only(id(1))), Some(Out)),
            (Out, ViewStep::Lose(MemberSet::only(id(1))), None),
            (Clean, ViewStep::Rejoin(id(1)), None),
            (Syncing, ViewStep::Rejoin(id(1)), None),
            (Out, ViewStep::Rejoin(id(1)), Some(Syncing)),
            (Clean, ViewStep::Promote(id(1)), None),
            (Syncing, ViewStep::Promote(id(1)), Some(Clean)),
            (Out, ViewStep::Promote(id(1)), None),
        ];
        for (from, step, to) in table {
            let before = view(&[Clean, from]);
            let after = before.step(step, Epoch(4));
            match to {
                Some(state) => {
                    let after = after.unwrap();
                    assert_eq!(after.state(id(1)), Some(state), "{from} {step}");
                    assert_eq!((after.number, after.epoch), (ViewNumber(8), Epoch(4)));
                }
                None => assert!(after.is_err(), "{from} {step}"),
            }
        }
    }

    #[test]
    fn the_last_clean_member_never_leaves() {
        let v = view(&[Clean, Syncing, Out]);
        assert_eq!(v.step(ViewStep::Lose(MemberSet::only(id(0))), Epoch(4)), Err(IllegalStep::NoCleanLeft));
        let both = MemberSet::from_iter([id(0), id(1)]);
        assert_eq!(v.step(ViewStep::Lose(both), Epoch(4)), Err(IllegalStep::NoCleanLeft));
    }

    #[test]
    fn a_promotion_that_is_taken_back_leaves_only_those_who_were_clean() {
        let v = view(&[Clean, Syncing]);
        let promoted = v.step(ViewStep::Promote(id(1)), Epoch(4)).unwrap();
        let back = promoted.without_promotions(v.clean());
        assert_eq!((back.clean(), back.in_state(Syncing)), (v.clean(), MemberSet::only(id(1))));
        let lost = back.step(ViewStep::Lose(v.clean()), Epoch(4));
        assert_eq!(lost, Err(IllegalStep::NoCleanLeft), "member 0 could go on alone, with an older view");
    }

    #[test]
    fn several_members_may_leave_in_one_step() {
        let lost = MemberSet::from_iter([id(1), id(2)]);
        let v = view(&[Clean, Clean, Syncing]).step(ViewStep::Lose(lost), Epoch(4)).unwrap();
        assert_eq!((v.clean(), v.out()), (MemberSet::only(id(0)), lost));
    }

    #[test]
    fn adding_needs_a_free_id_or_an_absent_member_and_a_new_store() {
        let v = view(&[Clean, Out]);
        let store = StoreId::random();
        let added = v.step(ViewStep::Add(id(2), store), Epoch(4)).unwrap();
        assert_eq!(added.state(id(2)), Some(Out));
        let replaced = v.step(ViewStep::Add(id(1), store), Epoch(4)).unwrap();
        assert_eq!(replaced.member(id(1)).unwrap().store, store);
        assert!(v.step(ViewStep::Add(id(0), store), Epoch(4)).is_err());
        let known = v.members[0].store;
        assert_eq!(v.step(ViewStep::Add(id(2), known), Epoch(4)), Err(IllegalStep::StoreInUse(known)));
    }

    #[test]
    fn only_an_absent_member_is_removed() {
        let v = view(&[Clean, Out, Syncing]);
        assert!(v.step(ViewStep::Remove(id(2)), Epoch(4)).is_err());
        assert_eq!(v.step(ViewStep::Remove(id(1)), Epoch(4)).unwrap().members.len(), 2);
        assert_eq!(v.step(ViewStep::Remove(id(5)), Epoch(4)), Err(IllegalStep::NoSuchMember(id(5))));
    }

    #[test]
    fn a_forced_view_is_higher_than_any_that_steps_could_lead_to() {
        let v = view(&[Clean, Syncing, Out]);
        let forced = v.step(ViewStep::Force(id(2)), Epoch(9)).unwrap();
        assert_eq!((forced.clean(), forced.out().len()), (MemberSet::only(id(2)), 2));
        assert!(forced.number.0 > v.number.0 + u64::from(u32::MAX) && v.may_precede(&forced));
        assert!(v.step(ViewStep::Force(id(5)), Epoch(9)).is_err());
    }

    #[test]
    fn a_successor_is_later_and_has_no_sudden_clean_member() {
        let v = view(&[Clean, Out]);
        let next = v.step(ViewStep::Attach(MemberSet::EMPTY), v.epoch).unwrap();
        assert!(v.may_precede(&next));
        assert!(!next.may_precede(&v));
        assert!(!v.may_precede(&v));
        let mut sudden = next.clone();
        sudden.members[1].state = Clean;
        assert!(!v.may_precede(&sudden));
        sudden.number = ViewNumber(9);
        assert!(v.may_precede(&sudden), "views in between may have made it Syncing");
        let older = View { epoch: Epoch(2), number: ViewNumber(99), ..next.clone() };
        assert!(!v.may_precede(&older), "what a fenced client proposed is earlier, whatever its number");
        let newer = View { epoch: Epoch(4), number: ViewNumber(5), ..next };
        assert!(v.may_precede(&newer));
    }

    #[test]
    fn a_malformed_view_is_refused() {
        assert!(view(&[Out, Syncing]).validate().is_err());
        assert!(view(&[]).validate().is_err());
        let mut v = view(&[Clean, Clean]);
        v.members.swap(0, 1);
        assert!(v.validate().is_err());
        assert_eq!(view(&[Clean, Out]).validate(), Ok(()));
    }
}
