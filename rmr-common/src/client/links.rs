//! Connections: which node has which store, whose store is which member, and what the nodes say of the pool.
//!
//! What counts is the store, never the index of a member: the store of a member that was replaced, or of one that was
//! removed, may still be shown by its node, and is nobody's leg.

use super::{Client, LinkId, LinkState, MAX_LINKS, Notice, Output, OverReason, Payload, PoolSelector, State};
use crate::auth::{Nonce, Opener, Step};
use crate::pool::{Address, Cause, Epoch, MemberId, MemberSet, PoolId, PoolSpec, StoreId, View};
use crate::time::Time;
use crate::wire::{Hello, HelloReply, Kind, MessageHeader, PROTOCOL_VERSION, Role, Status};

/// Never by itself.
const NEVER: Time = Time(u64::MAX);

impl super::Link {
    /// Whether it is not tried any more, at least until something changes.
    pub(super) fn is_idle(&self) -> bool {
        self.retired || matches!(self.state, LinkState::Down { retry_at } if retry_at == NEVER)
    }
}

impl Client {
    /// Opens a link. When all are in use, one is taken that leads to nobody who is known as a member.
    pub(super) fn add_link(&mut self, address: Address) -> Option<LinkId> {
        let link = super::Link {
            address: address.clone(),
            member: None,
            store: None,
            state: LinkState::Connecting,
            greeted: self.now,
            again: false,
            last_sent: self.now,
            ping_since: None,
            last_error: "not connected yet".into(),
            asked: false,
            contested_since: None,
            denied: false,
            retired: false,
        };
        let is_of_member = |a: &Address| self.spec.iter().flat_map(|s| &s.members).any(|m| m.address == *a);
        let is_idle = |l: &super::Link| matches!(l.state, LinkState::Down { .. });
        let index = if let Some(index) = self.links.iter().position(|l| l.retired) {
            self.links[index] = link;
            index
        } else if self.links.len() < MAX_LINKS {
            self.links.push(link);
            self.links.len() - 1
        } else {
            let index = self.links.iter().position(|l| is_idle(l) && !is_of_member(&l.address))?;
            self.links[index] = link;
            index
        };
        let id = LinkId(u8::try_from(index).ok()?);
        for leg in self.legs.iter_mut().filter(|leg| **leg == Some(id)) {
            *leg = None;
        }
        self.outputs.push_back(Output::Connect(id, address));
        Some(id)
    }

    pub(super) fn link(&self, id: LinkId) -> Option<&super::Link> {
        self.links.get(usize::from(id.0))
    }

    pub(super) fn link_mut(&mut self, id: LinkId) -> Option<&mut super::Link> {
        self.links.get_mut(usize::from(id.0))
    }

    /// The hello answer of a member whose link is ready.
    pub(super) fn ready(&self, member: MemberId) -> Option<&HelloReply> {
        self.hello_of(self.legs[member.index()]?)
    }

    /// What the node at the other end of a link that is ready said.
    pub(super) fn hello_of(&self, id: LinkId) -> Option<&HelloReply> {
        if let LinkState::Ready(reply) = &self.link(id)?.state { Some(reply) } else { None }
    }

    /// The members whose links are ready.
    pub(super) fn ready_members(&self) -> MemberSet {
        MemberId::all().filter(|&m| self.ready(m).is_some()).collect()
    }

    /// What every node that is connected said, whatever it has.
    pub(super) fn hellos(&self) -> impl Iterator<Item = &HelloReply> {
        self.links.iter().filter_map(|l| if let LinkState::Ready(r) = &l.state { Some(&**r) } else { None })
    }

    pub(super) fn header(&self, kind: Kind) -> MessageHeader {
        let pool = self.spec.as_ref().map_or(PoolId::from_bytes([0; 16]), |s| s.id);
        MessageHeader {
            epoch: self.epoch,
            view: self.view.as_ref().map_or(crate::pool::ViewNumber(0), |v| v.number),
            watermark: self.parts.watermark(self.sequence),
            ..MessageHeader::new(kind, pool)
        }
    }

