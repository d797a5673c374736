//! The connection of a stale member to the node that it is brought up to date from.

use std::os::fd::RawFd;

use rmr_common::auth::{KeyRing, Nonce, Opener, Step};
use rmr_common::buffer::Segment;
use rmr_common::pool::{Address, ClientId, MemberId, PoolId};
use rmr_common::replica::Event;
use rmr_common::time::Time;
use rmr_common::transport::{Connection, Place, Receiver, Wire};
use rmr_common::wire::{
    HEADER_SIZE, Hello, HelloReply, Kind, MAX_BODY, MessageHeader, PROTOCOL_VERSION, Role, Status,
};
use vmm_sys_util::epoll::EventSet;

use super::member::Member;
use crate::ctl::advice::Advice;

/// See the module's comment.
pub(super) struct SourceLink {
    pub(super) wire: Wire,
    pub(super) descriptor: RawFd,
    pub(super) watched: EventSet,
    opener: Opener,
    is_greeted: bool,
    /// The member that is meant, where it is known, and the address that it was looked for at.
    meant: Meant,
}

impl SourceLink {
    /// Takes over a connection and says hello.
    pub(super) fn new(
        mut wire: Wire,
        pool: PoolId,
        keys: &KeyRing,
        description: String,
        meant: Meant,
    ) -> Result<Self, String> {
        let descriptor = wire.descriptor().ok_or("no descriptor")?;
        let hello = Hello {
            versions: (PROTOCOL_VERSION, PROTOCOL_VERSION),
            capabilities: 0,
            role: Role::Peer,
            client: ClientId::random(),
            pool_name: String::new(),
            description,
            nonce: None,
        };
        let nonce = Nonce::random().map_err(|e| e.to_string())?;
        let opener = Opener::new(keys, nonce, pool, &hello);
        let body = opener.hello().to_vec();
        let mut header = MessageHeader::new(Kind::Hello, pool);
        header.payload = u32::try_from(body.len()).unwrap_or(u32::MAX);
        wire.queue(&header, Some(body));
        Ok(Self { wire, descriptor, watched: EventSet::IN, opener, is_greeted: false, meant })
    }

    /// What its descriptor is to be watched for.
    pub(super) fn interest(&self) -> EventSet {
        if self.wire.wants_to_send() { EventSet::IN | EventSet::OUT } else { EventSet::IN }
    }

    /// Hands what arrived to the member.
    pub(super) fn receive(&mut self, member: &mut Member, now: Time) -> Result<(), String> {
        let (opener, is_greeted, meant) = (&mut self.opener, &mut self.is_greeted, &self.meant);
        let is_remote = self.wire.is_rdma();
        let mut sink = Sink { member, opener, is_greeted, meant, is_remote, proof: None, error: None, now };
        let received = self.wire.receive(&mut sink);
        let (error, proof) = (sink.error.take(), sink.proof.take());
        if let Some((header, body)) = proof {
            self.wire.queue(&header, Some(body));
        }
        received.map_err(|e| e.to_string()).and(error.map_or(Ok(()), Err))
    }
}

/// The other end of a connection to a source, as it is meant.
#[derive(Clone, Debug)]
pub(super) struct Meant {
    pub(super) member: Option<MemberId>,
    pub(super) address: Address,
}

struct Sink<'a> {
    member: &'a mut Member,
    opener: &'a mut Opener,
    is_greeted: &'a mut bool,
    meant: &'a Meant,
    /// The source writes pulled data to its place by itself.
    is_remote: bool,
    /// What the node asked for before it answers the hello.
    proof: Option<(MessageHeader, Vec<u8>)>,
    error: Option<String>,
    now: Time,
}

impl Receiver for Sink<'_> {
    fn place(&mut self, header: &MessageHeader, segments: &mut Vec<Segment>) -> Place {
        let memory = if header.kind == Kind::PullData { self.member.pulls.place(header) } else { None };
        if memory.is_none() {
            self.error = Some(format!("protocol error: {:?} with data for no pull", header.kind));
            return Place::Discard;
        }
        segments.extend(memory);
        Place::Data
    }

    fn longest_body(&self) -> u32 {
        MAX_BODY
    }

    fn deliver(&mut self, header: &MessageHeader, body: &[u8]) {
        if self.error.is_some() {
            // The link is over; what it says now is of no use.
        } else if *self.is_greeted && header.kind == Kind::PullData {
            // Whose it is says the answer behind it.
            self.member.resync_received += (HEADER_SIZE + header.payload as usize) as u64;
        } else if *self.is_greeted {
            self.member.resync_received += (HEADER_SIZE + body.len()) as u64;
            if header.kind == Kind::PullReply {
                match self.member.pulls.answered(header, body, self.is_remote) {
                    Ok(data) if self.is_remote => self.member.resync_received += data as u64,
                    Ok(_) => {}
                    Err(error) => {
                        self.error = Some(format!("protocol error: {error}"));
                        return;
                    }
                }
            }
            self.member.replica.apply(Event::PeerMessage(header, body), self.now);
        } else if matches!(header.kind, Kind::Challenge | Kind::HelloReply) && header.status == Status::Ok {
            match self.opener.take(header, body) {
                Ok(Step::Prove(proof)) => {
                    let payload = u32::try_from(proof.len()).unwrap_or(u32::MAX);
                    let header = MessageHeader { payload, ..MessageHeader::new(Kind::Proof, header.pool) };
                    self.proof = Some((header, proof));
                }
                Ok(Step::Welcome(reply)) => {
                    if let Err(error) = check_source(self.meant, self.member, reply) {
                        self.error = Some(error);
                        return;
                    }
                    *self.is_greeted = true;
                    self.member.replica.apply(Event::PeerUp, self.now);
                }
                Err(error) => self.error = Some(format!("the source: {error}")),
            }
        } else {
            let text = String::from_utf8_lossy(body);
            self.error = Some(format!(
                "the source refuses: {}{}{text}",
                header.status,
                if text.is_empty() { "" } else { ": " }
            ));
        }
    }
}

/// Whether the node has the member that is meant. Another one, or the very store that asks, would have nothing to give. The store
/// of the source is no criterion: this member may have been away when it was replaced.
fn check_source(meant: &Meant, own: &Member, reply: &[u8]) -> Result<(), String> {
    let found = HelloReply::decode(reply).map_err(|error| format!("protocol error: {error}"))?;
    let is_own = found.store() == own.store.superblock().store;
    if !is_own && meant.member.is_none_or(|member| member == found.member) {
        return Ok(());
    }
    let who = if is_own { "this very store".to_owned() } else { format!("member {}", found.member) };
    let wanted =
        meant.member.map_or_else(|| "another member".to_owned(), |member| format!("member {member}"));
    Err(format!(
        "wrong address: the node at {} has {who}, not {wanted}; if nodes have moved, tell the pool: {}",
        meant.address,
        Advice::addresses_of(&own.replica.spec().name)
    ))
}
