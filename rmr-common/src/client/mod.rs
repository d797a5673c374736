//! The coordinator and data path of one pool, as a state machine without I/O.
//!
//! Events go in through [`Client::apply`] and [`Client::submit`]; what is to be done comes out of
//! [`Client::take_output`]. The daemon, the simulator and the tests drive the same code.
//!
//! ```text
//!              every Clean member of the highest view answers
//!   ┌───────────┐ ───────────────────────▶ ┌───────────┐      ┌──────────┐
//!   │ Gathering │                          │ Attaching │ ───▶ │ Changing │◀─┐ a member is lost
//!   └───────────┘ ◀─────────────────────── └───────────┘      └──────────┘  │
//!     ▲   a member did not answer, or an older epoch │           │ durable on all active members
//!     │                                              ▼           ▼          │
//!     │ the last Clean member is lost        ┌─────────┐     ┌────────┐ ────┘
//!     └───────────────────────────────────── │  Over   │ ◀── │ Active │ ───▶ Detaching ───▶ Over
//!                                            └─────────┘     └────────┘
//!                                         refused or fenced
//! ```

mod attach;
mod change;
mod data;
mod faults;
mod force;
mod health;
mod history;
mod links;
mod parts;
mod reconcile;
pub mod recovery;
mod rejoin;
mod status;
mod unflushed;
mod verify;

use std::collections::VecDeque;
use std::time::Duration;

use thiserror::Error;

pub use change::CommandToken;
pub use force::Force;
pub use status::{LegStatus, LinkSummary, PoolStatus};

use crate::auth::{KeyRing, Nonce, Opener};
use crate::map::BlockMap;
use crate::pool::{
    Address, BootId, Cause, ClientId, Epoch, MAX_MEMBERS, MemberId, MemberSet, PoolId, PoolSpec, Position,
    Refusal, Sequence, Slot, StoreId, View, ViewNumber,
};
use crate::time::Time;
use crate::transport::rdma::{Fabric, ReadMode};
use crate::transport::tls::ClientTls;
use crate::wire::{AttachReply, HelloReply, MAX_SLOTS, MessageHeader};
use parts::{OpIndex, Parts};

/// Most bytes of one message's data, whatever nodes allow: what was made for legs over TCP may have to go over RDMA as well,
/// where a message with what stands behind it has to fit 1 MiB.
const MAX_PART: u32 = 512 << 10;

/// Most connections that a client keeps: one for each member, and as many seed addresses that are still to be told
/// apart.
pub const MAX_LINKS: usize = 2 * MAX_MEMBERS;
/// Most requests that wait for a slot. A device queue never has more; other callers get [`IoError::TooMany`].
pub const MAX_QUEUED: usize = 64 * 1024;

/// [`Config::read_error_limit`] unless told otherwise: more than the odd bad sector, fewer than a dying disk makes in an hour.
pub const DEFAULT_READ_ERROR_LIMIT: u32 = 16;

/// [`Config::rejoin_backoff_max`] unless told otherwise.
pub const DEFAULT_REJOIN_BACKOFF_MAX: Duration = Duration::from_secs(300);

