//! The command line of `rmrctl`: global options, commands, and the arguments of those that make, show and delete pools.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use rmr_common::auth::KeyRing;
use rmr_common::pool::TransportKind;
use rmr_common::transport::tls::{ClientTls, IdentityFiles};

use super::CtlError;
use super::change_args::{
    AddMemberArgs, ForceFromArgs, GrowArgs, MaintenanceArgs, MoveArgs, RemoveMemberArgs, ReplaceArgs,
    ResyncArgs,
};
use super::http::NodeAddress;
use super::store::StoreCommand;
use super::verify::VerifyArgs;
use crate::admin::api::PoolKey;
use crate::store::ByteSize;

/// Heading of the options that every command has.
const GLOBAL: &str = "Options of every command";

const EXAMPLES: &str = "\
Examples:
  rmrctl pool create vm-1 --size 20G --member node-a --member node-b:7701=/dev/vdb
  rmrctl --node node-a --node node-b status
  rmrctl status vm-1 --watch
  RMR_NODES=node-a,node-b rmrctl pool list --json

Exit codes: 0 done (status: every copy current), 1 failed, 2 wrong usage,
  3 status: degraded, 4 status: suspended or unknown, 5 verify: copies differ,
  6 status: every pool that was seen is safe, but a node did not answer";

const CREATE_EXAMPLES: &str = "\
Examples:
  rmrctl pool create vm-1 --size 20G --member node-a --member node-b
  rmrctl pool create db --size 1T --member node-a=/dev/vdb --member node-b=/dev/vdc

Either every member's store is made, or none: after a failure or an interrupt,
what was made is removed again.";

const STATUS_EXAMPLES: &str = "\
Examples:
  rmrctl --node node-a --node node-b status
  rmrctl --node node-a --node node-b status vm-1 --watch 5

Name every node that holds a member: a pool is SAFE only when all its copies were seen.
Exit codes: 0 every copy current, 3 degraded, 4 suspended or unknown (the worst pool counts),
  6 every pool that was seen is safe, but a node did not answer";

const ADD_EXAMPLES: &str = "\
Examples:
  rmrctl --node node-a pool add-member vm-1 --member node-c --wait
  rmrctl --node node-a pool add-member vm-1 --member node-c=/dev/vdb

Run the same command again after a failure: what is done is not done twice.";

const VERIFY_EXAMPLES: &str = "\
Examples:
  rmrctl --node node-a --node node-b pool verify vm-1 --wait
  rmrctl --node node-a pool verify vm-1 --rate 100M
  rmrctl --node node-a pool verify vm-1 --repair --trust 0 --wait

Exit codes: 0 begun, or done and no copy differs (any more), 1 failed or interrupted,
  5 copies differ and were not repaired";

const REPLACE_EXAMPLES: &str = "\
Examples:
  rmrctl --node node-a pool replace vm-1 1 --member node-b=/dev/vdc --wait

Run the same command again after a failure: what is done is not done twice.";

/// Creates, changes, shows and deletes replicated disks on storage nodes.
#[derive(Clone, Debug, Parser)]
#[command(name = "rmrctl", version, after_help = EXAMPLES, propagate_version = true)]
pub struct Cli {
    /// Admin address of a node, HOST or HOST:PORT; repeat it for each node [default: 127.0.0.1:7701]
    #[arg(long = "node", value_name = "HOST:PORT", global = true, env = "RMR_NODES", value_delimiter = ',', help_heading = GLOBAL)]
    pub nodes: Vec<NodeAddress>,
    /// Print JSON for programs
    #[arg(long, global = true, help_heading = GLOBAL)]
    pub json: bool,
    /// Longest wait for an answer of a node, in seconds
    #[arg(long, value_name = "SECONDS", global = true, default_value = "10", value_parser = parse_timeout, help_heading = GLOBAL)]
    pub timeout: Duration,
    /// A client that left without a goodbye is gone for good, its host is dead: rmrctl may take its place where a command needs it,
    /// and the client is fenced should it come back
    #[arg(long, global = true, help_heading = GLOBAL)]
    pub client_is_gone: bool,
    /// File with the key of the pool, where a command attaches to a pool with a key itself; only its owner may have access to it
    #[arg(long, value_name = "FILE", global = true, env = "RMR_KEY_FILE", help_heading = GLOBAL)]
    pub key_file: Option<PathBuf>,
    /// Authorities, in PEM form, to trust on tls:// addresses, where a command attaches to a pool itself
    #[arg(long, value_name = "FILE", global = true, env = "RMR_TLS_AUTHORITIES", help_heading = GLOBAL)]
    pub tls_authorities: Option<PathBuf>,
    /// Certificate to show to nodes that ask for one, in PEM form
    #[arg(long, value_name = "FILE", global = true, env = "RMR_TLS_CERTIFICATE", help_heading = GLOBAL)]
    pub tls_certificate: Option<PathBuf>,
    /// Private key of the certificate, in PEM form
    #[arg(long, value_name = "FILE", global = true, env = "RMR_TLS_KEY", help_heading = GLOBAL)]
    pub tls_key: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

impl Cli {
    pub(super) fn keys(&self) -> Result<KeyRing, CtlError> {
        let keys = self.key_file.as_deref().map(KeyRing::from_file).transpose();
        keys.map(Option::unwrap_or_default).map_err(|e| CtlError::failed(e.to_string()))
    }

