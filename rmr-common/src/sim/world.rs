//! The world of one run: nodes, clients, the network between them, and the queue of what happens next.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::io::Write;
use std::time::Duration;

use super::coverage::Coverage;
use super::disk::SECTORS_PER_BLOCK;
use super::host::Host;
use super::network::{Connection, Message};
use super::node::{Node, Target};
use super::oracle::{Oracle, SECTOR, Step};
use super::peers::Peer;
use super::profile::Profile;
use super::rng::Rng;
use crate::client::{self, LinkId};
use crate::pool::{Address, ChunkSize, MemberId, MemberSpec, PoolId, PoolSpec, StoreId, TransportKind, View};
use crate::replica::{self, DiskOperation, DiskResult, DurableState};

pub(super) const MILLISECOND: u64 = 1_000_000;

/// A rule that was broken, in words.
pub(super) type Check<T = ()> = Result<T, String>;

/// What happens next.
pub(super) enum Event {
    ToNode(usize, Message),
    ToClient(usize, Message),
    /// The node, or the client, learns that a connection is gone.
    NodeLoses(usize),
    ClientLoses(usize),
    Connected {
        host: usize,
        link: LinkId,
        node: usize,
        binding: TransportKind,
    },
    DiskEffect {
        node: usize,
        life: u32,
        io: u32,
    },
    DiskDone {
        node: usize,
        life: u32,
        io: u32,
    },
    MetadataDone {
        node: usize,
        life: u32,
        target: Target,
    },
    NodeTick {
        node: usize,
        life: u32,
    },
    NodeWake {
        node: usize,
        life: u32,
        at: u64,
    },
    HostTick(usize, u64),
    /// Somebody has the pool verified, or a disk rots.
    Audit,
    /// A stale member's link to its source, and what goes over it.
    PeerConnected {
        node: usize,
        life: u32,
        attempt: u64,
        source: usize,
    },
    ToSource(usize, Message),
    ToStale(usize, Message),
    SourceLoses(usize),
    StaleLoses(usize),
    HealNodes(usize, usize),
    /// A fault at a member that is being brought back in.
    Strike {
        host: usize,
        node: usize,
    },
    Burst(usize),
    HostCrash(usize),
    NodeStart(usize),
    Heal {
        host: usize,
        node: usize,
    },
    ErrorsEnd(usize),
    /// A store has room, or not.
    Grown {
        node: usize,
        life: u32,
        from: u64,
        to: u64,
    },
    /// A client is about to die.
    Doom(usize),
    /// What the run is aimed at.
    Aimed(super::aim::Shot),
    Operate,
    /// An operator forces a member into use.
    Decide,
    NodeCrash(usize),
    /// Somebody copies a store, or puts a copy in the place of one.
    Copy,
    /// The store that a copy took the place of is put back.
    PutBack(usize),
    /// A node that takes no views takes them again.
    Cured(usize),
    /// A node is about to stop in order, and has stopped.
    Stopping {
        node: usize,
        life: u32,
        limit: u64,
    },
    Stopped {
        node: usize,
        life: u32,
        power: bool,
    },
    /// A guest resets its device after writes were lost.
    GuestReset(usize),
    Work,
    Fault,
}

struct Scheduled(u64, u64, Event);

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}