/// How a client behaves.
#[derive(Clone, Debug)]
pub struct Config {
    /// Identity of this client; a daemon that is started again for the same disk uses the same one.
    pub client: ClientId,
    /// Who this client is, in words; a client that is refused because of it is told these.
    pub description: String,
    /// Displace a live client of another identity.
    pub takeover: bool,
    /// Let any client displace this one that does not yield itself: for tools that attach for a moment, and must not keep a
    /// guest from its disk.
    pub yields: bool,
    /// The operator's override of the recovery rule: go on with one member alone, whatever it has, and take all others as
    /// wholly stale. Writes that only others have are lost. It is done once; later attaches of the client keep the rule.
    pub force_from: Option<Force>,
    /// Only look: learn the pool's specification and its members' views, and never attach.
    pub observe: bool,
    /// A leg that leaves a request unanswered for so long is lost.
    pub leg_timeout: Duration,
    /// Requests wait so long for a pool without a reachable Clean member, then fail.
    pub suspend_timeout: Duration,
    /// How long an attach waits for members that it could do without, so that a slow connection is no lost member.
    pub attach_grace: Duration,
    /// Pause between two attempts to connect.
    pub reconnect_interval: Duration,
    /// A silent link is probed this often.
    pub ping_interval: Duration,
    /// While writes arrive, members put on durable record this often how far the pool has come. A store that is put back to a
    /// state of more than so long before its last write is known by that.
    pub mark_interval: Duration,
    /// Longest pause before a member that failed again and again is brought in once more.
    pub rejoin_backoff_max: Duration,
    /// A member that is brought in holds requests for so long at most, unless the members in service are as slow.
    pub rejoin_hold: Duration,
    /// A verify that looks at a range again holds writes to it for so long at most.
    pub verify_hold: Duration,
    /// The keys of the pool: the node has to prove that it has one of them, and this client does. Empty: no authentication.
    pub keys: KeyRing,
    /// How drivers connect to `tls://` addresses; without it they refuse them. The state machine itself has no use for it.
    pub tls: Option<ClientTls>,
    /// What connections over RDMA have in common, with the memory that is registered for them; for drivers as well.
    pub fabric: Fabric,
    /// A leg whose disk fails reads is resynchronised so many times within an hour; after that it is left out until an
    /// operator brings it back. Errors that come together count once.
    pub read_error_limit: u32,
    /// What is done about memory that is changed while it is being written.
    pub data_digest: DataDigest,
    /// Most bytes of copies, and so of data in flight, unless `data_digest` is off.
    pub bounce_memory: u32,
}

/// What is done about memory that its owner changes while it is being written: each leg would get other bytes.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum DataDigest {
    /// Nothing: members may differ in such a write. For owners that never do that.
    #[default]
    Off,
    /// One digest goes to all legs, and a write that does not fit it on some leg is repeated on all from a copy. What is read
    /// carries a digest too.
    Detect,
    /// As [`DataDigest::Detect`], and every write is sent from a copy at once.
    Bounce,
}

/// [`Config::bounce_memory`] unless told otherwise: as much as a node grants one client by default.
pub const DEFAULT_BOUNCE_MEMORY: u32 = 32 << 20;

impl Config {
    /// The defaults, for a client with this identity and description.
    #[must_use]
    pub fn new(client: ClientId, description: impl Into<String>) -> Self {
        Self {
            client,
            description: description.into(),
            takeover: false,
            yields: false,
            force_from: None,
            observe: false,
            leg_timeout: Duration::from_secs(5),
            suspend_timeout: Duration::from_secs(60),
            attach_grace: Duration::from_secs(1),
            reconnect_interval: Duration::from_millis(500),
            ping_interval: Duration::from_secs(1),
            mark_interval: Duration::from_secs(5),
            rejoin_backoff_max: DEFAULT_REJOIN_BACKOFF_MAX,
            rejoin_hold: Duration::from_millis(500),
            verify_hold: Duration::from_millis(20),
            keys: KeyRing::default(),
            tls: None,
            fabric: Fabric::new(ReadMode::Direct),
            read_error_limit: DEFAULT_READ_ERROR_LIMIT,
            data_digest: DataDigest::Off,
            bounce_memory: DEFAULT_BOUNCE_MEMORY,
        }
    }
}

/// How the pool is found on its nodes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PoolSelector {
    /// By its name, which must mean the same pool on every node that is asked.
    Name(String),
    /// By its identity.
    Id(PoolId),
}

impl std::str::FromStr for PoolSelector {
    type Err = crate::pool::SpecError;

    /// Text that reads as a uuid is an identity, anything else a name.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Ok(id) = uuid::Uuid::parse_str(text) {
            return Ok(Self::Id(PoolId(id)));
        }
        PoolSpec::validate_name(text)?;
        Ok(Self::Name(text.to_owned()))
    }
}