    pub(super) fn tls(&self) -> Result<Option<ClientTls>, CtlError> {
        let identity = match (&self.tls_certificate, &self.tls_key) {
            (Some(certificate), Some(key)) => {
                Some(IdentityFiles { certificate: certificate.clone(), key: key.clone() })
            }
            (None, None) => None,
            _ => return Err(CtlError::failed("expected --tls-certificate and --tls-key, found one of them")),
        };
        match &self.tls_authorities {
            Some(path) => ClientTls::load(path, identity.as_ref())
                .map(Some)
                .map_err(|e| CtlError::failed(e.to_string())),
            None if identity.is_some() => {
                Err(CtlError::failed("expected --tls-authorities beside --tls-certificate"))
            }
            None => Ok(None),
        }
    }
}

/// The commands.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Create, show, list, change and delete pools
    #[command(subcommand)]
    Pool(PoolCommand),
    /// Tell pools of changes of their members' nodes
    #[command(subcommand)]
    Member(MemberCommand),
    /// List, open, close and delete stores of nodes, while the nodes run
    #[command(subcommand)]
    Store(StoreCommand),
    /// Is the data safe, and how long until it is
    #[command(after_help = STATUS_EXAMPLES)]
    Status(StatusArgs),
    /// Facts of nodes
    #[command(subcommand)]
    Node(NodeCommand),
    /// Say which transports this machine can use to reach nodes, and what is missing; asks no node
    #[command(after_help = "On a storage node, `rmr-node doctor` also looks at disks and memory.
Exit codes: 0 what there is works, 3 it works with limits")]
    Doctor,
}

impl Command {
    /// Whether it prints more than its outcome: with JSON, an object per line.
    pub(super) const fn tells_progress(&self) -> bool {
        let Self::Pool(command) = self else { return false };
        match command {
            PoolCommand::AddMember(args) => args.wait.wait,
            PoolCommand::Replace(args) => args.wait.wait,
            PoolCommand::Maintenance(args) => args.wait.wait,
            PoolCommand::Move(_) | PoolCommand::Resync(_) => true,
            _ => false,
        }
    }
}

/// The commands on pools.
#[derive(Clone, Debug, Subcommand)]
pub enum PoolCommand {
    /// Create a pool with one member on each of some nodes
    #[command(after_help = CREATE_EXAMPLES)]
    Create(CreateArgs),
    /// List the pools of the nodes
    List,
    /// Show all of one pool
    Show {
        /// Name or uuid of the pool
        #[arg(value_name = "NAME|UUID")]
        pool: PoolKey,
    },
    /// Delete a pool and all its data
    Delete(DeleteArgs),
    /// Add a copy, while the pool is in use
    #[command(after_help = ADD_EXAMPLES)]
    AddMember(AddMemberArgs),
    /// Remove a copy, while the pool is in use
    RemoveMember(RemoveMemberArgs),
    /// Give a member a new, empty store: its disk or its node was lost, or is exchanged
    #[command(after_help = REPLACE_EXAMPLES)]
    Replace(ReplaceArgs),
    /// Move a copy to another node: add it there, wait until it is current, remove the old one
    Move(MoveArgs),
    /// Take a member out by plan, so that its node can be stopped, or bring it back in
    Maintenance(MaintenanceArgs),
    /// Make a pool larger, while it is in use
    Grow(GrowArgs),
    /// Go on with one member although others may have newer data, which is lost then
    ForceFrom(ForceFromArgs),
    /// Compare the copies with each other, while the pool is in use, and repair what differs
    #[command(after_help = VERIFY_EXAMPLES)]
    Verify(VerifyArgs),
    /// How far a verify is, or what the last one found
    VerifyStatus {
        /// Name or uuid of the pool
        #[arg(value_name = "NAME|UUID")]
        pool: PoolKey,
    },
    /// Give a verify up
    VerifyCancel {
        /// Name or uuid of the pool
        #[arg(value_name = "NAME|UUID")]
        pool: PoolKey,
    },
    /// Wait until every copy is current. Without a guest, rmrctl holds the pool meanwhile, so that it is brought up to date
    Resync(ResyncArgs),
}

