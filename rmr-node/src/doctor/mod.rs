//! `rmr-node doctor` and `rmrctl doctor`: what this machine has, what is missing for what, and whether each transport works
//! here. Nothing is changed but for a small file in the store directory, which is removed again.
//!
//! * [`machine`] — facts of the kernel, read below a root directory.
//! * [`probe`] — what is found by trying.
//! * [`verdict`] — what the facts mean.

pub mod machine;
pub mod probe;
/// What is wrong with the keys in a directory, one line each.
fn bad_keys(directory: &Path) -> Vec<String> {
    let failed = |error: std::io::Error| vec![format!("{}: {error}", directory.display())];
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) => return failed(error),
    };
    let mut bad = Vec::new();
    match std::fs::metadata(directory) {
        Ok(metadata) if metadata.mode() & 0o022 != 0 => bad.push(format!(
            "{}: others than its owner may put keys there, expected mode 0700",
            directory.display()
        )),
        Ok(_) => {}
        Err(error) => return failed(error),
    }
    for entry in entries {
        match entry {
            Ok(entry) => {
                let name = entry.file_name();
                let name = name.to_string_lossy();
                if name.ends_with(".key") || name.ends_with(".key.old") {
                    bad.extend(SecretKey::read(&entry.path()).err().map(|error| error.to_string()));
                }
            }
            Err(error) => bad.push(format!("{}: {error}", directory.display())),
        }
    }
    bad.sort();
    bad
}

#[cfg(test)]
mod testing;
pub mod verdict;

use std::fmt;
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rmr_common::auth::SecretKey;
use rmr_common::pool::{Address, TransportKind};
use rmr_common::words;
use serde::Serialize;

use self::machine::{Machine, RdmaPort};
use self::probe::{Engine, StoreDirectory, StorePath};
use self::verdict::{Level, Plan, Verdict};
use crate::config::{Config, EngineChoice, Settings};
use crate::service;
use crate::store::ByteSize;

/// Exit code when everything that is configured works.
pub const EXIT_WORKS: u8 = 0;
/// Exit code when it works with limits that are named.
pub const EXIT_LIMITED: u8 = 3;
/// Exit code when something that is configured does not work.
pub const EXIT_FAILS: u8 = 4;

/// What to examine.
#[derive(Clone, Debug, clap::Args)]
pub struct DoctorArgs {
    /// Configuration file (TOML) of the node that is to run here
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print JSON for programs
    #[arg(long)]
    pub json: bool,
    /// Flags of the node that is to run here
    #[command(flatten)]
    pub settings: Settings,
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Of this program.
    pub version: &'static str,
    /// The machine.
    pub machine: Machine,
    /// Disk I/O, where a node is to run.
    pub engine: Option<Engine>,
    /// The directory of stores, if there is one.
    pub store_directory: Option<StoreDirectory>,
    /// Stores that are named.
    pub stores: Vec<StorePath>,
    /// What it means, one for each thing.
    pub verdicts: Vec<Verdict>,
}

impl Report {
    /// Examines this machine for a node with this configuration.
    #[must_use]
    pub fn for_node(config: &Config) -> Self {
        let root = Path::new("/");
        let machine = Machine::of(root);
        let plan = Plan {
            listen: config.listen.clone(),
            buffers: config.buffer_memory.saturating_mul(config.shards as u64),
            built_with_rdma: built_with_rdma(),
        };
        let unbound = unbound(&config.listen);
        let certificates = config.tls.identity.is_some().then(|| {
            service::load_tls(&config.tls).map(|_| ()).map_err(|error| words::error(error.as_ref()))
        });
        let engine = Engine::probe();
        let store_directory = config.store_dir.as_deref().map(StoreDirectory::probe);
        let stores: Vec<_> = config.stores.iter().map(|path| StorePath::probe(root, path)).collect();
        let mut verdicts = vec![
            verdict::tcp(&machine, &unbound),
            verdict::tls(&plan, certificates.as_ref(), &unbound),
            verdict::rdma(&machine, &plan),
            verdict::keys(config.keys.directory.as_deref().map(bad_keys)),
            verdict::memory(&machine, &plan),
            verdict::engine(&machine, &plan, &engine, config.engine == EngineChoice::Uring),
        ];
        verdicts.extend(store_directory.iter().map(verdict::store_directory));
        verdicts.extend(stores.iter().map(verdict::store));
        Self {
            version: env!("CARGO_PKG_VERSION"),
            machine,
            engine: Some(engine),
            store_directory,
            stores,
            verdicts,
        }
    }

    /// Examines this machine for clients: hypervisor hosts and operators' machines.
    #[must_use]
    pub fn for_client() -> Self {
        let machine = Machine::of(Path::new("/"));
        let plan = Plan { listen: Vec::new(), buffers: 0, built_with_rdma: built_with_rdma() };
        let verdicts = vec![verdict::tcp(&machine, &[]), verdict::rdma(&machine, &plan)];
        let version = env!("CARGO_PKG_VERSION");
        Self { version, machine, engine: None, store_directory: None, stores: Vec::new(), verdicts }
    }