impl std::fmt::Display for PoolSelector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Id(id) => id.fmt(f),
        }
    }
}

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Operation {
    /// Fill the request's memory from the pool.
    Read,
    /// Write the request's memory to the pool.
    Write,
    /// Make everything completed so far survive a power cut.
    Flush,
    /// Forget a range; it reads as zeroes afterwards.
    Discard,
    /// Make a range read as zeroes.
    WriteZeroes,
}

impl std::fmt::Display for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "write of zeroes",
        })
    }
}

impl Operation {
    /// Whether it changes the pool's data.
    #[must_use]
    pub const fn is_write(self) -> bool {
        matches!(self, Self::Write | Self::Discard | Self::WriteZeroes)
    }

    /// Whether the request has memory of the length of its range.
    #[must_use]
    pub const fn has_data(self) -> bool {
        matches!(self, Self::Read | Self::Write)
    }
}

/// Names a request to its maker. Unique among the requests in flight.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Token(pub u64);

/// Why a request failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum IoError {
    /// The range is not within the pool, or not aligned to its logical block size.
    #[error("the range is not within the pool or not aligned to its logical block size")]
    BadRange,
    /// Every copy's disk answered with an error.
    #[error("the disk of every copy that could serve the request answered with an error")]
    Media,
    /// No Clean member could be reached within the time limit.
    #[error("the pool was suspended for longer than its time limit: no current copy could be reached")]
    Suspended,
    /// Every current copy lost writes that had completed and were not flushed.
    #[error(
        "completed writes were lost: every current copy's machine was started anew before they were flushed, or its disk failed \
         the flush; nothing is served until that is acknowledged"
    )]
    LostWrites,
    /// The request's memory could not be read or written.
    #[error("the memory of the request could not be reached: its owner has taken it away")]
    Memory,
    /// Another client has taken the pool.
    #[error("this client lost the pool to another one")]
    Fenced,
    /// The client is not attached any more.
    #[error("the client is not attached")]
    Detached,
    /// The request was given up on request.
    #[error("the request was cancelled")]
    Cancelled,
    /// Too many requests are waiting.
    #[error("more than 65536 requests are waiting")]
    TooMany,
}

/// Why a client is over.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum OverReason {
    /// A live client holds the pool.
    #[error("the pool is held by {0}")]
    Held(String),
    /// Another client attached with a higher epoch.
    #[error("another client has attached with epoch {0}; this one may not touch the pool any more")]
    Fenced(Epoch),
    /// A node does not know the pool.
    #[error("{address} has no pool '{pool}'{text}")]
    NoSuchPool {
        /// The node that was asked.
        address: Address,
        /// What was asked for.
        pool: String,
        /// What the node said, if anything.
        text: String,
    },
    /// Two nodes mean different pools.
    #[error("the nodes disagree about the pool: {0}")]
    Conflict(String),
    /// A node speaks no common protocol version, or refuses for good.
    #[error("{address} refuses: {text}")]
    Refused {
        /// The node.
        address: Address,
        /// Its words.
        text: String,
    },
    /// The client detached on request.
    #[error("detached on request")]
    Detached,
}

/// Index of a connection of the client.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub struct LinkId(pub u8);

/// What happened.
#[derive(Debug)]
pub enum Event<'a> {
    /// A connection that [`Output::Connect`] asked for stands; with a random number for it that nobody can foretell.
    LinkUp(LinkId, Nonce),
    /// A connection could not be made, or is gone. The driver has closed it already.
    LinkDown(LinkId, &'a str),
    /// A message arrived. Data of a read went to where [`Client::payload_target`] said; other payloads are the body. An answer
    /// whose data does not fit the digest in its header is handed in with [`crate::wire::Status::DigestDiffers`].
    Message(LinkId, &'a MessageHeader, &'a [u8]),
    /// Memory of this part could not be read or written: its owner has taken it away. Of a write, the leg may have been sent other
    /// data in place of it. Handed in before any answer to what was sent so.
    MemoryFault(Slot, Sequence),
    /// Time has passed; due at the latest at [`Client::deadline`].
    Tick,
    /// Leave the pool in good order: finish, flush, say so to the nodes.
    Detach,
    /// Give up every request that is outstanding: each fails once nothing touches its memory any more. The links are
    /// made anew, and the client attaches again.
    Cancel,
}