pub(super) struct World<'a> {
    /// Members are at one binding, and clients are told another one to find the pool.
    pub(super) asks_otherwise: bool,
    pub(super) rng: Rng,
    pub(super) now: u64,
    pub(super) step: Step,
    queue: BinaryHeap<Reverse<Scheduled>>,
    queued: u64,
    pub(super) profile: Profile,
    /// The pool as it was made.
    pub(super) spec: PoolSpec,
    /// The pool as it is in the view that was committed last.
    pub(super) committed_spec: PoolSpec,
    pub(super) operator: super::operator::Operator,
    pub(super) forces: super::force::Forces,
    pub(super) nodes: Vec<Node>,
    pub(super) hosts: Vec<Host>,
    pub(super) connections: Vec<Connection>,
    pub(super) peers: Vec<Peer>,
    /// Pairs of nodes that cannot connect to each other.
    pub(super) parted: BTreeSet<(usize, usize)>,
    /// Messages between two nodes arrive no earlier than this.
    pub(super) stalled: BTreeMap<(usize, usize), u64>,
    pub(super) resyncs: super::resync::Resyncs,
    pub(super) audit: super::verify::Audit,
    pub(super) aiming: super::aim::Aiming,
    pub(super) rollbacks: super::rollback::Rollbacks,
    pub(super) sick: super::sick::Sick,
    pub(super) oracle: Oracle,
    pub(super) coverage: Coverage,
    pub(super) next_token: u64,
    pub(super) submitted: u64,
    pub(super) faults: u64,
    /// No more faults happen.
    pub(super) is_calm: bool,
    /// Every request must succeed.
    pub(super) is_verifying: bool,
    /// Some disk has answered with an error.
    pub(super) had_errors: bool,
    /// The view that was committed last.
    pub(super) committed: Option<View>,
    /// Every view that was ever durable anywhere.
    pub(super) views: BTreeMap<(u64, u64), (View, PoolSpec)>,
    /// Whether some member was attached that no client had left in good order.
    pub(super) unclean: bool,
    /// So many answers to reads find their memory changed by the guest.
    pub(super) scribbles: u64,
    /// What a liar says comes from here.
    pub(super) liar: Rng,
    trace: Option<&'a mut dyn Write>,
}

macro_rules! trace {
    ($world:expr, $($arg:tt)*) => {
        if $world.is_traced() {
            $world.trace_line(&format!($($arg)*));
        }
    };
}
pub(super) use trace;

impl<'a> World<'a> {
    pub(super) fn new(seed: u64, trace: Option<&'a mut dyn Write>) -> Self {
        let mut rng = Rng::new(seed);
        let aiming = super::aim::Aiming::new(seed);
        let members = match rng.range(0, 19) {
            0..=1 => 1,
            2..=9 => 2,
            10..=17 => 3,
            18 => 4,
            _ => 8,
        };
        let members = members.max(aiming.aim.least_members());
        let size = rng.range(1, 4) << 20;
        let asks_otherwise = seed % super::KINDS == super::ASKS_OTHERWISE;
        let binding = if asks_otherwise { TransportKind::Rdma } else { TransportKind::Tcp };
        let member = |i: u8| {
            let id = MemberId::new(i).unwrap_or_else(|| MemberId::all().next().expect("there are members"));
            MemberSpec::new(
                id,
                StoreId::from_bytes([i + 1; 16]),
                Address::new(binding, format!("node-{i}"), 7700),
            )
        };
        let spec = PoolSpec {
            id: PoolId::from_bytes([0xaa; 16]),
            name: "pool".into(),
            size,
            chunk_size: ChunkSize::from_bytes(64 << 10).unwrap_or_default(),
            logical_block_size: 512,
            members: (0..members).map(member).collect(),
        };
        let view = View::initial(spec.members.iter().map(|m| (m.id, m.store)));
        let all_write_back = rng.percent(40) || aiming.aim.needs_caches();
        let state = DurableState::new(view.clone(), spec.clone());
        let nodes: Vec<_> = spec
            .members
            .iter()
            .map(|m| {
                let write_back = all_write_back || rng.percent(20);
                (m.id, m.store, m.address.clone(), write_back)
            })
            .collect();
        let mut profile = Profile::draw(&mut rng, aiming.aim);
        let sectors = usize::try_from(size / SECTOR).unwrap_or(0);
        let operator = super::operator::Operator::new(&mut rng);
        let forces = super::force::Forces::new(&mut rng);
        aiming.aim.shape(&mut profile);
        if forces.is_there {
            // A verify is of one branch, and its report of the pool.
            profile.audits = 0;
        }
        let mut world = Self {
            asks_otherwise,
            liar: super::liar::rng(seed),
            rng,
            now: 0,
            step: 1,
            queue: BinaryHeap::new(),
            queued: 0,
            profile,
            nodes: Vec::new(),
            operator,
            forces,
            committed_spec: spec.clone(),
            hosts: Vec::new(),
            connections: Vec::new(),
            peers: Vec::new(),
            parted: BTreeSet::new(),
            stalled: BTreeMap::new(),
            resyncs: super::resync::Resyncs::default(),
            audit: super::verify::Audit::default(),
            aiming,
            rollbacks: super::rollback::Rollbacks::default(),
            sick: super::sick::Sick::default(),
            oracle: Oracle::new(sectors),
            coverage: Coverage::default(),
            next_token: 1,
            submitted: 0,
            faults: 0,
            is_calm: false,
            is_verifying: false,
            had_errors: false,
            committed: None,
            views: BTreeMap::from([((1, 0), (view, spec.clone()))]),
            unclean: false,
            scribbles: 0,
            trace,
            spec,
        };
        for (member, store, address, write_back) in nodes {
            let capacity = world.capacity();
            let node = Node::new(member, store, address, state.clone(), write_back, capacity);
            world.nodes.push(node);
            world.start_node(world.nodes.len() - 1);
        }
        world.start_host(1, false);
        world.after(MILLISECOND, Event::Work);
        world.after(2 * MILLISECOND, Event::Audit);
        let pause = world.profile.fault_pause;
        world.after(pause, Event::Fault);
        world.after(10 * MILLISECOND, Event::Operate);
        world.begin_rollbacks();
        if world.forces.is_there {
            let first = world.rng.range(1, 20) * world.profile.fault_pause;
            world.after(first, Event::Decide);
        }
        world
    }

