//! `rmrctl`, the command line for storage nodes: the way from a command to what is printed.
//!
//! Each command gives an [`Outcome`], the same facts as text and as JSON; only [`run`] prints.

pub mod advice;
mod args;
pub mod assess;
mod change;
pub mod change_args;
mod coordinate;
pub mod format;
pub mod http;
mod pool;
mod readdress;
mod status;
mod store;
mod survey;
mod sync;
mod verify;

use std::io::{ErrorKind, IsTerminal, Write};

use serde_json::{Value, json};
use thiserror::Error;

use self::advice::Advice;
pub use self::args::{
    Cli, Command, CreateArgs, DeleteArgs, MemberArg, MemberCommand, NodeCommand, PoolCommand, StatusArgs,
    TransportArg,
};
use self::http::{CallError, Client};
pub use self::store::StoreCommand;
use self::survey::{Context, Survey, once_each};
pub use self::verify::VerifyArgs;
use crate::admin::api::NodeInfo;
use crate::doctor::Report;

/// Exit code of a command that failed.
pub const EXIT_FAILED: u8 = 1;

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
        Command::Pool(_) | Command::Member(_) | Command::Store(_) | Command::Node(_) | Command::Doctor => {
            None
        }
    };
    let lines = watch.is_some() || cli.command.tells_progress();
    let tty = std::io::stdout().is_terminal();
    let colour = tty && std::env::var_os("NO_COLOR").is_none();
    loop {
        let exit = match runtime.block_on(execute(cli)) {
            Ok(outcome) => {
                let printed = print(&outcome, cli.json, watch.is_some(), lines, tty, colour);
                outcome.warnings.iter().for_each(|warning| complain(warning));
                match printed {
                    Ok(()) => outcome.exit,
                    // The reader has seen enough, as `head` does. What was to be done is done.
                    Err(e) if e.kind() == ErrorKind::BrokenPipe => return outcome.exit,
                    Err(e) => {
                        complain(&format!("the result cannot be written to standard output: {e}"));
                        return EXIT_FAILED;
                    }
                }
            }
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
    out.flush()
}

fn complain(message: &str) {
    // There may be nobody to read it, which is no reason to end in another way.
    let _ = writeln!(std::io::stderr(), "rmrctl: {}", format::plain_lines(message));
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
        keys: cli.keys()?,
        tls: cli.tls()?,
        client_is_gone: cli.client_is_gone,
        advice: Advice::new(cli),
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
        Command::Member(MemberCommand::Address { pool }) => readdress::address(&context, pool).await,
        Command::Store(command) => store::run(&context, command).await,
        Command::Status(args) => status::status(&context, args.pool.as_ref()).await,
        Command::Node(NodeCommand::Show) => show_nodes(&context).await,
        Command::Doctor => doctor(),
    }
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
        "LEFT OUT",
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
                    info.stores_left_out.to_string(),
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
