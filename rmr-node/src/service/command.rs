//! Operators' commands on a node: from the admin API or from another node of the pool to the client that is attached here,
//! and its answers back. A command from another node goes no further than that: so none goes in circles.

use std::sync::Arc;
use std::time::Duration;

use rmr_common::pool::{Command as PoolCommand, CommandReply, MemberId, PoolId, PoolSpec, Refusal};
use rmr_common::replica::{CommandId, ConnectionId};
use rmr_common::wire::{Kind, MessageHeader, Role, Status};

use super::Shared;
use super::forward::{Forward, Forwarded};
use super::shard::Shard;
use crate::admin::Responder;
use crate::admin::api::{ControlError, ErrorCode};

/// Longest time to connect to another node of the pool that is asked for the client.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A client that makes devices larger answers when they have zeroed themselves.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// Longest command that another node may pass on, in bytes of JSON.
const MAX_COMMAND: usize = 64 << 10;

/// What a shard says of a command of the admin API.
pub(super) struct Answered {
    pub(super) reply: CommandReply,
    /// The pool as this node knows it, and which member this node is.
    pub(super) spec: PoolSpec,
    pub(super) member: MemberId,
}

/// Who waits for the answer to a command.
pub(super) enum Asker {
    Admin(Responder<Answered>),
    Node(ConnectionId, MessageHeader),
}

impl Shard {
    /// The admin API gives a command for a pool.
    pub(super) fn admin_command(
        &mut self,
        pool: PoolId,
        command: &PoolCommand,
        responder: Responder<Answered>,
    ) {
        match self.member_of_pool(pool) {
            Some(index) => self.take_command(index, command, Asker::Admin(responder)),
            None => {
                let text = "the store of the pool is being closed on this node";
                responder.send(Err(ControlError::new(ErrorCode::NotFound, text)));
            }
        }
    }

    /// Another node passes a command on.
    pub(super) fn node_command(&mut self, connection: ConnectionId, header: &MessageHeader, body: &[u8]) {
        let Some(index) = self.member_of_connection(connection) else { return };
        let asker = Asker::Node(connection, *header);
        if body.len() > MAX_COMMAND {
            let text = format!("a command of {} bytes: expected at most {MAX_COMMAND}", body.len());
            return self.answer(index, asker, CommandReply::refused(Refusal::BadCommand, text));
        }
        match serde_json::from_slice(body) {
            Ok(command) => self.take_command(index, &command, asker),
            Err(error) => {
                let text = format!("the command cannot be read: {error}");
                self.answer(index, asker, CommandReply::refused(Refusal::BadCommand, text));
            }
        }
    }

    fn take_command(&mut self, index: usize, command: &PoolCommand, asker: Asker) {
        let id = self.next_command();
        let withheld = match &asker {
            Asker::Admin(_) => Some(None),
            Asker::Node(..) => self.may_log(|throttles| &mut throttles.commands),
        };
        let Some(member) = self.member_mut(index) else { return };
        if let Some(withheld) = withheld {
            tracing::info!(pool = %member.replica.spec().name, withheld, "asked by an operator: {command}");
        }
        member.commands.push((id, asker));
        member.replica.command(id, command);
        self.activate(index);
    }

    /// The replica has the answer.
    pub(super) fn command_done(&mut self, index: usize, id: CommandId, reply: CommandReply) {
        let Some(member) = self.member_mut(index) else { return };
        let Some(at) = member.commands.iter().position(|(asked, _)| *asked == id) else { return };
        let (_, asker) = member.commands.swap_remove(at);
        self.answer(index, asker, reply);
    }

    fn answer(&mut self, index: usize, asker: Asker, reply: CommandReply) {
        let Some(member) = self.member_mut(index) else { return };
        let (spec, member) = (member.replica.spec().clone(), member.replica.member());
        match asker {
            Asker::Admin(responder) => responder.send(Ok(Answered { reply, spec, member })),
            Asker::Node(connection, header) => {
                let Ok(body) = serde_json::to_vec(&reply) else { return };
                let mut answer = header.reply(Kind::CommandReply, Status::Ok);
                answer.payload = u32::try_from(body.len()).unwrap_or(u32::MAX);
                self.send_body(connection, &answer, body);
            }
        }
    }
}

/// Asks the other members' nodes in turn, when no client is attached to this one. Blocks.
pub(super) fn ask_others(shared: &Arc<Shared>, asked: Answered, command: &PoolCommand) -> CommandReply {
    let Answered { reply, spec, member } = asked;
    if !matches!(reply, CommandReply::Refused { reason: Refusal::NoCoordinator, .. }) {
        return reply;
    }
    let mut said = vec![format!("member {member} (this node): no client is attached")];
    let keys = match shared.keys.of(spec.id, &spec.name) {
        Ok(keys) => keys,
        Err(reason) => return CommandReply::refused(Refusal::NoCoordinator, reason),
    };
    for other in spec.members.iter().filter(|m| m.id != member) {
        let forward = Forward {
            address: &other.address,
            pool: spec.id,
            role: Role::Peer,
            description: format!("node {}, for an operator", shared.config.node_name),
            connect_timeout: CONNECT_TIMEOUT.min(shared.config.leg_timeout),
            answer_timeout: ANSWER_TIMEOUT,
            fabric: &shared.fabric,
            keys: keys.clone(),
            tls: shared.client_tls.clone(),
            tls_only: shared.config.is_tls_only(),
        };
        match forward.run(command) {
            Forwarded::Answered(CommandReply::Refused { reason: Refusal::NoCoordinator, .. }) => {
                said.push(format!("member {}: no client is attached", other.id));
            }
            Forwarded::Answered(reply) => return reply,
            Forwarded::NotSent(why) => said.push(format!("member {}: {why}", other.id)),
            Forwarded::Lost(why) => {
                let text = format!(
                    "the node of member {} did not answer: {why}; the command may have been done or not, repeat it to know",
                    other.id
                );
                return CommandReply::refused(Refusal::CoordinatorLost, text);
            }
        }
    }
    CommandReply::refused(
        Refusal::NoCoordinator,
        format!("no client of pool '{}' was found: {}", spec.name, said.join("; ")),
    )
}
