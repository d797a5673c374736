//! What the facts mean: for each thing that a node does, whether it works here, and what is missing for what, in
//! sentences. Pure functions of the facts and of what is configured.

use std::fmt;
use std::net::IpAddr;

use rmr_common::pool::{Address, TransportKind};
use serde::Serialize;

use super::machine::{Machine, RdmaDevice, RdmaPort};
use super::probe::{Engine, StoreDirectory, StorePath};
use crate::disk::Medium;
use crate::store::ByteSize;

/// Whether something works, the worst last.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Nothing is missing.
    Works,
    /// Not to be had on this machine, and nothing configured needs it.
    Absent,
    /// Works with the drawbacks that are named.
    Limited,
    /// Configured, and does not work.
    Fails,
}

/// What is to be said of one thing.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Verdict {
    /// The thing.
    pub subject: String,
    /// Whether it works.
    pub level: Level,
    /// Why, and what to do, in sentences.
    pub findings: Vec<String>,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let level = match self.level {
            Level::Works => "works",
            Level::Absent => "not here",
            Level::Limited => "works, with limits",
            Level::Fails => "DOES NOT WORK",
        };
        write!(f, "{}: {level}", self.subject)?;
        for finding in &self.findings {
            write!(f, "\n    {finding}")?;
        }
        Ok(())
    }
}

/// What a verdict is made of: the worst of what was found.
struct Opinion {
    subject: String,
    level: Level,
    findings: Vec<String>,
}

impl Opinion {
    fn new(subject: impl Into<String>) -> Self {
        Self { subject: subject.into(), level: Level::Works, findings: Vec::new() }
    }

    fn say(&mut self, level: Level, finding: impl Into<String>) {
        self.level = self.level.max(level);
        self.findings.push(finding.into());
    }

    fn verdict(self) -> Verdict {
        let Self { subject, level, findings } = self;
        Verdict { subject, level, findings }
    }
}

/// What is to run on the machine.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where to listen.
    pub listen: Vec<Address>,
    /// Buffers of all shards together, in bytes.
    pub buffers: u64,
    /// Whether this program was built with verbs.
    pub built_with_rdma: bool,
}

impl Plan {
    fn of(&self, kind: TransportKind) -> impl Iterator<Item = &Address> {
        self.listen.iter().filter(move |address| address.transport() == kind)
    }

    /// How bad it is that a transport is not to be had.
    fn missing(&self, kind: TransportKind) -> Level {
        if self.of(kind).next().is_some() { Level::Fails } else { Level::Absent }
    }
}

/// `tcp://`. `unbound` names addresses of `listen` that are none of this machine's, with the system's words.
#[must_use]
pub fn tcp(machine: &Machine, unbound: &[(Address, String)]) -> Verdict {
    let mut opinion = Opinion::new("tcp://");
    say_unbound(&mut opinion, TransportKind::Tcp, unbound);
    let tcp = &machine.tcp;
    match tcp.congestion_control.as_deref() {
        // As connections choose it; see rmr_common::transport::tcp.
        Some(default) if !matches!(default, "cubic" | "reno") => {
            match ["cubic", "reno"].iter().find(|name| tcp.choosable.iter().any(|found| found == *name)) {
                Some(used) => opinion.say(
                    Level::Works,
                    format!("The system's congestion control is {default}; connections use {used}."),
                ),
                None => opinion.say(
                    Level::Limited,
                    format!(
                        "The congestion control is {default} and neither cubic nor reno may be chosen (found: {}): \
                         if it paces, large writes are slow. Allow cubic in net.ipv4.tcp_allowed_congestion_control.",
                        tcp.choosable.join(" ")
                    ),
                ),
            }
        }
        _ => {}
    }
    for (name, found) in [("tcp_rmem", tcp.receive_buffer_max), ("tcp_wmem", tcp.send_buffer_max)] {
        /// Room for a request of the largest size.
        const LEAST: u64 = 1 << 20;
        if let Some(bytes) = found.filter(|bytes| *bytes < LEAST) {
            let finding = format!(
                "net.ipv4.{name} lets a socket have {} at most, less than one request of 1M: raise its third number.",
                ByteSize(bytes)
            );
            opinion.say(Level::Limited, finding);
        }
    }
    opinion.verdict()
}

/// `tls://`. `certificates` is what came of loading them; none if none are configured.
#[must_use]
pub fn tls(plan: &Plan, certificates: Option<&Result<(), String>>, unbound: &[(Address, String)]) -> Verdict {
    let mut opinion = Opinion::new("tls://");
    match certificates {
        None => {
            opinion.say(
                plan.missing(TransportKind::Tls),
                "No certificate is configured ([tls] certificate, key).",
            );
        }
        Some(Err(problem)) => {
            opinion.say(Level::Fails, format!("The certificates cannot be used: {problem}."))
        }
        Some(Ok(())) => {}
    }
    say_unbound(&mut opinion, TransportKind::Tls, unbound);
    opinion.verdict()
}

