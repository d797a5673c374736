//! What an operator may ask of a pool's coordinator while the pool is in use, and what it answers.
//!
//! The same JSON goes through a node's admin API, from the node to the coordinator, and back. Every command may be
//! repeated: one that has been done already is answered with [`CommandReply::Done`] and changes nothing.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Address, MemberId, PoolSpec, StoreId, VerifyOptions, VerifyReport, View};

/// A change of a pool in use. A move to another node is an addition, the wait until the new member is Clean, and a removal.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
pub enum Command {
    /// A new member, whose store exists already and is empty. It starts Out and wholly stale, and is brought in by itself.
    Add {
        /// The store.
        store: StoreId,
        /// Where its node listens.
        address: Address,
        /// The id that the store was made for; the lowest free one if it is not said.
        member: Option<MemberId>,
    },
    /// A member leaves for good. An active one is taken Out first, with nothing lost.
    Remove {
        /// The member.
        member: MemberId,
        /// The store that is meant, so that a repetition never hits another one that has the id by then.
        store: Option<StoreId>,
    },
    /// A member gets another store, which is empty, or its store has moved to another address. An active member whose
    /// store changes is taken Out first.
    Replace {
        /// The member.
        member: MemberId,
        /// The store from now on.
        store: StoreId,
        /// Where its node listens.
        address: Address,
    },
    /// Nodes have other addresses than the pool knows; the stores are the same. All of them change in one view, so that two
    /// nodes may have each other's address.
    Readdress {
        /// The members with their addresses from now on. The others stay as they are.
        members: Vec<MemberAddress>,
    },
    /// A member is taken Out with nothing lost, and stays Out until this is switched off.
    Maintenance {
        /// The member.
        member: MemberId,
        /// Whether it is to be Out.
        on: bool,
    },
    /// Members that are Out are brought in now: the pauses after failed rejoins are forgotten, and so are the read errors for
    /// which one was left out. A member in maintenance stays out.
    Resync {
        /// The member; all of them if it is not said.
        #[serde(default)]
        member: Option<MemberId>,
    },
    /// The pool gets larger. All active members make room first; if one cannot, nothing changes.
    Grow {
        /// The new size in bytes, a multiple of 4096.
        size: u64,
    },
    /// All Clean members are compared with each other, while the pool is in use. Answered when it has begun; so are the
    /// two below, with [`CommandReply::Verify`].
    Verify {
        /// How.
        #[serde(default)]
        options: VerifyOptions,
    },
    /// How far the verify is that is under way, or how the last one of this client ended.
    VerifyStatus,
    /// Gives up the verify that is under way.
    VerifyCancel,
}

/// The address of a member from now on.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberAddress {
    /// The member.
    pub member: MemberId,
    /// The store that it must have: a command for a member that was replaced meanwhile changes nothing.
    pub store: StoreId,
    /// Where its node listens.
    pub address: Address,
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Add { store, address, member: Some(member) } => {
                write!(f, "add member {member} with store {store} at {address}")
            }
            Self::Add { store, address, member: None } => write!(f, "add store {store} at {address}"),
            Self::Remove { member, .. } => write!(f, "remove member {member}"),
            Self::Replace { member, store, address } => {
                write!(f, "replace the store of member {member} by {store} at {address}")
            }
            Self::Readdress { members } => {
                let list: Vec<_> = members.iter().map(|m| format!("{} at {}", m.member, m.address)).collect();
                write!(f, "new addresses of members: {}", list.join(", "))
            }
            Self::Maintenance { member, on: true } => write!(f, "maintenance of member {member}"),
            Self::Maintenance { member, on: false } => write!(f, "end of the maintenance of member {member}"),
            Self::Resync { member: Some(member) } => write!(f, "bring member {member} in now"),
            Self::Resync { member: None } => f.write_str("bring all members in now"),
            Self::Grow { size } => write!(f, "grow to {size} bytes"),
            Self::Verify { options } if options.repair => f.write_str("verify and repair"),
            Self::Verify { .. } => f.write_str("verify"),
            Self::VerifyStatus => f.write_str("status of the verify"),
            Self::VerifyCancel => f.write_str("end of the verify"),
        }
    }
}

