//! Operators' commands: changes of the pool while it is in use.
//!
//! ```text
//!                 node of a new store          flush      no write in flight       flush again
//!   Deciding ─┬──▶ Meeting ──▶ ┐    ┌─▶ Flushing ─▶ Quiescing ──────────▶ FlushingQuiet ─▶ ┐
//!     ▲       ├──▶ Growing ──▶ ├────┘  only when an active member is to leave             ├─▶ Changing ─▶ Deciding
//!     │       └──────────────▶ ┘──────────────────────────────────────────────────────────┘        │
//!     └──────────────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//! Each time round, [`plan::next_step`] looks at the committed view and its specification, and says what is still to be done.
//! So a command that was given up half-way is finished by giving it again, and one that is done is done.

use std::collections::VecDeque;

use super::{Client, LinkId, LinkState, Output, Payload, State};
use crate::pool::{
    Address, Cause, Command, CommandReply, MemberId, MemberSet, PoolSpec, Refusal, StoreId, ViewStep,
};
use crate::time::Time;
use crate::wire::{DirtyAddition, Kind, MessageHeader, Status};

mod plan;

use plan::{Leave, Step, look_at, new_store, next_step};

/// Most commands that wait; more are refused.
const MAX_COMMANDS: usize = 16;

/// Names a command to its maker. Unique among the commands that are not answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct CommandToken(pub u64);

/// Who gave a command.
enum Origin {
    /// The owner of the client.
    Owner(CommandToken),
    /// A node, in this message on this link, when the link was to this store.
    Node(LinkId, Option<StoreId>, MessageHeader),
}

struct Asked {
    origin: Origin,
    command: Command,
}

/// How far the command under way has come.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Phase {
    /// What is to be done next follows from the committed view.
    Deciding,
    /// The node that is to hold a new store is asked what it has.
    Meeting(LinkId),
    /// A first flush, so that the one behind the barrier is short.
    Flushing(Leave),
    /// Requests are held back until no write is in flight.
    Quiescing(Leave),
    /// What was written since the first flush.
    FlushingQuiet(Leave),
    /// All is flushed, and no write is in flight.
    Leaving(Leave),
    /// Members make room.
    Growing(MemberSet),
    /// The view is being committed.
    Changing,
}

struct Running {
    asked: Asked,
    phase: Phase,
    since: Time,
    /// The node of the new store was asked, and has it.
    met: bool,
    /// Members that have room for the pool as it is to be.
    grown: MemberSet,
}

/// Commands that are not answered.
#[derive(Default)]
pub(super) struct Commands {
    waiting: VecDeque<Asked>,
    running: Option<Running>,
    /// A flush round is to begin for the one that is running.
    pub(super) wants_flush: bool,
}

impl Commands {
    /// Whether one is under way.
    pub(super) const fn is_running(&self) -> bool {
        self.running.is_some()
    }
}

impl Client {
    /// Takes in a command of the owner's. It is answered once, with [`Output::CommandDone`].
    pub fn command(&mut self, token: CommandToken, command: Command, now: Time) {
        self.now = now;
        self.take_command(Origin::Owner(token), command);
        self.pump();
    }

    /// The command that is under way.
    #[must_use]
    pub(crate) fn running_command(&self) -> Option<&Command> {
        self.commands.running.as_ref().map(|r| &r.asked.command)
    }

    /// What the command that is under way is doing, in a word.
    #[must_use]
    pub(crate) fn command_phase(&self) -> Option<(&Command, &'static str)> {
        let running = self.commands.running.as_ref()?;
        let phase = match running.phase {
            Phase::Deciding => "deciding",
            Phase::Meeting(_) => "meeting",
            Phase::Flushing(_) => "flushing",
            Phase::Quiescing(_) | Phase::FlushingQuiet(_) | Phase::Leaving(_) => "quiescing",
            Phase::Growing(_) => "growing",
            Phase::Changing => "changing",
        };
        Some((&running.asked.command, phase))
    }