/// Keys of pools. `bad` is what is wrong with those in the directory; none if no directory is configured.
#[must_use]
pub fn keys(bad: Option<Vec<String>>) -> Verdict {
    let mut opinion = Opinion::new("pool keys");
    match bad {
        None => opinion.say(
            Level::Absent,
            "No authentication: no directory of keys is configured ([keys] directory), and whoever reaches a data address may \
             attach.",
        ),
        Some(bad) => bad.into_iter().for_each(|problem| opinion.say(Level::Fails, format!("{problem}."))),
    }
    opinion.verdict()
}

fn say_unbound(opinion: &mut Opinion, kind: TransportKind, unbound: &[(Address, String)]) {
    for (address, problem) in unbound.iter().filter(|(address, _)| address.transport() == kind) {
        opinion.say(Level::Fails, format!("Cannot listen on {address}: {problem}."));
    }
}

/// `rdma://`.
#[must_use]
pub fn rdma(machine: &Machine, plan: &Plan) -> Verdict {
    let mut opinion = Opinion::new("rdma://");
    let missing = plan.missing(TransportKind::Rdma);
    if !plan.built_with_rdma {
        opinion.say(missing, "This program was built without the feature rdma; use tcp://.");
    }
    let rdma = &machine.rdma;
    if rdma.devices.is_empty() {
        opinion.say(
            missing,
            "No device: /sys/class/infiniband is empty. Load the card's driver, or set up Soft-RoCE \
             (`rdma link add rxe0 type rxe netdev INTERFACE`); until then use tcp://.",
        );
        return opinion.verdict();
    }
    if !rdma.connection_manager {
        opinion.say(missing, "No /dev/infiniband/rdma_cm: load the module rdma_ucm.");
    }
    if rdma.providers.is_empty() {
        opinion.say(
            missing,
            "libibverbs has no driver in /etc/libibverbs.d: install the package ibverbs-providers.",
        );
    }
    let mut usable = false;
    for device in &rdma.devices {
        usable |= say_device(&mut opinion, missing, device);
    }
    if !usable {
        opinion.say(missing, "No device has a usable port.");
    }
    for address in plan.of(TransportKind::Rdma) {
        let wanted: Option<IpAddr> = address.host().parse().ok();
        let owned = |ip: IpAddr| ports(machine).any(|port| port.is_active() && has(port, ip));
        if wanted.is_some_and(|ip| !ip.is_unspecified() && !owned(ip)) {
            opinion.say(Level::Fails, format!("No active port has the address of {address}."));
        }
    }
    say_locked_memory(&mut opinion, machine, plan, missing);
    opinion.verdict()
}

/// Whether the device has a port that can be used; if not, the reasons are said.
fn say_device(opinion: &mut Opinion, missing: Level, device: &RdmaDevice) -> bool {
    let name = &device.name;
    if device.device_file.is_none() {
        opinion.say(missing, format!("{name} has no file in /dev/infiniband: load the module ib_uverbs."));
        return false;
    }
    let mut usable = false;
    for port in &device.ports {
        let place = format!("{name}/{}", port.number);
        if !port.is_active() {
            // Another port may be the one that is meant to be used.
            opinion.say(
                Level::Works,
                format!(
                    "{place} is {} ({}), not ACTIVE: check cable and link.",
                    port.state, port.physical_state
                ),
            );
        } else if port.link_layer == "Ethernet" && !port.gids.iter().any(|gid| is_routable(gid.address)) {
            let interface = port.interface.as_deref().unwrap_or("its network device");
            opinion.say(Level::Works, format!("{place} has no IP address: give one to {interface}."));
        } else {
            usable = true;
            if let Some(mtu) = port.path_mtu.filter(|mtu| *mtu < 4096) {
                let interface = port.interface.as_deref().unwrap_or("its network device");
                opinion.say(
                    Level::Works,
                    format!(
                        "{place} carries {mtu} bytes in a packet, so a block of 4096 takes {}: an MTU of 4200 or more \
                         on {interface} and on all switches makes it one.",
                        4096 / mtu
                    ),
                );
            }
        }
    }
    usable
}

fn say_locked_memory(opinion: &mut Opinion, machine: &Machine, plan: &Plan, missing: Level) {
    let memory = &machine.memory;
    // The kernel counts what io_uring pins and what a card pins together, also where it is the same.
    let pinned = plan.buffers.saturating_mul(2);
    if let Some(limit) = memory.lock_limit.filter(|limit| !memory.lock_privileged && *limit < pinned) {
        opinion.say(
            missing,
            format!(
                "This process may lock {} and has no CAP_IPC_LOCK; the buffers that cards write to are {}, which count for \
                 io_uring and again for each device. Set LimitMEMLOCK=infinity.",
                ByteSize(limit),
                ByteSize(plan.buffers)
            ),
        );
    }
}

fn ports(machine: &Machine) -> impl Iterator<Item = &RdmaPort> {
    machine.rdma.devices.iter().flat_map(|device| &device.ports)
}

