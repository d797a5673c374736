//! Pools of a test, made and asked about with `rmrctl` as an operator would, and compared store by store.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::netns::command_on;
use super::stores::{self, Area};
use super::{Host, Lab, Node, Transport, programs, wait_until};

/// Runs `rmrctl` against the node whose admin address is `admin`.
///
/// # Errors
/// When it does not succeed; the error carries what it said.
pub fn rmrctl(admin: SocketAddr, arguments: &[&str]) -> Result<String> {
    rmrctl_on(None, admin, arguments)
}

/// As [`rmrctl`], on a host of the test's own network.
pub(super) fn rmrctl_on(host: Option<&Host>, admin: SocketAddr, arguments: &[&str]) -> Result<String> {
    let mut command = command_on(host, programs::own("rmrctl")?)?;
    programs::output_of(command.arg("--node").arg(admin.to_string()).args(arguments))
}

/// A pool to be.
#[derive(Clone, Debug)]
pub struct PoolBuilder {
    name: String,
    size_mib: u64,
    block_size: Option<u32>,
    members: Vec<Member>,
    operator: Option<Host>,
    patience: Option<Duration>,
}

#[derive(Clone, Debug)]
struct Member {
    node: String,
    admin: SocketAddr,
    data: String,
    transport: Transport,
    store_dir: PathBuf,
}

impl Member {
    fn on(node: &Node) -> Self {
        Self {
            node: node.name().to_owned(),
            admin: node.admin_address(),
            data: node.data_address(),
            transport: node.transport(),
            store_dir: node.store_dir().to_owned(),
        }
    }
}

impl PoolBuilder {
    /// A pool of 64 MiB without members.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            size_mib: 64,
            block_size: None,
            members: Vec::new(),
            operator: None,
            patience: None,
        }
    }

    /// Size in MiB.
    #[must_use]
    pub fn size_mib(mut self, size_mib: u64) -> Self {
        self.size_mib = size_mib;
        self
    }

    /// The logical block size that guests see, instead of the default.
    #[must_use]
    pub fn block_size(mut self, bytes: u32) -> Self {
        self.block_size = Some(bytes);
        self
    }

    /// Asks and orders from a host of the test's own network.
    #[must_use]
    pub fn operator(mut self, host: &Host) -> Self {
        self.operator = Some(host.clone());
        self
    }

    /// How long the operator waits for an answer, instead of the default: where all nodes answer, however crowded the machine is.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = Some(patience);
        self
    }

    /// Adds a member on `node`.
    #[must_use]
    pub fn member(mut self, node: &Node) -> Self {
        self.members.push(Member::on(node));
        self
    }

    /// What `rmrctl` is told in order to create the pool.
    #[must_use]
    pub fn create_arguments(&self) -> Vec<String> {
        let size = format!("{}M", self.size_mib);
        let mut arguments: Vec<_> =
            ["pool", "create", &self.name, "--size", &size].map(str::to_owned).to_vec();
        for member in &self.members {
            arguments.extend(["--member".to_owned(), member.admin.to_string()]);
        }
        if let Some(bytes) = self.block_size {
            arguments.extend(["--block-size".to_owned(), bytes.to_string()]);
        }
        // TCP is the default; most operators will never write it.
        if let Some(member) = self.members.iter().find(|member| member.transport != Transport::Tcp) {
            arguments.extend(["--transport".to_owned(), member.transport.to_string()]);
        }
        arguments
    }

    /// Creates the pool.
    ///
    /// # Errors
    /// When it has no member or `rmrctl` refuses.
    pub fn create(self, _lab: &Lab) -> Result<Pool> {
        let Some(first) = self.members.first() else { bail!("pool '{}' needs a member", self.name) };
        let arguments = self.create_arguments();
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        rmrctl_on(self.operator.as_ref(), first.admin, &arguments)?;
        let Self { name, size_mib, members, operator, patience, .. } = self;
        Ok(Pool { name, size_mib, members, operator, patience })
    }
}

/// An existing pool. It holds no process: nodes and daemon have their own handles.
#[derive(Clone, Debug)]
pub struct Pool {
    name: String,
    size_mib: u64,
    members: Vec<Member>,
    operator: Option<Host>,
    patience: Option<Duration>,
}