    /// A node passes a command on.
    pub(super) fn command_message(&mut self, id: LinkId, header: &MessageHeader, body: &[u8]) {
        let origin = Origin::Node(id, self.link(id).and_then(|l| l.store), *header);
        match serde_json::from_slice(body) {
            Ok(command) => self.take_command(origin, command),
            Err(error) => {
                let text = format!("the command cannot be read: {error}");
                self.answer_command(&origin, &CommandReply::refused(Refusal::BadCommand, text));
            }
        }
    }

    fn take_command(&mut self, origin: Origin, command: Command) {
        if let Some(reply) = self.verify_command(&command) {
            return self.answer_command(&origin, &reply);
        }
        let refusal = match &self.state {
            State::Over(reason) => Some((Refusal::NoCoordinator, format!("the client has ended: {reason}"))),
            State::Detaching { .. } => Some((Refusal::NoCoordinator, "the client is leaving".to_owned())),
            State::Gathering { .. } | State::Attaching { .. } | State::Changing { attach: true, .. } => {
                let text = "the pool is suspended: no Clean member can be reached now".to_owned();
                Some((Refusal::Suspended, text))
            }
            State::Changing { .. } | State::Active if self.commands.waiting.len() >= MAX_COMMANDS => {
                Some((Refusal::Busy, format!("{MAX_COMMANDS} commands are waiting already")))
            }
            State::Changing { .. } | State::Active => None,
        };
        if let Some((reason, text)) = refusal {
            return self.answer_command(&origin, &CommandReply::refused(reason, text));
        }
        match &command {
            Command::Resync { member: None } => self.bring_in_now(self.view_out()),
            Command::Resync { member: Some(member) } | Command::Maintenance { member, on: false } => {
                self.bring_in_now(MemberSet::only(*member));
            }
            _ => {}
        }
        self.commands.waiting.push_back(Asked { origin, command });
        self.advance_command();
    }

    fn answer_command(&mut self, origin: &Origin, reply: &CommandReply) {
        match origin {
            Origin::Owner(token) => self.outputs.push_back(Output::CommandDone(*token, reply.clone())),
            Origin::Node(id, store, header) => {
                let is_there = |l: &super::Link| l.store == *store && matches!(l.state, LinkState::Ready(_));
                if !self.link(*id).is_some_and(is_there) {
                    return; // The node knows that the client was lost.
                }
                // A reply is plain data, which has a JSON form.
                let Ok(body) = serde_json::to_vec(reply) else { return };
                let mut header = header.reply(Kind::CommandReply, Status::Ok);
                header.payload = u32::try_from(body.len()).unwrap_or(u32::MAX);
                self.outputs.push_back(Output::Send(*id, header, Payload::Body(body)));
            }
        }
    }

    /// Refuses every command: this client cannot go on with them.
    pub(super) fn give_up_commands(&mut self, reason: Refusal, why: &str) {
        let commands = std::mem::take(&mut self.commands);
        if let Some(running) = commands.running {
            let text = format!("{why}; the command may have been done in part, repeat it to finish it");
            self.answer_command(&running.asked.origin, &CommandReply::refused(reason, text));
        }
        for asked in commands.waiting {
            self.answer_command(&asked.origin, &CommandReply::refused(reason, why));
        }
    }

