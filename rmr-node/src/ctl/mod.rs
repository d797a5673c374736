//! `rmrctl`, the command line for storage nodes: its arguments and the way from a command to what is printed.
//!
//! Each command gives an [`Outcome`], the same facts as text and as JSON; only [`run`] prints.

pub mod assess;
mod change;
pub mod change_args;
mod coordinate;
pub mod format;
pub mod http;
mod pool;
mod status;
mod sync;
mod verify;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use rmr_common::pool::TransportKind;
use rmr_common::transport::tls::{ClientTls, IdentityFiles};
use serde_json::{Value, json};
use thiserror::Error;
use tokio::task::JoinSet;

use crate::admin::api::{NodeInfo, PoolKey, PoolList, PoolStatus};
use crate::doctor::Report;
use crate::store::ByteSize;
use change_args::{
    AddMemberArgs, ForceFromArgs, GrowArgs, MaintenanceArgs, MoveArgs, RemoveMemberArgs, ReplaceArgs,
    ResyncArgs,
};
use http::{CallError, Client, NodeAddress};
pub use verify::VerifyArgs;

/// Exit code of a command that failed.
pub const EXIT_FAILED: u8 = 1;

/// Heading of the options that every command has.
const GLOBAL: &str = "Options of every command";

const EXAMPLES: &str = "\
Examples:
  rmrctl pool create vm-1 --size 20G --member node-a --member node-b:7701=/dev/vdb
  rmrctl --node node-a --node node-b status
  rmrctl status vm-1 --watch
  RMR_NODES=node-a,node-b rmrctl pool list --json

Exit codes: 0 done (status: every copy current), 1 failed, 2 wrong usage,
  3 status: degraded, 4 status: suspended or unknown, 5 verify: copies differ";

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
Exit codes: 0 every copy current, 3 degraded, 4 suspended or unknown (the worst pool counts)";

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
    fn tls(&self) -> Result<Option<ClientTls>, CtlError> {
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
    /// Is the data safe, and how long until it is
    #[command(after_help = STATUS_EXAMPLES)]
    Status(StatusArgs),
    /// Facts of nodes
    #[command(subcommand)]
    Node(NodeCommand),
    /// Say which transports this machine can use to reach nodes, and what is missing; asks no node
    #[command(after_help = "On a storage node, `rmr-node doctor` also looks at disks and memory.
Exit codes: 0 what there is works, 3 it works with limits, 4 a transport cannot work")]
    Doctor,
}

impl Command {
    /// Whether it prints more than its outcome: with JSON, an object per line.
    const fn tells_progress(&self) -> bool {
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
    /// Overwrite what the devices or files hold
    #[arg(long)]
    pub overwrite: bool,
    /// The devices are known to read as zeroes: do not write them
    #[arg(long)]
    pub assume_zero: bool,
    /// Longest time that one store may take, in seconds: a device that cannot zero itself is written in full
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

fn parse_create_timeout(text: &str) -> Result<Duration, String> {
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

/// What a command gives: the same facts for people and for programs.
#[derive(Clone, PartialEq, Debug)]
pub struct Outcome {
    /// For people; ends in a line break.
    pub text: String,
    /// For programs.
    pub json: Value,
    /// Said on standard error in either case.
    pub warnings: Vec<String>,
    /// Exit code.
    pub exit: u8,
}

/// Why a command failed.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum CtlError {
    /// A node could not be asked, or refused.
    #[error(transparent)]
    Call(#[from] CallError),
    /// Something else stands against it.
    #[error("{0}")]
    Failed(String),
}

impl CtlError {
    fn failed(message: impl Into<String>) -> Self {
        Self::Failed(message.into())
    }
}

/// Runs a command and prints to the process's streams; gives the exit code.
#[must_use]
pub fn run(cli: &Cli) -> u8 {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            complain(&e.to_string());
            return EXIT_FAILED;
        }
    };
    let watch = match &cli.command {
        Command::Status(args) => args.watch,
        Command::Pool(_) | Command::Node(_) | Command::Doctor => None,
    };
    let lines = watch.is_some() || cli.command.tells_progress();
    let tty = std::io::stdout().is_terminal();
    let colour = tty && std::env::var_os("NO_COLOR").is_none();
    loop {
        let exit = match runtime.block_on(execute(cli)) {
            Ok(outcome) => match print(&outcome, cli.json, watch.is_some(), lines, tty, colour) {
                Ok(()) => outcome.exit,
                // The reader went away; nobody is left to be told.
                Err(_) => return EXIT_FAILED,
            },
            Err(e) => {
                complain(&e.to_string());
                EXIT_FAILED
            }
        };
        match watch {
            None => return exit,
            Some(pause) => std::thread::sleep(pause),
        }
    }
}

fn print(
    outcome: &Outcome,
    json: bool,
    watch: bool,
    lines: bool,
    tty: bool,
    colour: bool,
) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    match (json, lines) {
        // One line for each round or step, for programs that read lines.
        (true, true) => writeln!(out, "{}", outcome.json)?,
        (true, false) => writeln!(out, "{:#}", outcome.json)?,
        (false, _) => {
            if watch && tty {
                write!(out, "\x1b[H\x1b[2J")?;
            }
            let text = format::plain_lines(&outcome.text);
            let text = if colour { colour_levels(&text) } else { text };
            out.write_all(text.as_bytes())?;
        }
    }
    out.flush()?;
    for warning in &outcome.warnings {
        complain(warning);
    }
    Ok(())
}