    pub(super) fn send(&mut self, member: MemberId, header: MessageHeader, payload: Payload) {
        let Some(id) = self.legs[member.index()] else { return };
        let now = self.now;
        if let Some(link) = self.link_mut(id) {
            link.last_sent = now;
            self.outputs.push_back(Output::Send(id, header, payload));
        }
    }

    pub(super) fn send_body(&mut self, member: MemberId, mut header: MessageHeader, body: Vec<u8>) {
        header.payload = u32::try_from(body.len()).unwrap_or(u32::MAX);
        self.send(member, header, Payload::Body(body));
    }

    pub(super) fn link_up(&mut self, id: LinkId, nonce: Nonce) {
        let (now, config) = (self.now, &self.config);
        let (pool, pool_name) = match (&self.spec, &self.selector) {
            // Not by the id that another node gave for the name: this node may know a second pool of that name.
            (_, PoolSelector::Name(name)) if self.goes_by_name() => {
                (PoolId::from_bytes([0; 16]), name.clone())
            }
            (Some(spec), _) => (spec.id, String::new()),
            (None, PoolSelector::Id(id)) => (*id, String::new()),
            (None, PoolSelector::Name(name)) => (PoolId::from_bytes([0; 16]), name.clone()),
        };
        let hello = Hello {
            versions: (PROTOCOL_VERSION, PROTOCOL_VERSION),
            capabilities: 0,
            role: Role::Client,
            client: config.client,
            pool_name,
            description: config.description.clone(),
            nonce: None,
        };
        let opener = Box::new(Opener::new(&config.keys, nonce, pool, &hello));
        let body = opener.hello().to_vec();
        let Some(link) = self.link_mut(id) else { return };
        link.state = LinkState::Greeting { since: now, opener };
        link.last_sent = now;
        link.ping_since = None;
        let mut header = MessageHeader::new(Kind::Hello, pool);
        header.payload = u32::try_from(body.len()).unwrap_or(u32::MAX);
        self.outputs.push_back(Output::Send(id, header, Payload::Body(body)));
    }

    /// Whether the name is all that says which pool is meant: the client was given no id, and has never been attached.
    pub(super) fn goes_by_name(&self) -> bool {
        let is_first = matches!(self.state, State::Gathering { .. }) && self.own_epochs.is_empty();
        is_first && matches!(self.selector, PoolSelector::Name(_))
    }

    /// Why a node that means another pool than the others ends the client.
    fn conflict(&self, known: &PoolSpec, address: &Address, other: &PoolSpec) -> String {
        if known.id == other.id || known.name != other.name {
            return format!("{known} on one node, {other} on {address}");
        }
        let is_known = |l: &&super::Link| matches!(&l.state, LinkState::Ready(r) if r.spec.id == known.id);
        let holders: Vec<_> = self.links.iter().filter(is_known).map(|l| l.address.to_string()).collect();
        format!(
            "'{}' names several pools, use the uuid: {} on {}, {} on {address}",
            known.name,
            known.id,
            holders.join(", "),
            other.id
        )
    }

    /// A connection is gone. The member, if it had requests or is part of the view, is lost with it.
    pub(super) fn link_down(&mut self, id: LinkId, reason: &str) {
        let retry_at = self.now + self.config.reconnect_interval;
        let Some(link) = self.link_mut(id) else { return };
        let was_ready = matches!(link.state, LinkState::Ready(_));
        let repeated = !was_ready && link.last_error == reason;
        link.again = false;
        link.state = LinkState::Down { retry_at };
        link.asked = true;
        reason.clone_into(&mut link.last_error);
        let (member, store, address) = (link.member, link.store, link.address.clone());
        if !repeated {
            self.notice(Notice::LinkLost(member, address, reason.to_owned()));
        }
        // Another address of the same node may be of use now.
        for other in self.links.iter_mut().filter(|l| was_ready && !l.retired && l.store == store) {
            if matches!(other.state, LinkState::Down { retry_at } if retry_at == NEVER) {
                other.state = LinkState::Down { retry_at };
            }
        }
        if let Some(member) = member.filter(|&m| was_ready && self.legs[m.index()] == Some(id)) {
            self.lose(MemberSet::only(member), reason);
        }
        self.connect_members();
        // It may have been the last one whose answer was waited for.
        self.try_attach();
    }

