//! Arguments of the commands that change a pool in use.

use std::str::FromStr;
use std::time::Duration;

use clap::{Args, ValueEnum};
use rmr_common::pool::{MAX_MEMBERS, MemberId};

use super::args::{MemberArg, StoreArgs, parse_create_timeout};
use crate::admin::api::PoolKey;
use crate::store::ByteSize;

/// A member by its number, as `rmrctl status` shows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemberNumber(pub MemberId);

impl FromStr for MemberNumber {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let id = text.parse().ok().and_then(MemberId::new);
        id.map(Self).ok_or_else(|| {
            format!(
                "'{text}' is no member: expected its number, 0 to {}, as `rmrctl status` shows it",
                MAX_MEMBERS - 1
            )
        })
    }
}

/// Whether to wait for copies to be current.
#[derive(Clone, Debug, Args)]
pub struct WaitArgs {
    /// Wait until the copy is current, and show how far it is. Without a guest, rmrctl holds the pool meanwhile
    #[arg(long)]
    pub wait: bool,
    /// Wait no longer than this, in seconds
    #[arg(long, value_name = "SECONDS", value_parser = parse_create_timeout)]
    pub wait_timeout: Option<Duration>,
}

/// Arguments of `pool add-member`.
#[derive(Clone, Debug, Args)]
pub struct AddMemberArgs {
    /// Name or uuid of the pool
    #[arg(value_name = "NAME|UUID")]
    pub pool: PoolKey,
    /// Admin address of the new copy's node, with the device or file to use there
    #[arg(long, value_name = "HOST:PORT[=PATH]")]
    pub member: MemberArg,
    /// How its store is made.
    #[command(flatten)]
    pub store: StoreArgs,
    /// Whether to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// Arguments of `pool remove-member`.
#[derive(Clone, Debug, Args)]
pub struct RemoveMemberArgs {
    /// Name or uuid of the pool
    #[arg(value_name = "NAME|UUID")]
    pub pool: PoolKey,
    /// Number of the member
    pub member: MemberNumber,
    /// Delete its store, too; otherwise it stays as it is, and belongs to nothing any more
    #[arg(long)]
    pub delete_store: bool,
}

/// Arguments of `pool replace`.
#[derive(Clone, Debug, Args)]
pub struct ReplaceArgs {
    /// Name or uuid of the pool
    #[arg(value_name = "NAME|UUID")]
    pub pool: PoolKey,
    /// Number of the member whose disk is replaced
    pub number: MemberNumber,
    /// Admin address of the node of its new store, with the device or file to use there; the same node or another one
    #[arg(long, value_name = "HOST:PORT[=PATH]")]
    pub member: MemberArg,
    /// How its store is made.
    #[command(flatten)]
    pub store: StoreArgs,
    /// Whether to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// Arguments of `pool move`.
#[derive(Clone, Debug, Args)]
pub struct MoveArgs {
    /// Name or uuid of the pool
    #[arg(value_name = "NAME|UUID")]
    pub pool: PoolKey,
    /// Number of the member that leaves
    pub member: MemberNumber,
    /// Admin address of the node that the copy moves to, with the device or file to use there
    #[arg(long, value_name = "HOST:PORT[=PATH]")]
    pub to: MemberArg,
    /// Delete the store that was moved away from, in the end
    #[arg(long)]
    pub delete_store: bool,
    /// How the new store is made.
    #[command(flatten)]
    pub store: StoreArgs,
    /// Wait for the new copy no longer than this, in seconds
    #[arg(long, value_name = "SECONDS", value_parser = parse_create_timeout)]
    pub wait_timeout: Option<Duration>,
}

/// On or off.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Switch {
    /// On.
    On,
    /// Off.
    Off,
}

/// Arguments of `pool maintenance`.
#[derive(Clone, Debug, Args)]
pub struct MaintenanceArgs {
    /// Name or uuid of the pool
    #[arg(value_name = "NAME|UUID")]
    pub pool: PoolKey,
    /// Number of the member
    pub member: MemberNumber,
    /// on: its node may be stopped, what it misses is recorded; off: it is brought up to date
    pub switch: Switch,
    /// Whether to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// Arguments of `pool grow`.
#[derive(Clone, Debug, Args)]
pub struct GrowArgs {
    /// Name or uuid of the pool
    #[arg(value_name = "NAME|UUID")]
    pub pool: PoolKey,
    /// The new size, e.g. 40G (1024-based), a multiple of 4096 bytes
    #[arg(long)]
    pub size: ByteSize,
    /// Longest time that it may take, in seconds: a device that cannot zero itself is written
    #[arg(long, value_name = "SECONDS", default_value = "3600", value_parser = parse_create_timeout)]
    pub grow_timeout: Duration,
}

/// Arguments of `pool force-from`.
#[derive(Clone, Debug, Args)]
pub struct ForceFromArgs {
    /// Name or uuid of the pool
    #[arg(value_name = "NAME|UUID")]
    pub pool: PoolKey,
    /// Number of the member to go on with
    pub member: MemberNumber,
    /// Say that you mean it: what only other members have is lost for ever
    #[arg(long)]
    pub yes_lose_what_others_have: bool,
    /// Say that members which cannot be reached now will never come back with what they have: nobody can tell them of this, and
    /// a client that reaches only them would go on from there
    #[arg(long)]
    pub unreachable_are_gone: bool,
}

/// Arguments of `pool resync`.
#[derive(Clone, Debug, Args)]
pub struct ResyncArgs {
    /// Name or uuid of the pool
    #[arg(value_name = "NAME|UUID")]
    pub pool: PoolKey,
    /// Wait no longer than this, in seconds
    #[arg(long, value_name = "SECONDS", value_parser = parse_create_timeout)]
    pub wait_timeout: Option<Duration>,
}