fn complain(message: &str) {
    eprintln!("rmrctl: {}", format::plain_lines(message));
}

/// Colours the level word of each headline.
fn colour_levels(text: &str) -> String {
    use assess::Level;
    let mut text = text.to_owned();
    for (level, code) in
        [(Level::Safe, 32), (Level::Degraded, 33), (Level::Suspended, 31), (Level::Unknown, 31)]
    {
        let word = format!("{}:", level.word());
        text = text.replace(&word, &format!("\x1b[1;{code}m{word}\x1b[0m"));
    }
    text
}

/// Runs a command.
///
/// # Errors
/// When it could not be carried out.
pub async fn execute(cli: &Cli) -> Result<Outcome, CtlError> {
    let client = Client { timeout: cli.timeout };
    let context = Context {
        client,
        given: cli.nodes.clone(),
        json: cli.json,
        tls: cli.tls()?,
        client_is_gone: cli.client_is_gone,
    };
    match &cli.command {
        Command::Pool(PoolCommand::Create(args)) => pool::create(&context, args).await,
        Command::Pool(PoolCommand::List) => pool::list(&context).await,
        Command::Pool(PoolCommand::Show { pool }) => pool::show(&context, pool).await,
        Command::Pool(PoolCommand::Delete(args)) => pool::delete(&context, args).await,
        Command::Pool(PoolCommand::AddMember(args)) => change::add(&context, args).await,
        Command::Pool(PoolCommand::RemoveMember(args)) => change::remove(&context, args).await,
        Command::Pool(PoolCommand::Replace(args)) => change::replace(&context, args).await,
        Command::Pool(PoolCommand::Move(args)) => change::move_member(&context, args).await,
        Command::Pool(PoolCommand::Maintenance(args)) => change::maintenance(&context, args).await,
        Command::Pool(PoolCommand::Grow(args)) => change::grow(&context, args).await,
        Command::Pool(PoolCommand::ForceFrom(args)) => sync::force_from(&context, args).await,
        Command::Pool(PoolCommand::Resync(args)) => sync::resync(&context, args).await,
        Command::Pool(PoolCommand::Verify(args)) => verify::verify(&context, args).await,
        Command::Pool(PoolCommand::VerifyStatus { pool }) => verify::status(&context, pool).await,
        Command::Pool(PoolCommand::VerifyCancel { pool }) => verify::cancel(&context, pool).await,
        Command::Status(args) => status::status(&context, args.pool.as_ref()).await,
        Command::Node(NodeCommand::Show) => show_nodes(&context).await,
        Command::Doctor => doctor(),
    }
}

/// Which nodes to ask, and how.
struct Context {
    client: Client,
    /// Nodes named on the command line or in the environment; may be empty.
    given: Vec<NodeAddress>,
    /// Print JSON for programs.
    json: bool,
    /// How `tls://` addresses are reached.
    tls: Option<ClientTls>,
    /// A client that left without a goodbye will not come back.
    client_is_gone: bool,
}

impl Context {
    /// The nodes to ask: those given, each once, or the one on this machine.
    fn nodes(&self) -> Vec<NodeAddress> {
        if self.given.is_empty() { vec![NodeAddress::local()] } else { once_each(&self.given) }
    }

    /// Asks all nodes for their pools.
    async fn survey(&self) -> Survey {
        let lists: Vec<(_, Result<PoolList, _>)> = self.get_all(self.nodes(), "/v1/pools").await;
        let answers = lists.into_iter().map(|(node, list)| (node, list.map(|l| l.pools))).collect();
        Survey { answers }
    }

    /// Asks nodes at the same time; the answers come in the order of `nodes`.
    async fn get_all<T: serde::de::DeserializeOwned + Send + 'static>(
        &self,
        nodes: Vec<NodeAddress>,
        path: &'static str,
    ) -> Vec<(NodeAddress, Result<T, CallError>)> {
        let client = self.client;
        let mut tasks = JoinSet::new();
        for (i, node) in nodes.into_iter().enumerate() {
            tasks.spawn(async move {
                let answer = client.get(&node, path).await;
                (i, node, answer)
            });
        }
        let mut answers = tasks.join_all().await;
        answers.sort_by_key(|(i, ..)| *i);
        answers.into_iter().map(|(_, node, answer)| (node, answer)).collect()
    }
}