    /// Does what can be done now for the command under way, or for the next.
    pub(super) fn advance_command(&mut self) {
        while self.is_active() && !self.detach_requested {
            if self.commands.running.is_none() {
                let Some(mut asked) = self.commands.waiting.pop_front() else { return };
                // The one that has the id now is meant, and no other when that is gone.
                if let Command::Remove { member, store: store @ None } = &mut asked.command {
                    *store = self.spec.as_ref().and_then(|s| s.member(*member)).map(|m| m.store);
                }
                let (phase, since) = (Phase::Deciding, self.now);
                self.commands.running =
                    Some(Running { asked, phase, since, met: false, grown: MemberSet::EMPTY });
            }
            let Some(running) = &mut self.commands.running else { return };
            match &running.phase {
                Phase::Changing => running.phase = Phase::Deciding,
                Phase::Deciding => {}
                Phase::Quiescing(leave)
                    if !self.parts.has_sent_write() && !self.parts.is_awaited_from(leave.member) =>
                {
                    running.phase = Phase::FlushingQuiet(leave.clone());
                    return self.flush_for_command();
                }
                Phase::Leaving(leave)
                    if self.parts.has_sent_write() || self.parts.is_awaited_from(leave.member) =>
                {
                    // Some were sent again when a view was committed meanwhile.
                    running.phase = Phase::Quiescing(leave.clone());
                    return;
                }
                Phase::Leaving(leave) => {
                    let leave = leave.clone();
                    return self.let_go(leave);
                }
                // Something is awaited.
                Phase::Meeting(_)
                | Phase::Flushing(_)
                | Phase::Quiescing(_)
                | Phase::FlushingQuiet(_)
                | Phase::Growing(_) => return,
            }
            let Some(step) = self.next_step() else { return };
            if !self.take_step(step) {
                return;
            }
        }
    }

    /// What the command under way needs next.
    fn next_step(&self) -> Option<Step> {
        let (running, view, spec) =
            (self.commands.running.as_ref()?, self.view.as_ref()?, self.spec.as_ref()?);
        let has_room = view.active().is_subset(running.grown);
        Some(next_step(&running.asked.command, view, spec, running.met, has_room))
    }

    /// True if there may be more to do at once.
    fn take_step(&mut self, step: Step) -> bool {
        match step {
            Step::Done => {
                let (Some(view), Some(spec)) = (self.view.clone(), self.spec.clone()) else { return false };
                self.finish_command(&CommandReply::Done { view, spec });
                true
            }
            Step::Refuse(reason, text) => {
                self.finish_command(&CommandReply::refused(reason, text));
                true
            }
            Step::Meet(address) => self.meet(address),
            Step::Leave(leave) => {
                self.set_command_phase(Phase::Flushing(leave));
                self.flush_for_command();
                false
            }
            Step::MakeRoom(size) => {
                let grown = self.commands.running.as_ref().map_or(MemberSet::EMPTY, |r| r.grown);
                let asked = self.view_active().without(grown);
                self.set_command_phase(Phase::Growing(asked));
                for member in asked.iter() {
                    let header = MessageHeader { offset: size, ..self.header(Kind::Grow) };
                    self.send(member, header, Payload::None);
                }
                false
            }
            Step::Change(step, spec) => {
                self.change_for_command(step, spec);
                false
            }
        }
    }

    /// A member leaves, unless that is not right any more.
    fn let_go(&mut self, leave: Leave) {
        if self.next_step() == Some(Step::Leave(leave.clone())) {
            return self.change_for_command(ViewStep::Lose(MemberSet::only(leave.member)), leave.spec);
        }
        self.set_command_phase(Phase::Deciding);
        self.resume_requests();
        self.advance_command();
    }

    fn flush_for_command(&mut self) {
        self.commands.wants_flush = true;
        self.start_flush();
    }

    fn change_for_command(&mut self, step: ViewStep, spec: PoolSpec) {
        let next = self.view.as_ref().map(|v| v.step(step, self.epoch));
        match next {
            Some(Ok(next)) => {
                let additions = match step {
                    // The store has nothing.
                    ViewStep::Add(member, _) => {
                        let members = MemberSet::only(member);
                        vec![DirtyAddition { members, offset: 0, length: spec.size }]
                    }
                    ViewStep::Lose(members) => self.missed_by(members),
                    _ => {
                        let size = self.spec.as_ref().map_or(spec.size, |s| s.size);
                        self.missed_growth(next.out(), size, spec.size).into_iter().collect()
                    }
                };
                self.set_command_phase(Phase::Changing);
                match step {
                    ViewStep::Lose(members) => {
                        self.stale_lost(members, |_| Cause::Operator, "an operator took it out");
                        for member in members.iter() {
                            self.note_lost(member, Cause::Operator, "an operator took it out");
                        }
                    }
                    // One that is being brought back in is another one from now on, or is to stay Out.
                    _ => self.rejoin_member().into_iter().for_each(|member| self.abort_rejoin(member)),
                }
                self.change_view(next, spec, additions, false);
            }
            Some(Err(error)) => self.finish_command(&CommandReply::refused(Refusal::Busy, error.to_string())),
            None => {}
        }
    }

