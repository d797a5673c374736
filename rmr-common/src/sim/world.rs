//! The world of one run: nodes, clients, the network between them, and the queue of what happens next.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::io::Write;
use std::time::Duration;

use super::coverage::Coverage;
use super::disk::SECTORS_PER_BLOCK;
use super::node::{Content, Node, Target};
use super::oracle::{Oracle, SECTOR, Step, WriteId};
use super::peers::{FIRST_PEER, Peer};
use super::rng::Rng;
use crate::auth::Nonce;
use crate::client::{self, Client, LinkId, Operation, Payload, PoolSelector, Protection, Token};
use crate::pool::{
    Address, ChunkSize, ClientId, Epoch, MemberId, MemberSpec, PoolId, PoolSpec, StoreId, View,
};
use crate::replica::{
    self, BufferToken, ConnectionId, DiskOperation, DiskResult, DurableState, IoId, Metadata, ReplyPayload,
};
use crate::time::Time;
use crate::wire::{AttachReply, Hello, Kind, Limits, MessageHeader, Status};

pub(super) const MILLISECOND: u64 = 1_000_000;

/// A rule that was broken, in words.
pub(super) type Check<T = ()> = Result<T, String>;

/// A message on its way.
pub(super) struct Message {
    pub(super) header: MessageHeader,
    pub(super) body: Vec<u8>,
    pub(super) data: Vec<u64>,
}

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

/// A connection. Messages keep their order in each direction.
pub(super) struct Connection {
    pub(super) host: usize,
    link: LinkId,
    pub(super) node: usize,
    life: u32,
    /// The run of the node's machine.
    pub(super) host_boot: u8,
    is_greeted: bool,
    /// Nothing that is on its way arrives any more.
    pub(super) is_cut: bool,
    pub(super) client_closed: bool,
    node_closed: bool,
    /// The node was told, so that nothing of the connection may come up any more.
    is_forgotten: bool,
    last_to_node: u64,
    last_to_client: u64,
}

impl Connection {
    /// Whether the node still listens to it.
    pub(super) const fn is_open(&self) -> bool {
        !self.is_cut && !self.client_closed && !self.node_closed
    }
}

/// A request that a client has not finished.
pub(super) struct Request {
    pub(super) operation: Operation,
    pub(super) first: usize,
    pub(super) count: usize,
    pub(super) start: Step,
    pub(super) write: Option<WriteId>,
    pub(super) memory: Vec<u64>,
    /// How often the guest has changed the memory of a write.
    changes: u64,
}

/// A client and the machine it runs on.
pub(super) struct Host {
    pub(super) client: Client,
    pub(super) id: u8,
    pub(super) links: Vec<Option<usize>>,
    /// The node that each link that is down led to.
    pub(super) lost_node: Vec<Option<usize>>,
    pub(super) requests: BTreeMap<u64, Request>,
    /// The view that the client last said to be committed.
    pub(super) committed: Option<View>,
    /// Another client has attached since this one did.
    pub(super) is_fenced: bool,
    pub(super) is_crashed: bool,
    /// The operator's decision that it carries out: with which member to go on, and when that was said.
    pub(super) forces: Option<(MemberId, Duration)>,
    /// The history of the pool to which it attached: see `sim/force.rs`.
    pub(super) branch: Option<usize>,
    /// The highest epoch that a node has shown it.
    pub(super) heard: Epoch,
    /// It was started for a command, and has no guest.
    pub(super) is_admin: bool,
    /// A view change is under way.
    pub(super) is_changing: bool,
    /// The machines' runs when the view was committed.
    pub(super) host_boots: Vec<u8>,
    /// It said that writes were lost, and its guest has not reset the device.
    pub(super) has_lost_writes: bool,
    pub(super) last_flush: u64,
    tick_at: u64,
    /// What the driver keeps: copies by slot, and the digest of the last message.
    copies: BTreeMap<u16, Vec<u64>>,
    digest: Option<((u16, u64, u64, u64), u32)>,
    pub(super) partitioned: Vec<bool>,
    /// Messages between the client and a node arrive no earlier than this.
    pub(super) stalled_until: Vec<u64>,
}

impl Host {
    pub(super) fn is_live(&self) -> bool {
        !self.is_crashed && self.client.over().is_none()
    }
}

/// What differs from run to run.
pub(super) struct Profile {
    pub(super) limits: Limits,
    pub(super) client: client::Config,
    intent_idle: Duration,
    pub(super) resync: replica::ResyncLimits,
    pub(super) network_delay: u64,
    pub(super) disk_delay: u64,
    metadata_delay: u64,
    /// Requests go anywhere, and not to few places.
    pub(super) spread: bool,
    pub(super) requests: u64,
    /// Per cent of the requests that read, of those that are neither flush, discard nor zeroes.
    pub(super) reads: u64,
    pub(super) burst: u64,
    pub(super) pause: u64,
    pub(super) faults: u64,
    pub(super) fault_pause: u64,
    /// Whether clients may die with writes in flight.
    pub(super) client_crashes: bool,
    /// How often the pool is verified while the run goes on.
    pub(super) audits: u64,
    /// Whether disks rot.
    pub(super) rot: bool,
    /// Per cent of the transfers before which the guest changes the memory that is sent.
    restless: u64,
    /// Per mille of the transfers with a digest whose data arrives damaged.
    damage: u64,
}