/// The commands on members.
#[derive(Clone, Debug, Subcommand)]
pub enum MemberCommand {
    /// Tell a pool the present addresses of its members' nodes, after nodes moved; name all of them with --node
    Address {
        /// Name or uuid of the pool
        #[arg(value_name = "NAME|UUID")]
        pool: PoolKey,
    },
}

/// Arguments of `pool create`.
#[derive(Clone, Debug, Args)]
pub struct CreateArgs {
    /// Name: 1 to 64 of A-Z a-z 0-9 . _ -
    pub name: String,
    /// Size, e.g. 20G (1024-based), a multiple of 4096 bytes
    #[arg(long)]
    pub size: ByteSize,
    /// Admin address of a member's node, with the device or file to use there; repeat it for each copy
    #[arg(long = "member", value_name = "HOST:PORT[=PATH]", required = true)]
    pub members: Vec<MemberArg>,
    /// Unit of dirty tracking on disk, a power of two from 64K to 64M
    #[arg(long, value_name = "SIZE", default_value = "1M")]
    pub chunk_size: ByteSize,
    /// Logical block size that guests see: 512 or 4096
    #[arg(long, value_name = "BYTES", default_value_t = 512)]
    pub block_size: u32,
    /// Which of the nodes' addresses members are reached by
    #[arg(long, value_enum, default_value_t = TransportArg::Tcp)]
    pub transport: TransportArg,
    /// Largest size that the pool may grow to later [default: 8 times its size]
    #[arg(long, value_name = "SIZE")]
    pub max_size: Option<ByteSize>,
    /// How the stores are made.
    #[command(flatten)]
    pub store: StoreArgs,
}

/// How stores are made.
#[derive(Clone, Debug, Args)]
pub struct StoreArgs {
    /// Overwrite what the device or file holds
    #[arg(long)]
    pub overwrite: bool,
    /// The device is known to read as zeroes: do not write them
    #[arg(long)]
    pub assume_zero: bool,
    /// Longest time that making the store may take, in seconds: a device that cannot zero itself is written in full
    #[arg(long, value_name = "SECONDS", default_value = "3600", value_parser = parse_create_timeout)]
    pub create_timeout: Duration,
}

/// A transport on the command line.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum TransportArg {
    /// TCP.
    Tcp,
    /// TLS over TCP.
    Tls,
    /// RDMA verbs.
    Rdma,
}

impl From<TransportArg> for TransportKind {
    fn from(arg: TransportArg) -> Self {
        match arg {
            TransportArg::Tcp => Self::Tcp,
            TransportArg::Tls => Self::Tls,
            TransportArg::Rdma => Self::Rdma,
        }
    }
}

/// A member to create: where, and on what.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MemberArg {
    /// Admin address of its node.
    pub node: NodeAddress,
    /// Device or file there; absent: a new file in the node's store directory.
    pub path: Option<PathBuf>,
}

impl FromStr for MemberArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (node, path) = match text.split_once('=') {
            Some((_, path)) if !path.starts_with('/') => {
                return Err(format!("store path '{path}': expected an absolute path on that node"));
            }
            Some((node, path)) => (node, Some(PathBuf::from(path))),
            None => (text, None),
        };
        Ok(Self { node: node.parse()?, path })
    }
}

/// Arguments of `pool delete`.
#[derive(Clone, Debug, Args)]
pub struct DeleteArgs {
    /// Name or uuid of the pool
    #[arg(value_name = "NAME|UUID")]
    pub pool: PoolKey,
    /// Say that you mean it: nothing of the pool's data can be had back
    #[arg(long)]
    pub yes_destroy_all_data: bool,
    /// Delete although a client is attached or a member's node cannot be reached
    #[arg(long)]
    pub force: bool,
}

/// Arguments of `status`.
#[derive(Clone, Debug, Args)]
pub struct StatusArgs {
    /// Name or uuid of a pool; all pools without it
    #[arg(value_name = "NAME|UUID")]
    pub pool: Option<PoolKey>,
    /// Print again every so many seconds, until interrupted
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2", value_parser = parse_timeout)]
    pub watch: Option<Duration>,
}

/// The commands on nodes.
#[derive(Clone, Debug, Subcommand)]
pub enum NodeCommand {
    /// Name, version, addresses and load of each node
    Show,
}

fn parse_timeout(text: &str) -> Result<Duration, String> {
    parse_seconds(text, 3600.0)
}

pub(super) fn parse_create_timeout(text: &str) -> Result<Duration, String> {
    parse_seconds(text, 604_800.0)
}

fn parse_seconds(text: &str, most: f64) -> Result<Duration, String> {
    let fail = || format!("'{text}': expected seconds from 0.1 to {most}");
    let seconds: f64 = text.parse().map_err(|_| fail())?;
    if !(0.1..=most).contains(&seconds) {
        return Err(fail());
    }
    Duration::try_from_secs_f64(seconds).map_err(|_| fail())
}