impl Pool {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size_mib << 20
    }

    /// Where its members' nodes listen for clients.
    pub fn data_addresses(&self) -> impl Iterator<Item = &str> {
        self.members.iter().map(|member| member.data.as_str())
    }

    /// What `rmrctl status` says of the pool when it asks the nodes of all members.
    ///
    /// # Errors
    /// When it cannot say anything.
    pub fn status(&self) -> Result<Value> {
        let mut command = self.rmrctl()?;
        let output = command.args(["status", &self.name, "--json"]).output().context("starting rmrctl")?;
        let text = String::from_utf8_lossy(&output.stdout);
        // The exit status tells the level too: 3 and 4 are answers, not failures.
        if !matches!(output.status.code(), Some(0 | 3 | 4 | 6)) {
            bail!(
                "{command:?} failed ({}): {text}{}",
                output.status,
                String::from_utf8_lossy(&output.stderr).trim_end()
            );
        }
        let status: Value = serde_json::from_str(&text)
            .with_context(|| format!("expected JSON from rmrctl status, found '{text}'"))?;
        let pools = status.get("pools").and_then(Value::as_array);
        let found = pools.and_then(|pools| pools.iter().find(|pool| pool["name"] == self.name.as_str()));
        found.cloned().with_context(|| format!("rmrctl status does not know pool '{}': {status}", self.name))
    }

    /// Runs `rmrctl pool COMMAND NAME …` with JSON against the nodes of all members: its exit code, and what it printed last.
    ///
    /// # Errors
    /// When it cannot be started, or prints no JSON although it ended well.
    pub fn rmrctl_pool(&self, command: &str, arguments: &[&str]) -> Result<(i32, Value)> {
        let mut program = self.rmrctl()?;
        program.args(["--json", "pool", command, &self.name]).args(arguments);
        let output = program.output().context("starting rmrctl")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let exit = output.status.code().context("rmrctl was killed")?;
        // Progress comes before, a line each.
        let last = serde_json::Deserializer::from_str(&text).into_iter::<Value>().last();
        match last {
            Some(Ok(value)) => Ok((exit, value)),
            _ if exit != 0 => Ok((exit, Value::from(String::from_utf8_lossy(&output.stderr).into_owned()))),
            found => bail!("expected JSON from {program:?}, found {found:?} in '{text}'"),
        }
    }

    /// The pool's level as `rmrctl status` has it: `safe`, `degraded`, `suspended` or `unknown`.
    ///
    /// # Errors
    /// As [`Pool::status`], or when the answer has no level.
    pub fn level(&self) -> Result<String> {
        let status = self.status()?;
        let level = status.pointer("/assessment/level").and_then(Value::as_str);
        level
            .map(str::to_owned)
            .with_context(|| format!("rmrctl status has no text at /assessment/level: {status}"))
    }

    /// Waits until [`Pool::level`] is `wanted`.
    ///
    /// # Errors
    /// When it is another one until `limit`, or cannot be asked.
    pub fn wait_for_level(&self, wanted: &str, limit: Duration) -> Result<()> {
        let mut last = String::new();
        let result = wait_until(&format!("pool '{}' to be {wanted}", self.name), limit, || {
            last = self.level()?;
            Ok(last == wanted)
        });
        result.with_context(|| format!("the level was '{last}'"))
    }

    /// The data areas of the stores of all members, found by what the stores say of themselves.
    ///
    /// # Errors
    /// When a member's store is missing.
    pub fn areas(&self) -> Result<Vec<Area>> {
        self.members.iter().map(|member| self.area_of(member)).collect()
    }

    /// Compares the stores of all members byte for byte. Nothing may be in flight.
    ///
    /// # Errors
    /// When they differ; the first different blocks are named.
    pub fn assert_identical(&self) -> Result<()> {
        stores::assert_identical(&self.areas()?).with_context(|| format!("stores of pool '{}'", self.name))
    }

    /// As [`Pool::assert_identical`], where writes may still be on their way for up to `limit`.
    ///
    /// # Errors
    /// When the stores differ even then.
    pub fn assert_identical_within(&self, limit: Duration) -> Result<()> {
        let started = Instant::now();
        loop {
            let result = self.assert_identical();
            if result.is_ok() || started.elapsed() > limit {
                return result;
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Compares the stores of the members on these nodes, where others are known to be out.
    ///
    /// # Errors
    /// When they differ; the first different blocks are named.
    pub fn assert_identical_on(&self, nodes: &[&str]) -> Result<()> {
        let areas = nodes.iter().map(|node| self.area_of(self.member(node)?)).collect::<Result<Vec<_>>>()?;
        stores::assert_identical(&areas)
            .with_context(|| format!("stores of pool '{}' on {nodes:?}", self.name))
    }

    /// The same pool with one more member, which an operator has added on `node`.
    #[must_use]
    pub fn with(mut self, node: &Node) -> Self {
        self.members.push(Member::on(node));
        self
    }

    /// The same pool without the member that an operator has removed from `node`.
    #[must_use]
    pub fn without(mut self, node: &Node) -> Self {
        self.members.retain(|member| member.node != node.name());
        self
    }

    /// `rmrctl pool COMMAND NAME …`, told of the nodes of all members.
    ///
    /// # Errors
    /// When the program is missing.
    pub fn operator(&self, command: &str, arguments: &[&str]) -> Result<Command> {
        let mut rmrctl = self.rmrctl()?;
        rmrctl.args(["--json", "pool", command, &self.name]).args(arguments);
        Ok(rmrctl)
    }

    /// `rmrctl`, told of the nodes of all members.
    fn rmrctl(&self) -> Result<Command> {
        let mut rmrctl = command_on(self.operator.as_ref(), programs::own("rmrctl")?)?;
        for member in &self.members {
            rmrctl.args(["--node", &member.admin.to_string()]);
        }
        if let Some(patience) = self.patience {
            rmrctl.args(["--timeout", &patience.as_secs().to_string()]);
        }
        Ok(rmrctl)
    }

    /// Runs [`Pool::operator`]; returns the last line that it printed, as JSON.
    ///
    /// # Errors
    /// When it does not succeed; the error carries what it said.
    pub fn operate(&self, command: &str, arguments: &[&str]) -> Result<Value> {
        let text = programs::output_of(&mut self.operator(command, arguments)?)?;
        let last = text.lines().last().unwrap_or_default();
        serde_json::from_str(last)
            .or_else(|_| serde_json::from_str(&text))
            .with_context(|| format!("expected JSON from rmrctl pool {command}, found '{text}'"))
    }

    fn member(&self, node: &str) -> Result<&Member> {
        let member = self.members.iter().find(|member| member.node == node);
        member.with_context(|| format!("pool '{}' has no member on node '{node}'", self.name))
    }

    fn area_of(&self, member: &Member) -> Result<Area> {
        let directory = &member.store_dir;
        for entry in fs::read_dir(directory).with_context(|| format!("listing {}", directory.display()))? {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "store") {
                continue;
            }
            let description = stores::inspect(&path)?;
            if description.pointer("/superblock/spec/name").and_then(Value::as_str) == Some(&self.name) {
                return Area::from_description(&path, &description);
            }
        }
        bail!("{} holds no store of pool '{}'", directory.display(), self.name)
    }
}
