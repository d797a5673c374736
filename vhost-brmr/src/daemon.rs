//! The daemon around the event loop: command line, log, sockets, signals, service manager, exit codes. Only the disk
//! is made elsewhere.

use std::fmt::{Debug, Display, Write as _};
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use rmr_common::text::{Printable, printable};
use rmr_common::words;
use sd_notify::NotifyState;
use tracing::field::Field;
use tracing::{error, info, warn};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::fmt::format::{Writer, debug_fn};

use crate::args::{Args, LogFormat};
use crate::config::{Endpoint, Settings};
use crate::disk::{Disk, ToldToStop};
use crate::event_loop::{EventLoop, FrontEnds, LoopError};
use crate::socket::SocketFile;
use crate::sys::{self, Inherited, StopSignals};

/// What `--print-capabilities` prints (vhost-user specification, "Backend program conventions").
pub const CAPABILITIES: &str = r#"{
  "type": "block",
  "features": [
    "read-only"
  ]
}"#;

/// Exit code for options and configuration that are not acceptable.
const USAGE: u8 = 2;
/// Exit code when another client took the pool over. A service manager must not start the daemon again then, or two would
/// take the pool from each other for ever.
const DISPLACED: u8 = 3;

/// The whole program: parses the command line, calls `open` for the disk, serves until told to stop.
///
/// `open` connects to the pool far enough to know its geometry, and does not attach to it.
pub fn main<D: Disk>(open: impl FnOnce(&Settings) -> anyhow::Result<D>) -> ExitCode {
    let args = Args::parse();
    if args.print_capabilities {
        // Nobody has to read all of it.
        ignore(writeln!(std::io::stdout(), "{CAPABILITIES}"));
        return ExitCode::SUCCESS;
    }
    let settings = match Settings::load(&args) {
        Ok(settings) => settings,
        Err(error) => {
            ignore(writeln!(std::io::stderr(), "vhost-brmr: {error}"));
            return ExitCode::from(USAGE);
        }
    };
    start_log(settings.log_format);
    ignore(sys::explain_bus_errors(matches!(settings.log_format, LogFormat::Json)));
    match run(&settings, open) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<ToldToStop>() => {
            info!("ended: {error:#}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            let text = words::error(error.as_ref());
            error!("{text}");
            // A line end in it would be another assignment for the service manager.
            notify(&[NotifyState::Status(&printable(&format!("failed: {text}")))]);
            match error.downcast_ref() {
                Some(LoopError::Displaced(_)) => ExitCode::from(DISPLACED),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn run<D: Disk>(
    settings: &Settings,
    open: impl FnOnce(&Settings) -> anyhow::Result<D>,
) -> anyhow::Result<()> {
    // Before anything starts a thread: the signals must be blocked in all of them.
    let signals = StopSignals::new().context("cannot take over SIGTERM and SIGINT")?;
    if let Err(error) = sys::raise_descriptor_limit() {
        warn!("the limit of open files cannot be raised: {error}");
    }
    let entrance = Entrance::claim(&settings.endpoint)?;
    let disk = open(settings).with_context(|| format!("pool {}", settings.pool.pool))?;
    // Not before: a front end that is accepted, and cut off because no node answers, may give its disk up for good. One that is
    // refused tries again.
    let front_ends = entrance.open()?;
    let size = disk.geometry().size;
    let (device, options) = (settings.device.clone(), settings.event_loop);
    let event_loop = EventLoop::new(disk, device, options, front_ends, Some(signals))?;
    info!(
        pool = %settings.pool.pool,
        size,
        queues = settings.device.queues,
        queue_size = settings.device.queue_size,
        read_only = settings.device.read_only,
        "ready for a front end"
    );
    notify(&[NotifyState::Ready]);
    let result = event_loop.run();
    notify(&[NotifyState::Stopping]);
    result?;
    info!("ended");
    Ok(())
}

/// Where front ends will come from, checked and not open yet.
enum Entrance<'a> {
    /// This path is free.
    Path(&'a Path, u32),
    /// Inherited. Connections that wait there are left alone until the disk is known, and stay if this process ends before.
    Inherited(Inherited),
}

impl<'a> Entrance<'a> {
    fn claim(endpoint: &'a Endpoint) -> anyhow::Result<Self> {
        Ok(match endpoint {
            Endpoint::Path { path, mode } => {
                SocketFile::check(path)?;
                Self::Path(path, *mode)
            }
            Endpoint::Inherited(fd) => {
                let socket = sys::inherit(*fd).with_context(|| format!("inherited descriptor {fd}"))?;
                Self::Inherited(socket)
            }
        })
    }

    fn open(self) -> anyhow::Result<FrontEnds> {
        Ok(match self {
            Self::Path(path, mode) => {
                let (file, listener) = SocketFile::listen(path, mode)?;
                FrontEnds::Path(file, listener)
            }
            Self::Inherited(Inherited::Listener(listener)) => FrontEnds::Listener(listener),
            Self::Inherited(Inherited::Stream(stream)) => FrontEnds::Connected(stream),
        })
    }
}

fn start_log(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let ansi = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(ansi).with_writer(std::io::stderr);
    // Else a log that nobody reads any more would end the daemon: the complaint about it panics.
    let log = log.log_internal_errors(false);
    let started = match format {
        // What nodes and front ends say may have line ends and orders to terminals in it.
        LogFormat::Text => {
            let fields = debug_fn(|writer: &mut Writer<'_>, field: &Field, value: &dyn Debug| {
                let mut shown = Printable(writer);
                if field.name() == "message" {
                    write!(shown, "{value:?}")
                } else {
                    write!(shown, "{}={value:?}", field.name())
                }
            });
            log.with_target(false).fmt_fields(fields.delimited(" ")).try_init()
        }
        LogFormat::Json => log.json().try_init(),
    };
    ignore(started);
}

fn notify(state: &[NotifyState<'_>]) {
    // Without a service manager there is nobody to tell.
    ignore(sd_notify::notify(state));
}

/// Drops an error that changes nothing, and says so in the debug log.
fn ignore<T, E: Display>(result: Result<T, E>) {
    if let Err(error) = result {
        tracing::debug!("{error}");
    }
}
