//! The daemons of a test: `vhost-brmr` processes, each serving one pool on a socket of the test's directory.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::netns::command_on;
use super::{FrontendBuilder, Host, Lab, Pool, Process, programs, wait_until};

const START_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// A listening socket that outlives the daemons that serve it: what systemd is to a daemon with a `.socket` unit.
#[derive(Clone, Debug)]
pub struct SocketUnit {
    path: PathBuf,
    listener: Arc<UnixListener>,
}

impl SocketUnit {
    /// Listens on a socket of this name in the test's directory.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn listen(lab: &Lab, name: &str) -> Result<Self> {
        let path = lab.path(format!("{name}.unit"));
        let listener =
            UnixListener::bind(&path).with_context(|| format!("listening on {}", path.display()))?;
        Ok(Self { path, listener: Arc::new(listener) })
    }

    /// Where front ends connect.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The same program and arguments, with the socket passed as sd_listen_fds(3) says: as descriptor 3, announced to this
    /// very process.
    fn activate(&self, daemon: &Command) -> Result<Command> {
        let mut shell = Command::new("/bin/sh");
        shell
            .args(["-c", "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" \"$@\""])
            .arg(daemon.get_program())
            .args(daemon.get_args())
            .stdin(Stdio::from(OwnedFd::from(self.listener.try_clone()?)));
        Ok(shell)
    }
}

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
    unit: Option<SocketUnit>,
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
            unit: None,
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

    /// Gives it this socket instead of a path.
    #[must_use]
    pub fn socket_unit(mut self, unit: &SocketUnit) -> Self {
        self.unit = Some(unit.clone());
        self
    }

    /// Starts the daemon and waits until it serves its socket.
    ///
    /// # Errors
    /// When the program is missing or does not come up.
    pub fn start(&self, lab: &Lab) -> Result<Daemon> {
        if let Some(unit) = &self.unit {
            let process = self.launch(lab, unit.path())?;
            process.wait_for_log("ready for a front end", START_LIMIT)?;
            return Ok(Daemon { process, socket: unit.path().to_owned() });
        }
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
        if self.unit.is_none() {
            command.arg("--socket-path").arg(socket);
        }
        command.args(["--pool", self.pool.name()]);
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
        let name = format!("daemon-{}", self.name);
        let Some(unit) = &self.unit else { return Process::spawn(lab, &name, command) };
        let mut command = unit.activate(&command)?;
        let log = lab.log(&name);
        let output = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
        command.stdout(output.try_clone()?).stderr(output);
        Process::adopt(&name, log, command)
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