    /// Closes a link for a reason found here, and treats it as lost.
    pub(super) fn drop_link(&mut self, id: LinkId, reason: &str) {
        self.outputs.push_back(Output::Disconnect(id));
        self.link_down(id, reason);
    }

    pub(super) fn drop_member(&mut self, member: MemberId, reason: &str) {
        if let Some(id) = self.legs[member.index()] {
            self.drop_link(id, reason);
        }
    }

    /// What a node says before it is greeted: that it asks for a proof of the key, or the end of the greeting.
    pub(super) fn greeting_message(&mut self, id: LinkId, header: &MessageHeader, body: &[u8]) {
        let Some(link) = self.link_mut(id) else { return };
        let address = link.address.clone();
        if header.status != Status::Ok {
            self.hello_refused(id, address, header.status, &String::from_utf8_lossy(body));
            return;
        }
        let LinkState::Greeting { opener, .. } = &mut link.state else { return };
        match opener.take(header, body) {
            Ok(Step::Welcome(reply)) => self.hello_reply(id, address, reply),
            Ok(Step::Prove(proof)) => {
                let payload = u32::try_from(proof.len()).unwrap_or(u32::MAX);
                let proves = MessageHeader { payload, ..MessageHeader::new(Kind::Proof, header.pool) };
                self.outputs.push_back(Output::Send(id, proves, Payload::Body(proof)));
            }
            Err(error) => self.denied(id, address, &error.to_string()),
        }
    }

    fn hello_reply(&mut self, id: LinkId, address: Address, body: &[u8]) {
        let reply = match HelloReply::decode(body) {
            Ok(reply) => reply,
            Err(error) => return self.drop_link(id, &format!("protocol error: {error}")),
        };
        if let Some(known) = &self.spec
            && !known.is_same_pool(&reply.spec)
        {
            let text = self.conflict(known, &address, &reply.spec);
            return self.end(OverReason::Conflict(text));
        }
        let (member, store) = (reply.member, reply.store());
        let epoch = reply.epoch.max(reply.view.epoch);
        // A store that an operator wants to add may be of a branch of its own, and is refused for that.
        let is_member = self.spec.iter().flat_map(|s| &s.members).any(|m| m.store == store);
        if is_member || matches!(self.state, State::Gathering { .. }) {
            self.highest_epoch = self.highest_epoch.max(epoch);
        }
        if let Some(link) = self.link_mut(id) {
            link.store = Some(store);
        }
        if self.is_duplicate(id, &reply) {
            return;
        }
        if !self.displaces(id, store) {
            // A second address of a node that is connected already, or one that is not for a leg.
            self.set_aside(id);
            let is_judged = is_member && !matches!(self.state, State::Gathering { .. });
            if !(is_judged && self.gives_way(epoch)) {
                self.try_attach();
            }
            return;
        }
        let (now, mut is_news) = (self.now, true);
        if let Some(link) = self.link_mut(id) {
            is_news = !std::mem::take(&mut link.again);
            link.last_error.clear();
            link.asked = true;
            link.greeted = now;
            link.state = LinkState::Ready(Box::new(reply));
        }
        if matches!(self.state, State::Gathering { .. }) {
            self.learn_spec();
            if is_news {
                self.notice(Notice::LegUp(member, address));
            }
            self.connect_members();
            return self.try_attach();
        }
        let spec = self.spec.clone();
        if spec.is_some_and(|s| s.member(member).is_some_and(|m| m.store == store)) {
            if self.gives_way(epoch) {
                return;
            }
            self.assign_legs();
            self.notice(Notice::LegUp(member, address));
        } else if !self.command_met(id) {
            self.dismiss(id);
        }
    }

