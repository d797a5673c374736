//! One member's protocol behaviour, as a state machine without I/O.
//!
//! A node gives it what happened (messages, disk completions, durable metadata, time) and carries out what it asks
//! for. What a write needs for recovery is durable before the write is answered: first the intent bit of its chunk and
//! the dirty bits of the members that miss it, then the data, then the answer.

mod additions;
mod command;
mod flush;
mod history;
mod io;
mod leave;
mod resync;
mod room;
mod session;
mod source;
mod status;
mod verify;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::Duration;

pub use command::CommandId;
pub use resync::{ResyncLimits, ResyncStatus};
pub use source::PulledData;
pub use status::{HolderStatus, MissedStatus, ReplicaCounters, ReplicaStatus};

use crate::map::{MapPage, MemberMaps};
use crate::pool::{
    Attested, BootId, Chunk, ClientId, CommandReply, Epoch, Mark, MemberId, PoolSpec, Position, Sequence,
    View, ViewNumber,
};
use crate::time::Time;
use crate::wire::{Hello, HelloReply, Limits, MAX_SLOTS, MessageHeader, PROTOCOL_VERSION, Role, SlotEntry};
use io::Io;
use resync::{Resync, Writing};
use session::{PendingAttach, PendingDetach, PendingView};

/// Names a connection to its node.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub struct ConnectionId(pub u32);

/// Names a buffer that the node filled with the data of a write.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct BufferToken(pub u32);

/// Names a disk request to the replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct IoId(pub u32);

/// Names a piece of metadata on its way to disk. Tickets grow; each is answered once.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// Which client has, or last had, the pool, as it stands in the superblock.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LastClient {
    /// Its identity.
    pub client: ClientId,
    /// Who it is, in words.
    pub description: String,
    /// Whether it is attached, or was when it was last heard of. False after it detached in good order.
    pub attached: bool,
}

/// The part of a superblock that the protocol changes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DurableState {
    /// The member's view.
    pub view: View,
    /// The pool as it is in that view; both change together, in one write.
    pub spec: PoolSpec,
    /// The highest epoch accepted.
    pub epoch: Epoch,
    /// The client of that epoch.
    pub last_client: Option<LastClient>,
    /// The last mark of the attachment that made the view.
    pub mark: Mark,
    /// What the member remembers of all members of the view.
    pub attested: Attested,
    /// Set when a flush of the data failed, until a view of a later session is committed: what had completed and was not flushed
    /// may be gone.
    pub flush_failed: bool,
}

impl DurableState {
    /// The state of a member that no client has attached to yet.
    #[must_use]
    pub fn new(view: View, spec: PoolSpec) -> Self {
        let (mark, attested) = (Mark(0), Attested::default());
        Self { view, spec, epoch: Epoch(0), last_client: None, mark, attested, flush_failed: false }
    }

    /// How far the store has come.
    #[must_use]
    pub const fn position(&self) -> Position {
        Position::new(self.epoch, &self.view, self.mark)
    }
}

/// A piece of metadata to make durable.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Metadata {
    /// A map page, as [`Replica::page`] returns it when the write starts. Written pages may be newer than asked for.
    Page(MapPage),
    /// The superblock.
    State(Box<DurableState>),
}

/// What a disk request does. Offsets are bytes of the pool.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiskOperation {
    /// Read into a buffer that the node finds.
    Read,
    /// Read, and give the digest of each block: see [`Event::Digested`].
    Digest,
    /// Write from the buffer.
    Write(BufferToken),
    /// Write data that came from another member; see [`Output::WritePulled`].
    WritePulled,
    /// Make everything completed so far durable.
    Flush,
    /// Forget the range; it must read as zeroes.
    Discard,
    /// Make the range read as zeroes.
    WriteZeroes,
    /// Zeroes that came from another member: as a discard, and nothing at all where the range reads as zeroes already. That
    /// must be seen on the disk at this moment: the store may hold old data in any place.
    ZeroPulled,
}