/// Payload of a message to send.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Payload {
    /// None.
    None,
    /// A part of a request's memory.
    Request {
        /// The request.
        token: Token,
        /// Where the part starts in the request's memory, in bytes.
        offset: u64,
        /// What protects it.
        protection: Protection,
    },
    /// A body.
    Body(Vec<u8>),
}

/// What protects the data of a write from being changed while it is sent to several legs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Protection {
    /// Nothing.
    None,
    /// The header gets the digest of the data. It is computed for the first leg, and is the same for all legs of one sequence:
    /// their messages follow one another.
    Digest,
    /// The data is sent from a copy, made for the first message of the slot and kept until [`Output::Unbounce`], and the header
    /// gets the copy's digest.
    Bounce,
    /// As [`Protection::Bounce`], for memory of which some cannot be read: that is zeroes in the copy. Reading it the usual way may
    /// end the process.
    Salvage,
}

/// What the driver has to do, in this order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Output {
    /// Open a connection and report [`Event::LinkUp`] or [`Event::LinkDown`].
    Connect(LinkId, Address),
    /// Close a connection; no event follows.
    Disconnect(LinkId),
    /// Send a message; its header's `payload` is the length of the payload.
    Send(LinkId, MessageHeader, Payload),
    /// The copy of the data of this slot, if there is one, is not needed any more.
    Unbounce(Slot),
    /// A request is finished.
    Complete(Token, Result<(), IoError>),
    /// A command of [`Client::command`] is answered.
    CommandDone(CommandToken, crate::pool::CommandReply),
    /// Something that operators want to know.
    Notice(Notice),
}

/// What is worth a line in a log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Notice {
    /// A link is up and its node answered.
    LegUp(MemberId, Address),
    /// A link is gone, or could not be made.
    LinkLost(Option<MemberId>, Address, String),
    /// The client attached.
    Attached(View),
    /// A view was committed.
    Committed(View),
    /// The pool is as this says from now on: its size, its members. Told with the first view, and after each change.
    Spec(Box<PoolSpec>),
    /// Members are lost; the pool goes on without them.
    Lost(MemberSet, Cause, String),
    /// A member could not be brought in.
    RejoinFailed {
        /// The member.
        member: MemberId,
        /// Why.
        cause: Cause,
        /// The same in words.
        reason: String,
        /// Losses and failed rejoins in a row.
        failures: u32,
        /// The next rejoin is tried after this.
        pause: Duration,
    },
    /// No Clean member can be reached; requests wait.
    Suspended(String),
    /// The client cannot attach yet, and waits for these members.
    Waiting(String),
    /// A copy's disk answered a read with an error; another copy served it.
    ReadError(MemberId, u64, u32),
    /// The machines of all these members, which are all that are Clean, were restarted, or their disks failed a flush. The number
    /// of blocks of completed writes that were not flushed on them follows. Every request fails until that is acknowledged.
    LostWrites(MemberSet, u64),
    /// These members did not detach in order: they could not flush, or did not answer. True if they are all that are Clean. The
    /// next client compares them with the others; what they had not flushed may be gone.
    DetachFailed(MemberSet, bool),
    /// A verify began, or ended; how, in words.
    Verify(String),
    /// The store of this member shows less than it had acknowledged: it went back in time, or is a copy of an earlier state. It is
    /// taken as wholly stale.
    Regressed {
        /// The member.
        member: MemberId,
        /// How far it had come.
        known: Position,
        /// What it shows.
        shown: Position,
    },
    /// Two nodes show one store. The first address is that of the one that is used; `None` if neither is.
    Duplicate(StoreId, Option<Address>, Address, Address),
    /// A member cannot come back, because its store cannot hold the pool as it is now.
    NoRoom(MemberId, String),
    /// The client is over.
    Over(OverReason),
}

