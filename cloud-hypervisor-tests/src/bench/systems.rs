//! The systems that are compared: each offers one disk on a vhost-user socket, with two copies behind it where it
//! replicates, and is started from nothing in a directory of its own on tmpfs.

use std::fmt;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use super::processes::{Role, Watched};
use crate::lab::{Process, free_port};

/// How long a program may take until it listens, or until it has done its work.
const PATIENCE: Duration = Duration::from_secs(10);

/// The pool that is created for a run.
const POOL: &str = "bench";

/// A system under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SystemKind {
    /// `vhost-brmr` over two `rmr-node`s.
    Brmr,
    /// The same with the programs of another build: whether a change made anything worse.
    BrmrBefore,
    /// `qemu-storage-daemon` with `quorum` over two `nbdkit file` servers: what a user would pick from Debian.
    Quorum,
    /// The same with the export in an I/O thread of its own.
    QuorumIothread,
    /// `qemu-storage-daemon` over one local file: no replication, no network.
    QsdFile,
    /// `qemu-storage-daemon` over nothing: the ceiling of vhost-user and of the load generator.
    QsdNull,
}

impl SystemKind {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Brmr, Self::BrmrBefore, Self::Quorum, Self::QuorumIothread, Self::QsdFile, Self::QsdNull];

    /// Its name in tables and files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Brmr => "brmr",
            Self::BrmrBefore => "brmr-before",
            Self::Quorum => "quorum",
            Self::QuorumIothread => "quorum-iothread",
            Self::QsdFile => "qsd-file",
            Self::QsdNull => "qsd-null",
        }
    }
}

impl fmt::Display for SystemKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for SystemKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|kind| kind.name() == text);
        found.ok_or_else(|| format!("expected one of {names}, found \"{text}\""))
    }
}

/// Where the programs are.
#[derive(Clone, Debug)]
pub struct Programs {
    /// Directory of `rmr-node`, `rmrctl` and `vhost-brmr`.
    pub directory: PathBuf,
    /// The same of another build of this project.
    pub before: Option<PathBuf>,
    /// `qemu-storage-daemon`, version 10 or later.
    pub storage_daemon: Option<PathBuf>,
    /// `nbdkit`.
    pub nbdkit: PathBuf,
}

/// Oldest `qemu-storage-daemon` that is a fair peer: Debian 12's own 7.2 stalls at depth.
const STORAGE_DAEMON_MAJOR: u32 = 10;

impl Programs {
    /// Looks for the programs: ours beside `directory`, the storage daemon at `storage_daemon`, or unpacked under
    /// `target/bench/qemu10`, or installed.
    #[must_use]
    pub fn find(directory: PathBuf, storage_daemon: Option<PathBuf>) -> Self {
        let places = ["target/bench/qemu10/usr/bin/qemu-storage-daemon", "/usr/bin/qemu-storage-daemon"];
        let storage_daemon = match storage_daemon {
            Some(path) => Some(path),
            None => places.into_iter().map(PathBuf::from).find(|path| {
                version_of(path)
                    .and_then(|text| major_of(&text))
                    .is_some_and(|major| major >= STORAGE_DAEMON_MAJOR)
            }),
        };
        Self { directory, before: None, storage_daemon, nbdkit: PathBuf::from("nbdkit") }
    }

    /// What is missing to start `kind`, in words.
    #[must_use]
    pub fn missing_for(&self, kind: SystemKind) -> Option<String> {
        match (kind, &self.before) {
            (SystemKind::Brmr, _) => return ours_missing_in(&self.directory),
            (SystemKind::BrmrBefore, Some(directory)) => return ours_missing_in(directory),
            (SystemKind::BrmrBefore, None) => {
                return Some("expected --before with the programs of another build".into());
            }
            _ => {}
        }
        let needs_nbdkit = matches!(kind, SystemKind::Quorum | SystemKind::QuorumIothread);
        if needs_nbdkit && version_of(&self.nbdkit).is_none() {
            return Some("nbdkit not found (package nbdkit)".into());
        }
        match &self.storage_daemon {
            Some(path) => version_of(path).is_none().then(|| format!("{} does not run", path.display())),
            None => Some(format!(
                "no qemu-storage-daemon of version {STORAGE_DAEMON_MAJOR} or later (package qemu-utils of \
                 bookworm-backports; docs/benchmarks.md says how to unpack it without installing it)"
            )),
        }
    }

