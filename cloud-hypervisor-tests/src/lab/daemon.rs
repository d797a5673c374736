//! The daemons of a test: `vhost-brmr` processes, each serving one pool on a socket of the test's directory.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::netns::command_on;
use super::{FrontendBuilder, Host, Lab, Pool, Process, programs, wait_until};

const START_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// A daemon to be.
#[derive(Clone, Debug)]
pub struct DaemonBuilder {
    name: String,
    pool: Pool,
    queues: u16,
    serial: Option<String>,
    read_only: bool,
    arguments: Vec<String>,
    host: Option<Host>,
}

impl DaemonBuilder {
    /// A daemon for `pool` with one queue, named after it.
    #[must_use]
    pub fn new(pool: &Pool) -> Self {
        Self {
            name: pool.name().to_owned(),
            pool: pool.clone(),
            queues: 1,
            serial: None,
            read_only: false,
            arguments: Vec::new(),
            host: None,
        }
    }

    /// Another name for its socket and log, where a test has two daemons for one pool.
    #[must_use]
    pub fn name(mut self, name: &str) -> Self {
        self.name = name.to_owned();
        self
    }

    /// Number of virtqueues.
    #[must_use]
    pub fn queues(mut self, queues: u16) -> Self {
        self.queues = queues;
        self
    }

    /// The serial that the guest sees.
    #[must_use]
    pub fn serial(mut self, serial: &str) -> Self {
        self.serial = Some(serial.to_owned());
        self
    }

    /// Refuses writes.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// Adds arguments to the command line.
    #[must_use]
    pub fn arguments<A: Into<String>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Runs it on a host of the test's own network. Its socket is where it always is.
    #[must_use]
    pub fn host(mut self, host: &Host) -> Self {
        self.host = Some(host.clone());
        self
    }

    /// Starts the daemon and waits until it serves its socket.
    ///
    /// # Errors
    /// When the program is missing or does not come up.
    pub fn start(&self, lab: &Lab) -> Result<Daemon> {
        let socket = lab.path(format!("{}.vhost", self.name));
        let process = self.launch(lab, &socket)?;
        process.wait_for_socket(&socket, START_LIMIT)?;
        Ok(Daemon { process, socket })
    }

    /// Starts the daemon and a front end for it, expecting that it is refused the pool when it attaches: returns its log
    /// once it has ended with a status other than 0.
    ///
    /// # Errors
    /// When it keeps running, or ends with status 0 or by a signal.
    pub fn start_refused(&self, lab: &Lab) -> Result<String> {
        let socket = lab.path(format!("{}.vhost", self.name));
        let process = self.launch(lab, &socket)?;
        wait_until("the daemon to listen or to end", START_LIMIT, || {
            Ok(socket.exists() || !process.is_running()?)
        })?;
        // A daemon claims its pool when the first ring starts. It may end at any point of this.
        let _front_end = FrontendBuilder::new(&socket).connect();
        let status = process.wait_exit(START_LIMIT).context("the daemon was expected to be refused")?;
        match status.code() {
            Some(code) if code != 0 => Ok(process.log_text()),
            _ => bail!("the daemon ended with {status}, expected a non-zero exit status"),
        }
    }

    fn launch(&self, lab: &Lab, socket: &Path) -> Result<Process> {
        let mut command = command_on(self.host.as_ref(), programs::own("vhost-brmr")?)?;
        command.arg("--socket-path").arg(socket).args(["--pool", self.pool.name()]);
        for address in self.pool.data_addresses() {
            command.args(["--node", address]);
        }
        command.args(["--num-queues", &self.queues.to_string()]);
        if let Some(serial) = &self.serial {
            command.args(["--serial", serial]);
        }
        if self.read_only {
            command.arg("--read-only");
        }
        command.args(&self.arguments);
        Process::spawn(lab, &format!("daemon-{}", self.name), command)
    }
}

/// A daemon; its process is killed when it is dropped.
#[derive(Debug)]
pub struct Daemon {
    process: Process,
    socket: PathBuf,
}

impl Daemon {
    /// Where it serves vhost-user.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Ends it as a crash would, with SIGKILL.
    ///
    /// # Errors
    /// When it does not go.
    pub fn kill(&self) -> Result<()> {
        self.process.kill()
    }

    /// Ends it with SIGTERM and demands a clean exit.
    ///
    /// # Errors
    /// When it does not end in time or with another status than 0.
    pub fn stop(&self) -> Result<()> {
        self.process.stop_cleanly(STOP_LIMIT)
    }
}