    /// Whether a link may be the leg of the member whose store it leads to: data goes the way that the member's address says,
    /// and no other. Until the client attaches, what a node says counts whichever way it was asked.
    pub(super) fn suits(&self, link: &super::Link) -> bool {
        let mut members = self.spec.iter().flat_map(|s| &s.members);
        let Some(line) = members.find(|m| Some(m.store) == link.store) else { return true };
        // The operator's decision goes by whatever there is.
        let is_forced = self.forced().is_some_and(|force| force.member == line.id);
        if self.is_contested(line.store) && line.address != link.address {
            return false;
        }
        is_forced || line.address.transport() == link.address.transport() || mutant!(AnyBinding)
    }

    /// Whether a link whose node has said hello is to be used: the first one to a store, or one that suits where the other
    /// does not, which is then given up.
    fn displaces(&mut self, id: LinkId, store: StoreId) -> bool {
        let is_there =
            |l: &super::Link| l.store == Some(store) && matches!(l.state, LinkState::Ready(_)) && !l.retired;
        let other = self.links.iter().position(is_there).and_then(|i| u8::try_from(i).ok()).map(LinkId);
        let suits = |id| self.link(id).is_some_and(|link| self.suits(link));
        match other {
            None => suits(id) || matches!(self.state, State::Gathering { .. }),
            Some(other) if suits(id) && !suits(other) && !self.legs.contains(&Some(other)) => {
                self.set_aside(other);
                true
            }
            // The one that the specification names comes first, as long as none is in use.
            Some(other)
                if matches!(self.state, State::Gathering { .. })
                    && suits(id)
                    && self.is_home(id)
                    && !self.is_home(other) =>
            {
                self.set_aside(other);
                true
            }
            Some(_) => false,
        }
    }

    /// Whether a link goes to the address that the specification has for the store at its other end.
    fn is_home(&self, id: LinkId) -> bool {
        let Some(link) = self.link(id) else { return false };
        let members = self.spec.iter().flat_map(|s| &s.members);
        members.into_iter().any(|m| Some(m.store) == link.store && m.address == link.address)
    }

    /// Whether two nodes showed this store a moment ago, so that none but the one that the specification names may be it.
    fn is_contested(&self, store: StoreId) -> bool {
        let lately = self.config.leg_timeout * 2;
        self.contested.is_some_and(|(s, since)| s == store && self.now - since <= lately)
    }

    /// Whether some leg does not go to the address that the specification has for its member.
    pub(super) fn has_leg_away(&self) -> bool {
        self.ready_members().iter().any(|m| self.legs[m.index()].is_some_and(|id| !self.is_home(id)))
    }

    /// Whether another node shows the same store, and this link is not to be used for that: then one is a copy of the other. The one
    /// at the address that the specification has is used, or the one that is in use already; else neither is, and no chance decides.
    ///
    /// A node that was started again has another run of its process as well, and an older link to it may not be known to be gone. So
    /// the older link is asked again first; one that is in use shows by its pings that it is alive.
    fn is_duplicate(&mut self, id: LinkId, reply: &HelloReply) -> bool {
        let (store, process) = (reply.store(), reply.process_boot);
        let shows_it = |l: &super::Link| match &l.state {
            LinkState::Ready(other) => other.store() == store && other.process_boot != process,
            _ => false,
        };
        let found = self.links.iter().zip(0u8..).map(|(l, i)| (l, LinkId(i)));
        let other = found.filter(|(l, i)| *i != id && !l.retired && shows_it(l)).map(|(_, i)| i).next();
        let Some(other) = other else {
            self.links[usize::from(id.0)].contested_since = None;
            return false;
        };
        let (now, timeout) = (self.now, self.config.leg_timeout);
        let is_leg = self.legs.contains(&Some(other)) && !matches!(self.state, State::Gathering { .. });
        let since = *self.links[usize::from(id.0)].contested_since.get_or_insert(now);
        if is_leg && now - since <= timeout {
            self.drop_link(id, "another node shows its store, and is in use");
            return true;
        }
        if !is_leg && since == now {
            let again = &mut self.links[usize::from(other.0)];
            again.contested_since = Some(now);
            self.drop_link(other, "asked again: another node shows its store");
            self.links[usize::from(other.0)].asked = false;
            return false;
        }
        let (Some(here), Some(there)) = (self.link(id), self.link(other)) else { return false };
        let (here, there) = (here.address.clone(), there.address.clone());
        let used = if is_leg || self.is_home(other) {
            Some(there.clone())
        } else {
            self.is_home(id).then(|| here.clone())
        };
        let is_used = used.as_ref() == Some(&here);
        self.contested = Some((store, now));
        let pair = if here.to_string() < there.to_string() { (here, there) } else { (there, here) };
        if self.told_duplicate != Some((store, pair.0.clone(), pair.1.clone())) {
            self.told_duplicate = Some((store, pair.0.clone(), pair.1.clone()));
            self.notice(Notice::Duplicate(store, used.clone(), pair.0, pair.1));
        }
        let reason = format!("two nodes show store {store}, and only one can be the member's");
        if used.is_none() || is_used {
            self.drop_link(other, &reason);
        }
        if !is_used {
            self.drop_link(id, &reason);
        }
        !is_used
    }

