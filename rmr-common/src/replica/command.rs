//! Operators' commands on their way through a node: to the client that is attached, and its answers back.

use super::{ConnectionId, Output, Replica, ReplyPayload};
use crate::pool::{Command, CommandReply, Refusal};
use crate::wire::{Kind, MessageHeader};

/// Most commands that wait for the client's answer; more are refused.
const MAX_COMMANDS: usize = 16;

/// Names a command to the node that took it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct CommandId(pub u64);

/// Commands that the client was given and has not answered, by the sequence of their message.
#[derive(Default)]
pub(super) struct Commands {
    waiting: Vec<(u64, CommandId)>,
    next: u64,
}

impl Replica {
    /// Passes an operator's command to the client that is attached. Each is answered once with [`Output::CommandDone`]:
    /// with the client's words, or with a refusal when no client is attached or it is lost before it has answered.
    pub fn command(&mut self, id: CommandId, command: &Command) {
        let refuse = |this: &mut Self, reason, text: &str| {
            this.outputs.push_back(Output::CommandDone(id, CommandReply::refused(reason, text)));
        };
        let Some(connection) = self.holder_connection().filter(|_| self.attach.is_none()) else {
            return refuse(self, Refusal::NoCoordinator, "no client is attached to the pool on this node");
        };
        if self.commands.waiting.len() >= MAX_COMMANDS {
            return refuse(self, Refusal::Busy, "16 commands wait for the client already");
        }
        let Ok(body) = serde_json::to_vec(command) else {
            return refuse(self, Refusal::BadCommand, "the command has no JSON form");
        };
        self.commands.next += 1;
        let sequence = self.commands.next;
        self.commands.waiting.push((sequence, id));
        let header = MessageHeader {
            epoch: self.epoch,
            view: self.view.number,
            sequence: crate::pool::Sequence(sequence),
            payload: u32::try_from(body.len()).unwrap_or(u32::MAX),
            ..MessageHeader::new(Kind::Command, self.spec.id)
        };
        self.outputs.push_back(Output::Send(connection, header, ReplyPayload::Body(body)));
    }

    /// The client has answered. Answers to what was given up meanwhile are of no interest.
    pub(super) fn command_reply(&mut self, connection: ConnectionId, header: &MessageHeader, body: &[u8]) {
        if self.holder_connection() != Some(connection) {
            return;
        }
        let waiting = &mut self.commands.waiting;
        let Some(at) = waiting.iter().position(|(s, _)| *s == header.sequence.0) else { return };
        let (_, id) = waiting.remove(at);
        let reply = serde_json::from_slice(body).unwrap_or_else(|error| {
            CommandReply::refused(
                Refusal::CoordinatorLost,
                format!("the client's answer cannot be read: {error}"),
            )
        });
        self.outputs.push_back(Output::CommandDone(id, reply));
    }

    /// The client is gone, or another one is in its place.
    pub(super) fn lose_commands(&mut self, why: &str) {
        for (_, id) in std::mem::take(&mut self.commands.waiting) {
            let text = format!("{why}; the command may have been done or not, repeat it to know");
            let reply = CommandReply::refused(Refusal::CoordinatorLost, text);
            self.outputs.push_back(Output::CommandDone(id, reply));
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::replica::tests::Bench;

    use super::*;
    use crate::replica::Event;

    fn grow() -> Command {
        Command::Grow { size: 1 << 30 }
    }

    fn done(bench: &mut Bench) -> Vec<(CommandId, Option<Refusal>)> {
        let reason =
            |reply| if let CommandReply::Refused { reason, .. } = reply { Some(reason) } else { None };
        let (done, rest) = std::mem::take(&mut bench.outputs)
            .into_iter()
            .partition::<Vec<_>, _>(|o| matches!(o, Output::CommandDone(..)));
        bench.outputs = rest;
        let pair = |o| if let Output::CommandDone(id, reply) = o { Some((id, reason(reply))) } else { None };
        done.into_iter().filter_map(pair).collect()
    }

    #[test]
    fn without_a_client_a_command_is_refused_at_once() {
        let mut bench = Bench::new(true);
        bench.command(CommandId(1), &grow());
        assert_eq!(done(&mut bench), vec![(CommandId(1), Some(Refusal::NoCoordinator))]);
        bench.attach(1, 1);
        bench.command(CommandId(2), &grow());
        assert_eq!(done(&mut bench), vec![(CommandId(2), Some(Refusal::NoCoordinator))], "it is attaching");
    }

    #[test]
    fn the_clients_answer_finds_the_command_that_it_is_for() {
        let mut bench = Bench::new(true);
        bench.attach(1, 1);
        bench.durable();
        bench.command(CommandId(1), &grow());
        bench.command(CommandId(2), &grow());
        let body = serde_json::to_vec(&CommandReply::refused(Refusal::NoRoom, "full")).unwrap();
        let header =
            MessageHeader { sequence: crate::pool::Sequence(2), ..bench.header(Kind::CommandReply, 1) };
        bench.message(7, header, &body);
        assert_eq!(done(&mut bench), vec![], "it is not the client's connection");
        bench.message(1, header, &body);
        bench.message(1, header, &body);
        assert_eq!(done(&mut bench), vec![(CommandId(2), Some(Refusal::NoRoom))]);
        bench.message(1, MessageHeader { sequence: crate::pool::Sequence(1), ..header }, b"{");
        assert_eq!(done(&mut bench), vec![(CommandId(1), Some(Refusal::CoordinatorLost))]);
    }

    #[test]
    fn a_client_that_is_lost_or_displaced_leaves_no_command_unanswered() {
        for is_displaced in [false, true] {
            let mut bench = Bench::new(true);
            bench.attach(1, 1);
            bench.durable();
            bench.command(CommandId(1), &grow());
            if is_displaced {
                bench.attach(2, 2);
            } else {
                bench.apply(Event::Closed(ConnectionId(1)));
            }
            assert_eq!(done(&mut bench), vec![(CommandId(1), Some(Refusal::CoordinatorLost))]);
        }
    }

    #[test]
    fn commands_that_wait_are_bounded() {
        let mut bench = Bench::new(true);
        bench.attach(1, 1);
        bench.durable();
        for id in 0..17 {
            bench.command(CommandId(id), &grow());
        }
        assert_eq!(done(&mut bench), vec![(CommandId(16), Some(Refusal::Busy))]);
    }
}