    /// The first line that each program says of its version, for the record.
    #[must_use]
    pub fn versions(&self) -> Vec<(String, String)> {
        let mut programs = vec![self.directory.join("vhost-brmr"), self.directory.join("rmr-node")];
        programs.extend(self.before.iter().map(|directory| directory.join("vhost-brmr")));
        programs.extend(self.storage_daemon.clone());
        programs.push(self.nbdkit.clone());
        let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        programs.iter().filter_map(|path| Some((name(path), version_of(path)?))).collect()
    }
}

/// Which of our programs are not in `directory`, in words.
fn ours_missing_in(directory: &Path) -> Option<String> {
    let is_missing = |name: &&str| !directory.join(name).is_file();
    let missing: Vec<&str> = ["rmr-node", "rmrctl", "vhost-brmr"].into_iter().filter(is_missing).collect();
    (!missing.is_empty()).then(|| format!("{} not found in {}", missing.join(", "), directory.display()))
}

fn version_of(program: &Path) -> Option<String> {
    let output = Command::new(program).arg("--version").stdin(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).lines().next()?.trim().to_owned();
    output.status.success().then_some(text)
}

/// The first number of a version line such as `qemu-storage-daemon version 10.0.2 (Debian …)`.
fn major_of(version: &str) -> Option<u32> {
    let word = version.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()))?;
    word.split('.').next()?.parse().ok()
}

/// A system that runs. Dropping it ends its processes and removes its directory.
pub struct System {
    kind: SystemKind,
    // Ends first, then its servers, then the files go.
    client: Process,
    servers: Vec<Process>,
    client_command: CommandLine,
    socket: PathBuf,
    directory: TempDir,
}

impl System {
    /// Starts `kind` with a disk of `disk_bytes` in a new directory below `parent`.
    pub fn start(
        kind: SystemKind,
        programs: &Programs,
        parent: &Path,
        disk_bytes: u64,
    ) -> anyhow::Result<Self> {
        if let Some(missing) = programs.missing_for(kind) {
            bail!("{kind} cannot be started: {missing}");
        }
        let directory = tempfile::Builder::new()
            .prefix(&format!("bench-{kind}-"))
            .tempdir_in(parent)
            .with_context(|| format!("making a directory below {}", parent.display()))?;
        let place =
            Place { directory: directory.path(), socket: directory.path().join("vhost.sock"), disk_bytes };
        let (servers, client_command) = match kind {
            SystemKind::Brmr => brmr(&programs.directory, &place)?,
            SystemKind::BrmrBefore => {
                brmr(programs.before.as_deref().unwrap_or(&programs.directory), &place)?
            }
            SystemKind::Quorum => quorum(programs, &place, false)?,
            SystemKind::QuorumIothread => quorum(programs, &place, true)?,
            SystemKind::QsdFile => (Vec::new(), storage_daemon(programs, &place, &qsd_file(&place)?, false)),
            SystemKind::QsdNull => (Vec::new(), storage_daemon(programs, &place, &[qsd_null(&place)], false)),
        };
        let socket = place.socket;
        let client = start_client(&client_command, &socket)?;
        Ok(Self { kind, client, servers, client_command, socket, directory })
    }

    /// Which it is.
    #[must_use]
    pub fn kind(&self) -> SystemKind {
        self.kind
    }

    /// Where its disk is.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Where its stores and logs are.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Its processes.
    #[must_use]
    pub fn watched(&self) -> Vec<Watched> {
        let client = Watched { role: Role::Client, pid: self.client.pid() };
        let servers = self.servers.iter().map(|server| Watched { role: Role::Server, pid: server.pid() });
        std::iter::once(client).chain(servers).collect()
    }