    /// Closes a link that is not needed, until the one that is used for its store is lost.
    fn set_aside(&mut self, id: LinkId) {
        self.outputs.push_back(Output::Disconnect(id));
        if let Some(link) = self.link_mut(id) {
            link.state = LinkState::Down { retry_at: NEVER };
        }
    }

    /// Lets go of links that were only of use to find the members.
    pub(super) fn set_strays_aside(&mut self) {
        let is_stray = |id: &LinkId| {
            let is_leg = self.legs.contains(&Some(*id));
            !is_leg && self.hello_of(*id).is_some() && self.link(*id).is_some_and(|link| !self.suits(link))
        };
        let strays: Vec<_> = (0u8..).map(LinkId).take(self.links.len()).filter(is_stray).collect();
        strays.into_iter().for_each(|id| self.set_aside(id));
    }

    /// Ends, or begins anew, if a member's node shows an epoch of a later branch; true if so.
    fn gives_way(&mut self, epoch: Epoch) -> bool {
        if self.is_of_older_branch(epoch) {
            self.end(OverReason::Fenced(epoch));
            return true;
        }
        let is_attaching = self.own_epochs.is_empty() && self.forced().is_none();
        let gives_way = is_attaching && self.epoch.is_of_older_branch(epoch) && !mutant!(OlderBranchLives);
        if gives_way {
            self.gather();
        }
        gives_way
    }

    /// Whether a node that shows this epoch knows of a branch that was forced into use after this client attached.
    pub(super) fn is_of_older_branch(&self, known: Epoch) -> bool {
        let own = self.own_epochs.first();
        own.is_some_and(|own| own.is_of_older_branch(known)) && !mutant!(OlderBranchLives)
    }

    fn hello_refused(&mut self, id: LinkId, address: Address, status: Status, text: &str) {
        if status == Status::NoSuchPool {
            // Other nodes may know it; it is over only when every one has said no.
            if self.is_denied_by_all(id) {
                let text = if text.is_empty() { String::new() } else { format!(": {text}") };
                self.end(OverReason::NoSuchPool { address, pool: self.selector.to_string(), text });
            } else {
                self.drop_link(id, "the node has no such pool");
            }
        } else if matches!(status, Status::KeyRequired | Status::KeyRefused | Status::NoKey) {
            self.denied(id, address, text);
        } else if status == Status::Version {
            self.end(OverReason::Refused { address, text: text.to_owned() });
        } else {
            self.drop_link(id, &format!("refused: {text}"));
        }
    }