fn has(port: &RdmaPort, ip: IpAddr) -> bool {
    port.gids.iter().any(|gid| gid.address == ip)
}

/// Not only of the link itself.
fn is_routable(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !ip.is_link_local(),
        IpAddr::V6(ip) => !ip.is_unicast_link_local(),
    }
}

/// Disk I/O.
#[must_use]
pub fn engine(machine: &Machine, plan: &Plan, engine: &Engine, wants_uring: bool) -> Verdict {
    let mut opinion = Opinion::new("disk engine");
    if let Some(problem) = &engine.problem {
        let level = if wants_uring { Level::Fails } else { Level::Limited };
        opinion.say(
            level,
            format!(
                "io_uring is not to be had ({problem}): requests run on the I/O thread, and a slow disk stops its \
                 whole shard. Check sysctl kernel.io_uring_disabled and the container's seccomp profile."
            ),
        );
        return opinion.verdict();
    }
    if !engine.missing_operations.is_empty() {
        let names = engine.missing_operations.join(", ");
        opinion
            .say(Level::Limited, format!("io_uring lacks {names}: a newer kernel has them (6.1 or later)."));
    }
    if !engine.deferred_work {
        let finding =
            "io_uring cannot defer its work to this thread (kernel before 6.1): more interruptions.";
        opinion.say(Level::Works, finding);
    }
    let memory = &machine.memory;
    let above_limit = memory.lock_limit.is_some_and(|limit| !memory.lock_privileged && limit < plan.buffers);
    if !engine.registered_buffers || above_limit {
        let limit = memory.lock_limit.map_or_else(|| "none".to_owned(), |limit| ByteSize(limit).to_string());
        opinion.say(
            Level::Limited,
            format!(
                "The {} of buffers cannot be registered with io_uring, so each request pins its pages. The limit on \
                 locked memory is {limit}: set LimitMEMLOCK=infinity.",
                ByteSize(plan.buffers)
            ),
        );
    }
    opinion.verdict()
}

/// Memory.
#[must_use]
pub fn memory(machine: &Machine, plan: &Plan) -> Verdict {
    let mut opinion = Opinion::new("memory");
    let buffers = ByteSize(plan.buffers);
    match machine.memory.available {
        None => opinion.say(Level::Limited, "/proc/meminfo does not say how much is available."),
        Some(available) if available < plan.buffers => {
            let text = format!(
                "The buffers are {buffers} and {} is available: lower shards or buffer_memory.",
                ByteSize(available >> 20 << 20)
            );
            opinion.say(Level::Fails, text);
        }
        Some(available) if available / 2 < plan.buffers => {
            let text = format!(
                "The buffers are {buffers}, more than half of the {} that is available.",
                ByteSize(available >> 20 << 20)
            );
            opinion.say(Level::Limited, text);
        }
        Some(_) => {}
    }
    opinion.verdict()
}

/// The directory of file stores.
#[must_use]
pub fn store_directory(directory: &StoreDirectory) -> Verdict {
    let mut opinion = Opinion::new(format!("store_dir {}", directory.path.display()));
    if let Some(problem) = &directory.problem {
        opinion.say(Level::Fails, format!("A store cannot be kept here: {problem}."));
    }
    let Some(facts) = &directory.facts else { return opinion.verdict() };
    say_medium(&mut opinion, facts.medium, facts.direct);
    if !facts.punches_holes {
        opinion.say(
            Level::Limited,
            "Space cannot be given back (no FALLOC_FL_PUNCH_HOLE): what a discard covers is overwritten with zeroes \
             where it holds anything else, and stores never shrink.",
        );
    }
    opinion.verdict()
}

/// A device or file of a store.
#[must_use]
pub fn store(store: &StorePath) -> Verdict {
    let mut opinion = Opinion::new(format!("store {}", store.path.display()));
    if let Some(problem) = &store.problem {
        opinion.say(Level::Fails, format!("It cannot be opened: {problem}."));
    }
    let Some(facts) = &store.facts else { return opinion.verdict() };
    say_medium(&mut opinion, facts.medium, facts.direct);
    if let Some(queue) = &facts.queue {
        if queue.discard_max_bytes == Some(0) {
            opinion.say(Level::Works, "The device has no discard.");
        }
        if queue.write_zeroes_max_bytes == Some(0) {
            opinion.say(
                Level::Works,
                "The device does not zero ranges by itself: space cannot be given back, and zeroes are written where it \
                 holds anything else.",
            );
        }
    }
    opinion.verdict()
}

fn say_medium(opinion: &mut Opinion, medium: Medium, direct: bool) {
    if medium == Medium::Memory {
        opinion.say(Level::Limited, "It lies in memory: it is gone with the machine.");
    } else if !direct {
        opinion.say(
            Level::Limited,
            "There is no direct I/O: each request is copied through the page cache, and I/O errors hide until a flush.",
        );
    }
}
