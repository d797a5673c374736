//! `rmr-node`: the storage service of a replicated disk. Without a subcommand it serves; `store` works on stores
//! offline.

use std::fmt::{Debug, Write as _};
use std::io::{ErrorKind, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use rmr_common::text::Printable;
use rmr_common::words;
use rmr_node::config::{Config, ConfigError, LogFormat, LogLevel, Settings};
use rmr_node::doctor::{DoctorArgs, Report};
use rmr_node::lifecycle::Shutdown;
use rmr_node::service;
use rmr_node::store::cli::StoreCommand;
use tracing::error;
use tracing::field::Field;
use tracing_subscriber::Layer;
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::{Writer, debug_fn};
use tracing_subscriber::layer::SubscriberExt;

/// Exit code of a process that failed while running.
const EXIT_FAILED: u8 = 1;
/// Exit code of wrong usage or configuration, as clap's own.
const EXIT_USAGE: u8 = 2;

const EXAMPLES: &str = "\
Examples:
  rmr-node --store-dir /var/lib/rmr
  rmr-node --config /etc/rmr/node.toml
  rmr-node --config /etc/rmr/node.toml --log-level debug --check-config
  rmr-node doctor --config /etc/rmr/node.toml
  rmr-node store inspect /dev/vdb

Flags win over the file; docs/configuration.md explains each setting.
Exit codes: 0 stopped as asked, 1 failed while running, 2 wrong usage or configuration";

/// Storage service of a replicated disk.
#[derive(Debug, Parser)]
#[command(name = "rmr-node", version, after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
struct Cli {
    /// Work on stores without the service
    #[command(subcommand)]
    command: Option<Command>,
    /// Configuration file (TOML)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print the effective configuration and exit
    #[arg(long)]
    check_config: bool,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create, inspect and destroy stores offline
    #[command(subcommand)]
    Store(StoreCommand),
    /// Say what this machine has and what is missing for what; changes nothing
    ///
    /// Looks at RDMA devices and their ports, limits on locked memory, hugepages, io_uring, TCP, the directory and devices
    /// of stores, and memory, as the configuration needs them, and gives a verdict for each. In the directory of stores a
    /// small file is made and removed.
    #[command(
        after_help = "Exit codes: 0 all that is configured works, 3 it works with limits, 4 some of it does not, \
                            2 wrong usage or configuration"
    )]
    Doctor(Box<DoctorArgs>),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.command {
        Some(Command::Store(command)) => {
            return match command.run() {
                Ok(()) => ExitCode::SUCCESS,
                Err(e) if is_closed_pipe(&e) => ExitCode::SUCCESS,
                Err(e) => fail(EXIT_FAILED, &words::error(e.as_ref())),
            };
        }
        Some(Command::Doctor(args)) => return doctor(*args),
        None => {}
    }
    let (settings, config) = match configure(cli.config, cli.settings) {
        Ok(both) => both,
        Err(e) => return fail(EXIT_USAGE, &e.to_string()),
    };
    if cli.check_config {
        return match settings.to_toml() {
            Ok(text) => print(&text),
            Err(e) => fail(EXIT_USAGE, &e.to_string()),
        };
    }
    if let Err(e) = start_log(config.log_format, &config.log_level) {
        return fail(EXIT_FAILED, &words::error(e.as_ref()));
    }
    match serve(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            error!("{}", words::error(e.as_ref()));
            ExitCode::from(EXIT_FAILED)
        }
    }
}

/// The complete settings, and what they mean for the service.
fn configure(file: Option<PathBuf>, flags: Settings) -> Result<(Settings, Config), ConfigError> {
    let file = file.map_or_else(|| Ok(Settings::default()), |path| Settings::read(&path))?;
    let settings = flags.over(file).with_defaults()?;
    let config = Config::new(&settings)?;
    Ok((settings, config))
}