#[derive(Debug)]
enum LinkState {
    /// Not connected; try again at this time.
    Down {
        retry_at: Time,
    },
    Connecting,
    /// Connected; the hello is not answered yet.
    Greeting {
        since: Time,
        opener: Box<Opener>,
    },
    Ready(Box<HelloReply>),
}

#[derive(Debug)]
struct Link {
    address: Address,
    /// The member whose leg it is.
    member: Option<MemberId>,
    /// The store that the node showed last.
    store: Option<StoreId>,
    state: LinkState,
    /// When its node last said what it knows.
    greeted: Time,
    /// It was made anew only to ask that again.
    again: bool,
    last_sent: Time,
    ping_since: Option<Time>,
    last_error: String,
    /// Since the client began to gather, the node has answered the hello, or could not be reached.
    asked: bool,
    /// Since when another node shows the same store.
    contested_since: Option<Time>,
    /// The node said that it has no such pool, or one does not believe the other that it may have to do with it.
    denied: bool,
    /// It leads to nobody who is of interest, and may be made to lead elsewhere.
    retired: bool,
}

enum State {
    /// Links are being made; the views of the members are looked at.
    Gathering {
        /// When it was first possible to go on.
        possible_since: Option<Time>,
        told: String,
    },
    /// Members are asked for the new epoch.
    Attaching { waiting: MemberSet, replies: Vec<(MemberId, AttachReply)>, since: Time },
    /// A view is being made durable.
    Changing { next: View, spec: PoolSpec, waiting: MemberSet, since: Time, attach: bool },
    /// Requests flow.
    Active,
    /// The goodbye is under way.
    Detaching { waiting: MemberSet, failed: MemberSet, since: Time },
    /// Nothing more will happen.
    Over(OverReason),
}

struct Op {
    token: Token,
    operation: Operation,
    offset: u64,
    length: u64,
    /// Bytes that parts have been made for.
    issued: u64,
    parts: u32,
    error: Option<IoError>,
    /// When it first waited for a pool that was not there. Never later again: a pool that comes back and serves nothing does
    /// not make a request younger.
    stuck: Option<Time>,
}

struct FlushRound {
    sequence: Sequence,
    /// The attachment under which it was sent.
    epoch: Epoch,
    pending: MemberSet,
    failed: MemberSet,
    since: Time,
    ops: Vec<OpIndex>,
    /// A command waits for it as well.
    for_command: bool,
}

/// The coordinator and data path of one pool.
pub struct Client {
    config: Config,
    selector: PoolSelector,
    state: State,
    links: Vec<Link>,
    /// The link of each member.
    legs: [Option<LinkId>; MAX_MEMBERS],
    /// The pool as it is in the committed view, or before that in the highest one seen.
    spec: Option<PoolSpec>,
    /// The order of the view that it goes with, if that is known.
    spec_order: Option<(Epoch, ViewNumber)>,
    /// The one that was told last.
    told_spec: Option<PoolSpec>,
    /// The committed view, or before that the highest one seen.
    view: Option<View>,
    epoch: Epoch,
    /// The highest one that any node has shown, of a view or an attach.
    highest_epoch: Epoch,
    /// The attachment of the last commit, and those under which views were proposed since. Empty before the first.
    own_epochs: Vec<Epoch>,
    /// When the pool was attached first.
    held_since: Option<Time>,
    /// An attach of this client did not come through since the last one that did.
    was_cut_short: bool,
    /// The epoch of a client that cut one short, and when it was seen first.
    rival: Option<(Epoch, Time)>,
    /// The members that are Out in the view committed last.
    committed_out: MemberSet,
    /// The members that are Clean in it.
    committed_clean: MemberSet,
    sequence: Sequence,
    parts: Parts,
    ops: Vec<Option<Op>>,
    free_ops: Vec<OpIndex>,
    /// Operations that still need slots, oldest first.
    backlog: VecDeque<OpIndex>,
    flush_queue: Vec<OpIndex>,
    flush: Option<FlushRound>,
    /// Blocks written since the last flush round started.
    unflushed: BlockMap,
    /// Blocks written before the flush round that is under way.
    flushing: BlockMap,
    bytes_in_flight: u64,
    max_io: u32,
    max_bytes: u64,
    slot_limit: usize,
    /// Members whose answered writes survive a power cut without a flush.
    write_through: MemberSet,
    /// The machine's run of each member that is active in the view committed last.
    host_boots: [Option<BootId>; MAX_MEMBERS],
    /// Members that said so since the last commit: a flush failed. A member whose process is restarted may not know of it.
    failed_flushes: MemberSet,
    /// See [`IoError::LostWrites`].
    lost_writes: bool,
    ready_slots: Vec<Slot>,
    slot_scratch: Vec<(Sequence, Slot)>,
    stale: rejoin::Stale,
    history: history::History,
    /// The store that two nodes showed last, and where.
    told_duplicate: Option<(StoreId, Address, Address)>,
    /// The same, and when they last did.
    contested: Option<(StoreId, Time)>,
    verify: Option<Box<verify::Verify>>,
    /// When the guest last asked for something.
    last_request: Option<Time>,
    commands: change::Commands,
    faults: faults::Faults,
    health: health::Health,
    /// Members that answered an attach with an error of their disk since the pool was active last.
    disks_refuse: MemberSet,
    /// Members whose node stopped in order, with everything flushed that they had answered, and that were not active since.
    left_flushed: MemberSet,
    detach_requested: bool,
    next_tick: Time,
    now: Time,
    counters: Counters,
    outputs: VecDeque<Output>,
}