    /// Makes the system ready for the next front end: a daemon that serves one and ends with it is started again,
    /// anything else that ended is an error.
    pub fn ready(&mut self) -> anyhow::Result<()> {
        for server in &self.servers {
            server.ensure_running("its client")?;
        }
        if self.client.exit_status()?.is_some_and(|status| status.success()) {
            self.client = start_client(&self.client_command, &self.socket)?;
        }
        self.client.ensure_running("a front end")
    }
}

struct Place<'a> {
    directory: &'a Path,
    socket: PathBuf,
    disk_bytes: u64,
}

impl Place<'_> {
    /// A new sparse file of the disk's size.
    fn disk_file(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.directory.join(name);
        let file = fs::File::create_new(&path).with_context(|| format!("creating {}", path.display()))?;
        file.set_len(self.disk_bytes)?;
        Ok(path)
    }
}

/// Two nodes, a pool over them, and the daemon. This is the only place that knows how our programs are started.
fn brmr(programs: &Path, place: &Place<'_>) -> anyhow::Result<(Vec<Process>, CommandLine)> {
    let mut nodes = Vec::new();
    let mut ports = Vec::new();
    for name in ["a", "b"] {
        let (port, admin) = (free_address()?, free_address()?);
        let stores = place.directory.join(format!("stores-{name}"));
        fs::create_dir(&stores)?;
        let config = place.directory.join(format!("node-{name}.toml"));
        let text = format!(
            "node_name = \"{name}\"\nlisten = [\"tcp://{port}\"]\nadvertise = [\"tcp://{port}\"]\nadmin = \"{admin}\"\n\
             store_dir = \"{}\"\n",
            stores.display()
        );
        fs::write(&config, text)?;
        let mut command =
            CommandLine::new(programs.join("rmr-node"), place.directory, &format!("node-{name}"));
        command.arg("--config").arg(config.to_string_lossy());
        let node = command.start()?;
        node.wait_for_port(port, PATIENCE)?;
        node.wait_for_port(admin, PATIENCE)?;
        nodes.push(node);
        ports.push((port, admin));
    }

    let mut create = CommandLine::new(programs.join("rmrctl"), place.directory, "rmrctl");
    create.arg("--node").arg(ports[0].1.to_string()).arg("pool").arg("create").arg(POOL);
    create.arg("--size").arg(place.disk_bytes.to_string());
    for (_, admin) in &ports {
        create.arg("--member").arg(admin.to_string());
    }
    let create = create.start()?;
    let status = create.wait_exit(PATIENCE)?;
    ensure!(status.success(), "rmrctl did not create the pool ({status}): {}", create.log_text().trim_end());

    let mut client = CommandLine::new(programs.join("vhost-brmr"), place.directory, "vhost-brmr");
    client.arg("--socket-path").arg(place.socket.to_string_lossy()).arg("--pool").arg(POOL);
    for (port, _) in &ports {
        client.arg("--node").arg(port.to_string());
    }
    client.arg("--num-queues").arg("1").arg("--queue-size").arg("1024");
    Ok((nodes, client))
}

fn quorum(
    programs: &Programs,
    place: &Place<'_>,
    iothread: bool,
) -> anyhow::Result<(Vec<Process>, CommandLine)> {
    let mut servers = Vec::new();
    let mut blocks = Vec::new();
    for leg in 0..2 {
        let (file, port) = (place.disk_file(&format!("leg{leg}.img"))?, free_address()?);
        let mut command =
            CommandLine::new(programs.nbdkit.clone(), place.directory, &format!("nbdkit-{leg}"));
        command.arg("--foreground").arg("--exit-with-parent");
        command.arg("--ipaddr").arg(port.ip().to_string()).arg("--port").arg(port.port().to_string());
        command.arg("file").arg(file.to_string_lossy());
        let server = command.start()?;
        server.wait_for_port(port, PATIENCE)?;
        servers.push(server);
        blocks.push(format!(
            "driver=nbd,node-name=leg{leg},server.type=inet,server.host={},server.port={}",
            port.ip(),
            port.port()
        ));
    }
    blocks.push(
        "driver=quorum,node-name=disk,vote-threshold=2,read-pattern=fifo,children.0=leg0,children.1=leg1"
            .into(),
    );
    Ok((servers, storage_daemon(programs, place, &blocks, iothread)))
}

