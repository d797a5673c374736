//! The running service: shards that own stores and connections, and the admin API beside them.
//!
//! ```text
//!   admin thread ── Command ──▶ shard 0 (listens) ── Command::Adopt ──▶ shard 1 …
//!                               event-manager loop: connections, replicas, disk engine, buffers
//! ```
//! A store belongs to one shard for as long as it is open, and so does every connection of its pool. Shards share
//! nothing but the list of which pool is where.

mod command;
mod connection;
mod control;
mod deletion;
mod forward;
mod judge;
mod keeper;
mod keys;
mod member;
mod places;
mod pulls;
mod remembered;
mod room;
mod shard;
mod source_link;
mod throttle;
mod trouble;
mod windows;

use std::collections::HashMap;
use std::net::{IpAddr, TcpListener, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;
use rmr_common::pool::{Address, BootId, PoolId, TransportKind};
use rmr_common::transport::rdma::{Fabric, RdmaListener};
use rmr_common::transport::tls::{ClientTls, ServerTls};
use rmr_common::transport::{Counters, Listener};

use crate::admin::api::{LeftOut, UnixMs};
use crate::admin::{AdminServer, HostNames};
use crate::config::{Config, TlsConfig};
use crate::disk::sys::raise_descriptor_limit;
use crate::lifecycle::{Shutdown, ready};
use crate::store::remove_unfinished;
use control::Control;
use keeper::{Keeper, Retries};
use keys::Keys;
use places::{Places, Stage};
use remembered::Remembered;
use shard::{Command, Shard, ShardHandle};

/// Descriptors that an open store takes: its own, those of data and metadata with the lock, and one while it grows.
const DESCRIPTORS_PER_STORE: usize = 5;
/// Descriptors for everything but stores, data connections and shards.
const OTHER_DESCRIPTORS: usize = 128;
/// How often the node looks whether a store that was left out is due.
const RETRY_BEAT: Duration = Duration::from_millis(500);

/// What all shards and the admin API know of one another.
pub(crate) struct Shared {
    config: Config,
    host_boot: BootId,
    process_boot: BootId,
    started: UnixMs,
    advertised: Mutex<Vec<Address>>,
    pools: Mutex<Places>,
    /// When stores that were left out are tried again.
    retries: Mutex<Retries>,
    /// The stores outside the store directory; none without a store directory.
    remembered: Mutex<Option<Remembered>>,
    /// Most stores, by configuration and by descriptors.
    max_stores: usize,
    connections: Connections,
    buffer_used: Vec<AtomicU64>,
    /// How much of that is lent to clients over RDMA.
    buffer_lent: Vec<AtomicU64>,
    /// Which shards have no io_uring, and do without.
    inline: Vec<AtomicBool>,
    /// What the connections of each shard have done.
    counters: Mutex<Vec<Counters>>,
    fabric: Fabric,
    /// How other nodes at `tls://` addresses are reached.
    client_tls: Option<ClientTls>,
    keys: Keys,
}

impl Shared {
    /// The list of stores. A panic elsewhere cannot have left it half changed: each change is one insert or remove.
    pub(crate) fn pools(&self) -> MutexGuard<'_, Places> {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note_counters(&self, shard: usize, counters: Counters) {
        let mut all = self.counters.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = all.get_mut(shard) {
            *own = counters;
        }
    }

    /// What all connections have done, as of a second ago at most.
    fn counters(&self) -> Counters {
        let mut sum = Counters::default();
        self.counters.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(|c| sum += *c);
        sum
    }

    fn advertised(&self) -> MutexGuard<'_, Vec<Address>> {
        self.advertised.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pool of this name, or the identity as it is when no name is given.
    fn resolve(&self, pool: PoolId, name: &str) -> Option<(PoolId, usize)> {
        let pools = self.pools();
        let found =
            if name.is_empty() { pools.get(pool).map(|place| (pool, place)) } else { pools.named(name) };
        found.filter(|(_, place)| place.stage != Stage::Making).map(|(id, place)| (id, place.shard))
    }

    /// Why the store of a pool is left out, if it is.
    fn why_left_out(&self, pool: PoolId, name: &str) -> Option<String> {
        let is_its = |l: &&LeftOut| {
            if name.is_empty() { l.pool == Some(pool) } else { l.name.as_deref() == Some(name) }
        };
        self.pools().left_out().find(is_its).map(|l| l.words())
    }
}

