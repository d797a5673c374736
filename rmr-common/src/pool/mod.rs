//! What a pool is: identities, units, its specification, and the views that say which member is current.
//!
//! No I/O happens here; everything is a plain value that can be compared, printed and put into a message.

mod command;
mod condition;
mod id;
mod position;
mod spec;
mod verify;
mod view;

pub use command::{Command, CommandReply, MemberAddress, Refusal};
pub use condition::{Cause, Condition};
pub use id::{
    Block, BootId, Chunk, ClientId, Epoch, MAX_NUMBER, Mark, MemberId, MemberSet, PoolId, Sequence, Slot,
    StoreId, ViewNumber,
};
pub use position::{Attested, Position};
pub use spec::{
    Address, AddressError, BLOCK_SIZE, ChunkSize, MAX_CHUNK_SIZE, MAX_MEMBERS, MAX_NAME_LENGTH,
    MAX_POOL_SIZE, MIN_CHUNK_SIZE, MemberSpec, PoolSpec, SpecError, TransportKind,
};
pub use verify::{VerifiedMember, VerifyDifference, VerifyOptions, VerifyOutcome, VerifyReport, VerifyState};
pub(crate) use view::FORCED_JUMP;
pub use view::{IllegalStep, MemberState, MemberView, View, ViewError, ViewStep};