    pub(super) const fn is_traced(&self) -> bool {
        self.trace.is_some()
    }

    pub(super) fn trace_line(&mut self, text: &str) {
        let (now, step) = (self.now, self.step);
        if let Some(trace) = &mut self.trace {
            // A trace that can not be written is no reason to stop a run.
            let _ = writeln!(trace, "{:>12.6} {step:>7} {text}", Duration::from_nanos(now).as_secs_f64());
        }
    }

    pub(super) fn after(&mut self, delay: u64, event: Event) {
        self.at(self.now + delay, event);
    }

    pub(super) fn at(&mut self, time: u64, event: Event) {
        self.queued += 1;
        self.queue.push(Reverse(Scheduled(time, self.queued, event)));
    }

    /// Lets the next thing happen; false when nothing is left.
    pub(super) fn advance(&mut self) -> Check<bool> {
        let Some(Reverse(Scheduled(time, _, event))) = self.queue.pop() else { return Ok(false) };
        self.now = time;
        self.step += 1;
        match event {
            Event::ToNode(connection, message) => self.deliver_to_node(connection, message)?,
            Event::ToClient(connection, message) => self.deliver_to_client(connection, message)?,
            Event::NodeLoses(connection) => self.node_loses(connection)?,
            Event::ClientLoses(connection) => self.client_loses(connection)?,
            Event::Connected { host, link, node, binding } => self.connected(host, link, node, binding)?,
            Event::DiskEffect { node, life, io } if self.nodes[node].life == life => {
                let (step, rng) = (self.step, &mut self.rng);
                let healed = self.nodes[node].disk.healed;
                let found = self.nodes[node].disk.apply(io, step, rng);
                if self.nodes[node].disk.healed > healed {
                    self.coverage.hit("unreadable block healed by a resync");
                }
                if !found.is_empty() {
                    self.nodes[node].reads.insert(io, found);
                }
            }
            Event::DiskDone { node, life, io } if self.nodes[node].life == life => {
                let Some(running) = self.nodes[node].disk.running.remove(&io) else { return Ok(true) };
                trace!(self, "node {node}: disk request {io} {:?} {:?}", running.operation, running.result);
                if running.result != DiskResult::Done {
                    self.nodes[node].reads.remove(&io);
                    if running.operation == DiskOperation::Read {
                        let end = (running.first + running.count).div_ceil(SECTORS_PER_BLOCK);
                        self.nodes[node].disk.unread.extend(running.first / SECTORS_PER_BLOCK..end);
                    }
                }
                if running.operation == DiskOperation::Flush && running.result != DiskResult::Done {
                    self.drop_unflushed(node);
                }
                let stale = self.own_stale(node);
                self.disk_ended(node, io, &running)?;
                self.cover_disk_done(node, &running, stale);
            }
            Event::MetadataDone { node, life, target } if self.nodes[node].life == life => {
                self.metadata_done(node, target)?;
            }
            Event::NodeTick { node, life } if self.nodes[node].life == life => {
                self.replica(node, replica::Event::Tick)?;
                self.after(1000 * MILLISECOND, Event::NodeTick { node, life });
            }
            Event::NodeWake { node, life, at } if self.nodes[node].life == life => {
                if self.nodes[node].wake_at == at {
                    self.nodes[node].wake_at = u64::MAX;
                    self.replica(node, replica::Event::Tick)?;
                }
            }
            Event::PeerConnected { node, life, attempt, source } => {
                self.peer_connected(node, life, attempt, source)?;
            }
            Event::ToSource(peer, message) => self.deliver_to_source(peer, &message)?,
            Event::ToStale(peer, message) => self.deliver_to_stale(peer, &message)?,
            Event::SourceLoses(peer) => self.source_loses(peer)?,
            Event::StaleLoses(peer) => self.stale_loses(peer)?,
            Event::HealNodes(a, b) => {
                self.parted.remove(&super::peers::pair(a, b));
            }
            Event::DiskEffect { .. }
            | Event::DiskDone { .. }
            | Event::MetadataDone { .. }
            | Event::NodeWake { .. }
            | Event::NodeTick { .. } => {} // Of an earlier life of the node.
            Event::HostTick(host, at) => {
                if self.hosts[host].tick_at == at && self.hosts[host].is_live() {
                    self.hosts[host].tick_at = u64::MAX;
                    self.client(host, client::Event::Tick)?;
                }
            }
            Event::NodeStart(node) => {
                if self.nodes[node].replica.is_none() && !self.nodes[node].is_gone {
                    self.restart(node);
                }
            }
            Event::Heal { host, node } => self.hosts[host].partitioned[node] = false,
            Event::ErrorsEnd(node) => (self.nodes[node].disk_errors, self.nodes[node].flush_errors) = (0, 0),
            Event::Grown { node, life, from, to } => self.grown(node, life, from, to)?,
            Event::Doom(host) => self.doom(host),
            Event::Aimed(shot) => self.shoot(shot)?,
            Event::Operate => self.operate()?,
            Event::Decide => self.decide()?,
            Event::Copy => self.copy_or_restore()?,
            Event::PutBack(node) => self.put_back(node)?,
            Event::NodeCrash(_) if self.is_calm => {} // Too late.
            Event::NodeCrash(node) => self.crash_node(node, false)?,
            Event::Cured(node) => self.cured(node),
            Event::Stopping { node, life, limit } => self.stopping(node, life, limit)?,
            Event::Stopped { node, life, power } => self.stopped(node, life, power)?,
            Event::GuestReset(host) => self.guest_reset(host),
            Event::Work => self.work()?,
            Event::Audit => self.audit_some()?,
            Event::Fault => self.fault()?,
            Event::Burst(host) => self.burst(host)?,
            Event::HostCrash(host) if self.is_calm || !self.can_die(host) => {} // Too late.
            Event::HostCrash(host) => self.crash_host(host),
            Event::Strike { host, node } => self.strike(host, node)?,
        }
        if self.step.is_multiple_of(16) {
            self.check_stale()?;
        }
        Ok(true)
    }
}