/// Runs the service until `shutdown` is requested and everything is closed in order.
///
/// # Errors
/// When an address, a store or a thread cannot be had at start, or a shard failed while running.
pub fn run(config: Config, shutdown: Shutdown) -> anyhow::Result<()> {
    let fabric = Fabric::for_nodes();
    let (server_tls, client_tls) = load_tls(&config.tls)?;
    let (listeners, bound) = listen(&config, server_tls.as_ref(), &fabric)?;
    let descriptors = raise_descriptor_limit().context("asking for the limit of open files")?;
    let max_stores = max_stores(&config, descriptors);
    let shared = Arc::new(Shared {
        host_boot: host_boot()?,
        process_boot: BootId::random(),
        started: UnixMs::now(),
        advertised: Mutex::new(config.advertised(&bound)?),
        pools: Mutex::default(),
        retries: Mutex::default(),
        remembered: Mutex::new(config.store_dir.as_deref().map(Remembered::read)),
        max_stores,
        connections: Connections::default(),
        buffer_used: (0..config.shards).map(|_| AtomicU64::new(0)).collect(),
        buffer_lent: (0..config.shards).map(|_| AtomicU64::new(0)).collect(),
        inline: (0..config.shards).map(|_| AtomicBool::new(false)).collect(),
        counters: Mutex::new(vec![Counters::default(); config.shards]),
        fabric,
        client_tls,
        keys: Keys::new(config.keys.clone()),
        config,
    });
    remove_remains(&shared)?;
    let handles: Vec<ShardHandle> =
        (0..shared.config.shards).map(ShardHandle::new).collect::<Result<_, _>>()?;
    let mut threads: Vec<JoinHandle<anyhow::Result<()>>> = Vec::new();
    for index in 0..shared.config.shards {
        let (shared, handles, shutdown) = (Arc::clone(&shared), handles.clone(), shutdown.clone());
        let thread = std::thread::Builder::new().name(format!("shard-{index}")).spawn(move || {
            let result = Shard::run(index, Arc::clone(&shared), handles, shutdown.clone());
            // The others cannot serve the pools of this one: stop all, in order.
            shutdown.request();
            result
        })?;
        threads.push(thread);
    }
    let keeper = Arc::new(Keeper::new(Arc::clone(&shared), handles.clone()));
    // A client that came before would be told that there is no such pool, and believe it.
    let count = keeper.open_all()?;
    let mut listeners = Some(listeners);
    for handle in &handles {
        handle.send(Command::Listen(listeners.take().unwrap_or_default()));
    }
    let control = Arc::new(Control::new(Arc::clone(&shared), handles, Arc::clone(&keeper)));
    let mut names = shared.config.known_names();
    names.extend(shared.advertised().iter().map(|address| address.host().to_owned()));
    let (address, limits) = (shared.config.admin, shared.config.admin_limits);
    let admin = AdminServer::start(address, limits, HostNames::new(names), control)?;
    retry_stores(keeper, shutdown)?;
    let addresses: Vec<String> = shared.advertised().iter().map(ToString::to_string).collect();
    let line = format!("serving {count} stores at {}", addresses.join(", "));
    tracing::info!(admin = %admin.local_addr(), "{line}");
    ready(&line);
    let mut outcome = Ok(());
    for thread in threads {
        match thread.join() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => outcome = outcome.and(Err(error)),
            Err(_) => outcome = outcome.and(Err(anyhow::anyhow!("a shard panicked"))),
        }
    }
    admin.stop();
    outcome
}

pub(crate) fn load_tls(config: &TlsConfig) -> anyhow::Result<(Option<ServerTls>, Option<ClientTls>)> {
    let clients = config.authorities.as_deref().filter(|_| config.verify_clients);
    let server = config.identity.as_ref().map(|own| ServerTls::load(own, clients)).transpose()?;
    let authorities = config.authorities.as_deref();
    let client = authorities.map(|path| ClientTls::load(path, config.identity.as_ref())).transpose()?;
    Ok((server, client))
}

fn listen(
    config: &Config,
    tls: Option<&ServerTls>,
    fabric: &Fabric,
) -> anyhow::Result<(Vec<Listener>, Vec<Address>)> {
    let (mut listeners, mut bound) = (Vec::new(), Vec::new());
    let dead_after = config.leg_timeout;
    for address in &config.listen {
        let candidates: Vec<_> = (address.host(), address.port())
            .to_socket_addrs()
            .with_context(|| format!("listen address {address}"))?
            .collect();
        let (listener, at) = match address.transport() {
            TransportKind::Tcp | TransportKind::Tls => {
                let socket = TcpListener::bind(&candidates[..])
                    .with_context(|| format!("listen address {address}"))?;
                socket.set_nonblocking(true)?;
                let at = socket.local_addr()?;
                let tls = tls.filter(|_| address.transport() == TransportKind::Tls).cloned();
                (Listener::Tcp { socket, dead_after, tls }, at)
            }
            TransportKind::Rdma => {
                let first = *candidates.first().with_context(|| format!("listen address {address}"))?;
                let listener = RdmaListener::bind(fabric, first, dead_after)
                    .with_context(|| format!("listen address {address}"))?;
                let at = listener.local_addr().unwrap_or(first);
                (Listener::Rdma(Box::new(listener)), at)
            }
        };
        bound.push(Address::new(address.transport(), at.ip().to_string(), at.port()));
        listeners.push(listener);
    }
    Ok((listeners, bound))
}