    /// The program's exit code: that of the worst verdict.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self.verdicts.iter().map(|verdict| verdict.level).max() {
            None | Some(Level::Works | Level::Absent) => EXIT_WORKS,
            Some(Level::Limited) => EXIT_LIMITED,
            Some(Level::Fails) => EXIT_FAILS,
        }
    }

    /// The report as people read it, or as programs do.
    ///
    /// # Errors
    /// When a path is no UTF-8, which JSON cannot hold.
    pub fn render(&self, json: bool) -> Result<String, serde_json::Error> {
        if json { serde_json::to_string_pretty(self).map(|text| text + "\n") } else { Ok(self.to_string()) }
    }
}

/// Whether this program can speak verbs at all.
const fn built_with_rdma() -> bool {
    cfg!(feature = "rdma")
}

/// Addresses that this machine cannot listen on, with the system's words. Ports are not tried: the node may be running.
fn unbound(listen: &[Address]) -> Vec<(Address, String)> {
    let try_one = |address: &Address| {
        let error = TcpListener::bind((address.host(), 0)).err()?;
        Some((address.clone(), error.to_string()))
    };
    listen.iter().filter(|address| address.transport() != TransportKind::Rdma).filter_map(try_one).collect()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Machine { kernel, memory, tcp, rdma } = &self.machine;
        let size = |bytes: Option<u64>| {
            bytes.map_or_else(|| "unknown".to_owned(), |bytes| ByteSize(bytes >> 20 << 20).to_string())
        };
        writeln!(f, "kernel:    {}", kernel.as_deref().unwrap_or("unknown"))?;
        let lock = match (memory.lock_privileged, memory.lock_limit) {
            (true, _) => "any amount (CAP_IPC_LOCK)".to_owned(),
            (false, None) => "any amount".to_owned(),
            (false, Some(limit)) => ByteSize(limit).to_string(),
        };
        let (available, total) = (size(memory.available), size(memory.total));
        writeln!(f, "memory:    {available} available of {total}; this process may lock {lock}")?;
        // Sizes of which none were set aside tell nobody anything.
        for pages in memory.huge_pages.iter().filter(|pages| pages.total > 0) {
            let (unit, total, free) = (ByteSize(pages.size_kib << 10), pages.total, pages.free);
            writeln!(f, "hugepages: {total} of {unit}, {free} free; none are needed")?;
        }
        writeln!(
            f,
            "TCP:       {}; may choose {}; socket buffers up to {} in, {} out",
            tcp.congestion_control.as_deref().unwrap_or("unknown"),
            tcp.choosable.join(" "),
            size(tcp.receive_buffer_max),
            size(tcp.send_buffer_max)
        )?;
        if rdma.devices.is_empty() {
            writeln!(f, "RDMA:      no device")?;
        }
        for device in &rdma.devices {
            let file = device.device_file.as_deref().unwrap_or("no device file");
            let firmware = device.firmware.as_deref().unwrap_or("unknown");
            writeln!(f, "RDMA:      {}, {file}, firmware {firmware}", device.name)?;
            device.ports.iter().try_for_each(|port| write_port(f, port))?;
        }
        if let Some(engine) = &self.engine {
            let yes = |flag: bool| if flag { "yes" } else { "no" };
            match &engine.problem {
                Some(problem) => writeln!(f, "io_uring:  no: {problem}")?,
                None => writeln!(
                    f,
                    "io_uring:  operations missing: {}; registered buffers: {}; deferred work: {}",
                    if engine.missing_operations.is_empty() {
                        "none".to_owned()
                    } else {
                        engine.missing_operations.join(" ")
                    },
                    yes(engine.registered_buffers),
                    yes(engine.deferred_work)
                )?,
            }
            let directory =
                self.store_directory.iter().filter_map(|found| Some((&found.path, found.facts.as_ref()?)));
            for (path, facts) in directory {
                writeln!(
                    f,
                    "store_dir: {}: {}, direct I/O: {}, alignment {}, gives space back: {}, zeroes ranges: {}",
                    path.display(),
                    facts.medium,
                    yes(facts.direct),
                    facts.alignment,
                    yes(facts.punches_holes),
                    yes(facts.zeroes_ranges)
                )?;
            }
            let stores = self.stores.iter().filter_map(|found| Some((&found.path, found.facts.as_ref()?)));
            for (path, facts) in stores {
                let cache = facts.queue.as_ref().and_then(|queue| queue.write_cache.as_deref());
                writeln!(
                    f,
                    "store:     {}: {} of {}, direct I/O: {}, alignment {}, cache: {}",
                    path.display(),
                    facts.medium,
                    ByteSize(facts.size),
                    yes(facts.direct),
                    facts.alignment,
                    cache.unwrap_or("unknown")
                )?;
            }
        }
        writeln!(f)?;
        self.verdicts.iter().try_for_each(|verdict| writeln!(f, "{verdict}"))
    }
}

fn write_port(f: &mut fmt::Formatter<'_>, port: &RdmaPort) -> fmt::Result {
    let RdmaPort { number, state, physical_state, link_layer, rate, .. } = port;
    write!(f, "           port {number}: {state} ({physical_state}), {link_layer}, {rate}")?;
    if let Some(interface) = &port.interface {
        write!(f, ", {interface}")?;
    }
    if let Some(mtu) = port.interface_mtu {
        write!(f, ", MTU {mtu}")?;
    }
    if let Some(mtu) = port.path_mtu {
        write!(f, ", {mtu} bytes in a packet")?;
    }
    writeln!(f)?;
    for gid in &port.gids {
        let kind = gid.kind.as_deref().unwrap_or("InfiniBand");
        writeln!(f, "           GID {}: {} ({kind})", gid.index, gid.address)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
