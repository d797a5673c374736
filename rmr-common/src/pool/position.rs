//! How far the history of a store has come, and what others remember of it: how a store that went back in time is noticed.
//!
//! `docs/replication.md`, "A store that went back in time", has the argument.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Epoch, MAX_MEMBERS, Mark, MemberId, MemberSet, View, ViewNumber};

/// The point that a store has reached in the history of its pool, by its own durable record. Only a coordinator moves it, so it
/// cannot be reached by restarts. The default is the point of a store that no client has attached to.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Position {
    /// Highest epoch that was accepted.
    pub epoch: Epoch,
    /// Epoch of the view.
    pub view_epoch: Epoch,
    /// Number of the view.
    pub view: ViewNumber,
    /// Last mark of the attachment that made the view.
    pub mark: Mark,
}

impl Position {
    /// The position of a member with this view, epoch and mark.
    #[must_use]
    pub const fn new(epoch: Epoch, view: &View, mark: Mark) -> Self {
        Self { epoch, view_epoch: view.epoch, view: view.number, mark }
    }

    const fn order(&self) -> (Epoch, ViewNumber, Mark) {
        (self.view_epoch, self.view, self.mark)
    }

    /// Whether a store at this position has lost what one at `known` had: it was at `known` once, and shows less.
    #[must_use]
    pub fn is_behind(&self, known: &Self) -> bool {
        self.epoch < known.epoch || self.order() < known.order()
    }

    /// Whether view and mark are the same; an attach that came to nothing raises the epoch alone.
    #[must_use]
    pub fn is_same_point(&self, other: &Self) -> bool {
        self.order() == other.order()
    }

    /// Notes that the store was seen at `other` as well.
    pub fn advance(&mut self, other: &Self) {
        self.epoch = self.epoch.max(other.epoch);
        if other.order() > self.order() {
            (self.view_epoch, self.view, self.mark) = other.order();
        }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "epoch {}, view {} of epoch {}", self.epoch, self.view, self.view_epoch)?;
        if self.mark.0 > 0 { write!(f, ", mark {}", self.mark) } else { Ok(()) }
    }
}

/// What is remembered of the members of a pool: the position that each is known to have reached, because it said so after
/// that was durable, and the members whose store was found behind it.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Attested {
    positions: [Position; MAX_MEMBERS],
    /// Members whose store went back in time and has not been copied over in full since.
    pub regressed: MemberSet,
}

impl Attested {
    /// What is known of a member. The default if nothing is.
    #[must_use]
    pub const fn of(&self, member: MemberId) -> &Position {
        &self.positions[member.index()]
    }

    /// Notes that a member was at this position.
    pub fn note(&mut self, member: MemberId, position: &Position) {
        self.positions[member.index()].advance(position);
    }

    /// Takes this for the position of a member, whatever was known before.
    pub fn set(&mut self, member: MemberId, position: &Position) {
        self.positions[member.index()] = *position;
    }

    /// Whether a member that shows `position` has lost a part of its history.
    #[must_use]
    pub fn refutes(&self, member: MemberId, position: &Position) -> bool {
        position.is_behind(self.of(member))
    }

    /// Forgets a member: another store takes its place, or none.
    pub fn forget(&mut self, member: MemberId) {
        self.positions[member.index()] = Position::default();
        self.regressed.remove(member);
    }

    /// Takes over what `other`, which goes with the view `theirs`, remembers of the stores that are members in `view` as well.
    pub fn merge(&mut self, view: &View, other: &Self, theirs: &View) {
        for line in view.members.iter().filter(|m| theirs.has_store(m.id, m.store)) {
            self.note(line.id, other.of(line.id));
            if other.regressed.contains(line.id) {
                self.regressed.insert(line.id);
            }
        }
    }

    /// The lowest mark that all `members` have durable in attachments of this epoch; zero if one has none.
    #[must_use]
    pub fn settled(&self, members: MemberSet, epoch: Epoch) -> Mark {
        let mark = |m: MemberId| {
            let position = self.of(m);
            if position.view_epoch == epoch { position.mark } else { Mark(0) }
        };
        members.iter().map(mark).min().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::StoreId;

    fn member(index: u8) -> MemberId {
        MemberId::new(index).unwrap()
    }

    fn at(epoch: u64, view_epoch: u64, view: u64, mark: u64) -> Position {
        Position {
            epoch: Epoch(epoch),
            view_epoch: Epoch(view_epoch),
            view: ViewNumber(view),
            mark: Mark(mark),
        }
    }

    #[test]
    fn a_store_is_behind_when_any_part_of_its_history_is_missing() {
        let table = [
            (at(7, 7, 9, 3), at(7, 7, 9, 3), false),
            (at(7, 7, 9, 2), at(7, 7, 9, 3), true),
            (at(7, 7, 8, 9), at(7, 7, 9, 0), true),
            (at(7, 6, 20, 9), at(7, 7, 9, 0), true),
            (at(7, 7, 9, 3), at(8, 7, 9, 3), true),
            (at(9, 7, 9, 3), at(8, 7, 9, 3), false),
            (at(8, 8, 10, 0), at(8, 7, 30, 5), false),
            (at(1, 1, 2, 0), Position::default(), false),
        ];
        for (shown, known, behind) in table {
            assert_eq!(shown.is_behind(&known), behind, "{shown} after {known}");
        }
    }

    #[test]
    fn what_was_seen_is_never_forgotten_by_seeing_less() {
        let mut known = at(8, 7, 9, 4);
        known.advance(&at(7, 7, 9, 3));
        assert_eq!(known, at(8, 7, 9, 4));
        known.advance(&at(8, 8, 3, 0));
        assert_eq!(known, at(8, 8, 3, 0), "a later attachment counts its views and marks by itself");
    }

    #[test]
    fn what_is_known_of_one_store_says_nothing_about_the_store_that_replaced_it() {
        let view = |store: u8| View::initial([(member(0), StoreId::from_bytes([store; 16]))]);
        let mut other = Attested::default();
        other.note(member(0), &at(3, 3, 3, 3));
        other.regressed.insert(member(0));
        let mut known = Attested::default();
        known.merge(&view(2), &other, &view(1));
        assert_eq!(known, Attested::default());
        known.merge(&view(1), &other, &view(1));
        assert_eq!(known, other);
        known.forget(member(0));
        assert_eq!(known, Attested::default());
    }

    #[test]
    fn a_mark_is_settled_when_every_member_has_it_in_the_same_attachment() {
        let mut known = Attested::default();
        let members: MemberSet = [member(0), member(1)].into_iter().collect();
        known.note(member(0), &at(3, 3, 3, 7));
        assert_eq!(known.settled(members, Epoch(3)), Mark(0));
        known.note(member(1), &at(3, 2, 3, 9));
        assert_eq!(known.settled(members, Epoch(3)), Mark(0), "that was a mark of an earlier attachment");
        known.note(member(1), &at(3, 3, 4, 5));
        assert_eq!(known.settled(members, Epoch(3)), Mark(5));
    }
}