fn doctor(args: DoctorArgs) -> ExitCode {
    let report = match configure(args.config, args.settings) {
        Ok((_, config)) => Report::for_node(&config),
        Err(e) => return fail(EXIT_USAGE, &e.to_string()),
    };
    match report.render(args.json) {
        Ok(text) if print(&text) == ExitCode::SUCCESS => ExitCode::from(report.exit_code()),
        Ok(_) => ExitCode::from(EXIT_FAILED),
        Err(e) => fail(EXIT_FAILED, &e.to_string()),
    }
}

fn serve(config: Config) -> anyhow::Result<()> {
    let shutdown = Shutdown::new()?;
    shutdown.on_signals()?;
    service::run(config, shutdown)?;
    Ok(())
}

fn start_log(format: LogFormat, level: &LogLevel) -> anyhow::Result<()> {
    let targets: Targets = level.as_str().parse()?;
    let colours = std::io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(colours);
    // Else a log that nobody reads any more would end the shard that writes to it: the complaint about it panics.
    let lines = lines.log_internal_errors(false);
    let layer = match format {
        // What strangers say may have line ends and orders to terminals in it.
        LogFormat::Text => {
            let fields = debug_fn(|writer: &mut Writer<'_>, field: &Field, value: &dyn Debug| {
                let mut shown = Printable(writer);
                if field.name() == "message" {
                    write!(shown, "{value:?}")
                } else {
                    write!(shown, "{}={value:?}", field.name())
                }
            });
            lines.fmt_fields(fields.delimited(" ")).with_target(false).boxed()
        }
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(layer.with_filter(targets)))?;
    Ok(())
}

fn print(text: &str) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        // The reader has seen enough, as `head` does.
        Err(e) if e.kind() == ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(e) => fail(EXIT_FAILED, &format!("the result cannot be written to standard output: {e}")),
    }
}

/// Whether an error is that of the one who reads the output and has closed it. What was to be done is done then.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == ErrorKind::BrokenPipe)
}

fn fail(code: u8, message: &str) -> ExitCode {
    // There may be nobody to read it, which is no reason to end in another way.
    let _ = writeln!(std::io::stderr(), "rmr-node: {message}");
    ExitCode::from(code)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent_and_its_help_has_examples() {
        Cli::command().debug_assert();
        let help = Cli::command().render_long_help().to_string();
        for text in
            ["rmr-node --config /etc/rmr/node.toml", "--resync-bytes-per-s", "[default: 64M]", "Exit codes"]
        {
            assert!(help.contains(text), "{text} is not in\n{help}");
        }
    }

    #[test]
    fn flags_reach_the_configuration_and_win_over_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("node.toml");
        std::fs::write(&file, "node_name = \"file\"\nshards = 3\nlisten = [\"tcp://10.0.0.1:1\"]\n").unwrap();
        let args = ["rmr-node", "--config", file.to_str().unwrap(), "--node-name", "flag"];
        let more =
            ["--listen", "tcp://10.0.0.2:2,tcp://10.0.0.3:3", "--buffer-memory", "16M", "--engine", "inline"];
        let cli = Cli::try_parse_from(args.into_iter().chain(more)).unwrap();
        let (_, config) = configure(cli.config, cli.settings).unwrap();
        assert_eq!((config.node_name.as_str(), config.shards, config.buffer_memory), ("flag", 3, 16 << 20));
        assert_eq!(
            config.listen.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["tcp://10.0.0.2:2", "tcp://10.0.0.3:3"]
        );
    }

    #[test]
    fn a_bad_flag_is_refused_by_name() {
        for (args, problem) in [
            (["--shards", "0"], "expected a whole number from 1 to 64"),
            (["--shards", "x"], "'x': expected a whole number"),
            (["--listen", "udp://a:1"], "the scheme is neither tcp nor tls nor rdma"),
            (["--buffer-memory", "64MB"], "is no size"),
            (["--log-level", "loud"], "no such level"),
            (["--admin", "here"], "invalid socket address"),
            (["--shard", "1"], "unexpected argument '--shard'"),
        ] {
            let error = Cli::try_parse_from(["rmr-node"].into_iter().chain(args)).unwrap_err();
            assert!(error.to_string().contains(problem), "{args:?}: {error}");
            assert_eq!(error.exit_code(), i32::from(EXIT_USAGE));
        }
    }
}