    /// The node and this client do not agree about the key. That of a running pool may be about to be changed on the nodes, one
    /// after the other; before anything is known of the pool, it is over when no node agrees.
    fn denied(&mut self, id: LinkId, address: Address, text: &str) {
        if self.is_denied_by_all(id) {
            self.end(OverReason::Refused { address, text: text.to_owned() });
        } else {
            self.drop_link(id, text);
        }
    }

    /// One more node has said no; whether all have, and the pool is not known.
    fn is_denied_by_all(&mut self, id: LinkId) -> bool {
        if let Some(link) = self.link_mut(id) {
            link.denied = true;
        }
        self.spec.is_none() && self.links.iter().all(|l| l.denied)
    }

    /// Takes over the specification that goes with the highest view seen so far. Before an attach it says where members are
    /// looked for, and no more: the attach goes by what members say then.
    fn learn_spec(&mut self) {
        let best = self.hellos().max_by_key(|r| r.view.order());
        let Some((order, spec)) = best.map(|r| (r.view.order(), r.spec.clone())) else { return };
        if self.spec_order.is_none_or(|known| order >= known) {
            self.adopt_spec(spec, Some(order));
        }
        self.assign_legs();
    }

    /// The pool is as this says from now on.
    pub(super) fn adopt_spec(&mut self, spec: PoolSpec, order: Option<(Epoch, crate::pool::ViewNumber)>) {
        self.unflushed.resize(spec.block_count());
        self.flushing.resize(spec.block_count());
        self.spec = Some(spec);
        self.spec_order = order;
    }

    /// The leg of each member is the link to its store.
    pub(super) fn assign_legs(&mut self) {
        let Some(spec) = &self.spec else { return };
        let mut legs = [None; crate::pool::MAX_MEMBERS];
        let mut found: Vec<(MemberId, usize)> = Vec::with_capacity(spec.members.len());
        for member in &spec.members {
            let is_its = |l: &super::Link| l.store == Some(member.store) && !l.retired;
            let is_ready = |l: &super::Link| matches!(l.state, LinkState::Ready(_));
            // An address that was changed while the member is in use counts from its next connection on.
            let leg = self.legs[member.id.index()].map(|id| usize::from(id.0));
            let leg = leg.filter(|_| !matches!(self.state, State::Gathering { .. }));
            let leg = leg.filter(|i| self.links.get(*i).is_some_and(|l| is_its(l) && is_ready(l)));
            let suits = |l: &super::Link| is_its(l) && self.suits(l);
            let ready = || self.links.iter().position(|l| suits(l) && is_ready(l));
            let index = leg.or_else(ready).or_else(|| self.links.iter().position(suits));
            found.extend(index.map(|index| (member.id, index)));
        }
        for link in &mut self.links {
            link.member = None;
        }
        for (member, index) in found {
            legs[member.index()] = u8::try_from(index).ok().map(LinkId);
            self.links[index].member = Some(member);
            if let LinkState::Ready(reply) = &self.links[index].state {
                if reply.write_through {
                    self.write_through.insert(member);
                } else {
                    self.write_through.remove(member);
                }
            }
        }
        self.legs = legs;
    }

    /// Opens a link to every member of the specification that no link leads to.
    pub(super) fn connect_members(&mut self) {
        if matches!(self.state, State::Over(_)) {
            return;
        }
        let members = self.spec.as_ref().map(|s| s.members.clone()).unwrap_or_default();
        for member in members {
            let leads_there = |(l, id): (&super::Link, u8)| {
                let is_up = !matches!(l.state, LinkState::Down { .. });
                let is_its =
                    l.store == Some(member.store) && (self.suits(l) || self.legs.contains(&Some(LinkId(id))));
                // Before an attach every member is looked for where it should be: what is found elsewhere may be a copy.
                let is_enough = !matches!(self.state, State::Gathering { .. });
                !l.retired && (l.address == member.address || is_enough && is_up && is_its)
            };
            if !self.links.iter().zip(0u8..).any(leads_there) {
                self.add_link(member.address);
                continue;
            }
            // One that was set aside for another link to the store is of use again when that is not, as the specification is now.
            let is_usable = |l: &super::Link| !l.is_idle() && l.store == Some(member.store) && self.suits(l);
            let is_left = |l: &super::Link| !l.retired && l.is_idle() && l.address == member.address;
            if !self.links.iter().any(is_usable)
                && let Some(index) = self.links.iter().position(is_left)
            {
                self.links[index].state = LinkState::Down { retry_at: self.now };
            }
        }
    }