/// What the nodes said when asked for their pools.
struct Survey {
    answers: Vec<(NodeAddress, Result<Vec<PoolStatus>, CallError>)>,
}

impl Survey {
    fn all_answered(&self) -> bool {
        self.answers.iter().all(|(_, answer)| answer.is_ok())
    }

    fn any_answered(&self) -> bool {
        self.answers.iter().any(|(_, answer)| answer.is_ok())
    }

    /// What went wrong, one line for each node that did not answer.
    fn errors(&self) -> Vec<String> {
        self.answers.iter().filter_map(|(_, answer)| answer.as_ref().err().map(ToString::to_string)).collect()
    }

    /// The node that holds this store.
    fn holder(&self, store: rmr_common::pool::StoreId) -> Option<&NodeAddress> {
        let holds = |pools: &Vec<PoolStatus>| pools.iter().any(|p| p.store == store);
        self.answers.iter().find(|(_, answer)| answer.as_ref().is_ok_and(holds)).map(|(node, _)| node)
    }

    fn pictures(&self) -> Vec<assess::Picture> {
        assess::merge(self.answers.iter().filter_map(|(_, a)| a.as_ref().ok()).flatten().cloned().collect())
    }

    /// The one pool that the key names.
    fn picture(&self, key: &PoolKey) -> Result<assess::Picture, CtlError> {
        let mut found: Vec<_> = self.pictures().into_iter().filter(|p| key.matches(&p.spec)).collect();
        match found.len() {
            0 if !self.any_answered() => {
                Err(CtlError::failed(format!("no node answered: {}", self.errors().join("; "))))
            }
            0 => {
                let asked: Vec<_> = self.answers.iter().map(|(node, _)| node.to_string()).collect();
                let unanswered = match self.errors() {
                    errors if errors.is_empty() => String::new(),
                    errors => format!("; not all answered: {}", errors.join("; ")),
                };
                let message =
                    format!("there is no pool {key} on the nodes asked ({}){unanswered}", asked.join(", "));
                Err(CtlError::failed(message))
            }
            1 => Ok(found.remove(0)),
            _ => {
                let ids: Vec<_> = found.iter().map(|p| p.spec.id.to_string()).collect();
                Err(CtlError::failed(format!("{key} names several pools, use the uuid: {}", ids.join(", "))))
            }
        }
    }

    /// The nodes as JSON: which were asked and which answered.
    fn json(&self) -> Value {
        self.answers
            .iter()
            .map(|(node, answer)| {
                json!({
                    "address": node,
                    "answered": answer.is_ok(),
                    "error": answer.as_ref().err().map(ToString::to_string),
                })
            })
            .collect()
    }
}

fn once_each(nodes: &[NodeAddress]) -> Vec<NodeAddress> {
    let mut once: Vec<NodeAddress> = Vec::new();
    for node in nodes {
        if !once.contains(node) {
            once.push(node.clone());
        }
    }
    once
}

fn doctor() -> Result<Outcome, CtlError> {
    let report = Report::for_client();
    let json = serde_json::to_value(&report).map_err(|e| CtlError::failed(e.to_string()))?;
    Ok(Outcome { text: report.to_string(), json, warnings: Vec::new(), exit: report.exit_code() })
}

async fn show_nodes(context: &Context) -> Result<Outcome, CtlError> {
    let answers: Vec<(_, Result<NodeInfo, _>)> = context.get_all(context.nodes(), "/v1/node").await;
    let mut table = format::Table::new(&[
        "NODE",
        "ADMIN",
        "DATA",
        "VERSION",
        "UP",
        "STORES",
        "CONNECTIONS",
        "BUFFERS",
        "ENGINE",
        "SHARDS",
    ]);
    let (mut nodes, mut warnings) = (Vec::new(), Vec::new());
    for (address, answer) in answers {
        match answer {
            Ok(info) => {
                let data: Vec<_> = info.data_addresses.iter().map(ToString::to_string).collect();
                let up_ms = info.now_unix_ms.0.saturating_sub(info.started_unix_ms.0);
                table.row(vec![
                    info.name.clone(),
                    address.to_string(),
                    data.join(","),
                    info.version.clone(),
                    format::duration(up_ms / 1000),
                    info.stores.to_string(),
                    format!("{}/{}", info.connections, info.max_connections),
                    format!("{}/{}", format::bytes(info.buffer_used_bytes), format::bytes(info.buffer_bytes)),
                    info.engine.clone(),
                    info.shards.to_string(),
                ]);
                nodes.push(json!({"address": address, "answered": true, "info": info}));
            }
            Err(e) => {
                warnings.push(e.to_string());
                nodes.push(json!({"address": address, "answered": false, "error": e.to_string()}));
            }
        }
    }
    let exit = if warnings.is_empty() { 0 } else { EXIT_FAILED };
    Ok(Outcome { text: table.print(0), json: json!({ "nodes": nodes }), warnings, exit })
}

#[cfg(test)]
mod change_tests;
#[cfg(test)]
mod tests;