    fn set_command_phase(&mut self, phase: Phase) {
        let now = self.now;
        if let Some(running) = &mut self.commands.running {
            running.phase = phase;
            running.since = now;
        }
    }

    fn finish_command(&mut self, reply: &CommandReply) {
        let Some(running) = self.commands.running.take() else { return };
        self.answer_command(&running.asked.origin, reply);
        if is_quiet(&running.phase) && self.is_active() {
            self.resume_requests();
        }
        self.dismiss_strangers();
    }

    /// Whether requests are held back for a member that is to leave.
    pub(super) fn is_command_quiescing(&self) -> bool {
        self.commands.running.as_ref().is_some_and(|r| is_quiet(&r.phase))
    }

    /// Whether the command under way wants the member to be Out, so that nobody brings it back in meanwhile.
    pub(super) fn is_held_out(&self, member: MemberId) -> bool {
        let command = self.commands.running.as_ref().map(|r| &r.asked.command);
        let is_in_maintenance =
            self.spec.as_ref().and_then(|s| s.member(member)).is_some_and(|m| m.maintenance);
        is_in_maintenance
            || command.is_some_and(|c| match c {
                Command::Remove { member: m, .. }
                | Command::Replace { member: m, .. }
                | Command::Maintenance { member: m, on: true } => *m == member,
                _ => false,
            })
    }

    /// The flush round that a command waited for is over. If it failed, what was not flushed goes on record.
    pub(super) fn command_flushed(&mut self) {
        let Some(running) = &mut self.commands.running else { return };
        match running.phase.clone() {
            Phase::Flushing(leave) => running.phase = Phase::Quiescing(leave),
            Phase::FlushingQuiet(leave) => running.phase = Phase::Leaving(leave),
            // It was for one that was given up.
            _ => return,
        }
        self.advance_command();
    }

    /// Sees to it that the node of a new store is asked what it has.
    fn meet(&mut self, address: Address) -> bool {
        let at = |l: &super::Link| !l.retired && l.address == address;
        let known = self.links.iter().position(at).and_then(|i| u8::try_from(i).ok()).map(LinkId);
        let id = match known {
            Some(id) => {
                // What it said before may be of the past: another store may be there by now.
                let is_leg = self.legs.contains(&Some(id));
                if !is_leg && !matches!(self.link(id).map(|l| &l.state), Some(LinkState::Connecting)) {
                    if !matches!(self.link(id).map(|l| &l.state), Some(LinkState::Down { .. })) {
                        self.outputs.push_back(Output::Disconnect(id));
                    }
                    if let Some(link) = self.link_mut(id) {
                        link.state = LinkState::Connecting;
                        link.store = None;
                    }
                    self.outputs.push_back(Output::Connect(id, address));
                }
                id
            }
            None => match self.add_link(address.clone()) {
                Some(id) => id,
                None => {
                    let text = format!("there are too many connections to ask the node at {address}");
                    self.finish_command(&CommandReply::refused(Refusal::Busy, text));
                    return true;
                }
            },
        };
        self.set_command_phase(Phase::Meeting(id));
        // It may be the leg of a member whose disk was exchanged, and the end of the connection may not be known yet.
        let wanted = self.running_command().and_then(new_store);
        if self.hello_of(id).is_some_and(|hello| Some(hello.store()) == wanted) {
            self.command_met(id);
        }
        false
    }

