//! The operator: gives commands at random moments, to the client that is attached, through a node, or as the coordinator
//! for a moment; gives up, repeats, and in the end wants all that was begun to be finished.

use super::node::Node;
use super::oracle::SECTOR;
use super::rng::Rng;
use super::world::{Check, Event, MILLISECOND, World, trace};
use crate::client::{self, CommandToken};
use crate::pool::{
    Address, Command, CommandReply, MemberId, MemberSet, MemberSpec, MemberState, PoolSpec, Refusal, StoreId,
    View,
};
use crate::replica::{self, CommandId, DurableState};
use crate::time::Time;
use crate::wire::{Kind, MessageHeader};

/// What a disk has where nobody has written: whoever reads it was given room that was not made.
pub(super) const GARBAGE: u64 = 0xffff_fffe << 24;
/// How much larger than in the beginning a pool becomes at most, in bytes.
const MOST_GROWTH: u64 = 1 << 20;
/// Most members that an operator makes.
const MOST_MEMBERS: usize = 5;
const MOST_NODES: usize = 10;

/// How a command was given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Client(usize),
    /// In this life of it.
    Node(usize, u32),
    /// By a client that was started for it.
    Admin(usize),
}

#[derive(Clone, Debug)]
struct Pending {
    number: u64,
    command: Command,
    way: Way,
    is_given: bool,
}

/// What the operator does and has done.
#[derive(Default)]
pub(super) struct Operator {
    /// Whether there is one in this run.
    is_there: bool,
    pause: u64,
    next: u64,
    pending: Option<Pending>,
    /// A command of which it is not known whether it was done.
    unfinished: Option<Command>,
    commands: u64,
}

impl Operator {
    pub(super) fn new(rng: &mut Rng) -> Self {
        let pause = rng.pick(&[20 * MILLISECOND, 200 * MILLISECOND, 1000 * MILLISECOND]);
        Self { is_there: rng.percent(40), pause, ..Self::default() }
    }

    /// The pool is another one: what was to be done in the old one is not to be done any more.
    pub(super) fn forget(&mut self) {
        self.pending = None;
        self.unfinished = None;
    }
}