impl DiskOperation {
    /// Whether it changes data for a client.
    const fn is_write(self) -> bool {
        matches!(self, Self::Write(_) | Self::Discard | Self::WriteZeroes)
    }
}

/// How a disk request ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiskResult {
    /// Well.
    Done,
    /// The disk is full.
    NoSpace,
    /// With any other error; the node has logged it.
    Failed,
}

/// Payload of an answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ReplyPayload {
    /// None.
    None,
    /// The buffer that this disk read filled. It is the node's to free once it is sent.
    Data(IoId),
    /// A body.
    Body(Vec<u8>),
    /// The body that [`PulledData::encode`] makes of these reads, and before it their data. The header's length of the payload
    /// is the node's to fill in.
    Pulled(PulledData),
}

/// What happened.
#[derive(Debug)]
pub enum Event<'a> {
    /// A message of a client that was greeted (see [`Replica::greet`]). A write's data is in the buffer; one whose data does not
    /// fit the digest in its header is handed in with [`crate::wire::Status::DigestDiffers`].
    Message {
        /// Where it came from.
        connection: ConnectionId,
        /// In which role that connection was opened.
        role: Role,
        /// Its header.
        header: &'a MessageHeader,
        /// Its body, if it is a control message.
        body: &'a [u8],
        /// Its data, if it is a write.
        buffer: Option<BufferToken>,
    },
    /// A connection is gone.
    Closed(ConnectionId),
    /// A disk request ended.
    Disk(IoId, DiskResult),
    /// The blocks that a [`DiskOperation::Digest`] read, by [`crate::wire::block_digests`].
    Digested(IoId, &'a [u64]),
    /// Metadata is durable, or cannot be made durable.
    Durable(Ticket, Result<(), ()>),
    /// The connection to another node that [`Output::PeerConnect`] asked for stands, and its hello is answered.
    PeerUp,
    /// It could not be made, or is gone.
    PeerDown(&'a str),
    /// A message arrived on it. The node has the data that a [`crate::wire::Kind::PullReply`] lists, and keeps it by the
    /// answer's sequence until [`Output::PullDone`].
    PeerMessage(&'a MessageHeader, &'a [u8]),
    /// [`Output::Grow`] has ended: there is room, or there is not, in words.
    Grown(Result<(), &'a str>),
    /// Time has passed; due once a second, and at [`Replica::deadline`].
    Tick,
}

/// What the node has to do, in this order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Output {
    /// Send a message; its header's `payload` is the length of the payload. If it has a digest, that is the node's to fill in.
    Send(ConnectionId, MessageHeader, ReplyPayload),
    /// Carry out a disk request.
    Disk {
        /// Its name.
        io: IoId,
        /// What to do.
        operation: DiskOperation,
        /// First byte of the pool.
        offset: u64,
        /// Bytes.
        length: u32,
    },
    /// Write a part of the data that came with the answer to a pull.
    WritePulled {
        /// Its name.
        io: IoId,
        /// The pull, by its sequence.
        pull: u64,
        /// First byte of the pull's data.
        from: u32,
        /// First byte of the pool.
        offset: u64,
        /// Bytes.
        length: u32,
    },
    /// Nothing more of a pull's data is written than what was asked for before.
    PullDone(u64),
    /// Connect to another node of the pool as a peer; there is one such connection at a time.
    PeerConnect(crate::pool::Address),
    /// Send a message without payload on it. A [`crate::wire::Kind::Pull`] may wait until there is memory for its data.
    PeerSend(MessageHeader),
    /// Close it; no event follows.
    PeerClose,
    /// Make metadata durable.
    Persist(Ticket, Metadata),
    /// The buffer of a write is not needed any more.
    Release(BufferToken),
    /// Close a connection; [`Event::Closed`] is not needed.
    Close(ConnectionId, &'static str),
    /// Make room for a pool of `to` bytes, up to now `from`: the store holds that much, its maps cover it, and everything
    /// from `from` on reads as zeroes, durably. Ends with [`Event::Grown`]; there is one at a time.
    Grow {
        /// Bytes that there is room for. What lies beyond them is nobody's.
        from: u64,
        /// Bytes that there is to be room for.
        to: u64,
    },
    /// What became of a command that [`Replica::command`] took.
    CommandDone(CommandId, CommandReply),
    /// Something that operators want to know.
    Notice(Notice),
}

/// What is worth a line in a log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Notice {
    /// A client attached.
    Attached(Epoch, String),
    /// A client was refused, because this one holds the pool.
    Refused(String, String),
    /// The client is gone without a goodbye; what it had in flight is not known to be complete.
    ClientLost(Epoch, String),
    /// The client detached.
    Detached(Epoch, String),
    /// The member has a new view.
    View(View),
    /// Metadata cannot be made durable: the member stops to answer writes.
    MetadataFailed,
    /// The coordinator found that the store of this member went back in time, and is to be copied over in full.
    Regressed,
    /// The disk failed a flush, for this purpose: what it had answered and not flushed may be gone. The session ends.
    FlushFailed(&'static str),
}

/// How a replica behaves.
#[derive(Clone, Debug)]
pub struct Config {
    /// What one client session may have outstanding.
    pub limits: Limits,
    /// An intent bit is cleared when its chunk was not written for so long.
    pub intent_idle: Duration,
    /// The run of the node's kernel.
    pub host_boot: BootId,
    /// The run of the node's process.
    pub process_boot: BootId,
    /// Whether the store needs no flush for durability.
    pub write_through: bool,
    /// How hard a resync of this member may work.
    pub resync: ResyncLimits,
    /// Bytes of the largest pool that the store can ever hold. Views and questions for more are refused at once.
    pub max_size: u64,
    /// Other nodes, and the members of the pool, are reached by `tls://` and in no other way.
    pub tls_only: bool,
}

struct Holder {
    client: ClientId,
    description: String,
    /// `None` once the connection is gone.
    connection: Option<ConnectionId>,
    since: Time,
    /// For how long it had the pool then.
    held: Duration,
    /// Whoever comes and does not yield may have its place.
    yields: bool,
}

#[derive(Clone, Copy)]
struct Activity {
    sequence: Sequence,
    last_write: Time,
}

/// Who waits for metadata to be durable. The numbers tell a step that was given up from the one that replaced it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Waiter {
    Io(IoId),
    Attach(Epoch),
    ViewPages(Epoch, ViewNumber),
    View(ViewNumber),
    DetachPages(Epoch),
    Detach(Epoch),
    Mark(Epoch, Mark),
    /// Nothing: the superblock is written for the next process.
    Nobody,
    /// The rehearsal of a rejoin, in this session.
    Rehearsal(u64),
}

/// One member of a pool.
pub struct Replica {
    config: Config,
    spec: PoolSpec,
    member: MemberId,
    view: View,
    epoch: Epoch,
    last_client: Option<LastClient>,
    history: history::History,
    /// The state as the superblock has it, and what is on its way there.
    durable_state: DurableState,
    coming_states: VecDeque<(Ticket, DurableState)>,
    /// The client before the one that is attached, whose writes the slot table may hold.
    previous_client: Option<ClientId>,
    holder: Option<Holder>,
    /// Commands that the client was given and has not answered.
    commands: command::Commands,
    room: room::Room,
    /// Whether the last client left in good order, so that the slot table needs no look.
    clean_detach: bool,
    maps: MemberMaps,
    /// A flush failed, and no view of a later session is known to be committed: see [`DurableState::flush_failed`].
    flush_failed: bool,
    /// A flush failed, and the member has adopted no view since: it hands out nothing of what it may have lost.
    distrusted: bool,
    flushes: flush::Flushes,
    /// What came with the view that is being set.
    additions: additions::Additions,
    /// Whether the slot table was lost with an earlier run of the process, and no attachment is known to have dealt with that.
    tables_lost: bool,
    slots: Vec<SlotEntry>,
    /// Writes that the disk failed, and may have carried out in part, above the watermark.
    failed_writes: Vec<SlotEntry>,
    watermark: Sequence,
    activity: BTreeMap<Chunk, Activity>,
    /// Chunks that may hold writes of a client that died: their intent bits stay.
    frozen: HashSet<Chunk>,
    /// Chunks whose intent bit goes when the flush that is under way is answered.
    clearing: Option<(IoId, Vec<(Chunk, Sequence)>)>,
    /// Where the next look at the intents begins.
    next_clearing: Chunk,
    /// Counts attaches: disk requests of an earlier session are of a client that is fenced.
    session: u64,
    /// The session in which the view was adopted. One of an earlier session says nothing about what was missed since.
    view_session: u64,
    /// The session in which a view of its own was known to be committed.
    settled_session: u64,
    resync: Option<Resync>,
    /// Pulled data on its way to disk.
    pulled_writes: HashMap<IoId, Writing>,
    /// Guest writes that wait for a block to be pulled, or for pulled data to be written.
    held: VecDeque<IoId>,
    source: source::Source,
    verify: verify::Verify,
    ios: Vec<Option<Io>>,
    free_ios: Vec<u32>,
    next_ticket: Ticket,
    /// Pages on their way to disk, with the ticket of the newest request.
    pending_pages: HashMap<MapPage, Ticket>,
    tickets: HashMap<Ticket, (Option<MapPage>, Vec<Waiter>)>,
    attach: Option<PendingAttach>,
    set_view: Option<PendingView>,
    /// Views that were replaced before they were durable, since the last one that is.
    views_given_up: u32,
    detach: Option<PendingDetach>,
    /// Set when metadata could not be written: nothing that depends on it is answered any more.
    broken: bool,
    /// The node is about to stop.
    leave: Option<leave::Leave>,
    /// What the client said of members that are not current, and when.
    conditions: (Time, Vec<crate::pool::Condition>),
    changed: Vec<MapPage>,
    now: Time,
    counters: ReplicaCounters,
    outputs: VecDeque<Output>,
}

impl Replica {
    /// A member as its store has it. `maps` hold the bits read from disk.
    #[must_use]
    pub fn new(config: Config, member: MemberId, state: DurableState, maps: MemberMaps) -> Self {
        let durable_state = state.clone();
        let history = history::History::new(&state);
        let spec = state.spec;
        let is_detached = state.last_client.as_ref().is_none_or(|c| !c.attached);
        let clean_detach = is_detached && maps.intent().count() == 0 && !state.flush_failed;
        let none = |slot| SlotEntry {
            slot: crate::pool::Slot(slot),
            sequence: Sequence(0),
            offset: 0,
            length: 0,
            failed: false,
        };
        Self {
            config,
            member,
            view: state.view,
            epoch: state.epoch,
            last_client: state.last_client,
            history,
            durable_state,
            coming_states: VecDeque::new(),
            previous_client: None,
            holder: None,
            commands: command::Commands::default(),
            room: room::Room::new(spec.size),
            clean_detach,
            flush_failed: state.flush_failed,
            distrusted: false,
            flushes: flush::Flushes::new(&spec),
            maps,
            additions: additions::Additions::default(),
            tables_lost: !clean_detach && !mutant!(RestartNotTold),
            spec,
            slots: (0..MAX_SLOTS).map(none).collect(),
            failed_writes: Vec::new(),
            watermark: Sequence(0),
            activity: BTreeMap::new(),
            frozen: HashSet::new(),
            clearing: None,
            next_clearing: Chunk(0),
            session: 0,
            view_session: u64::MAX,
            settled_session: u64::MAX,
            resync: None,
            pulled_writes: HashMap::new(),
            held: VecDeque::new(),
            source: source::Source::default(),
            verify: verify::Verify::default(),
            ios: Vec::new(),
            free_ios: Vec::new(),
            next_ticket: Ticket(1),
            pending_pages: HashMap::new(),
            tickets: HashMap::new(),
            attach: None,
            set_view: None,
            views_given_up: 0,
            detach: None,
            broken: false,
            leave: None,
            conditions: (Time(0), Vec::new()),
            changed: Vec::new(),
            now: Time(0),
            counters: ReplicaCounters::default(),
            outputs: VecDeque::with_capacity(256),
        }
    }

    /// The epoch by which a client may judge its own branch: one of a branch that was forced only when that is durable.
    fn shown_epoch(&self) -> Epoch {
        let durable = self.durable_state.epoch;
        if durable.is_of_older_branch(self.epoch) { durable } else { self.epoch }
    }

    /// Answers a hello: what a client has to know before it attaches.
    ///
    /// # Errors
    /// The words of a refusal, when no version of the client's is spoken here.
    pub fn greet(&self, hello: &Hello) -> Result<HelloReply, String> {
        let (low, high) = hello.versions;
        if !(low..=high).contains(&PROTOCOL_VERSION) {
            return Err(format!(
                "this node speaks protocol version {PROTOCOL_VERSION}, the client {low} to {high}"
            ));
        }
        // What is not durable may never have been: nobody is to wait for a branch that a crash undid. An epoch of the same branch is
        // no more than a number to be above.
        let DurableState { view, spec, .. } = &self.durable_state;
        let epoch = self.shown_epoch();
        Ok(HelloReply {
            version: PROTOCOL_VERSION,
            capabilities: 0,
            limits: self.config.limits,
            member: self.member,
            write_through: self.config.write_through,
            host_boot: self.config.host_boot,
            process_boot: self.config.process_boot,
            spec: spec.clone(),
            view: view.clone(),
            epoch,
            position: self.durable_state.position(),
            attested: self.durable_state.attested,
            clean_detach: self.clean_detach,
        })
    }

    /// Takes in one event.
    pub fn apply(&mut self, event: Event<'_>, now: Time) {
        self.now = now;
        match event {
            Event::Message { connection, role, header, .. } if !header.kind.is_from(role) => {
                let reason = match role {
                    Role::Client => "a message that no client sends",
                    Role::Peer => "a message that nodes do not send one another",
                };
                self.outputs.push_back(Output::Close(connection, reason));
                self.closed(connection);
            }
            Event::Message { connection, role, header, body, buffer } => {
                self.message(connection, role, header, body, buffer)
            }
            Event::Closed(connection) => self.closed(connection),
            Event::Disk(io, result) => self.disk_done(io, result),
            Event::Digested(io, digests) => self.digested(io, digests),
            Event::Durable(ticket, result) => self.durable(ticket, result),
            Event::PeerUp if self.has_compare_link() => self.compare_link_up(),
            Event::PeerUp => self.peer_up(),
            Event::PeerDown(reason) if self.has_compare_link() => self.fail_compares(reason),
            Event::PeerDown(reason) => self.peer_down(reason),
            Event::PeerMessage(header, body) if self.has_compare_link() => {
                self.reference_message(header, body);
            }
            Event::PeerMessage(header, body) => self.peer_message(header, body),
            Event::Grown(result) => self.grown(result),
            Event::Tick => {
                self.clear_intents();
                self.pump_resync();
                self.tick_verify();
            }
        }
    }

    /// When [`Event::Tick`] is due before the next second is over, if it is.
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        self.resync_deadline()
    }

    /// The next thing to do, if any.
    pub fn take_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// The bytes of a map page as they are now.
    #[must_use]
    pub fn page(&self, page: MapPage) -> Option<&[u8; crate::map::MAP_PAGE_BYTES]> {
        self.maps.page(page)
    }

    /// The intent map and the dirty maps as they are now.
    #[must_use]
    pub const fn maps(&self) -> &MemberMaps {
        &self.maps
    }

    /// The pool's specification.
    #[must_use]
    pub const fn spec(&self) -> &PoolSpec {
        &self.spec
    }

    /// Which member this is.
    #[must_use]
    pub const fn member(&self) -> MemberId {
        self.member
    }

    /// The member's view.
    #[must_use]
    pub const fn view(&self) -> &View {
        &self.view
    }

    /// The highest epoch that the member has accepted.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The connection of the client that is attached.
    #[must_use]
    pub fn holder_connection(&self) -> Option<ConnectionId> {
        self.holder.as_ref()?.connection
    }

    /// Whether a flush failed, and no view of a later session is known to be committed.
    #[must_use]
    pub const fn flush_failed(&self) -> bool {
        self.flush_failed
    }

    /// Whether disk or metadata requests are under way.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.ios.len() > self.free_ios.len() || !self.tickets.is_empty()
    }

    fn present_state(&self) -> DurableState {
        DurableState {
            view: self.view.clone(),
            spec: self.spec.clone(),
            epoch: self.epoch,
            last_client: self.last_client.clone(),
            mark: self.history.mark,
            attested: self.history.attested,
            flush_failed: self.flush_failed,
        }
    }

    fn persist(&mut self, metadata: Metadata, waiters: Vec<Waiter>) -> Ticket {
        let ticket = self.next_ticket;
        self.next_ticket = Ticket(ticket.0 + 1);
        let page = if let Metadata::Page(page) = &metadata { Some(*page) } else { None };
        if let Some(page) = page {
            self.pending_pages.insert(page, ticket);
        }
        self.tickets.insert(ticket, (page, waiters));
        self.outputs.push_back(Output::Persist(ticket, metadata));
        ticket
    }

    fn persist_state(&mut self, waiter: Waiter) {
        let state = self.present_state();
        let ticket = self.persist(Metadata::State(Box::new(state.clone())), vec![waiter]);
        self.coming_states.push_back((ticket, state));
    }

    /// Starts the writes of all changed pages, and lets `waiter` wait for them and for every page that is on its way.
    /// Returns how many tickets it waits for.
    fn persist_changed(&mut self, waiter: Waiter) -> usize {
        let mut changed = std::mem::take(&mut self.changed);
        for page in changed.drain(..) {
            self.persist(Metadata::Page(page), Vec::new());
        }
        self.changed = changed;
        let pending: Vec<Ticket> = self.pending_pages.values().copied().collect();
        for ticket in &pending {
            if let Some((_, waiters)) = self.tickets.get_mut(ticket) {
                waiters.push(waiter);
            }
        }
        pending.len()
    }

    fn durable(&mut self, ticket: Ticket, result: Result<(), ()>) {
        let Some((page, waiters)) = self.tickets.remove(&ticket) else { return };
        if let Some(page) = page
            && self.pending_pages.get(&page) == Some(&ticket)
        {
            self.pending_pages.remove(&page);
        }
        if let Some(at) = self.coming_states.iter().position(|(t, _)| *t == ticket)
            && let Some((_, state)) = self.coming_states.drain(..=at).next_back()
            && result.is_ok()
        {
            self.durable_state = state;
        }
        if result.is_err() && !self.broken && !mutant!(MetadataErrorIgnored) {
            self.broken = true;
            self.notice(Notice::MetadataFailed);
            if let Some(connection) = self.holder_connection() {
                // The client goes on without this member; the others record what it misses.
                self.outputs.push_back(Output::Close(connection, "metadata cannot be written"));
                self.closed(connection);
            }
        }
        for waiter in waiters {
            match waiter {
                Waiter::Io(io) => self.io_metadata_durable(io),
                Waiter::Attach(epoch) => self.attach_durable(epoch),
                Waiter::ViewPages(epoch, view) => self.view_page_durable(epoch, view),
                Waiter::View(view) => self.view_durable(view),
                Waiter::DetachPages(epoch) => self.detach_page_durable(epoch),
                Waiter::Detach(epoch) => self.detach_durable(epoch),
                Waiter::Mark(epoch, mark) => self.mark_durable(epoch, mark),
                Waiter::Nobody => {}
                Waiter::Rehearsal(session) => self.rehearsal_durable(session),
            }
        }
    }

    fn notice(&mut self, notice: Notice) {
        self.outputs.push_back(Output::Notice(notice));
    }
}

#[cfg(test)]
mod flush_tests;
#[cfg(test)]
mod force_tests;
#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod room_tests;
#[cfg(test)]
mod tests;