    /// Lets go of every node whose store is no member: it was removed or replaced. Its address is tried again if a member
    /// is expected there.
    pub(super) fn dismiss_strangers(&mut self) {
        let Some(spec) = &self.spec else { return };
        let is_member = |s: StoreId| spec.members.iter().any(|m| m.store == s);
        let is_stranger = |l: &super::Link| !l.retired && l.store.is_some_and(|s| !is_member(s));
        let strangers = self.links.iter().zip(0u8..).filter(|(l, _)| is_stranger(l)).map(|(_, i)| LinkId(i));
        let strangers: Vec<_> = strangers.filter(|id| !self.is_met(*id)).collect();
        strangers.into_iter().for_each(|id| self.dismiss(id));
    }

    /// Lets go of a node whose store is no member.
    pub(super) fn dismiss(&mut self, id: LinkId) {
        let retry_at = self.now + self.config.reconnect_interval;
        let Some(link) = self.links.get_mut(usize::from(id.0)) else { return };
        if !matches!(link.state, LinkState::Down { .. }) {
            self.outputs.push_back(Output::Disconnect(id));
        }
        link.member = None;
        link.store = None;
        "its store is not a member of the pool".clone_into(&mut link.last_error);
        let is_expected = self.spec.iter().flat_map(|s| &s.members).any(|m| m.address == link.address);
        link.retired = !is_expected;
        link.state = LinkState::Down { retry_at: if is_expected { retry_at } else { NEVER } };
    }

    /// A member was asked for its view or took one: what it said in its hello is of the past.
    pub(super) fn note_view(&mut self, member: MemberId, view: &View, spec: &PoolSpec) {
        if let Some(id) = self.legs[member.index()]
            && let Some(link) = self.link_mut(id)
            && let LinkState::Ready(reply) = &mut link.state
        {
            reply.view = view.clone();
            reply.spec = spec.clone();
        }
    }

    pub(super) fn note_epoch(&mut self, member: MemberId, epoch: Epoch) {
        if let Some(id) = self.legs[member.index()]
            && let Some(link) = self.link_mut(id)
            && let LinkState::Ready(reply) = &mut link.state
        {
            reply.epoch = reply.epoch.max(epoch);
        }
    }

    pub(super) fn tick_links(&mut self) {
        for i in 0..self.links.len() {
            let id = LinkId(u8::try_from(i).unwrap_or(u8::MAX));
            let link = &mut self.links[i];
            match &link.state {
                LinkState::Down { retry_at } if *retry_at <= self.now => {
                    link.state = LinkState::Connecting;
                    let address = link.address.clone();
                    self.outputs.push_back(Output::Connect(id, address));
                }
                LinkState::Greeting { since, .. } if self.now - *since > self.config.leg_timeout => {
                    self.drop_link(id, "the hello was not answered in time");
                }
                LinkState::Ready(_) => {
                    if link.ping_since.is_some_and(|since| self.now - since > self.config.leg_timeout) {
                        if let Some(member) = link.member {
                            self.health.blame(member, Cause::Silent);
                        }
                        self.drop_link(id, "no answer within the leg timeout");
                    } else if link.ping_since.is_none()
                        && self.now - link.last_sent >= self.config.ping_interval
                    {
                        link.ping_since = Some(self.now);
                        link.last_sent = self.now;
                        let header = self.header(Kind::Ping);
                        self.outputs.push_back(Output::Send(id, header, Payload::None));
                    }
                }
                // Connecting is bounded by the driver's connect; the others are not due.
                LinkState::Down { .. } | LinkState::Connecting | LinkState::Greeting { .. } => {}
            }
        }
    }
}