/// What a client has done since it started.
#[derive(Clone, Copy, Default, Debug, serde::Serialize)]
pub struct Counters {
    /// Requests completed well.
    pub completed: u64,
    /// Requests failed.
    pub failed: u64,
    /// Views committed.
    pub views: u64,
    /// Writes that waited for an overlapping one.
    pub overlapping: u64,
    /// Transfers whose data did not fit their digest.
    pub digest_mismatches: u64,
    /// Parts of writes that were sent from a copy.
    pub bounced: u64,
    /// Reads that a leg's disk failed, and that were repeated on another one.
    pub read_errors: u64,
    /// Parts of requests whose memory could not be reached.
    pub memory_faults: u64,
}

impl Client {
    /// A client of one pool that will ask the nodes at `seeds` (at most [`MAX_MEMBERS`], further ones are ignored).
    #[must_use]
    pub fn new(config: Config, selector: PoolSelector, seeds: &[Address], now: Time) -> Self {
        let mut client = Self {
            config,
            selector,
            state: State::Gathering { possible_since: None, told: String::new() },
            links: Vec::new(),
            legs: [None; MAX_MEMBERS],
            spec: None,
            spec_order: None,
            told_spec: None,
            view: None,
            epoch: Epoch(0),
            highest_epoch: Epoch(0),
            own_epochs: Vec::new(),
            held_since: None,
            was_cut_short: false,
            rival: None,
            committed_out: MemberSet::EMPTY,
            committed_clean: MemberSet::EMPTY,
            sequence: Sequence(0),
            parts: Parts::new(MAX_SLOTS),
            ops: Vec::new(),
            free_ops: Vec::new(),
            backlog: VecDeque::new(),
            flush_queue: Vec::new(),
            flush: None,
            unflushed: BlockMap::new(0),
            flushing: BlockMap::new(0),
            bytes_in_flight: 0,
            max_io: 0,
            max_bytes: 0,
            slot_limit: 0,
            write_through: MemberSet::EMPTY,
            host_boots: [None; MAX_MEMBERS],
            failed_flushes: MemberSet::EMPTY,
            lost_writes: false,
            ready_slots: Vec::new(),
            slot_scratch: Vec::new(),
            stale: rejoin::Stale::default(),
            history: history::History::default(),
            told_duplicate: None,
            contested: None,
            verify: None,
            last_request: None,
            commands: change::Commands::default(),
            faults: faults::Faults::default(),
            health: health::Health::default(),
            disks_refuse: MemberSet::EMPTY,
            left_flushed: MemberSet::EMPTY,
            detach_requested: false,
            next_tick: now,
            now,
            counters: Counters::default(),
            outputs: VecDeque::with_capacity(256),
        };
        for address in seeds.iter().take(MAX_MEMBERS) {
            client.add_link(address.clone());
        }
        client
    }