/// Why a command was not carried out. Unless its text says otherwise, nothing has changed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// No client is attached that could do it.
    NoCoordinator,
    /// The client left, or was lost, before it answered: the command may have been done or not. Repeating it tells.
    CoordinatorLost,
    /// No Clean member can be reached now. The command may have been done in part; repeating it finishes it.
    Suspended,
    /// Too many commands are waiting, or the pool is too busy to carry this one out in time.
    Busy,
    /// The command cannot be read.
    BadCommand,
    /// The pool has no such member.
    UnknownMember,
    /// Without the member the pool would have no Clean one.
    LastClean,
    /// The pool has as many members as it may have.
    TooManyMembers,
    /// The id belongs to a member with another store.
    MemberIdTaken,
    /// The store is another member already, or has a history of its own.
    StoreInUse,
    /// Another member has that address.
    AddressInUse,
    /// Nobody answers at the address.
    Unreachable,
    /// The node at the address does not have that store as that member of this pool.
    StoreNotFound,
    /// The size is smaller than the pool, not a multiple of 4096, or too large.
    BadSize,
    /// The store of a member cannot be made as large.
    NoRoom,
    /// The member is reached over TLS or RDMA, and would be reached with less protection at the new address.
    WeakerAddress,
    /// A verify cannot do what is asked: one is under way, or there are too few Clean members.
    CannotVerify,
}

/// What became of a command.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "snake_case", deny_unknown_fields)]
pub enum CommandReply {
    /// It is done, now or earlier: the pool as it is.
    Done {
        /// The committed view.
        view: View,
        /// The specification that goes with it.
        spec: PoolSpec,
    },
    /// What the verify of the pool has done and found, if there ever was one under this client.
    Verify {
        /// The report.
        report: Option<Box<VerifyReport>>,
    },
    /// It was not carried out.
    Refused {
        /// Why, for programs.
        reason: Refusal,
        /// Why, for people.
        text: String,
    },
}

impl CommandReply {
    /// A refusal.
    #[must_use]
    pub fn refused(reason: Refusal, text: impl Into<String>) -> Self {
        Self::Refused { reason, text: text.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_and_replies_read_back_from_json_and_unknown_fields_are_refused() {
        let member = MemberId::new(2).unwrap();
        let (store, address) = (StoreId::random(), Address::tcp("node-c", 7700));
        for command in [
            Command::Add { store, address: address.clone(), member: Some(member) },
            Command::Remove { member, store: None },
            Command::Readdress { members: vec![MemberAddress { member, store, address: address.clone() }] },
            Command::Replace { member, store, address },
            Command::Maintenance { member, on: true },
            Command::Resync { member: None },
            Command::Resync { member: Some(member) },
            Command::Grow { size: 1 << 30 },
            Command::Verify {
                options: VerifyOptions { repair: true, trust: Some(member), ..Default::default() },
            },
            Command::VerifyStatus,
            Command::VerifyCancel,
        ] {
            let text = serde_json::to_string(&command).unwrap();
            assert_eq!(serde_json::from_str::<Command>(&text).unwrap(), command, "{text}");
        }
        let text = r#"{"command":"grow","size":1048576,"shrink":true}"#;
        assert!(serde_json::from_str::<Command>(text).is_err());
        let reply = CommandReply::refused(Refusal::LastClean, "no");
        let text = serde_json::to_string(&reply).unwrap();
        assert_eq!(text, r#"{"result":"refused","reason":"last_clean","text":"no"}"#);
        assert_eq!(serde_json::from_str::<CommandReply>(&text).unwrap(), reply);
    }
}
