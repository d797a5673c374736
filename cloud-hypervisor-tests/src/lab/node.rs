//! Storage nodes of a test: `rmr-node` processes on free ports of the test's fabric, which can be killed and started again.

use std::fmt;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::netns::command_on;
use super::pool::rmrctl_on as rmrctl;
use super::{Fabric, Host, Lab, Process, Transport, free_port, programs};

/// How long an answer of the admin API may take.
const ADMIN_LIMIT: Duration = Duration::from_secs(30);
const START_LIMIT: Duration = Duration::from_secs(60);
/// The node's own bound for a graceful stop is 20 s.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// A node to be.
#[derive(Clone, Debug)]
pub struct NodeBuilder {
    name: String,
    shards: u32,
    engine: Option<String>,
    on_disk: bool,
    settings: String,
    host: Option<Host>,
    address: Option<Ipv4Addr>,
}

impl NodeBuilder {
    /// A node with one shard whose stores are on tmpfs.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            shards: 1,
            engine: None,
            on_disk: false,
            settings: String::new(),
            host: None,
            address: None,
        }
    }

    /// Number of I/O threads.
    #[must_use]
    pub fn shards(mut self, shards: u32) -> Self {
        self.shards = shards;
        self
    }

    /// The disk engine, instead of the node's own choice.
    #[must_use]
    pub fn engine(mut self, engine: &str) -> Self {
        self.engine = Some(engine.to_owned());
        self
    }

    /// Puts the stores below `/tmp` instead of tmpfs, where O_DIRECT works.
    #[must_use]
    pub fn on_disk(mut self) -> Self {
        self.on_disk = true;
        self
    }

    /// Adds lines to the configuration file, as they are.
    #[must_use]
    pub fn settings(mut self, toml: &str) -> Self {
        self.settings = toml.to_owned();
        self
    }

    /// Has it listen for clients and peers at another address of this machine, by the lab's transport.
    #[must_use]
    pub fn address(mut self, address: Ipv4Addr) -> Self {
        self.address = Some(address);
        self
    }

    /// Runs it on a host of the test's own network, over TCP.
    #[must_use]
    pub fn host(mut self, host: &Host) -> Self {
        self.host = Some(host.clone());
        self
    }

    /// Starts the node and waits until it answers on both ports.
    ///
    /// # Errors
    /// When the program is missing or does not come up.
    pub fn start(&self, lab: &Lab) -> Result<Node> {
        let fabric = match (&self.host, self.address) {
            (Some(host), _) => Fabric::new(Transport::Tcp, host.address()),
            (None, Some(address)) => Fabric::new(lab.fabric().transport(), address),
            (None, None) => lab.fabric(),
        };
        let data = DataAddress { fabric, port: free_port()? };
        let admin_host = self.host.as_ref().map_or(Ipv4Addr::LOCALHOST, Host::address);
        let admin = SocketAddr::from((admin_host, free_port()?));
        let directory = format!("{}.stores", self.name);
        let store_dir = if self.on_disk { lab.path(directory) } else { lab.memory_path(directory) };
        fs::create_dir(&store_dir).with_context(|| format!("making {}", store_dir.display()))?;
        let config = lab.path(format!("{}.toml", self.name));
        let engine =
            self.engine.as_ref().map_or_else(String::new, |engine| format!("engine = \"{engine}\"\n"));
        let text = format!(
            "node_name = \"{}\"\nlisten = [\"{data}\"]\nadvertise = [\"{data}\"]\nadmin = \"{admin}\"\n\
             store_dir = \"{}\"\nshards = {}\n{engine}{}\n",
            self.name,
            store_dir.display(),
            self.shards,
            self.settings
        );
        fs::write(&config, text).with_context(|| format!("writing {}", config.display()))?;
        let host = self.host.clone();
        let process = launch(lab, &self.name, &config, host.as_ref(), data, admin)?;
        Ok(Node { name: self.name.clone(), host, data, admin, store_dir, config, process })
    }
}

/// Where a node listens for clients and peers.
#[derive(Clone, Copy, Debug)]
struct DataAddress {
    fabric: Fabric,
    port: u16,
}

impl fmt::Display for DataAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.fabric.endpoint(self.port))
    }
}

fn launch(
    lab: &Lab,
    name: &str,
    config: &Path,
    host: Option<&Host>,
    data: DataAddress,
    admin: SocketAddr,
) -> Result<Process> {
    let mut command = command_on(host, programs::own("rmr-node")?)?;
    command.arg("--config").arg(config);
    let process = Process::spawn(lab, &format!("node-{name}"), command)?;
    if host.is_some() {
        // Its ports cannot be reached from here.
        process.wait_until("an answer of the admin API", START_LIMIT, || {
            Ok(rmrctl(host, admin, &["node", "show"]).is_ok())
        })?;
        return Ok(process);
    }
    // A node listens for data before it does for operators; a verbs address cannot be probed as cheaply.
    if data.fabric.transport() == Transport::Tcp {
        process.wait_for_port(SocketAddr::new(data.fabric.host(), data.port), START_LIMIT)?;
    }
    process.wait_for_port(admin, START_LIMIT)?;
    Ok(process)
}

/// A node; its process is killed when it is dropped.
#[derive(Debug)]
pub struct Node {
    name: String,
    host: Option<Host>,
    data: DataAddress,
    admin: SocketAddr,
    store_dir: PathBuf,
    config: PathBuf,
    process: Process,
}

impl Node {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it listens for clients and peers, as `vhost-brmr --node` takes it.
    #[must_use]
    pub fn data_address(&self) -> String {
        self.data.to_string()
    }

    /// What carries its data.
    #[must_use]
    pub fn transport(&self) -> Transport {
        self.data.fabric.transport()
    }

    /// Where it listens for admin requests.
    #[must_use]
    pub fn admin_address(&self) -> SocketAddr {
        self.admin
    }

    /// Asks the admin API, and returns the JSON of its answer. Much cheaper than `rmrctl`, for what looks often.
    ///
    /// # Errors
    /// When there is no answer, or none of status 200.
    pub fn admin_get(&self, path: &str) -> Result<Value> {
        let mut stream = TcpStream::connect(self.admin).context("connecting to the admin API")?;
        stream.set_read_timeout(Some(ADMIN_LIMIT))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", self.admin)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).with_context(|| format!("GET {path} of node '{}'", self.name))?;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        ensure!(head.starts_with("HTTP/1.1 200 "), "GET {path} of node '{}': {answer}", self.name);
        serde_json::from_str(body).with_context(|| format!("expected JSON from {path}, found '{body}'"))
    }

    /// The directory of its stores.
    #[must_use]
    pub fn store_dir(&self) -> &Path {
        &self.store_dir
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

    /// Starts it again, with the same ports and stores; a process that still runs is killed first.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn restart(&mut self, lab: &Lab) -> Result<()> {
        self.process.kill()?;
        self.process = launch(lab, &self.name, &self.config, self.host.as_ref(), self.data, self.admin)?;
        Ok(())
    }
}
