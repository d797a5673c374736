//! Operators' commands: changes of the pool while it is in use.

use super::{Client, LinkId, Output, Payload, State};
use crate::pool::{Command, CommandReply, Refusal};
use crate::time::Time;
use crate::wire::{Kind, MessageHeader};

/// Names a command to its maker. Unique among the commands that are not answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct CommandToken(pub u64);

/// Who gave a command.
pub(super) enum Origin {
    /// The owner of the client.
    Owner(CommandToken),
    /// A node, in this message.
    Node(LinkId, MessageHeader),
}

impl Client {
    /// Takes in a command of the owner's. It is answered once, with [`Output::CommandDone`].
    pub fn command(&mut self, token: CommandToken, command: Command, now: Time) {
        self.now = now;
        self.take_command(Origin::Owner(token), command);
        self.pump();
    }

    /// A node passes a command on.
    pub(super) fn command_message(&mut self, link: LinkId, header: &MessageHeader, body: &[u8]) {
        let origin = Origin::Node(link, *header);
        match serde_json::from_slice(body) {
            Ok(command) => self.take_command(origin, command),
            Err(error) => {
                self.answer_command(
                    &origin,
                    CommandReply::refused(
                        Refusal::BadCommand,
                        format!("the command cannot be read: {error}"),
                    ),
                );
            }
        }
    }

    fn take_command(&mut self, origin: Origin, command: Command) {
        if let Some(reply) = self.verify_command(&command) {
            return self.answer_command(&origin, reply);
        }
        let (reason, text) = match &self.state {
            State::Over(reason) => (Refusal::NoCoordinator, format!("the client has ended: {reason}")),
            _ => (Refusal::Busy, format!("not possible now: {command}")),
        };
        self.answer_command(&origin, CommandReply::refused(reason, text));
    }

    fn answer_command(&mut self, origin: &Origin, reply: CommandReply) {
        match origin {
            Origin::Owner(token) => self.outputs.push_back(Output::CommandDone(*token, reply)),
            Origin::Node(link, header) => {
                // The view and the words of a reply have a JSON form.
                let Ok(body) = serde_json::to_vec(&reply) else { return };
                let mut header = header.reply(Kind::CommandReply, crate::wire::Status::Ok);
                header.payload = u32::try_from(body.len()).unwrap_or(u32::MAX);
                self.outputs.push_back(Output::Send(*link, header, Payload::Body(body)));
            }
        }
    }
}