/// The run of this machine's kernel: what it has in its caches is lost when this changes.
fn host_boot() -> anyhow::Result<BootId> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(path).with_context(|| path.to_owned())?;
    Ok(BootId(uuid::Uuid::parse_str(text.trim()).with_context(|| path.to_owned())?))
}

/// Removes what is left in the store directory of stores whose creation was cut short.
fn remove_remains(shared: &Shared) -> anyhow::Result<()> {
    if let Some(directory) = &shared.config.store_dir {
        let removed =
            remove_unfinished(directory).with_context(|| format!("reading {}", directory.display()))?;
        for path in removed {
            tracing::warn!(path = %path.display(), "removed what was left of a store whose creation was cut short");
        }
    }
    Ok(())
}

/// Most stores that the node may have: what is configured, or as many as there are descriptors for beside connections.
fn max_stores(config: &Config, descriptors: u64) -> usize {
    let possible = possible_stores(config.max_connections, config.shards, descriptors);
    if possible < config.max_stores {
        tracing::info!(
            possible,
            configured = config.max_stores,
            "the limit of open files allows fewer stores than max_stores: raise it (LimitNOFILE=, ulimit -n) if they are needed"
        );
    }
    config.max_stores.min(possible)
}

/// As many stores as there are descriptors for beside everything else. Half of the descriptors are for stores in any case:
/// connections that find none left wait for one, and a store that is not served has nobody to wait for.
fn possible_stores(connections: usize, shards: usize, descriptors: u64) -> usize {
    let all = usize::try_from(descriptors).unwrap_or(usize::MAX);
    let others = connections.saturating_add(OTHER_DESCRIPTORS + 16 * shards).min(all / 2);
    (all - others) / DESCRIPTORS_PER_STORE
}

/// Tries stores that were left out again, until the node stops.
fn retry_stores(keeper: Arc<Keeper>, shutdown: Shutdown) -> anyhow::Result<()> {
    let work = move || {
        while !shutdown.requested() {
            std::thread::sleep(RETRY_BEAT);
            keeper.retry_due();
        }
    };
    std::thread::Builder::new().name("stores".into()).spawn(work)?;
    Ok(())
}

/// How many connections there are, in all and by the address of the peer.
#[derive(Default)]
pub(crate) struct Connections {
    all: AtomicUsize,
    by_address: Mutex<HashMap<IpAddr, usize>>,
}

impl Connections {
    /// The number of connections.
    fn count(&self) -> usize {
        self.all.load(Ordering::Relaxed)
    }

    /// Each change is one number: a panic elsewhere cannot have left it half made.
    fn by_address(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.by_address.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's place among those that there may be; given back when dropped, which is when nothing of it is left.
pub(crate) struct ConnectionPlace {
    shared: Arc<Shared>,
    peer: IpAddr,
}

impl ConnectionPlace {
    /// Takes a place for a connection of this peer.
    ///
    /// # Errors
    /// The setting whose limit is reached, with the limit.
    pub(crate) fn take(shared: &Arc<Shared>, peer: IpAddr) -> Result<Self, (&'static str, usize)> {
        let (config, connections) = (&shared.config, &shared.connections);
        // An IPv4 address is the same peer when it comes to a socket for both.
        let peer = peer.to_canonical();
        let mut by_address = connections.by_address();
        let own = by_address.get(&peer).copied().unwrap_or(0);
        if connections.count() >= config.max_connections {
            return Err(("max_connections", config.max_connections));
        }
        if own >= config.max_connections_per_address {
            return Err(("max_connections_per_address", config.max_connections_per_address));
        }
        by_address.insert(peer, own + 1);
        connections.all.fetch_add(1, Ordering::Relaxed);
        drop(by_address);
        Ok(Self { shared: Arc::clone(shared), peer })
    }
}

impl Drop for ConnectionPlace {
    fn drop(&mut self) {
        let mut by_address = self.shared.connections.by_address();
        self.shared.connections.all.fetch_sub(1, Ordering::Relaxed);
        if let Some(own) = by_address.get_mut(&self.peer) {
            *own -= 1;
            if *own == 0 {
                by_address.remove(&self.peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_low_limit_of_descriptors_leaves_room_for_stores() {
        assert_eq!(possible_stores(256, 1, 40), 4);
        assert_eq!(possible_stores(256, 1, 1400), 200);
        assert!(possible_stores(256, 4, 524_288) > 100_000);
    }
}