pub(super) struct World<'a> {
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
        let member = |i: u8| {
            let id = MemberId::new(i).unwrap_or_else(|| MemberId::all().next().expect("there are members"));
            MemberSpec::new(id, StoreId::from_bytes([i + 1; 16]), Address::tcp(format!("node-{i}"), 7700))
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
        let all_write_back = rng.percent(40) || aiming.aim == super::aim::Aim::Caches;
        let state =
            DurableState { view: view.clone(), spec: spec.clone(), epoch: Epoch(0), last_client: None };
        let nodes: Vec<_> = spec
            .members
            .iter()
            .map(|m| {
                let write_back = all_write_back || rng.percent(20);
                (m.id, m.store, m.address.clone(), write_back)
            })
            .collect();
        let mut client = client::Config::new(ClientId::from_bytes([0; 16]), "");
        let milliseconds = |rng: &mut Rng, list: &[u64]| Duration::from_millis(rng.pick(list));
        client.leg_timeout = milliseconds(&mut rng, &[200, 500, 2000]);
        client.suspend_timeout = milliseconds(&mut rng, &[600, 3000, 60_000]);
        client.attach_grace = milliseconds(&mut rng, &[0, 50, 500]);
        client.reconnect_interval = milliseconds(&mut rng, &[10, 50, 300]);
        client.ping_interval = milliseconds(&mut rng, &[50, 200, 1000]);
        client.verify_hold = milliseconds(&mut rng, &[5, 20, 200]);
        client.data_digest = rng.pick(&[
            client::DataDigest::Off,
            client::DataDigest::Off,
            client::DataDigest::Detect,
            client::DataDigest::Bounce,
        ]);
        client.bounce_memory = rng.pick(&[8192, 1 << 18, 32 << 20]);
        client.read_error_limit = u32::try_from(rng.pick(&[0, 1, 16])).unwrap_or(1);
        let max_io = rng.pick(&[4096, 16384, 65536, 262_144, 1 << 20]);
        let limits =
            Limits { max_io, slots: rng.pick(&[2, 8, 32, 256]), max_bytes: max_io * rng.pick(&[1, 2, 8]) };
        let faults = if rng.percent(15) { 0 } else { rng.range(1, 20) };
        let is_scattered = aiming.aim == super::aim::Aim::Scattered;
        let disk_delay = rng.pick(&[20_000, 500_000, 10 * MILLISECOND]);
        // Slow, and no leg is lost for it alone.
        let longest =
            u64::try_from(client.leg_timeout.as_nanos() / 4).unwrap_or(u64::MAX).min(disk_delay * 20);
        if is_scattered && client.data_digest == client::DataDigest::Off {
            client.data_digest = client::DataDigest::Detect;
        }
        let profile = Profile {
            limits,
            client,
            intent_idle: milliseconds(&mut rng, &[0, 1000, 3000]),
            resync: replica::ResyncLimits {
                max_inflight: rng.pick(&[1, 2, 4, 16]),
                bytes_per_s: rng.pick(&[None, None, Some(1 << 18), Some(1 << 20), Some(16 << 20)]),
            },
            network_delay: rng.pick(&[20_000, 500_000, 5 * MILLISECOND]),
            disk_delay,
            metadata_delay: if is_scattered { longest } else { 0 },
            spread: is_scattered,
            requests: rng.range(10, 250),
            reads: rng.pick(&[40, 80]),
            burst: rng.pick(&[1, 4, 16]),
            pause: rng.pick(&[MILLISECOND, 10 * MILLISECOND, 100 * MILLISECOND, 300 * MILLISECOND]),
            faults,
            fault_pause: rng.pick(&[
                2 * MILLISECOND,
                30 * MILLISECOND,
                400 * MILLISECOND,
                1000 * MILLISECOND,
            ]),
            client_crashes: rng.percent(40) || aiming.aim != super::aim::Aim::Chance,
            audits: if rng.percent(35) { rng.range(1, 8) } else { 0 },
            rot: rng.percent(60),
            restless: rng.pick(&[0, 10, 50]),
            damage: if is_scattered { 60 } else { rng.pick(&[0, 0, 5]) },
        };
        let sectors = usize::try_from(size / SECTOR).unwrap_or(0);
        let operator = super::operator::Operator::new(&mut rng);
        let forces = super::force::Forces::new(&mut rng);
        let mut profile = profile;
        aiming.aim.shape(&mut profile);
        if forces.is_there {
            // A verify is of one branch, and its report of the pool.
            profile.audits = 0;
        }
        let mut world = Self {
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
            Event::Connected { host, link, node } => self.connected(host, link, node)?,
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
            Event::NodeCrash(_) if self.is_calm => {} // Too late.
            Event::NodeCrash(node) => self.crash_node(node, false)?,
            Event::GuestReset(host) => self.guest_reset(host),
            Event::Work => self.work()?,
            Event::Audit => self.audit_some()?,
            Event::Fault => self.fault()?,
            Event::Burst(host) => self.burst(host)?,
            Event::HostCrash(host) if self.is_calm || !self.hosts[host].is_live() => {} // Too late.
            Event::HostCrash(host) => self.crash_host(host),
            Event::Strike { host, node } => self.strike(host, node)?,
        }
        if self.step.is_multiple_of(16) {
            self.check_stale()?;
        }
        Ok(true)
    }

    // Nodes ------------------------------------------------------------------------------------------------------

    pub(super) fn start_node(&mut self, node: usize) {
        let (limits, idle) = (self.profile.limits, self.profile.intent_idle);
        let resync = self.profile.resync;
        self.nodes[node].start(limits, idle, resync);
        let life = self.nodes[node].life;
        let delay = self.rng.range(1, 1000) * MILLISECOND;
        self.after(delay, Event::NodeTick { node, life });
        trace!(self, "node {node} starts with {}", self.nodes[node].durable.view);
    }

    /// Gives an event to a replica, and carries out what it asks for.
    pub(super) fn replica(&mut self, node: usize, event: replica::Event<'_>) -> Check {
        let now = Time(self.now);
        let (stale, blocks) = (self.own_stale(node), self.blocks_at(node));
        let may_freshen = matches!(event, replica::Event::Disk(..) | replica::Event::PeerMessage(..));
        let Some(replica) = &mut self.nodes[node].replica else { return Ok(()) };
        replica.apply(event, now);
        // A member that comes to another branch loses what lies beyond the end that the pool has there.
        let is_smaller = self.has_branches() && self.blocks_at(node) < blocks;
        if !may_freshen && !is_smaller && self.own_stale(node) < stale && !self.is_clean_at(node) {
            return Err(format!(
                "node {node} takes a stale block for current before its disk has written it"
            ));
        }
        while let Some(output) = self.nodes[node].replica.as_mut().and_then(replica::Replica::take_output) {
            match output {
                replica::Output::Send(connection, header, payload) => {
                    self.node_sends(node, connection, header, payload)?;
                }
                replica::Output::Disk { io, operation, offset, length } => {
                    self.submit_disk(node, io, operation, offset, length)?;
                }
                replica::Output::Persist(ticket, metadata) => {
                    let target = match &metadata {
                        Metadata::Page(page) => Target::Page(*page),
                        Metadata::State(_) => Target::State,
                    };
                    let queue = self.nodes[node].metadata.entry(target).or_default();
                    queue.waiting.push(ticket);
                    if let Metadata::State(state) = metadata {
                        queue.state = Some(state);
                    }
                    self.start_metadata(node, target)?;
                }
                replica::Output::WritePulled { io, pull, from, offset, length } => {
                    self.write_pulled(node, io, (pull, from), (offset, length))?;
                }
                replica::Output::PullDone(pull) => {
                    let known = self.nodes[node].pulled.remove(&pull);
                    known.ok_or_else(|| format!("node {node} is done with pull {pull} twice"))?;
                }
                replica::Output::PeerConnect(address) => self.peer_connect(node, &address)?,
                replica::Output::PeerSend(header) => self.peer_send(node, header)?,
                replica::Output::PeerClose => self.peer_close(node),
                replica::Output::Release(token) => {
                    if self.nodes[node].disk.uses(token) {
                        return Err(format!("node {node} released {token:?} while the disk writes from it"));
                    }
                    if self.nodes[node].buffers.remove(&token.0).is_none() {
                        return Err(format!("node {node} released {token:?} twice"));
                    }
                }
                replica::Output::Close(connection, reason) => {
                    trace!(self, "node {node} closes connection {}: {reason}", connection.0);
                    if connection.0 >= FIRST_PEER {
                        self.source_closes(connection);
                    } else {
                        self.node_closes(connection.0 as usize);
                    }
                }
                replica::Output::Grow { from, to } => self.make_room(node, from, to)?,
                replica::Output::CommandDone(id, reply) => self.answered(id.0, true, reply)?,
                replica::Output::Notice(notice) => {
                    trace!(self, "node {node}: {notice:?}");
                    self.node_notice(node, &notice);
                }
            }
        }
        self.schedule_wake(node);
        Ok(())
    }

    fn node_sends(
        &mut self,
        node: usize,
        connection: ConnectionId,
        mut header: MessageHeader,
        payload: ReplyPayload,
    ) -> Check {
        let mut message = Message { header, body: Vec::new(), data: Vec::new() };
        match payload {
            ReplyPayload::None => {}
            ReplyPayload::Pulled(pulled) => {
                (message.body, message.data) = self.pulled_answer(node, &header, &pulled)?;
                header.payload = u32::try_from(message.body.len()).unwrap_or(u32::MAX);
                message.header = header;
            }
            ReplyPayload::Data(io) => {
                let found = self.nodes[node].reads.remove(&io.0);
                let found = found.ok_or_else(|| format!("node {node} sends a read that found nothing"))?;
                message.data = found.into_iter().map(super::verify::strip).collect();
                header.digest = header.digest.map(|_| digest_of(&message.data));
                message.header = header;
            }
            ReplyPayload::Body(body) => message.body = body,
        }
        // Pulled data is a message of its own, or no message at all.
        let has_data = header.kind != Kind::PullReply;
        let data = if has_data { message.data.len() as u64 * SECTOR } else { 0 };
        let length = message.body.len() as u64 + data;
        if length != u64::from(header.payload) {
            return Err(format!("node {node} sends {length} bytes with a header that says {header:?}"));
        }
        if header.kind == Kind::AttachReply && header.status == Status::Ok {
            self.unclean |= !AttachReply::decode(&message.body).map_err(|e| e.to_string())?.clean_detach;
        }
        self.note_told(node, &header, &message.body);
        self.check_answer(node, &header)?;
        self.check_attach_answer(node, connection, &header)?;
        if connection.0 >= FIRST_PEER {
            return self.peer_answer(connection, message);
        }
        self.send(connection.0 as usize, false, message)
    }

    fn submit_disk(
        &mut self,
        index: usize,
        io: IoId,
        operation: DiskOperation,
        offset: u64,
        length: u32,
    ) -> Check {
        let data = match operation {
            DiskOperation::Write(token) => {
                self.nodes[index].buffers.get(&token.0).map(|b| b.0.clone()).unwrap_or_default()
            }
            _ => Vec::new(),
        };
        self.submit_data(index, io, operation, (offset, length), data)
    }

    pub(super) fn submit_data(
        &mut self,
        index: usize,
        io: IoId,
        operation: DiskOperation,
        (offset, length): (u64, u32),
        data: Vec<u64>,
    ) -> Check {
        let is_pulled = self.is_pulled_write(index, operation, offset, length);
        if is_pulled {
            self.check_pulled(index, offset, length)?;
        } else {
            self.check_disk(index, operation, offset, length)?;
        }
        let is_read = matches!(operation, DiskOperation::Read | DiskOperation::Digest);
        let is_unreadable = is_read && self.nodes[index].disk.is_bad(offset, length);
        let is_flush = operation == DiskOperation::Flush;
        let errors =
            self.nodes[index].disk_errors + if is_flush { self.nodes[index].flush_errors } else { 0 };
        let is_bad = self.rng.percent(errors) || is_unreadable;
        let no_space = self.rng.percent(30) && !is_read;
        let result = match (is_bad, no_space) {
            (false, _) => DiskResult::Done,
            (true, true) => DiskResult::NoSpace,
            (true, false) => DiskResult::Failed,
        };
        let node = &mut self.nodes[index];
        node.disk
            .submit(io, operation, (offset, length), data, result, is_pulled)
            .map_err(|e| format!("node {index}: {e}"))?;
        let life = node.life;
        let most = self.profile.disk_delay * if self.rng.percent(2) && !self.is_calm { 20 } else { 1 };
        let is_write = !is_read && operation != DiskOperation::Flush;
        let effect = self.rng.range(1, most)
            + if is_write { self.slowness(index) } else { 0 }
            + if is_flush { self.slowness_of_flush() } else { 0 };
        let done = effect + self.rng.range(1, most / 2);
        trace!(self, "node {index}: disk request {} {operation:?} at {offset}+{length} begins", io.0);
        self.after(effect, Event::DiskEffect { node: index, life, io: io.0 });
        self.after(done, Event::DiskDone { node: index, life, io: io.0 });
        Ok(())
    }

    fn start_metadata(&mut self, index: usize, target: Target) -> Check {
        let node = &mut self.nodes[index];
        let Some(queue) = node.metadata.get_mut(&target) else { return Ok(()) };
        if queue.writing.is_some() || queue.waiting.is_empty() {
            return Ok(());
        }
        let content = match target {
            Target::Page(page) => {
                let bytes = node.replica.as_ref().and_then(|r| r.page(page)).copied();
                Content::Page(Box::new(bytes.ok_or_else(|| format!("node {index} has no page {page:?}"))?))
            }
            Target::State => {
                Content::State(queue.state.take().ok_or("a superblock was asked for without its content")?)
            }
        };
        queue.writing = Some((std::mem::take(&mut queue.waiting), content));
        let life = node.life;
        let usual = self.profile.disk_delay * 2;
        let most = if self.is_calm { usual } else { self.profile.metadata_delay.max(usual) };
        let delay = self.rng.range(1, most);
        self.after(delay, Event::MetadataDone { node: index, life, target });
        Ok(())
    }

    fn metadata_done(&mut self, index: usize, target: Target) -> Check {
        let queue = self.nodes[index].metadata.get_mut(&target);
        let Some((tickets, content)) = queue.and_then(|q| q.writing.take()) else { return Ok(()) };
        let failed = std::mem::take(&mut self.nodes[index].metadata_fails);
        if !failed {
            self.make_durable(index, target, content)?;
        }
        trace!(self, "node {index}: {target:?} durable: {}", !failed);
        for ticket in tickets {
            self.replica(index, replica::Event::Durable(ticket, if failed { Err(()) } else { Ok(()) }))?;
        }
        self.start_metadata(index, target)
    }

    pub(super) fn make_durable(&mut self, index: usize, target: Target, content: Content) -> Check {
        match (target, content) {
            (Target::Page(page), Content::Page(bytes)) => {
                self.check_page(index, page, &bytes)?;
                self.nodes[index].pages.insert(page, bytes);
            }
            (_, Content::State(state)) => {
                self.check_state(index, &state)?;
                self.nodes[index].durable = *state;
                self.note_durable(index)?;
            }
            (Target::State, Content::Page(_)) => return Err("a map page for the superblock".into()),
        }
        Ok(())
    }

    // Network ----------------------------------------------------------------------------------------------------

    /// Sends data with the digest that it has; the guest may have changed it since, before any leg was sent it or between.
    fn protected_data(
        &mut self,
        host: usize,
        token: Token,
        range: std::ops::Range<usize>,
        protection: Protection,
        message: &mut Message,
    ) -> Check {
        let header = message.header;
        let missing = || format!("{token:?} sends data it does not have");
        let memory = |world: &Self| {
            let request = world.hosts[host].requests.get(&token.0);
            request.and_then(|r| r.memory.get(range.clone())).map(<[u64]>::to_vec).ok_or_else(missing)
        };
        let slot = header.slot.0;
        match protection {
            Protection::None => message.data = memory(self)?,
            Protection::Bounce => {
                let copy = match self.hosts[host].copies.get(&slot) {
                    Some(copy) if copy.len() == range.len() => copy.clone(),
                    Some(_) => return Err(format!("slot {slot} has a copy of another request")),
                    None => memory(self)?,
                };
                self.hosts[host].copies.insert(slot, copy.clone());
                message.header.digest = Some(digest_of(&copy));
                message.data = copy;
                self.coverage.hit("write sent from a copy");
            }
            Protection::Digest => {
                let key = (slot, header.sequence.0, header.epoch.0, header.view.0);
                let digest = match self.hosts[host].digest {
                    Some((last, digest)) if last == key => digest,
                    _ => digest_of(&memory(self)?),
                };
                self.hosts[host].digest = Some((key, digest));
                message.header.digest = Some(digest);
                if self.rng.percent(self.profile.restless) {
                    self.change_memory(host, token, &range);
                }
                message.data = memory(self)?;
            }
        }
        Ok(())
    }

    /// The guest changes a sector of the memory that it writes from.
    fn change_memory(&mut self, host: usize, token: Token, range: &std::ops::Range<usize>) {
        let index = range.start + self.rng.index(range.len());
        let Some(request) = self.hosts[host].requests.get_mut(&token.0) else { return };
        let Some(write) = request.write else { return };
        request.changes += 1;
        let value = Oracle::stamp(write, index) | (request.changes & 0xff) << 16;
        request.memory[index] = value;
        let sector = request.first + index;
        self.oracle_of(host).vary(write, sector, value);
        self.coverage.hit("guest changed memory in flight");
    }

    fn send(&mut self, index: usize, to_node: bool, mut message: Message) -> Check {
        let decoded = MessageHeader::decode(&message.header.encode());
        if decoded != Ok(message.header) {
            return Err(format!("{:?} does not survive the wire: {decoded:?}", message.header));
        }
        let is_damaged = message.header.digest.is_some()
            && !self.is_calm
            && self.profile.damage > 0
            && self.rng.range(0, 999) < self.profile.damage;
        if is_damaged && let Some(first) = message.data.first_mut() {
            self.coverage.hit("data damaged on its way");
            self.had_errors = true;
            *first ^= 1 << 63;
        }
        let delay = self.rng.range(1, self.profile.network_delay);
        let connection = &self.connections[index];
        let closed = if to_node { connection.client_closed } else { connection.node_closed };
        if closed || connection.is_cut {
            return Ok(());
        }
        trace!(
            self,
            "connection {index} {} {:?} slot {} sequence {} epoch {} view {} {}+{} {:?}",
            if to_node { "→" } else { "←" },
            message.header.kind,
            message.header.slot,
            message.header.sequence,
            message.header.epoch,
            message.header.view,
            message.header.offset,
            message.header.length,
            message.header.status
        );
        let connection = &mut self.connections[index];
        let stalled = self.hosts[connection.host].stalled_until[connection.node];
        let last = if to_node { &mut connection.last_to_node } else { &mut connection.last_to_client };
        *last = (self.now + delay).max(stalled).max(*last + 1);
        let (at, event) = if to_node {
            (*last, Event::ToNode(index, message))
        } else {
            (*last, Event::ToClient(index, message))
        };
        self.at(at, event);
        Ok(())
    }

    fn deliver_to_node(&mut self, index: usize, message: Message) -> Check {
        let connection = &self.connections[index];
        let (node, is_greeted) = (connection.node, connection.is_greeted);
        // A node that closes a connection may have read messages before that it looks at afterwards.
        let is_late = connection.node_closed && !connection.is_forgotten && self.rng.percent(50);
        let connection = &self.connections[index];
        let is_deaf = connection.is_cut || connection.is_forgotten || (connection.node_closed && !is_late);
        if is_deaf || self.nodes[node].life != connection.life || self.nodes[node].replica.is_none() {
            return Ok(());
        }
        let header = message.header;
        if header.kind == Kind::Hello {
            return self.greet(index, node, &header, &message.body);
        }
        if !is_greeted || header.pool != self.spec.id {
            return Err(format!("{:?} for pool {} before the hello", header.kind, header.pool));
        }
        let mut header = header;
        if header.kind == Kind::Write && header.digest.is_some_and(|d| d != digest_of(&message.data)) {
            header.status = Status::DigestDiffers;
            self.coverage.hit("write refused for its digest");
        }
        let buffer = (header.kind == Kind::Write).then(|| {
            let node = &mut self.nodes[node];
            node.next_buffer += 1;
            node.buffers.insert(node.next_buffer, (message.data, header));
            BufferToken(node.next_buffer)
        });
        self.cover_message(node, &header);
        let connection = ConnectionId(u32::try_from(index).unwrap_or(u32::MAX));
        let event = replica::Event::Message { connection, header: &header, body: &message.body, buffer };
        let before = self.before_message(node, &header, &message.body);
        let held = self.held_against(node, &header, &message.body);
        self.replica(node, event)?;
        self.check_held(node, held)?;
        self.after_message(node, before)
    }

    fn greet(&mut self, index: usize, node: usize, header: &MessageHeader, body: &[u8]) -> Check {
        let hello = Hello::decode(body).map_err(|e| e.to_string())?;
        let Some(replica) = &self.nodes[node].replica else { return Ok(()) };
        let is_known = header.pool == self.spec.id || hello.pool_name == self.spec.name;
        let mut reply = header.reply(Kind::HelloReply, Status::Ok);
        let body = match replica.greet(&hello) {
            Ok(reply) if is_known => reply.encode(),
            Ok(_) => return Err(format!("a hello asks for pool {} '{}'", header.pool, hello.pool_name)),
            Err(error) => return Err(error),
        };
        reply.payload = u32::try_from(body.len()).unwrap_or(u32::MAX);
        self.connections[index].is_greeted = true;
        self.send(index, false, Message { header: reply, body, data: Vec::new() })
    }

    fn deliver_to_client(&mut self, index: usize, mut message: Message) -> Check {
        let connection = &self.connections[index];
        let (host, link) = (connection.host, connection.link);
        if connection.is_cut || connection.client_closed {
            return Ok(());
        }
        if !message.data.is_empty()
            && let Some((token, offset)) = self.hosts[host].client.payload_target(link, &message.header)
        {
            // A guest may scribble over the memory that it reads into; then its data is not what was sent.
            let is_scribbled = !self.hosts[host].client.is_bounced(message.header.slot) && self.scribbles > 0;
            self.scribbles -= u64::from(is_scribbled);
            let differs = message.header.digest.is_some_and(|d| d != digest_of(&message.data));
            if message.header.digest.is_some() && (is_scribbled || differs) {
                message.header.status = Status::DigestDiffers;
                self.coverage.hit("read repeated for its digest");
            }
            let request = self.hosts[host].requests.get_mut(&token.0);
            let request = request.ok_or_else(|| format!("data for {token:?}, which is finished"))?;
            let first = usize::try_from(offset / SECTOR).unwrap_or(usize::MAX);
            let place = request.memory.get_mut(first..first + message.data.len());
            place.ok_or("data beyond the memory of a request")?.copy_from_slice(&message.data);
        }
        self.cover_to_client(host, &message.header);
        let node = self.connections[index].node;
        let is_hello = message.header.kind == Kind::HelloReply;
        let must_end = is_hello && self.heard_of(host, node, &message.body);
        self.client(host, client::Event::Message(link, &message.header, &message.body))?;
        if must_end { self.check_ended(host, node) } else { Ok(()) }
    }

    fn connected(&mut self, host: usize, link: LinkId, node: usize) -> Check {
        if !self.hosts[host].is_live() {
            return Ok(());
        }
        let is_reachable = self.nodes[node].replica.is_some() && !self.hosts[host].partitioned[node];
        if !is_reachable || (!self.is_calm && self.rng.percent(3)) {
            return self.client(host, client::Event::LinkDown(link, "connection refused"));
        }
        self.connections.push(Connection {
            host,
            link,
            node,
            life: self.nodes[node].life,
            host_boot: self.nodes[node].host_boot,
            is_greeted: false,
            is_cut: false,
            client_closed: false,
            node_closed: false,
            is_forgotten: false,
            last_to_node: 0,
            last_to_client: 0,
        });
        self.hosts[host].links[usize::from(link.0)] = Some(self.connections.len() - 1);
        self.client(host, client::Event::LinkUp(link, Nonce([0; 32])))
    }

    /// A connection breaks: what is on its way is lost, and each side learns of it in its own time.
    pub(super) fn cut(&mut self, index: usize) {
        let most = self.profile.network_delay * 4;
        let (a, b) = (self.rng.range(1, most), self.rng.range(1, most));
        if !self.connections[index].is_cut {
            let host = self.connections[index].host;
            self.cover_command("leg cut", Some(host));
        }
        let connection = &mut self.connections[index];
        if std::mem::replace(&mut connection.is_cut, true) {
            return;
        }
        self.after(a, Event::NodeLoses(index));
        self.after(b, Event::ClientLoses(index));
        trace!(self, "connection {index} is cut");
    }

    /// A side closed: the other one gets what is on its way, or not, and then the end.
    fn closed(&mut self, index: usize, by_node: bool) {
        let delay = self.rng.range(1, self.profile.network_delay);
        let in_order = self.rng.percent(70);
        let connection = &mut self.connections[index];
        if connection.is_cut {
            return;
        }
        let last = if by_node { connection.last_to_client } else { connection.last_to_node };
        let at = if in_order { (self.now + delay).max(last + 1) } else { self.now + delay };
        self.at(at, if by_node { Event::ClientLoses(index) } else { Event::NodeLoses(index) });
    }

    fn node_closes(&mut self, index: usize) {
        if !std::mem::replace(&mut self.connections[index].node_closed, true) {
            self.closed(index, true);
        }
    }

    pub(super) fn client_closes(&mut self, index: usize) {
        let (host, link) = (self.connections[index].host, self.connections[index].link);
        self.hosts[host].links[usize::from(link.0)] = None;
        if !std::mem::replace(&mut self.connections[index].client_closed, true) {
            self.closed(index, false);
        }
    }

    fn node_loses(&mut self, index: usize) -> Check {
        let connection = &mut self.connections[index];
        let (node, life) = (connection.node, connection.life);
        connection.is_forgotten = true;
        if std::mem::replace(&mut connection.node_closed, true) || self.nodes[node].life != life {
            return Ok(());
        }
        trace!(self, "node {node} loses connection {index}");
        let connection = ConnectionId(u32::try_from(index).unwrap_or(u32::MAX));
        self.replica(node, replica::Event::Closed(connection))
    }

    fn client_loses(&mut self, index: usize) -> Check {
        let connection = &mut self.connections[index];
        let (host, link) = (connection.host, connection.link);
        if std::mem::replace(&mut connection.client_closed, true) {
            return Ok(());
        }
        self.hosts[host].lost_node[usize::from(link.0)] = Some(self.connections[index].node);
        self.hosts[host].links[usize::from(link.0)] = None;
        if !self.hosts[host].is_live() {
            return Ok(());
        }
        trace!(self, "client {host} loses connection {index}");
        self.client(host, client::Event::LinkDown(link, "connection lost"))
    }

    /// Addresses that a client is started with: some member that is active comes first.
    fn seeds(&mut self) -> Vec<Address> {
        let active = self.committed.as_ref().map(View::active);
        let is_active = |m: &MemberSpec| active.is_none_or(|a| a.contains(m.id));
        let (first, rest): (Vec<_>, Vec<_>) =
            self.committed_spec.members.clone().into_iter().partition(is_active);
        let mut addresses: Vec<_> = first.into_iter().map(|m| m.address).collect();
        let turn = self.rng.index(addresses.len());
        addresses.rotate_left(turn);
        addresses.extend(rest.into_iter().map(|m| m.address));
        addresses
    }

    // Clients ----------------------------------------------------------------------------------------------------

    pub(super) fn start_host(&mut self, id: u8, takeover: bool) {
        let mut config = self.profile.client.clone();
        config.client = ClientId::from_bytes([id; 16]);
        config.description = format!("client {id}");
        config.takeover = takeover;
        let by_name = self.rng.percent(50);
        let selector =
            if by_name { PoolSelector::Name("pool".into()) } else { PoolSelector::Id(self.spec.id) };
        let mut addresses = self.seeds();
        let seeds = self.rng.range(1, addresses.len() as u64);
        // A client that knows one node finds the others; but then that node must be up.
        let seeds = if self.is_calm || self.rng.percent(50) { addresses.len() as u64 } else { seeds };
        self.prefer_forced(config.force_from, &mut addresses);
        addresses.truncate(usize::try_from(seeds).unwrap_or(1));
        // It may know of a node that was in use once.
        let all: Vec<_> = self.nodes.iter().map(|n| n.address.clone()).collect();
        if self.has_operator() && config.force_from.is_none() && self.rng.percent(30) {
            let other = all[self.rng.index(all.len())].clone();
            addresses.retain(|a| *a != other);
            addresses.insert(0, other);
            addresses.truncate(crate::pool::MAX_MEMBERS);
        }
        let client = Client::new(config, selector, &addresses, Time(self.now));
        let nodes = self.nodes.len();
        self.hosts.push(Host {
            client,
            id,
            links: vec![None; client::MAX_LINKS],
            lost_node: vec![None; client::MAX_LINKS],
            requests: BTreeMap::new(),
            committed: None,
            is_fenced: false,
            is_crashed: false,
            forces: None,
            branch: None,
            heard: Epoch(0),
            is_admin: false,
            is_changing: false,
            host_boots: vec![0; nodes],
            has_lost_writes: false,
            last_flush: u64::MAX,
            tick_at: u64::MAX,
            copies: BTreeMap::new(),
            digest: None,
            partitioned: vec![false; nodes],
            stalled_until: vec![0; nodes],
        });
        let host = self.hosts.len() - 1;
        trace!(self, "client {host} starts as {id}, takeover: {takeover}");
        self.aim_at_new(host);
        self.client_outputs(host).unwrap_or_default();
    }

    /// Gives an event to a client, and carries out what it asks for.
    pub(super) fn client(&mut self, host: usize, event: client::Event<'_>) -> Check {
        let now = Time(self.now);
        self.cover_client_event(host, &event);
        self.hosts[host].client.apply(event, now);
        self.check_verify(host)?;
        self.client_outputs(host)
    }

    pub(super) fn client_outputs(&mut self, host: usize) -> Check {
        while let Some(output) = self.hosts[host].client.take_output() {
            match output {
                client::Output::Connect(link, address) => {
                    let node = self.node_at(&address);
                    let node = node.ok_or_else(|| format!("a connection to {address}, which is no node"))?;
                    let delay = self.rng.range(1, self.profile.network_delay * 2);
                    self.after(delay, Event::Connected { host, link, node });
                }
                client::Output::Disconnect(link) => {
                    if let Some(connection) = self.hosts[host].links[usize::from(link.0)] {
                        trace!(self, "client {host} closes connection {connection}");
                        self.client_closes(connection);
                    }
                }
                client::Output::Send(link, header, payload) => {
                    self.client_sends(host, link, header, payload)?;
                }
                client::Output::Unbounce(slot) => {
                    self.hosts[host].copies.remove(&slot.0);
                }
                client::Output::Complete(token, result) => self.complete(host, token, result)?,
                client::Output::CommandDone(token, reply) => self.answered(token.0, false, reply)?,
                client::Output::Notice(notice) => {
                    trace!(self, "client {host}: {notice:?}");
                    self.client_notice(host, notice)?;
                }
            }
        }
        let deadline = self.hosts[host].client.deadline().0.max(self.now + 1);
        if self.hosts[host].is_live() && deadline < self.hosts[host].tick_at {
            self.hosts[host].tick_at = deadline;
            self.at(deadline, Event::HostTick(host, deadline));
        }
        Ok(())
    }

    fn client_sends(&mut self, host: usize, link: LinkId, header: MessageHeader, payload: Payload) -> Check {
        let connection = self.hosts[host].links[usize::from(link.0)];
        let mut message = Message { header, body: Vec::new(), data: Vec::new() };
        if let Some(connection) = connection {
            self.tempt_fate(host, self.connections[connection].node, &header);
            self.tempt_operator(host, self.connections[connection].node, &header);
            self.take_aim(host, self.connections[connection].node, &header);
            self.tempt_force(host, self.connections[connection].node, &header);
        }
        match payload {
            Payload::None => {}
            Payload::Body(body) => message.body = body,
            Payload::Request { token, offset, protection } => {
                let first = usize::try_from(offset / SECTOR).unwrap_or(usize::MAX);
                let count = usize::try_from(u64::from(header.payload) / SECTOR).unwrap_or(usize::MAX);
                self.protected_data(host, token, first..first + count, protection, &mut message)?;
            }
        }
        if header.kind == Kind::Read {
            self.check_read_from(host, connection)?;
        } else if header.kind.is_request() {
            self.check_sent_to(host, connection)?;
        }
        if header.kind == Kind::Hello
            && let Some(connection) = connection
        {
            self.cover_stranger(self.connections[connection].node);
        }
        let Some(connection) = connection else {
            return Err(format!("client {host} sends {:?} on {link:?}, which is not connected", header.kind));
        };
        if header.kind == Kind::SetView {
            self.note_proposal(host, &message.body)?;
        }
        self.send(connection, true, message)
    }

    /// Gives a request to a client.
    pub(super) fn submit(&mut self, host: usize, operation: Operation, first: usize, count: usize) -> Check {
        self.step += 1;
        let token = Token(self.next_token);
        self.next_token += 1;
        let zero = operation != Operation::Write;
        let write = operation.is_write().then(|| {
            // What a client that lost its place writes must never be seen.
            let (step, is_fenced) = (self.step, self.hosts[host].is_fenced);
            let oracle = self.oracle_of(host);
            // It may think of the pool as larger than it is, before it has attached.
            let is_beyond = first + count > oracle.len();
            if is_fenced || is_beyond { oracle.reserve(step) } else { oracle.begin(first, count, zero, step) }
        });
        let memory = match (operation, write) {
            (Operation::Write, Some(id)) => (0..count).map(|i| Oracle::stamp(id, i)).collect(),
            (Operation::Read, _) => vec![u64::MAX; count],
            _ => Vec::new(),
        };
        let request = Request { operation, first, count, start: self.step, write, memory, changes: 0 };
        trace!(self, "client {host}: {token:?} {operation:?} sectors {first}+{count} as write {write:?}");
        self.hosts[host].requests.insert(token.0, request);
        let (offset, length) = (first as u64 * SECTOR, count as u64 * SECTOR);
        self.hosts[host].client.submit(token, operation, offset, length, Time(self.now));
        self.client_outputs(host)
    }

    fn complete(&mut self, host: usize, token: Token, result: Result<(), client::IoError>) -> Check {
        self.step += 1;
        trace!(self, "client {host}: {token:?} ends: {result:?}");
        let request = self.hosts[host].requests.remove(&token.0);
        let request = request.ok_or_else(|| format!("client {host} completed {token:?} twice"))?;
        let step = self.step;
        let described = |e: String| format!("client {host}, {token:?} {:?}: {e}", request.operation);
        if let Err(error) = result {
            let end = (request.first + request.count) as u64 * SECTOR;
            let is_beyond = self.hosts[host].client.spec().is_some_and(|s| end > s.size);
            if !(error == client::IoError::BadRange && is_beyond && self.has_branches()) {
                self.check_error(host, error).map_err(described)?;
            }
            if let Some(write) = request.write {
                self.oracle_of(host).refuse(write, request.first, request.count, step);
            }
            return Ok(());
        }
        if self.hosts[host].has_lost_writes {
            return Err(described("served although writes were lost, and the guest does not know".into()));
        }
        self.aim_at_completed(host, &request);
        match request.operation {
            Operation::Read => {
                let oracle = self.oracle_of(host);
                for (i, &value) in request.memory.iter().enumerate() {
                    oracle.read(request.first + i, value, request.start, step).map_err(described)?;
                }
                if self.is_astray(host) {
                    self.coverage.hit("force: a client of an older branch reads");
                }
                Ok(())
            }
            Operation::Flush => self.check_flushed(host, &request).map_err(described),
            Operation::Write | Operation::Discard | Operation::WriteZeroes => {
                let reads = self.hosts.iter().flat_map(|h| h.requests.values());
                let oldest = reads.map(|r| r.start).min().unwrap_or(step).min(step);
                if let Some(write) = request.write {
                    self.oracle_of(host).acknowledge(
                        write,
                        request.first,
                        request.count,
                        step,
                        oldest.saturating_sub(1),
                    );
                }
                self.check_written(host, &request).map_err(described)
            }
        }
    }
}

/// The digest of sectors.
fn digest_of(sectors: &[u64]) -> u32 {
    let mut bytes = Vec::with_capacity(std::mem::size_of_val(sectors));
    sectors.iter().for_each(|s| bytes.extend_from_slice(&s.to_le_bytes()));
    crate::wire::data_digest(&bytes)
}