    /// The same for a pool whose specification is known from an earlier look: requests are accepted at once, and a node
    /// that means another pool ends the client. Further nodes are taken from the specification.
    #[must_use]
    pub fn with_spec(config: Config, spec: PoolSpec, seeds: &[Address], now: Time) -> Self {
        let mut client = Self::new(config, PoolSelector::Id(spec.id), seeds, now);
        client.adopt_spec(spec, None);
        client.connect_members();
        client
    }

    /// Takes in one event.
    pub fn apply(&mut self, event: Event<'_>, now: Time) {
        self.now = now;
        if matches!(self.state, State::Over(_)) {
            return;
        }
        match event {
            Event::LinkUp(link, nonce) => self.link_up(link, nonce),
            Event::LinkDown(link, reason) => self.link_down(link, reason),
            Event::Message(link, header, body) => self.message(link, header, body),
            Event::MemoryFault(slot, sequence) => self.memory_fault(slot, sequence),
            Event::Tick => self.tick(),
            Event::Detach => {
                self.detach_requested = true;
                self.interrupt_verify("the client detaches");
                let was_held = self.is_command_quiescing() && self.is_active();
                self.give_up_commands(Refusal::NoCoordinator, "the client is leaving");
                if was_held {
                    self.resume_requests();
                }
                self.try_detach();
            }
            Event::Cancel => self.cancel(),
        }
        self.pump();
        if self.verify.is_some() {
            self.pump_verify();
        }
    }

    /// The next thing to do, if any.
    pub fn take_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When [`Event::Tick`] is due at the latest.
    #[must_use]
    pub fn deadline(&self) -> Time {
        self.verify_deadline().map_or(self.next_tick, |due| due.min(self.next_tick))
    }

    /// The pool's specification, known once a node has answered.
    #[must_use]
    pub const fn spec(&self) -> Option<&PoolSpec> {
        self.spec.as_ref()
    }

    /// Whether requests flow.
    #[must_use]
    pub const fn is_active(&self) -> bool {
        matches!(self.state, State::Active)
    }

    /// Why the client is over, once it is.
    #[must_use]
    pub const fn over(&self) -> Option<&OverReason> {
        if let State::Over(reason) = &self.state { Some(reason) } else { None }
    }

    /// Whether every link was tried since the client began to look, so that no node is known that could tell of a later view or
    /// specification.
    #[must_use]
    pub fn has_asked_all(&self) -> bool {
        self.links.iter().all(|l| l.asked || l.is_idle())
    }

    /// The view from which the one that is being made follows, or the committed one.
    pub(crate) const fn view(&self) -> Option<&View> {
        self.view.as_ref()
    }

    /// How many requests are not finished.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.ops.len() - self.free_ops.len()
    }

    fn notice(&mut self, notice: Notice) {
        self.outputs.push_back(Output::Notice(notice));
    }

    fn view_out(&self) -> MemberSet {
        self.view.as_ref().map_or(MemberSet::EMPTY, View::out)
    }

    fn view_active(&self) -> MemberSet {
        self.view.as_ref().map_or(MemberSet::EMPTY, View::active)
    }

    fn view_clean(&self) -> MemberSet {
        self.view.as_ref().map_or(MemberSet::EMPTY, View::clean)
    }

    fn tick(&mut self) {
        let busy = self.parts.in_flight() > 0
            || self.flush.is_some()
            || self.commands.is_running()
            || !self.is_active();
        let interval = if busy {
            self.config.leg_timeout.min(Duration::from_millis(800)) / 8
        } else {
            self.config.ping_interval
        };
        self.next_tick = self.now + interval;
        self.tick_links();
        self.tick_requests();
        self.tick_state();
        self.tick_stale();
        self.tick_history();
        self.tick_commands();
        self.tick_health();
        self.schedule_rejoin();
    }
}

#[cfg(test)]
mod tests;