fn qsd_file(place: &Place<'_>) -> anyhow::Result<Vec<String>> {
    let file = place.disk_file("disk.img")?;
    Ok(vec![format!("driver=file,node-name=disk,filename={}", file.display())])
}

fn qsd_null(place: &Place<'_>) -> String {
    format!("driver=null-co,node-name=disk,size={},read-zeroes=off", place.disk_bytes)
}

/// A storage daemon that exports the block node named `disk`.
fn storage_daemon(programs: &Programs, place: &Place<'_>, blocks: &[String], iothread: bool) -> CommandLine {
    let program = programs.storage_daemon.clone().unwrap_or_else(|| "qemu-storage-daemon".into());
    let mut command = CommandLine::new(program, place.directory, "qemu-storage-daemon");
    if iothread {
        command.arg("--object").arg("iothread,id=io");
    }
    for block in blocks {
        command.arg("--blockdev").arg(block);
    }
    let thread = if iothread { ",iothread=io" } else { "" };
    command.arg("--export").arg(format!(
        "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on,num-queues=1{thread}",
        place.socket.display()
    ));
    command
}

fn start_client(command: &CommandLine, socket: &Path) -> anyhow::Result<Process> {
    // A path left by an earlier process must not be taken for the new one's.
    if socket.exists() {
        fs::remove_file(socket)?;
    }
    let client = command.start()?;
    client.wait_for_socket(socket, PATIENCE)?;
    Ok(client)
}

/// A loopback address that nobody listens on.
fn free_address() -> anyhow::Result<SocketAddr> {
    Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?)))
}

/// What to run, and where its output goes.
struct CommandLine {
    program: PathBuf,
    arguments: Vec<String>,
    log: PathBuf,
}

impl CommandLine {
    fn new(program: PathBuf, directory: &Path, log: &str) -> Self {
        Self { program, arguments: Vec::new(), log: directory.join(format!("{log}.log")) }
    }

    fn arg(&mut self, argument: impl Into<String>) -> &mut Self {
        self.arguments.push(argument.into());
        self
    }

    fn start(&self) -> anyhow::Result<Process> {
        let name = self.program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let log = fs::OpenOptions::new().create(true).append(true).open(&self.log)?;
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        Process::adopt(&name, self.log.clone(), command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_major_version_is_read_from_a_version_line() {
        assert_eq!(major_of("qemu-storage-daemon version 10.0.2 (Debian 1:10.0.2+ds-2)"), Some(10));
        assert_eq!(major_of("qemu-storage-daemon version 7.2.22"), Some(7));
        assert_eq!(major_of("nonsense"), None);
    }

    #[test]
    fn systems_are_named_and_a_wrong_name_lists_the_right_ones() {
        for kind in SystemKind::ALL {
            assert_eq!(kind.name().parse(), Ok(kind));
        }
        assert!("drbd".parse::<SystemKind>().unwrap_err().contains("quorum-iothread"));
    }

    #[test]
    fn what_is_missing_is_named() {
        let nowhere = PathBuf::from("/nonexistent");
        let programs = Programs {
            directory: nowhere.clone(),
            before: None,
            storage_daemon: Some(nowhere.join("qsd")),
            nbdkit: nowhere.join("n"),
        };
        assert!(programs.missing_for(SystemKind::Brmr).unwrap().contains("vhost-brmr"));
        assert!(programs.missing_for(SystemKind::BrmrBefore).unwrap().contains("--before"));
        assert!(programs.missing_for(SystemKind::Quorum).unwrap().contains("nbdkit"));
        assert!(programs.missing_for(SystemKind::QsdNull).unwrap().contains("does not run"));
        assert!(System::start(SystemKind::QsdNull, &programs, Path::new("/tmp"), 1 << 20).is_err());
    }
}