    /// Whether a command waits for what this node has.
    pub(super) fn is_met(&self, id: LinkId) -> bool {
        let store = self.link(id).and_then(|l| l.store);
        let is_its = |r: &Running| store.is_some() && store == new_store(&r.asked.command);
        self.commands.running.as_ref().is_some_and(|r| r.phase == Phase::Meeting(id) || is_its(r))
    }

    /// A node has answered; true if a command waited for it.
    pub(super) fn command_met(&mut self, id: LinkId) -> bool {
        let is_its = |r: &Running| r.phase == Phase::Meeting(id);
        let Some(running) = self.commands.running.as_ref().filter(|r| is_its(r)) else { return false };
        let (Some(hello), Some(view), Some(spec)) = (self.hello_of(id), &self.view, &self.spec) else {
            return false;
        };
        if let Err((reason, text)) = look_at(&running.asked.command, hello, view, spec) {
            self.finish_command(&CommandReply::refused(reason, text));
        } else if let Some(running) = &mut self.commands.running {
            running.met = true;
            running.phase = Phase::Deciding;
        }
        self.advance_command();
        true
    }

    pub(super) fn grow_reply(&mut self, member: MemberId, header: &MessageHeader, body: &[u8]) {
        if header.epoch != self.epoch || self.rejoin_grown(member, header, body) {
            return;
        }
        let Some(running) = &mut self.commands.running else { return };
        let Command::Grow { size } = running.asked.command else { return };
        let Phase::Growing(asked) = &mut running.phase else { return };
        if header.offset != size || !asked.remove(member) {
            return;
        }
        if header.status == Status::Ok {
            running.grown.insert(member);
            let is_last = asked.is_empty();
            if is_last {
                running.phase = Phase::Deciding;
                self.advance_command();
            }
            return;
        }
        let text = String::from_utf8_lossy(body);
        let text = format!("member {member} cannot hold {size} bytes: {text}");
        self.finish_command(&CommandReply::refused(Refusal::NoRoom, text));
        self.advance_command();
    }

    /// Members were lost. They need not have room: they make some when they come back.
    pub(super) fn commands_lost(&mut self, members: MemberSet) {
        let Some(running) = &mut self.commands.running else { return };
        running.grown = running.grown.without(members);
        if let Phase::Growing(asked) = &mut running.phase {
            *asked = asked.without(members);
        }
    }

    /// Time has passed.
    pub(super) fn tick_commands(&mut self) {
        self.advance_command();
        let (now, limit) = (self.now, self.config.leg_timeout * 2);
        let Some(running) = &mut self.commands.running else { return };
        let is_late = now - running.since > limit;
        let refusal = match &mut running.phase {
            Phase::Meeting(id) if is_late => {
                let id = *id;
                match self.links.get(usize::from(id.0)) {
                    Some(link) if matches!(link.state, LinkState::Ready(_)) => {
                        let text = format!("the node at {} has another store of the pool", link.address);
                        Some((Refusal::StoreNotFound, text))
                    }
                    link => {
                        let error = link.map_or("", |l| l.last_error.as_str());
                        let text = format!("the node of the new store does not answer: {error}");
                        Some((Refusal::Unreachable, text))
                    }
                }
            }
            Phase::Flushing(_) | Phase::Quiescing(_) | Phase::FlushingQuiet(_) | Phase::Leaving(_)
                if is_late =>
            {
                Some((Refusal::Busy, "the pool is too busy to let a member go".to_owned()))
            }
            Phase::Growing(asked) if asked.is_empty() => {
                running.phase = Phase::Deciding;
                None
            }
            _ => None,
        };
        if let Some((reason, text)) = refusal {
            self.finish_command(&CommandReply::refused(reason, text));
        }
        self.advance_command();
    }
}

/// Whether requests are held back.
const fn is_quiet(phase: &Phase) -> bool {
    matches!(phase, Phase::Quiescing(_) | Phase::FlushingQuiet(_) | Phase::Leaving(_))
}