impl World<'_> {
    /// The next thing that the operator does.
    pub(super) fn operate(&mut self) -> Check {
        if !self.operator.is_there {
            return Ok(());
        }
        let pause = if self.is_calm { 50 * MILLISECOND } else { self.rng.range(1, self.operator.pause) };
        // An attach may find that a command was done which the operator does not know of.
        let is_attached = self.hosts.iter().any(|h| h.is_live() && h.client.is_active());
        let is_over = self.is_calm && is_attached && self.is_operator_content();
        if !is_over {
            self.after(pause, Event::Operate);
        }
        if self.committed.is_none() {
            return Ok(());
        }
        if let Some(pending) = self.operator.pending.clone() {
            return self.wait_for(pending);
        }
        let unfinished = self.operator.unfinished.take();
        let command = match unfinished {
            // What is not known to be done is repeated, or something else is tried first.
            Some(command) if self.is_calm || self.rng.percent(70) => Some(command),
            _ if self.is_calm => self.left_to_do(),
            _ if self.operator.commands >= 12 => None,
            _ => Some(self.any_command()),
        };
        let Some(command) = command else { return Ok(()) };
        self.operator.commands += 1;
        self.give(command)
    }

    /// Whether a command is under way.
    pub(super) const fn is_operating(&self) -> bool {
        self.operator.pending.is_some()
    }

    pub(super) const fn has_operator(&self) -> bool {
        self.operator.is_there
    }

    /// Whether nothing that was begun is left to be finished.
    pub(super) fn is_operator_content(&self) -> bool {
        let is_idle = self.operator.pending.is_none() && self.operator.unfinished.is_none();
        !self.operator.is_there || is_idle && self.left_to_do().is_none()
    }

    /// What has to be done for every member to be Clean.
    fn left_to_do(&self) -> Option<Command> {
        let is_lost = |m: &&MemberSpec| self.nodes.iter().any(|n| n.store == m.store && n.is_gone);
        if let Some(lost) = self.committed_spec.members.iter().find(is_lost) {
            return Some(Command::Remove { member: lost.id, store: Some(lost.store) });
        }
        let line = self.committed_spec.members.iter().find(|m| m.maintenance)?;
        Some(Command::Maintenance { member: line.id, on: false })
    }

    /// A command is under way: its client may have gone, or the operator loses patience.
    fn wait_for(&mut self, pending: Pending) -> Check {
        match pending.way {
            Way::Admin(host) if self.hosts[host].is_live() => {
                let is_attached = self.hosts[host].client.is_active();
                if !pending.is_given && is_attached {
                    if let Some(pending) = &mut self.operator.pending {
                        pending.is_given = true;
                    }
                    return self.give_to_client(host, pending.number, pending.command);
                }
                // Others are in the way, or the pool is suspended.
                if !pending.is_given && self.rng.percent(30) {
                    self.operator.pending = None;
                    self.operator.unfinished = Some(pending.command);
                    return self.client(host, client::Event::Detach);
                }
            }
            Way::Client(host) if self.hosts[host].is_live() => {}
            Way::Node(node, life) if self.nodes[node].replica.is_some() && self.nodes[node].life == life => {}
            Way::Admin(_) | Way::Client(_) | Way::Node(..) => {
                // Nobody is left who could answer.
                self.operator.pending = None;
                self.operator.unfinished = Some(pending.command);
            }
        }
        Ok(())
    }

    fn give(&mut self, command: Command) -> Check {
        self.operator.next += 1;
        let number = self.operator.next;
        let is_usable = |h: &usize| self.hosts[*h].is_live() && !self.is_astray(*h);
        let live: Vec<_> = (0..self.hosts.len()).filter(is_usable).collect();
        trace!(self, "operator: {command}");
        self.forget_failures(&command);
        let way = match live.last() {
            None => {
                self.coverage.hit("command by an administrative coordinator");
                self.start_host(7, false);
                let host = self.hosts.len() - 1;
                self.hosts[host].is_admin = true;
                Way::Admin(host)
            }
            Some(&host) if self.rng.percent(50) => Way::Client(host),
            Some(_) => {
                let node = self.rng.index(self.nodes.len());
                Way::Node(node, self.nodes[node].life)
            }
        };
        let is_given = !matches!(way, Way::Admin(_));
        self.operator.pending = Some(Pending { number, command: command.clone(), way, is_given });
        match way {
            Way::Client(host) => self.give_to_client(host, number, command),
            Way::Node(node, _) => {
                let Some(replica) = &mut self.nodes[node].replica else { return Ok(()) };
                replica.command(CommandId(number), &command);
                self.replica(node, replica::Event::Tick)
            }
            Way::Admin(_) => Ok(()),
        }
    }

    fn give_to_client(&mut self, host: usize, number: u64, command: Command) -> Check {
        let now = Time(self.now);
        self.hosts[host].client.command(CommandToken(number), command, now);
        self.client_outputs(host)
    }

    /// A command is answered.
    pub(super) fn answered(&mut self, number: u64, from_node: bool, reply: CommandReply) -> Check {
        trace!(self, "operator: command {number}: {reply:?}");
        let is_its = |p: &mut Pending| p.number == number;
        let Some(pending) = self.operator.pending.take_if(is_its) else { return Ok(()) };
        self.forget_failures(&pending.command);
        if from_node && !matches!(reply, CommandReply::Refused { reason: Refusal::NoCoordinator, .. }) {
            self.coverage.hit("command through a node");
        }
        match reply {
            // In a branch of which the operator knows nothing.
            CommandReply::Done { view, .. } if !self.is_of_main(&view) => {
                self.operator.unfinished = Some(pending.command.clone());
            }
            CommandReply::Done { view, spec } => self.check_done(&pending.command, &view, &spec)?,
            CommandReply::Refused { reason, text } => self.refused(&pending.command, reason, &text)?,
            CommandReply::Verify { .. } => {
                return Err(format!("'{}' is answered by a report", pending.command));
            }
        }
        if let Way::Admin(host) = pending.way
            && self.hosts[host].is_live()
        {
            self.client(host, client::Event::Detach)?;
        }
        // Done is done, also when it is asked for again.
        if self.rng.percent(10) && !self.is_calm {
            self.operator.unfinished = Some(pending.command);
        }
        Ok(())
    }

    /// What was answered to be done is so, in a view that is committed.
    fn check_done(&mut self, command: &Command, view: &View, spec: &PoolSpec) -> Check {
        let committed = self.committed.as_ref().ok_or("a command was done before any view was committed")?;
        if view.order() > committed.order() || !spec.describes(view) {
            return Err(format!("'{command}' is done in {view}, after {committed}"));
        }
        let is_so = match command {
            Command::Add { store, address, .. } => {
                spec.members.iter().any(|m| m.store == *store && m.address == *address)
            }
            Command::Remove { store, .. } => spec.members.iter().all(|m| Some(m.store) != *store),
            Command::Replace { member, store, address } => {
                spec.member(*member).is_some_and(|m| m.store == *store && m.address == *address)
            }
            // The addresses of simulated nodes stay as they are.
            Command::Readdress { .. } => false,
            Command::Maintenance { member, on } => spec.member(*member).is_some_and(|m| m.maintenance == *on),
            Command::Grow { size } => spec.size == *size,
            // Verifies are not the operator's here: see `sim/verify.rs`.
            Command::Verify { .. } | Command::VerifyStatus | Command::VerifyCancel => false,
            Command::Resync { .. } => true,
        };
        if !is_so {
            return Err(format!("'{command}' is answered as done, and is not: {spec:?}"));
        }
        self.coverage.hit(situation(command, "done"));
        Ok(())
    }

    fn refused(&mut self, command: &Command, reason: Refusal, text: &str) -> Check {
        match reason {
            Refusal::LastClean => self.coverage.hit("command refused: last Clean member"),
            Refusal::Suspended => self.coverage.hit("command refused: suspended"),
            Refusal::Unreachable => self.coverage.hit("command refused: node of the new store unreachable"),
            Refusal::CoordinatorLost => self.coverage.hit("command lost with its client"),
            Refusal::NoRoom => self.coverage.hit("command refused: no room"),
            Refusal::BadSize => {
                let is_bad = matches!(command, Command::Grow { size } if *size < self.committed_spec.size);
                if !is_bad && !self.has_branches() {
                    return Err(format!("'{command}' is refused: {text}"));
                }
            }
            Refusal::BadCommand | Refusal::CannotVerify | Refusal::WeakerAddress if !self.has_branches() => {
                return Err(format!("'{command}' is refused: {text}"));
            }
            Refusal::BadCommand
            | Refusal::CannotVerify
            | Refusal::WeakerAddress
            | Refusal::StoreNotFound
            | Refusal::StoreInUse
            | Refusal::AddressInUse
            | Refusal::MemberIdTaken
            | Refusal::TooManyMembers
            | Refusal::UnknownMember
            | Refusal::NoCoordinator
            | Refusal::Busy => {}
        }
        let may_come = matches!(
            reason,
            Refusal::Suspended
                | Refusal::CoordinatorLost
                | Refusal::NoCoordinator
                | Refusal::Busy
                | Refusal::Unreachable
        );
        let is_wanted = match command {
            // A store that nobody may use any more; the member is there as before.
            Command::Replace { member, .. } | Command::Remove { member, .. } => {
                self.committed_spec.member(*member).is_some()
            }
            Command::Add { .. } | Command::Maintenance { .. } | Command::Grow { .. } => true,
            Command::Readdress { .. }
            | Command::Resync { .. }
            | Command::Verify { .. }
            | Command::VerifyStatus
            | Command::VerifyCancel => false,
        };
        if may_come && is_wanted && (reason != Refusal::Unreachable || !self.is_gone(command)) {
            self.operator.unfinished = Some(command.clone());
        }
        Ok(())
    }

    /// Whether the store that a command is about is lost for good.
    fn is_gone(&self, command: &Command) -> bool {
        let (Command::Add { store, .. } | Command::Replace { store, .. }) = command else { return false };
        self.nodes.iter().any(|n| n.store == *store && n.is_gone)
    }

    fn any_command(&mut self) -> Command {
        let members: Vec<_> = self.committed_spec.members.iter().map(|m| (m.id, m.store)).collect();
        let (member, store) = self.rng.pick(&members);
        let has_place = self.nodes.len() < MOST_NODES;
        // Two branches that both grow have different things in the same place.
        let grows = self.forces.is_there && self.rng.percent(30);
        match if grows { 9 } else { self.rng.range(0, 9) } {
            0..=2 if members.len() < MOST_MEMBERS && has_place => {
                let free: Vec<_> =
                    MemberId::all().filter(|m| self.committed_spec.member(*m).is_none()).collect();
                // The lowest free one is the one that was used last, as likely as not.
                let id = if self.rng.percent(60) { free[0] } else { self.rng.pick(&free) };
                let (store, address) = self.make_store(id, None);
                Command::Add { store, address, member: Some(id) }
            }
            3..=4 if members.len() > 1 => Command::Remove { member, store: Some(store) },
            5..=6 if has_place => {
                // A disk that is lost for good is one that nobody needs.
                let is_out = self.committed.as_ref().and_then(|v| v.state(member)) == Some(MemberState::Out);
                let address = self.committed_spec.member(member).map(|m| m.address.clone());
                let at = address.filter(|_| is_out && self.rng.percent(70));
                let (store, address) = self.make_store(member, at);
                Command::Replace { member, store, address }
            }
            7 => {
                let on = self.rng.percent(70);
                Command::Maintenance { member, on }
            }
            8 if self.rng.percent(40) => Command::Resync { member: self.rng.percent(50).then_some(member) },
            8 if self.rng.percent(20) => Command::Grow { size: self.committed_spec.size - 4096 },
            _ => {
                let most = self.spec.size + MOST_GROWTH;
                let left = (most - self.committed_spec.size) / 4096;
                let more = self.rng.range(0, left.min(64));
                Command::Grow { size: self.committed_spec.size + more * 4096 }
            }
        }
    }

    /// A node with an empty store for a member. With an address, the disk of the node there was exchanged.
    fn make_store(&mut self, member: MemberId, at: Option<Address>) -> (StoreId, Address) {
        let number = u8::try_from(self.nodes.len()).unwrap_or(u8::MAX);
        let store = StoreId::from_bytes([number + 1; 16]);
        let address = at.unwrap_or_else(|| {
            Address::new(self.spec.members[0].address.transport(), format!("node-{number}"), 7700)
        });
        if let Some(old) = self.node_at(&address) {
            trace!(self, "the disk of node {old} is lost");
            self.nodes[old].is_gone = true;
            // Nothing of it is needed by anybody: a crash that comes to nothing.
            self.crash_node(old, false).unwrap_or_default();
        }
        // As it is made for the pool as it is known at the time.
        let mut spec = self.committed_spec.clone();
        spec.members.retain(|m| m.id != member);
        spec.members.push(MemberSpec::new(member, store, address.clone()));
        spec.members.sort_by_key(|m| m.id);
        for line in &mut spec.members {
            line.maintenance = false;
        }
        let view = View::unjoined(spec.members.iter().map(|m| (m.id, m.store)), member);
        let write_back = self.rng.percent(30);
        let state = DurableState::new(view, spec);
        let capacity = self.capacity();
        self.nodes.push(Node::new(member, store, address.clone(), state, write_back, capacity));
        for host in &mut self.hosts {
            host.partitioned.push(false);
            host.stalled_until.push(0);
            host.host_boots.push(0);
        }
        let node = self.nodes.len() - 1;
        trace!(self, "node {node} is made with store {store} for member {member}");
        if self.rng.percent(90) {
            self.start_node(node);
        } else {
            self.after(200 * MILLISECOND, Event::NodeStart(node));
        }
        (store, address)
    }

    /// The node that answers at an address.
    pub(super) fn node_at(&self, address: &Address) -> Option<usize> {
        // It listens at both.
        let is_at = |a: &Address| (a.host(), a.port()) == (address.host(), address.port());
        self.nodes.iter().rposition(|n| is_at(&n.address))
    }

    /// Sectors that a disk has room for.
    pub(super) fn capacity(&self) -> usize {
        let growth = if self.operator.is_there { MOST_GROWTH } else { 0 };
        usize::try_from((self.spec.size + growth) / SECTOR).unwrap_or(0)
    }

    /// Sectors of the pool as it is committed.
    pub(super) fn sectors(&self) -> usize {
        usize::try_from(self.committed_spec.size / SECTOR).unwrap_or(0)
    }

    /// A replica wants room.
    pub(super) fn make_room(&mut self, node: usize, from: u64, to: u64) -> Check {
        let durable = self.nodes[node].durable.spec.size;
        if from < durable {
            return Err(format!("node {node} makes room from {from} on, and has a pool of {durable} bytes"));
        }
        let is_out = |v: &View| v.state(self.nodes[node].member) == Some(MemberState::Out);
        if self.is_member(node) && self.committed.as_ref().is_some_and(is_out) {
            self.coverage.hit("a member that was away makes room");
        }
        let timeout = u64::try_from(self.profile.client.leg_timeout.as_nanos()).unwrap_or(u64::MAX);
        let most = if self.rng.percent(20) && !self.is_calm { timeout * 2 } else { 5 * MILLISECOND };
        let delay = self.rng.range(1, most);
        let life = self.nodes[node].life;
        self.after(delay, Event::Grown { node, life, from, to });
        Ok(())
    }

    pub(super) fn grown(&mut self, node: usize, life: u32, from: u64, to: u64) -> Check {
        let sector = |bytes: u64| usize::try_from(bytes / SECTOR).unwrap_or(0);
        if self.nodes[node].life != life {
            return Ok(()); // It was not done in time.
        }
        if self.rng.percent(10) && !self.is_calm {
            return self.replica(node, replica::Event::Grown(Err("no space")));
        }
        self.nodes[node].disk.zero(sector(from), sector(to));
        self.nodes[node].room = to;
        trace!(self, "node {node} has room for {to} bytes");
        self.replica(node, replica::Event::Grown(Ok(())))
    }

    /// The specification that goes with a view which a client has committed.
    pub(super) fn check_spec(&mut self, host: usize, view: &View) -> Check {
        let Some(spec) = self.hosts[host].client.spec().cloned() else {
            return Err(format!("client {host} committed {view} and has no specification"));
        };
        if !spec.describes(view) {
            return Err(format!("client {host} committed {view} with {spec:?}"));
        }
        if spec.size < self.committed_spec.size {
            return Err(format!("{view} makes the pool smaller: {} bytes", spec.size));
        }
        for member in view.active().iter() {
            let index = self.node_in(view, member);
            let node = &self.nodes[index];
            if node.durable.view == *view && node.durable.spec != spec {
                return Err(format!("member {member} has {view} with {:?}", node.durable.spec));
            }
            if node.room < spec.size && !self.is_back(index) {
                return Err(format!("member {member} has no room for {} bytes in {view}", spec.size));
            }
        }
        self.check_absence(view, &spec)?;
        if spec.size > self.committed_spec.size {
            self.oracle.grow(usize::try_from(spec.size / SECTOR).unwrap_or(0));
        }
        self.committed_spec = spec;
        Ok(())
    }

    /// A member that is taken Out on purpose has lost nothing, and nothing of it is lost.
    fn check_absence(&mut self, view: &View, spec: &PoolSpec) -> Check {
        let Some(last) = self.committed.clone() else { return Ok(()) };
        if view.number.0 != last.number.0 + 1 || view.epoch != last.epoch {
            return Ok(()); // Something came in between.
        }
        let is_new = |m: &&MemberSpec| {
            m.maintenance && last.state(m.id) == Some(MemberState::Clean) && !view.active().contains(m.id)
        };
        let planned: MemberSet = spec.members.iter().filter(is_new).map(|m| m.id).collect();
        for member in planned.iter() {
            let index = self.node_in(view, member);
            let disk = &self.nodes[index].disk;
            if disk.unflushed_since.iter().any(|s| *s > 0) && disk.running.is_empty() {
                return Err(format!("member {member} is let go in {view} with something unflushed"));
            }
            for keeper in view.active().iter() {
                let replica = self.nodes[self.node_in(view, keeper)].replica.as_ref();
                let missed = replica.and_then(|r| r.maps().dirty_blocks(member));
                // A write that a member refused waits to be sent again, and is on record until then. What it could not read is on
                // record to be written anew.
                let is_unfinished = |block: u64| {
                    let block = usize::try_from(block).unwrap_or(0);
                    let first = block * 8;
                    disk.unread.contains(&block)
                        || (first..(first + 8).min(self.sectors())).any(|s| self.oracle.is_in_flight(s))
                };
                if let Some(block) = missed.and_then(|m| m.iter().find(|b| !is_unfinished(b.0))) {
                    return Err(format!("member {member} misses {block:?} at {keeper} when it is let go"));
                }
            }
            self.coverage.hit("planned absence with nothing lost");
        }
        Ok(())
    }

    // Faults and coverage ----------------------------------------------------------------------------------------

    /// Sometimes a fault strikes just when a command is being carried out.
    pub(super) fn tempt_operator(&mut self, host: usize, node: usize, header: &MessageHeader) {
        let is_step = matches!(header.kind, Kind::SetView | Kind::Grow | Kind::Flush | Kind::Attach);
        let is_busy = self.hosts[host].client.status().command.is_some();
        if !is_step || !is_busy || self.is_calm || self.faults >= self.profile.faults || !self.rng.percent(25)
        {
            return;
        }
        self.faults += 1;
        let most = self.rng.pick(&[self.profile.network_delay * 4, self.profile.network_delay * 40]);
        let delay = self.rng.range(1, most);
        let is_client = self.profile.client_crashes && self.rng.percent(40);
        self.after(delay, if is_client { Event::Doom(host) } else { Event::Strike { host, node } });
    }

    /// Something befalls the pool while a command is under way.
    pub(super) fn cover_command(&mut self, what: &'static str, host: Option<usize>) {
        if !self.operator.is_there {
            return;
        }
        let live: Vec<_> = match host {
            Some(host) => vec![host],
            None => (0..self.hosts.len()).filter(|&h| self.hosts[h].is_live()).collect(),
        };
        for host in live {
            if let Some(command) = self.hosts[host].client.running_command() {
                self.coverage.hit(situation(command, what));
            }
        }
    }

    /// A client meets a node whose store is not, or no longer, a member.
    pub(super) fn cover_stranger(&mut self, node: usize) {
        let node = &self.nodes[node];
        let is_joining = node.durable.view.number.0 == 0;
        match self.committed_spec.member(node.member) {
            None if !is_joining => self.coverage.hit("a removed store is met by a client"),
            Some(line) if line.store != node.store && !is_joining => {
                self.coverage.hit("a replaced store is met by a client");
            }
            _ => {} // A member, or one that is to be.
        }
    }
}

/// The name of a situation of a command.
fn situation(command: &Command, what: &'static str) -> &'static str {
    let names: [&'static str; 5] = match what {
        "done" => ["add: done", "remove: done", "replace: done", "maintenance: done", "grow: done"],
        "client crashed" => [
            "add: client crashed",
            "remove: client crashed",
            "replace: client crashed",
            "maintenance: client crashed",
            "grow: client crashed",
        ],
        "node crashed" => [
            "add: node crashed",
            "remove: node crashed",
            "replace: node crashed",
            "maintenance: node crashed",
            "grow: node crashed",
        ],
        _ => ["add: leg cut", "remove: leg cut", "replace: leg cut", "maintenance: leg cut", "grow: leg cut"],
    };
    match command {
        Command::Add { .. } => names[0],
        Command::Remove { .. } => names[1],
        Command::Replace { .. } => names[2],
        Command::Maintenance { .. } => names[3],
        Command::Resync { .. } => "resync: done",
        // The operator gives no commands about verifies or addresses here.
        Command::Grow { .. }
        | Command::Readdress { .. }
        | Command::Verify { .. }
        | Command::VerifyStatus
        | Command::VerifyCancel => names[4],
    }
}
