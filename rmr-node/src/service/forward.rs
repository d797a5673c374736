//! Gives a command to another node of a pool, which passes it to the client that is attached there. Runs on a thread that may
//! wait; the connection is the usual one between nodes.

use std::io;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use rmr_common::auth::{KeyRing, Nonce, Opener, Step};
use rmr_common::buffer::Segment;
use rmr_common::pool::{Address, ClientId, Command, CommandReply, PoolId, Sequence};
use rmr_common::transport::connect::Connector;
use rmr_common::transport::rdma::Fabric;
use rmr_common::transport::tls::ClientTls;
use rmr_common::transport::{Connection, Place, Receiver, Wire};
use rmr_common::wire::{Hello, Kind, MessageHeader, PROTOCOL_VERSION, Role, Status};
use rmr_common::words;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// A node closes connections that say nothing for long.
const PING_INTERVAL: Duration = Duration::from_secs(1);
/// The sequence of the one command on the connection.
const SEQUENCE: Sequence = Sequence(1);

/// Where a command goes, and how long that may take.
pub(super) struct Forward<'a> {
    pub(super) address: &'a Address,
    pub(super) pool: PoolId,
    pub(super) role: Role,
    pub(super) description: String,
    pub(super) connect_timeout: Duration,
    pub(super) answer_timeout: Duration,
    pub(super) fabric: &'a Fabric,
    /// The pool's keys.
    pub(super) keys: KeyRing,
    /// How a `tls://` address is reached.
    pub(super) tls: Option<ClientTls>,
    /// It goes to `tls://` addresses in any case.
    pub(super) tls_only: bool,
}

/// What became of it.
pub(super) enum Forwarded {
    /// The node answered.
    Answered(CommandReply),
    /// The node never got it.
    NotSent(String),
    /// The node may have got it, and did not answer.
    Lost(String),
}

impl Forward<'_> {
    /// Sends the command and waits for the answer.
    pub(super) fn run(&self, command: &Command) -> Forwarded {
        let Ok(body) = serde_json::to_vec(command) else {
            return Forwarded::NotSent("the command has no JSON form".to_owned());
        };
        let mut talk = match self.connect() {
            Ok(talk) => talk,
            Err(error) => return Forwarded::NotSent(error),
        };
        match talk.until(Instant::now() + self.connect_timeout, |state| state.is_greeted) {
            Ok(true) => {}
            Ok(false) => return Forwarded::NotSent("it does not answer a hello in time".to_owned()),
            Err(error) => return Forwarded::NotSent(error),
        }
        let header = MessageHeader { sequence: SEQUENCE, ..talk.header(Kind::Command, &body) };
        talk.wire.queue(&header, Some(body));
        match talk.until(Instant::now() + self.answer_timeout, |state| state.reply.is_some()) {
            Ok(_) => match talk.state.reply.take() {
                Some(Ok(reply)) => Forwarded::Answered(reply),
                Some(Err(error)) => Forwarded::Lost(error),
                None => Forwarded::Lost(format!("no answer within {}", words::time(self.answer_timeout))),
            },
            Err(error) => Forwarded::Lost(error),
        }
    }

    /// Connects and says hello.
    fn connect(&self) -> Result<Talk, String> {
        let text = |error: io::Error| error.to_string();
        let connector =
            Connector::new(self.connect_timeout, self.tls.clone(), self.fabric.clone()).map_err(text)?;
        let connector = connector.leaving_tls_never(self.tls_only);
        connector.connect(1, self.address);
        let waits = Waits::on(connector.descriptor()).map_err(text)?;
        // A name may have several addresses, each with the time allowed.
        let deadline = Instant::now() + self.connect_timeout * 4;
        let wire = loop {
            if let Some((_, attempt)) = connector.next() {
                break attempt?;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err("it cannot be reached in time".to_owned());
            }
            waits.wait(EventSet::IN, left).map_err(text)?;
        };
        let waits = Waits::on(wire.descriptor().ok_or("no descriptor")?).map_err(text)?;
        let hello = Hello {
            versions: (PROTOCOL_VERSION, PROTOCOL_VERSION),
            capabilities: 0,
            role: self.role,
            client: ClientId::random(),
            pool_name: String::new(),
            description: self.description.clone(),
            nonce: None,
        };
        let nonce = Nonce::random().map_err(|e| e.to_string())?;
        let opener = Opener::new(&self.keys, nonce, self.pool, &hello);
        let body = opener.hello().to_vec();
        let mut talk = Talk { wire, waits, pool: self.pool, state: State::new(opener) };
        let header = talk.header(Kind::Hello, &body);
        talk.wire.queue(&header, Some(body));
        Ok(talk)
    }
}

/// A connection with what has arrived on it.
struct Talk {
    wire: Wire,
    waits: Waits,
    pool: PoolId,
    state: State,
}

struct State {
    opener: Opener,
    /// What the node asked for before it answers the hello.
    proof: Option<Vec<u8>>,
    is_greeted: bool,
    error: Option<String>,
    reply: Option<Result<CommandReply, String>>,
}

impl State {
    const fn new(opener: Opener) -> Self {
        Self { opener, proof: None, is_greeted: false, error: None, reply: None }
    }
}

impl Talk {
    fn header(&self, kind: Kind, body: &[u8]) -> MessageHeader {
        let payload = u32::try_from(body.len()).unwrap_or(u32::MAX);
        MessageHeader { payload, ..MessageHeader::new(kind, self.pool) }
    }

    /// Sends and receives until `done`; false when the time is over before.
    fn until(&mut self, deadline: Instant, done: impl Fn(&State) -> bool) -> Result<bool, String> {
        let mut next_ping = Instant::now() + PING_INTERVAL;
        loop {
            self.wire.flush().map_err(|e| e.to_string())?;
            self.wire.receive(&mut self.state).map_err(|e| e.to_string())?;
            if let Some(proof) = self.state.proof.take() {
                let header = self.header(Kind::Proof, &proof);
                self.wire.queue(&header, Some(proof));
                continue;
            }
            if done(&self.state) {
                return Ok(true);
            }
            if let Some(error) = self.state.error.take() {
                return Err(error);
            }
            let now = Instant::now();
            if now >= deadline {
                return Ok(false);
            }
            if self.state.is_greeted && now >= next_ping {
                next_ping = now + PING_INTERVAL;
                let ping = self.header(Kind::Ping, &[]);
                self.wire.queue(&ping, None);
                continue;
            }
            let set = if self.wire.wants_to_send() { EventSet::IN | EventSet::OUT } else { EventSet::IN };
            let wait = (deadline - now).min(PING_INTERVAL);
            self.waits.wait(set, wait).map_err(|e| e.to_string())?;
        }
    }
}

impl Receiver for State {
    fn place(&mut self, _header: &MessageHeader, _segments: &mut Vec<Segment>) -> Place {
        Place::Discard
    }

    fn deliver(&mut self, header: &MessageHeader, body: &[u8]) {
        match header.kind {
            Kind::Challenge | Kind::HelloReply if header.status == Status::Ok && !self.is_greeted => {
                match self.opener.take(header, body) {
                    Ok(Step::Prove(proof)) => self.proof = Some(proof),
                    Ok(Step::Welcome(_)) => self.is_greeted = true,
                    Err(error) => self.error = Some(error.to_string()),
                }
            }
            Kind::HelloReply => {
                let text = String::from_utf8_lossy(body);
                self.error = Some(format!(
                    "it refuses: {}{}{text}",
                    header.status,
                    if text.is_empty() { "" } else { ": " }
                ));
            }
            Kind::CommandReply if header.sequence == SEQUENCE => {
                let reply = serde_json::from_slice(body);
                self.reply = Some(reply.map_err(|e| format!("its answer cannot be read: {e}")));
            }
            Kind::Goodbye => self.error = Some("it is stopping".to_owned()),
            // Answers to pings.
            _ => {}
        }
    }
}

/// One descriptor that is waited for.
struct Waits {
    epoll: Epoll,
    descriptor: RawFd,
}

impl Waits {
    fn on(descriptor: RawFd) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        epoll.ctl(ControlOperation::Add, descriptor, EpollEvent::new(EventSet::IN, 0))?;
        Ok(Self { epoll, descriptor })
    }

    fn wait(&self, set: EventSet, at_most: Duration) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Modify, self.descriptor, EpollEvent::new(set, 0))?;
        let millis = i32::try_from(at_most.as_millis()).unwrap_or(i32::MAX).saturating_add(1);
        match self.epoll.wait(millis, &mut [EpollEvent::default()]) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
            _ => Ok(()),
        }
    }
}
