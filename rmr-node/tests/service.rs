//! A real node and its clients over real sockets: well-behaved ones, and peers that break every rule.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use rmr_common::auth::{KeyRing, SecretKey};
use rmr_common::client::{Config, IoError, OverReason, PoolSelector};
use rmr_common::driver::{Pool, PoolError};
use rmr_common::pool::{
    Address, ChunkSize, ClientId, Command as PoolCommand, CommandReply, Epoch, MemberId, MemberSpec, PoolId,
    PoolSpec, Refusal, Sequence, Slot, StoreId, View, ViewNumber,
};
use rmr_common::transport::tls::{ClientTls, IdentityFiles};
use rmr_common::wire::{
    Attach, FRAME_HEADER_SIZE, FrameHeader, HEADER_SIZE, Hello, HelloReply, Kind, MessageHeader, NONCE_SIZE,
    PROOF_SIZE, Proof, Role, Status, frame_crc,
};
use rmr_node::store::{CreateOptions, Store, ZeroPolicy};

const MIB: u32 = 1 << 20;
const POOL_SIZE: u64 = 64 << 20;
/// A process that is forked while a store is made would keep its lock for a moment; so one at a time.
static FORKING: Mutex<()> = Mutex::new(());
/// Longest wait for what comes in any case: only a fault, or a machine that stands still, makes it pass.
const PATIENCE: Duration = Duration::from_secs(60);
/// What is quick, on a machine that may be crowded. What must not be waited for takes longer, if it ends at all.
const QUICK: Duration = Duration::from_secs(10);

/// A node of its own process, with as many pools of one member as asked for, `pool-0` and up.
struct Node {
    child: Child,
    address: SocketAddr,
    pools: Vec<PoolSpec>,
    log: PathBuf,
    _dir: tempfile::TempDir,
}

impl Node {
    fn start(pools: usize, flags: &[&str]) -> Self {
        Self::start_with("", pools, flags)
    }

    /// Starts it from a shell that runs `before` first.
    fn start_with(before: &str, pools: usize, flags: &[&str]) -> Self {
        let forking = FORKING.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = tempfile::tempdir().expect("a directory");
        let address = own_address();
        let pools: Vec<PoolSpec> = (0..pools).map(|i| create_pool(&dir, i, address)).collect();
        let log = dir.path().join("log");
        let file = std::fs::File::create(&log).expect("a log file");
        let listen = address.to_string();
        let child = Command::new("sh")
            .args(["-c", &format!("{before} exec \"$@\""), "sh", env!("CARGO_BIN_EXE_rmr-node")])
            .args(["--listen", &listen, "--admin", "127.0.0.1:0", "--store-dir"])
            .arg(dir.path())
            .args(flags)
            .env_remove("RMR_LOG")
            .stderr(file)
            .stdout(Stdio::null())
            .spawn()
            .expect("the node starts");
        drop(forking);
        let node = Self { child, address, pools, log, _dir: dir };
        wait_for("the node serves", || node.log().contains("serving"));
        node
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Where it serves its pools.
    fn data_address(&self) -> Address {
        Address::tcp(self.address.ip().to_string(), self.address.port())
    }

    /// A client that gives nobody up because the machine is crowded.
    fn config(name: &str) -> Config {
        let mut config = Config::new(ClientId::random(), name);
        config.leg_timeout = PATIENCE;
        config
    }

    /// Attaches a well-behaved client.
    fn attach(&self, pool: usize) -> Result<Pool, PoolError> {
        let selector = PoolSelector::Id(self.pools[pool].id);
        Pool::connect(Self::config("a client"), selector, &[self.data_address()], PATIENCE)
    }

    /// Milliseconds of processor time so far.
    fn cpu_ms(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).expect("it runs");
        let fields: Vec<&str> = stat.rsplit(')').next().expect("its name").split_whitespace().collect();
        let ticks = |i: usize| fields[i].parse::<u64>().expect("a number");
        (ticks(11) + ticks(12)) * 10
    }

    fn resident_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("it runs");
        let line = status.lines().find(|l| l.starts_with("VmRSS")).expect("it has memory");
        line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number")
    }

    /// Waits until the node uses at most so many percent of one processor for as long as `time`. It may have work left from
    /// before; one that spins, or is woken again and again, never comes to rest.
    fn comes_to_rest(&self, percent: u64, time: Duration, what: &str) {
        let mut loads = Vec::new();
        while loads.last().is_none_or(|load| *load > percent) {
            assert!(loads.len() < 20, "{what}: {loads:?} percent of a processor, each for {time:?}");
            let before = self.cpu_ms();
            std::thread::sleep(time);
            loads.push((self.cpu_ms() - before) * 100 / u64::try_from(time.as_millis()).expect("short"));
        }
    }

    /// Asks it to stop, and returns how long that took.
    fn stop(&mut self) -> Duration {
        let start = Instant::now();
        self.terminate();
        loop {
            if let Some(status) = self.child.try_wait().expect("it is ours") {
                assert!(status.success(), "{status}:\n{}", self.log());
                return start.elapsed();
            }
            assert!(start.elapsed() < PATIENCE, "it does not stop:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn terminate(&self) {
        let _forking = FORKING.lock().unwrap_or_else(PoisonError::into_inner);
        let kill = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status();
        assert!(kill.expect("kill runs").success());
    }

    fn assert_running(&mut self) {
        assert!(self.child.try_wait().expect("it is ours").is_none(), "the node ended:\n{}", self.log());
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An address that nobody else has: the host of this process, and a port that was not given before. A port of 127.0.0.1 that
/// is free now may be that of somebody's outgoing connection in a moment.
fn own_address() -> SocketAddr {
    static NEXT_PORT: AtomicU16 = AtomicU16::new(7700);
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    let host = Ipv4Addr::new(127, 64 | high, middle, low);
    SocketAddr::from((host, NEXT_PORT.fetch_add(1, Ordering::Relaxed)))
}

fn create_pool(dir: &tempfile::TempDir, index: usize, address: SocketAddr) -> PoolSpec {
    let (member, store) = (MemberId::all().next().expect("there are members"), StoreId::random());
    let spec = PoolSpec {
        id: PoolId::random(),
        name: format!("pool-{index}"),
        size: POOL_SIZE,
        chunk_size: ChunkSize::default(),
        logical_block_size: 512,
        members: vec![MemberSpec::new(member, store, Address::tcp(address.ip().to_string(), address.port()))],
    };
    let options = CreateOptions {
        spec: spec.clone(),
        member,
        store,
        view: View::initial([(member, store)]),
        overwrite: false,
        zero: ZeroPolicy::Zero,
        max_size: None,
    };
    let path = dir.path().join(format!("pool-{index}.store"));
    Store::create(&path, &options, &mut |_, _| {}).expect("the store is created");
    spec
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A peer that is written out by hand.
struct Raw {
    stream: TcpStream,
    pool: PoolId,
    epoch: Epoch,
    view: ViewNumber,
    table: Vec<MessageHeader>,
}

impl Raw {
    fn connect(node: &Node, pool: usize) -> Self {
        let stream = TcpStream::connect(node.address).expect("it listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream.set_write_timeout(Some(PATIENCE)).expect("a timeout");
        let pool = node.pools[pool].id;
        Self { stream, pool, epoch: Epoch(0), view: ViewNumber(0), table: Vec::new() }
    }

    /// A connection that was greeted.
    fn greeted(node: &Node, pool: usize) -> Self {
        let mut raw = Self::connect(node, pool);
        let body = raw.hello(node.pools[pool].id);
        let reply = HelloReply::decode(&body.1).expect("a hello reply");
        (raw.epoch, raw.view) = (reply.epoch, reply.view.number);
        raw
    }

    /// A connection that holds its pool.
    fn attached(node: &Node, pool: usize) -> Self {
        let mut raw = Self::greeted(node, pool);
        raw.epoch = Epoch(raw.epoch.0 + 1);
        let attach = Attach {
            client: ClientId::random(),
            takeover: true,
            rejoin: false,
            yields: false,
            description: "raw".into(),
        }
        .encode();
        let header = raw.header(Kind::Attach, 0, u32::try_from(attach.len()).expect("short"));
        raw.send(&[(header, &attach)]);
        let (header, _) = raw.receive();
        assert_eq!((header.kind, header.status), (Kind::AttachReply, Status::Ok));
        raw
    }

    fn hello(&mut self, pool: PoolId) -> (MessageHeader, Vec<u8>) {
        self.hello_as(pool, Role::Client, None)
    }

    fn hello_as(
        &mut self,
        pool: PoolId,
        role: Role,
        nonce: Option<[u8; NONCE_SIZE]>,
    ) -> (MessageHeader, Vec<u8>) {
        let hello = Hello {
            versions: (1, 1),
            capabilities: 0,
            role,
            client: ClientId::random(),
            pool_name: String::new(),
            description: "raw".into(),
            nonce,
        };
        let body = hello.encode();
        let header = MessageHeader {
            payload: u32::try_from(body.len()).expect("short"),
            ..MessageHeader::new(Kind::Hello, pool)
        };
        self.send(&[(header, &body)]);
        self.receive()
    }

    fn header(&self, kind: Kind, slot: u16, payload: u32) -> MessageHeader {
        MessageHeader {
            slot: Slot(slot),
            payload,
            epoch: self.epoch,
            view: self.view,
            sequence: Sequence(u64::from(slot) + 1),
            ..MessageHeader::new(kind, self.pool)
        }
    }

    fn write_header(&self, slot: u16, offset: u64, length: u32) -> MessageHeader {
        MessageHeader { offset, length, ..self.header(Kind::Write, slot, length) }
    }

    fn read_header(&self, slot: u16, offset: u64, length: u32) -> MessageHeader {
        MessageHeader { offset, length, ..self.header(Kind::Read, slot, 0) }
    }

    /// The head of a frame with these messages.
    fn frame(headers: &[MessageHeader]) -> Vec<u8> {
        let table: Vec<u8> = headers.iter().flat_map(MessageHeader::encode).collect();
        let payload = headers.iter().map(|h| h.payload).sum();
        let count = u16::try_from(headers.len()).expect("few");
        let frame = FrameHeader { count, payload, checksum: frame_crc(&table) };
        [frame.encode().as_slice(), &table].concat()
    }

    fn send(&mut self, messages: &[(MessageHeader, &[u8])]) {
        let headers: Vec<_> = messages.iter().map(|(h, _)| *h).collect();
        let mut bytes = Self::frame(&headers);
        messages.iter().for_each(|(_, payload)| bytes.extend_from_slice(payload));
        self.stream.write_all(&bytes).expect("it takes it");
    }

    /// The next message.
    fn receive(&mut self) -> (MessageHeader, Vec<u8>) {
        self.try_receive().expect("a message")
    }

    fn try_receive(&mut self) -> std::io::Result<(MessageHeader, Vec<u8>)> {
        if self.table.is_empty() {
            let mut head = [0; FRAME_HEADER_SIZE];
            self.stream.read_exact(&mut head)?;
            let frame = FrameHeader::decode(&head).map_err(std::io::Error::other)?;
            for _ in 0..frame.count {
                let mut bytes = [0; HEADER_SIZE];
                self.stream.read_exact(&mut bytes)?;
                self.table.push(MessageHeader::decode(&bytes).map_err(std::io::Error::other)?);
            }
        }
        let header = self.table.remove(0);
        let mut payload = vec![0; header.payload as usize];
        self.stream.read_exact(&mut payload)?;
        Ok((header, payload))
    }

    /// Whether the node closes the connection within `time`.
    fn is_closed_within(&mut self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        let mut bytes = vec![0; 1 << 16];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            self.stream.set_read_timeout(Some(left)).expect("a timeout");
            match self.stream.read(&mut bytes) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return false,
                Err(_) => return true,
            }
        }
    }
}

fn pattern(seed: u64, length: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length as usize);
    while bytes.len() < length as usize {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length as usize);
    bytes
}

#[test]
fn garbage_and_broken_promises_close_the_connection_and_harm_nobody() {
    let mut node = Node::start(2, &[]);
    let pool = node.attach(0).unwrap();
    let hello_for = |raw: &mut Raw, id| {
        let (header, _) = raw.hello(id);
        (header.kind, header.status)
    };
    let mut foreign = Raw::connect(&node, 0);
    assert_eq!(hello_for(&mut foreign, PoolId::random()), (Kind::HelloReply, Status::NoSuchPool));
    assert!(foreign.is_closed_within(PATIENCE));
    for bytes in [b"GET / HTTP/1.1\r\n\r\n".repeat(20), vec![0; 4096], vec![0xff; 4096]] {
        let mut raw = Raw::connect(&node, 0);
        raw.stream.write_all(&bytes).unwrap();
        assert!(raw.is_closed_within(PATIENCE));
    }
    // A message before the hello, and one for another pool after it.
    let mut raw = Raw::connect(&node, 0);
    let ping = raw.header(Kind::Ping, 0, 0);
    raw.send(&[(ping, &[])]);
    assert!(raw.is_closed_within(PATIENCE));
    let mut raw = Raw::greeted(&node, 1);
    let ping = MessageHeader { pool: node.pools[0].id, ..raw.header(Kind::Ping, 0, 0) };
    raw.send(&[(ping, &[])]);
    assert!(raw.is_closed_within(PATIENCE));
    // Requests of a connection that is not attached are refused, and it lives on.
    let mut raw = Raw::greeted(&node, 0);
    let write = raw.write_header(0, 0, 4096);
    raw.send(&[(write, &[1; 4096])]);
    assert_ne!(raw.receive().0.status, Status::Ok);
    let ping = raw.header(Kind::Ping, 0, 0);
    raw.send(&[(ping, &[])]);
    assert_eq!(raw.receive().0.kind, Kind::Pong);
    let data = pattern(1, 8192);
    pool.blocking().write_at(&data, 4096).unwrap();
    let mut back = vec![0; 8192];
    pool.blocking().read_at(&mut back, 4096).unwrap();
    assert!(back == data);
    node.assert_running();
}

#[test]
fn a_second_client_is_refused_by_name_and_the_first_works_on() {
    let node = Node::start(1, &[]);
    let pool = node.attach(0).unwrap();
    match node.attach(0) {
        Err(PoolError::Over(OverReason::Held(holder))) => assert_eq!(holder, "a client"),
        other => panic!("{:?}", other.map(|_| ())),
    }
    pool.blocking().write_at(&[7; 4096], 0).unwrap();
}

#[test]
fn a_client_that_is_closed_for_nonsense_does_not_hold_the_pool() {
    let node = Node::start(1, &[]);
    let mut raw = Raw::attached(&node, 0);
    let pong = raw.header(Kind::Pong, 0, 0);
    raw.send(&[(pong, &[])]);
    assert!(raw.is_closed_within(PATIENCE));
    node.attach(0).expect("nobody holds it any more");
}

#[test]
fn a_write_without_data_takes_no_buffer_of_another_write() {
    let node = Node::start(2, &["--buffer-memory", "8M"]);
    let other = node.attach(1).unwrap();
    let mut raw = Raw::attached(&node, 0);
    let (first, empty, third) =
        (raw.write_header(0, 0, 4096), raw.write_header(1, 0, 0), raw.write_header(2, MIB.into(), MIB));
    let data = pattern(3, MIB);
    raw.stream.write_all(&Raw::frame(&[first, empty, third])).unwrap();
    raw.stream.write_all(&[9; 4096]).unwrap();
    raw.stream.write_all(&data[..1 << 19]).unwrap();
    let mut statuses = vec![raw.receive().0.status, raw.receive().0.status];
    // Whoever gets memory now must not get what the third write still arrives in.
    for i in 0..7u64 {
        other.blocking().write_at(&pattern(10 + i, MIB), i << 20).unwrap();
    }
    raw.stream.write_all(&data[1 << 19..]).unwrap();
    statuses.push(raw.receive().0.status);
    assert_eq!(statuses.iter().filter(|s| **s == Status::Ok).count(), 2, "{statuses:?}");
    let read = raw.read_header(3, MIB.into(), MIB);
    raw.send(&[(read, &[])]);
    assert!(raw.receive().1 == data, "the third write arrived as a whole");
}

#[test]
fn a_write_that_is_cut_in_its_payload_changes_nothing_and_gives_its_memory_back() {
    let node = Node::start(1, &["--buffer-memory", "8M"]);
    for _ in 0..4 {
        let mut raw = Raw::attached(&node, 0);
        let headers: Vec<_> = (0..8).map(|i| raw.write_header(i, u64::from(i) << 20, MIB)).collect();
        raw.stream.write_all(&Raw::frame(&headers)).unwrap();
        raw.stream.write_all(&vec![0xee; 300_000]).unwrap();
        raw.stream.shutdown(std::net::Shutdown::Both).unwrap();
    }
    let pool = node.attach(0).unwrap();
    let mut back = vec![1; 8 << 20];
    pool.blocking().read_at(&mut back, 0).unwrap();
    assert!(back.iter().all(|b| *b == 0), "a part of a write is on the disk");
}

#[test]
fn a_greeted_peer_that_is_not_attached_takes_no_buffers() {
    let node = Node::start(2, &["--buffer-memory", "8M"]);
    let mut raws = Vec::new();
    for _ in 0..3 {
        let mut raw = Raw::greeted(&node, 0);
        let headers: Vec<_> = (0..8).map(|i| raw.write_header(i, u64::from(i) << 20, MIB)).collect();
        raw.stream.write_all(&Raw::frame(&headers)).unwrap();
        raws.push(raw);
    }
    std::thread::sleep(Duration::from_millis(100));
    let pool = node.attach(1).unwrap();
    let start = Instant::now();
    pool.blocking().write_at(&pattern(1, MIB), 0).unwrap();
    assert!(start.elapsed() < QUICK, "it waited for a peer that has no right to anything");
}

#[test]
fn a_connection_that_waits_for_memory_costs_no_processor_time() {
    let node = Node::start(3, &["--buffer-memory", "8M", "--leg-timeout-ms", "20000"]);
    let hogs = [hog(&node, 0), hog(&node, 1)];
    let mut waiting = Raw::attached(&node, 2);
    let data = pattern(5, MIB);
    let write = waiting.write_header(0, 0, MIB);
    waiting.stream.write_all(&Raw::frame(&[write])).unwrap();
    waiting.stream.write_all(&data[..1 << 18]).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    node.comes_to_rest(5, Duration::from_secs(1), "while it waits for memory");
    waiting.stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert!(waiting.try_receive().is_err(), "it did not have to wait");
    waiting.stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // It goes on when there is memory.
    drop(hogs);
    waiting.stream.write_all(&data[1 << 18..]).unwrap();
    let (reply, _) = waiting.receive();
    assert_eq!((reply.kind, reply.status), (Kind::IoReply, Status::Ok));
}

/// A client that announces data for all the buffers and sends none of it.
fn hog(node: &Node, pool: usize) -> Raw {
    let mut hog = Raw::attached(node, pool);
    let headers: Vec<_> = (0..9).map(|i| hog.write_header(i, u64::from(i) << 20, MIB)).collect();
    hog.stream.write_all(&Raw::frame(&headers)).expect("it takes it");
    std::thread::sleep(Duration::from_millis(100));
    hog
}

#[test]
fn a_connection_that_waits_for_memory_and_hangs_up_is_gone_at_once() {
    let node = Node::start(3, &["--buffer-memory", "8M", "--leg-timeout-ms", "20000"]);
    let _hogs = [hog(&node, 0), hog(&node, 1)];
    let mut waiting = Raw::attached(&node, 2);
    let write = waiting.write_header(0, 0, MIB);
    waiting.stream.write_all(&Raw::frame(&[write])).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    drop(waiting);
    std::thread::sleep(Duration::from_millis(100));
    node.comes_to_rest(5, Duration::from_millis(500), "for a connection that is gone");
    node.attach(2).expect("the client that hung up does not hold the pool");
}

#[test]
fn everybody_gets_memory_in_turn_when_there_is_little() {
    let node = Node::start(2, &["--buffer-memory", "8M"]);
    let pools = [node.attach(0).unwrap(), node.attach(1).unwrap()];
    let data = Arc::new(pattern(1, MIB));
    let (sender, receiver) = mpsc::channel();
    let start = Instant::now();
    for round in 0..2u64 {
        for i in 0..64u64 {
            for (p, pool) in pools.iter().enumerate() {
                let (sender, data) = (sender.clone(), Arc::clone(&data));
                if round == 0 {
                    pool.write((i % 60) << 20, vec![data.to_vec()], move |r| {
                        let _ = sender.send((p, r.map(drop)));
                    });
                } else {
                    pool.read((i % 60) << 20, vec![vec![0; MIB as usize]], move |r| {
                        let _ = sender.send((p, r.map(|b| assert!(b[0] == *data))));
                    });
                }
            }
        }
    }
    for n in 0..256 {
        let (p, result) =
            receiver.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("stalled after {n} of 256"));
        result.unwrap_or_else(|e| panic!("pool {p}: {e}"));
    }
    assert!(start.elapsed() < PATIENCE);
    assert!(!node.log().contains("lost"), "{}", node.log());
}

#[test]
fn readers_do_not_starve_a_writer() {
    let node = Node::start(3, &["--buffer-memory", "8M"]);
    let stop = Arc::new(AtomicBool::new(false));
    let reads = Arc::new(AtomicU64::new(0));
    let mut greedy: Vec<Raw> = vec![Raw::attached(&node, 0), Raw::attached(&node, 1)];
    let writer = node.attach(2).unwrap();
    let mut longest = Duration::ZERO;
    std::thread::scope(|scope| {
        for raw in &mut greedy {
            let (stop, reads) = (Arc::clone(&stop), Arc::clone(&reads));
            scope.spawn(move || {
                // More than all the memory is asked for at any time.
                let header =
                    |raw: &Raw, i: u64| raw.read_header(u16::try_from(i % 16).unwrap(), (i % 64) << 20, MIB);
                for i in 0..16 {
                    let read = header(raw, i);
                    raw.send(&[(read, &[])]);
                }
                let mut next = 16;
                while !stop.load(Ordering::Relaxed) {
                    raw.receive();
                    reads.fetch_add(1, Ordering::Relaxed);
                    let read = header(raw, next);
                    raw.send(&[(read, &[])]);
                    next += 1;
                }
            });
        }
        let end = Instant::now() + Duration::from_secs(2);
        while Instant::now() < end {
            let start = Instant::now();
            let written = writer.blocking().write_at(&pattern(1, MIB), 0);
            longest = longest.max(start.elapsed());
            assert_eq!(written, Ok(()));
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(reads.load(Ordering::Relaxed) > 32);
    assert!(longest < QUICK, "a write waited for {longest:?}");
}

#[test]
fn a_client_that_does_not_take_its_answers_leaves_memory_for_others() {
    let node = Node::start(2, &["--buffer-memory", "8M"]);
    let mut slow = Raw::attached(&node, 0);
    let pool = node.attach(1).unwrap();
    for i in 0..32 {
        let read = slow.read_header(i, u64::from(i) << 20, MIB);
        slow.send(&[(read, &[])]);
    }
    std::thread::sleep(Duration::from_millis(200));
    let start = Instant::now();
    for i in 0..20 {
        pool.blocking().write_at(&pattern(i, MIB), i << 20).unwrap();
    }
    assert!(start.elapsed() < QUICK, "others waited for {:?}", start.elapsed());
    node.comes_to_rest(5, Duration::from_millis(500), "for a client that takes nothing");
    // When it reads at last, every answer is there.
    for i in 0..32 {
        let (reply, data) = slow.receive();
        assert_eq!(
            (reply.kind, reply.status, data.len()),
            (Kind::IoReply, Status::Ok, MIB as usize),
            "answer {i}"
        );
    }
}

#[test]
fn a_client_that_asks_and_never_listens_cannot_fill_the_memory() {
    let mut node = Node::start(1, &["--leg-timeout-ms", "60000"]);
    let before = node.resident_kib();
    for flood in [Kind::Ping, Kind::Read] {
        let mut raw = Raw::attached(&node, 0);
        let header =
            if flood == Kind::Read { raw.read_header(0, 0, 512) } else { raw.header(Kind::Ping, 0, 0) };
        let frame = Raw::frame(&[header; 64]);
        raw.stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
        // 200 MiB of questions, of which the node takes a few.
        for _ in 0..40_000 {
            if raw.stream.write_all(&frame).is_err() {
                break;
            }
        }
        let grown = node.resident_kib().saturating_sub(before) / 1024;
        assert!(grown < 96, "{flood:?}: {grown} MiB more than before");
        node.assert_running();
    }
}

#[test]
fn a_connection_between_nodes_can_ask_and_cannot_attach() {
    let node = Node::start(1, &[]);
    for kind in [Kind::Attach, Kind::Write, Kind::SetView, Kind::Flush, Kind::Detach] {
        let mut raw = Raw::connect(&node, 0);
        assert_eq!(raw.hello_as(raw.pool, Role::Peer, None).0.status, Status::Ok);
        let ping = raw.header(Kind::Ping, 0, 0);
        raw.send(&[(ping, &[])]);
        assert_eq!(raw.receive().0.kind, Kind::Pong);
        let header = raw.header(kind, 0, 0);
        raw.send(&[(header, &[])]);
        assert!(raw.is_closed_within(PATIENCE), "{kind:?}");
    }
}

#[test]
fn nobody_without_the_key_gets_further_than_the_challenge() {
    use std::os::unix::fs::PermissionsExt;
    let keys = tempfile::tempdir().unwrap();
    let file = keys.path().join("pool-0.key");
    std::fs::write(&file, [1; 32]).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let mut node = Node::start(2, &["--key-dir", keys.path().to_str().unwrap()]);
    let nonce = Some([7; NONCE_SIZE]);
    let hello = |pool: usize, nonce| {
        let mut raw = Raw::connect(&node, pool);
        let (header, body) = raw.hello_as(raw.pool, Role::Client, nonce);
        (raw, (header.kind, header.status), String::from_utf8_lossy(&body).into_owned())
    };
    let (mut raw, answer, words) = hello(0, None);
    assert_eq!(answer, (Kind::HelloReply, Status::KeyRequired));
    assert!(words.contains("requires a key") && words.contains("--key-file"), "{words}");
    assert!(raw.is_closed_within(PATIENCE));
    let (mut raw, answer, words) = hello(1, nonce);
    assert_eq!(answer, (Kind::HelloReply, Status::NoKey));
    assert!(words.contains("--key-dir"), "{words}");
    assert!(raw.is_closed_within(PATIENCE));
    // What is no key any more lets nobody in, as long as it lies there.
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(hello(0, nonce).1, (Kind::HelloReply, Status::NoKey));
    assert_eq!(hello(0, None).1, (Kind::HelloReply, Status::NoKey));
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    // After the challenge comes one proof, and nothing else.
    let body = Proof { proofs: vec![[0; PROOF_SIZE]] }.encode();
    let length = u32::try_from(body.len()).unwrap();
    for kind in [Kind::Ping, Kind::Attach, Kind::Read, Kind::Hello] {
        let (mut raw, answer, _) = hello(0, nonce);
        assert_eq!(answer, (Kind::Challenge, Status::Ok));
        let header = raw.header(kind, 0, 0);
        raw.send(&[(header, &[])]);
        assert!(raw.is_closed_within(PATIENCE), "{kind:?}");
    }
    let (mut raw, ..) = hello(0, nonce);
    let proof = raw.header(Kind::Proof, 0, length);
    raw.send(&[(proof, &body)]);
    assert_eq!(raw.receive().0.status, Status::KeyRefused);
    assert!(raw.is_closed_within(PATIENCE));
    let (mut raw, ..) = hello(0, nonce);
    let proof = raw.header(Kind::Proof, 0, length - 1);
    raw.send(&[(proof, &body[1..])]);
    assert_eq!(raw.receive().0.status, Status::KeyRefused);
    // Who has the key is let in, and the pool without one is open to all.
    let with = |key: u8, pool: usize| {
        let mut config = Node::config("a client");
        config.keys = KeyRing::new(vec![SecretKey::from_bytes([key; 32])]);
        Pool::connect(config, PoolSelector::Id(node.pools[pool].id), &[node.data_address()], PATIENCE)
    };
    assert!(with(2, 0).err().unwrap().to_string().contains("not this pool's"));
    let pool = with(1, 0).unwrap();
    pool.blocking().write_at(&[3; 4096], 0).unwrap();
    drop(pool);
    drop(node.attach(1).unwrap());
    node.stop();
}

#[test]
fn bodies_before_the_hello_take_no_memory() {
    let node = Node::start(1, &[]);
    let before = node.resident_kib();
    let mut raws = Vec::new();
    for _ in 0..8 {
        let mut raw = Raw::connect(&node, 0);
        let header = MessageHeader { payload: MIB, ..MessageHeader::new(Kind::Hello, raw.pool) };
        raw.stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
        // Refused at any point of it.
        let _ = raw.stream.write_all(&Raw::frame(&[header; 64]));
        let _ = raw.stream.write_all(&vec![1; 16 << 20]);
        raws.push(raw);
    }
    let grown = node.resident_kib().saturating_sub(before) / 1024;
    assert!(grown < 16, "{grown} MiB for peers that never said hello");
    assert!(raws.iter_mut().all(|raw| raw.is_closed_within(PATIENCE)));
}

#[test]
fn a_peer_that_sends_a_byte_now_and_then_is_dropped() {
    let node = Node::start(1, &["--leg-timeout-ms", "200"]);
    let mut raws = [Raw::connect(&node, 0), Raw::attached(&node, 0)];
    let header = raws[1].write_header(0, 0, MIB);
    let frames = [Raw::frame(&[MessageHeader::new(Kind::Hello, raws[0].pool)]), Raw::frame(&[header])];
    let end = Instant::now() + PATIENCE;
    let mut at = 0;
    let mut closed = [false; 2];
    while Instant::now() < end && closed != [true; 2] {
        for (i, raw) in raws.iter_mut().enumerate() {
            let byte = frames[i].get(at).copied().unwrap_or(0);
            // The second one has sent its head at once, and drips its payload.
            let bytes: &[u8] = if i == 1 && at == 0 { &frames[1] } else { &[byte] };
            closed[i] |=
                raw.stream.write_all(bytes).is_err() || raw.is_closed_within(Duration::from_millis(1));
        }
        at += 1;
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(closed, [true; 2], "within {PATIENCE:?} at a leg timeout of 200 ms");
}

#[test]
fn the_limit_of_connections_holds_and_lets_go() {
    let mut node = Node::start(1, &["--max-connections", "256"]);
    let pool = node.attach(0).unwrap();
    let mut raws: Vec<Raw> = (0..300).map(|_| Raw::connect(&node, 0)).collect();
    let mut refused = 0;
    for raw in raws.iter_mut().rev().take(45) {
        refused += usize::from(raw.is_closed_within(PATIENCE));
    }
    assert_eq!(refused, 45, "all that came after the 256th");
    pool.blocking().write_at(&[1; 4096], 0).unwrap();
    node.comes_to_rest(5, Duration::from_millis(500), "with all the connections that it may have");
    drop(raws);
    wait_for("room again", || {
        let mut raw = Raw::connect(&node, 0);
        !raw.is_closed_within(Duration::from_millis(50))
    });
    node.assert_running();
}

#[test]
fn a_node_without_descriptors_waits_calmly_and_recovers() {
    let mut node = Node::start_with("ulimit -n 40;", 1, &[]);
    let pool = node.attach(0).unwrap();
    let raws: Vec<Raw> = (0..60).map(|_| Raw::connect(&node, 0)).collect();
    std::thread::sleep(Duration::from_millis(200));
    node.comes_to_rest(5, Duration::from_secs(1), "without descriptors");
    assert!(node.log().lines().count() < 100, "the log is flooded");
    pool.blocking().write_at(&[1; 4096], 0).unwrap();
    drop(raws);
    drop(pool);
    node.attach(0).expect("it accepts again");
    node.assert_running();
}

#[test]
fn idle_connections_cost_nothing() {
    let node = Node::start(2, &[]);
    let pool = node.attach(0).unwrap();
    pool.blocking().write_at(&[1; 4096], 0).unwrap();
    let _greeted = Raw::greeted(&node, 1);
    node.comes_to_rest(0, Duration::from_secs(2), "idle");
}

#[test]
fn a_stop_under_load_is_quick_and_in_good_order() {
    let mut node = Node::start(2, &[]);
    let pool = Arc::new(node.attach(0).unwrap());
    let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    // Peers that will not go by themselves: one that says nothing, one that only looks, one that holds a pool.
    let _silent = Raw::connect(&node, 0);
    let _greeted = Raw::greeted(&node, 0);
    let load = {
        let (pool, stop, written) = (Arc::clone(&pool), Arc::clone(&stop), Arc::clone(&written));
        std::thread::spawn(move || {
            let (sender, receiver) = mpsc::sync_channel(8);
            for i in 0u64.. {
                let sender = sender.clone();
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                pool.write((i % 1000) * 8192, vec![pattern(i, 8192)], move |r| {
                    let _ = sender.try_send(r.is_ok());
                });
                if i >= 8 && receiver.recv_timeout(Duration::from_millis(100)) == Ok(true) {
                    written.fetch_add(1, Ordering::Relaxed);
                }
            }
        })
    };
    wait_for("writes", || written.load(Ordering::Relaxed) > 100);
    let took = node.stop();
    stop.store(true, Ordering::Relaxed);
    load.join().unwrap();
    assert!(took < QUICK, "it took {took:?}, and a node that waits in vain takes 20 s:\n{}", node.log());
    let log = node.log();
    assert!(log.contains("all stores are closed in order"), "{log}");
    assert!(!log.contains("not marked clean"), "{log}");
    let report = Store::inspect(&node.log.with_file_name("pool-0.store")).unwrap().to_string();
    assert!(report.contains("closed in order: yes"), "{report}");
    // Requests still wait for the node; the client gives up with the process.
    std::mem::forget(pool);
}

#[test]
fn a_holder_that_ignores_the_goodbye_cannot_write_behind_the_clean_mark() {
    let mut node = Node::start(1, &["--stop-timeout-s", "2"]);
    let mut raw = Raw::attached(&node, 0);
    let stop = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut slot = 0;
            loop {
                let write = raw.write_header(slot % 512, 0, 4096);
                let frame = [Raw::frame(&[write]), vec![3; 4096]].concat();
                if raw.stream.write_all(&frame).is_err() || raw.try_receive().is_err() {
                    return;
                }
                slot += 1;
            }
        });
        let stop = node.stop();
        writer.join().unwrap();
        stop
    });
    assert!(stop < QUICK, "{stop:?}");
}

#[test]
fn a_node_that_stops_refuses_connections_at_once() {
    let mut node = Node::start(1, &["--stop-timeout-s", "30"]);
    let _holder = Raw::attached(&node, 0);
    node.terminate();
    let refuses = || TcpStream::connect(node.address).is_err();
    wait_for("a refusal: a client would wait for an answer that never comes", refuses);
    // It waits for the holder, so it is not its end that refuses.
    node.assert_running();
}

#[test]
fn clients_reach_pools_on_other_shards_and_leave_them_at_any_moment() {
    let mut node = Node::start(4, &["--shards", "3"]);
    let pools: Vec<Pool> = (0..4).map(|i| node.attach(i).unwrap()).collect();
    let data = pattern(4, 65536);
    for (i, pool) in pools.iter().enumerate() {
        pool.blocking().write_at(&data, (i as u64) << 20).unwrap();
        let mut back = vec![0; 65536];
        pool.blocking().read_at(&mut back, (i as u64) << 20).unwrap();
        assert!(back == data);
    }
    // Handovers of connections that are closed while they change hands, and that reuse one another's descriptors.
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for i in 0..300 {
                    let mut raw = Raw::connect(&node, i % 4);
                    let hello = Hello {
                        versions: if i % 2 == 0 { (9, 9) } else { (1, 1) },
                        capabilities: 0,
                        role: Role::Client,
                        client: ClientId::random(),
                        pool_name: String::new(),
                        description: "raw".into(),
                        nonce: None,
                    };
                    let body = hello.encode();
                    let payload = u32::try_from(body.len()).unwrap();
                    let header = MessageHeader { payload, ..MessageHeader::new(Kind::Hello, raw.pool) };
                    raw.send(&[(header, &body)]);
                    if i % 3 == 0 {
                        let (reply, _) = raw.receive();
                        assert_eq!(reply.kind, Kind::HelloReply);
                    }
                }
            });
        }
    });
    node.assert_running();
    for pool in &pools {
        pool.blocking().write_at(&data, 0).unwrap();
    }
}

#[test]
fn a_node_says_that_it_serves_when_all_its_pools_can_be_reached() {
    let node = Node::start(6, &["--shards", "3"]);
    let log = node.log();
    let before = log.split("serving").next().unwrap();
    assert_eq!(before.matches("store is open").count(), 6, "{log}");
}

#[test]
fn an_idle_client_is_kept_however_short_the_leg_timeout_is() {
    let node = Node::start(1, &["--leg-timeout-ms", "100"]);
    let pool = node.attach(0).unwrap();
    std::thread::sleep(Duration::from_millis(2500));
    pool.blocking().write_at(&[1; 4096], 0).unwrap();
    assert!(!node.log().contains("client lost"), "{}", node.log());
}

#[test]
fn every_request_completes_when_the_client_is_displaced() {
    let node = Node::start(1, &[]);
    for _ in 0..5 {
        let mut config = Node::config("the old one");
        config.takeover = true;
        let seeds = [node.data_address()];
        let selector = PoolSelector::Id(node.pools[0].id);
        let pool = Pool::connect(config, selector, &seeds, PATIENCE)
            .unwrap_or_else(|e| panic!("{e}: {}", node.log()));
        let mut submitted = 0;
        let (completed, fenced) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let displacer = std::thread::scope(|scope| {
            let displacer = scope.spawn(|| Raw::attached(&node, 0));
            let (mut left, end) = (2000, Instant::now() + PATIENCE);
            // Some come before the client knows, some while its thread ends, some after.
            while left > 0 && Instant::now() < end {
                left -= u64::from(fenced.load(Ordering::Relaxed));
                if !fenced.load(Ordering::Relaxed) && submitted > completed.load(Ordering::Relaxed) + 500 {
                    // The others need the processor, if there is but one.
                    std::thread::sleep(Duration::from_micros(50));
                    continue;
                }
                let (completed, fenced) = (Arc::clone(&completed), Arc::clone(&fenced));
                pool.write(0, vec![vec![1; 512]], move |result| {
                    fenced.fetch_or(result == Err(IoError::Fenced), Ordering::Relaxed);
                    completed.fetch_add(1, Ordering::Relaxed);
                });
                submitted += 1;
            }
            displacer.join().expect("it attaches")
        });
        assert!(fenced.load(Ordering::Relaxed));
        wait_for("every completion", || completed.load(Ordering::Relaxed) == submitted);
        drop(displacer);
    }
}

#[test]
fn a_client_that_takes_nothing_at_all_is_dropped() {
    let node = Node::start(1, &["--leg-timeout-ms", "500"]);
    let mut deaf = Raw::attached(&node, 0);
    for i in 0..32 {
        let read = deaf.read_header(i, u64::from(i) << 20, MIB);
        deaf.send(&[(read, &[])]);
    }
    wait_for("its connection is closed", || node.log().contains("client lost"));
    node.attach(0).expect("nobody holds the pool");
}

/// A frame of well-formed messages that make little sense, and how many bytes of payload follow it.
fn nonsense(raw: &Raw, rng: &mut impl rand::Rng) -> Vec<u8> {
    const KINDS: [Kind; 10] = [
        Kind::Write,
        Kind::Write,
        Kind::Read,
        Kind::Read,
        Kind::Flush,
        Kind::Discard,
        Kind::WriteZeroes,
        Kind::Ping,
        Kind::SetView,
        Kind::Attach,
    ];
    let mut headers = Vec::new();
    for _ in 0..rng.random_range(1..=12) {
        let kind = KINDS[rng.random_range(0..KINDS.len())];
        let length = [0, 1, 512, 4096, 65536, MIB][rng.random_range(0..6)];
        let payload = match kind {
            Kind::Write => length,
            Kind::SetView | Kind::Attach => length.min(4096),
            _ => 0,
        };
        headers.push(MessageHeader {
            length,
            offset: rng.random_range(0..=POOL_SIZE / 512) * 512,
            epoch: Epoch(raw.epoch.0 + u64::from(rng.random_ratio(1, 20))),
            ..raw.header(kind, rng.random_range(0..1024), payload)
        });
    }
    let payload: u32 = headers.iter().map(|h| h.payload).sum();
    let mut bytes = Raw::frame(&headers);
    bytes.resize(bytes.len() + payload as usize, 0xbd);
    bytes
}

#[test]
fn nonsense_of_one_pools_clients_never_reaches_another_pool() {
    use rand::{Rng, SeedableRng};
    let mut node = Node::start(3, &["--buffer-memory", "8M"]);
    let pool = node.attach(0).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for (attacker, pool) in [(1, 1), (2, 2), (3, 2)] {
            let (node, stop) = (&node, &stop);
            scope.spawn(move || {
                let mut rng = rand::rngs::StdRng::seed_from_u64(attacker);
                while !stop.load(Ordering::Relaxed) {
                    let mut raw = Raw::greeted(node, pool);
                    if rng.random_ratio(4, 5) {
                        // It is whoever attached last that may write; nobody looks at the answer.
                        raw.epoch = Epoch(raw.epoch.0 + 1);
                        let client = ClientId::random();
                        let body = Attach {
                            client,
                            takeover: true,
                            rejoin: false,
                            yields: false,
                            description: "raw".into(),
                        }
                        .encode();
                        let header = raw.header(Kind::Attach, 0, u32::try_from(body.len()).unwrap());
                        raw.send(&[(header, &body)]);
                        if raw.try_receive().is_err() {
                            continue;
                        }
                    }
                    raw.stream.set_write_timeout(Some(Duration::from_millis(20))).unwrap();
                    raw.stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
                    for _ in 0..rng.random_range(1..20) {
                        let bytes = nonsense(&raw, &mut rng);
                        let cut = if rng.random_ratio(1, 8) {
                            rng.random_range(0..bytes.len())
                        } else {
                            bytes.len()
                        };
                        if raw.stream.write_all(&bytes[..cut]).is_err() || cut < bytes.len() {
                            break;
                        }
                        if rng.random() {
                            // Takes some of the answers, or none.
                            let _ = raw.stream.read(&mut vec![0; 1 << 20]);
                        }
                    }
                }
            });
        }
        let start = Instant::now();
        for round in 0.. {
            if start.elapsed() > Duration::from_secs(4) {
                break;
            }
            let (at, data) = ((round % 8) << 21, pattern(round, 3 * MIB / 2));
            pool.blocking().write_at(&data, at).unwrap();
            let mut back = vec![0; data.len()];
            pool.blocking().read_at(&mut back, at).unwrap();
            assert!(back == data, "round {round}");
        }
        stop.store(true, Ordering::Relaxed);
    });
    node.assert_running();
    assert!(!node.log().contains("panicked"), "{}", node.log());
    node.comes_to_rest(5, Duration::from_secs(1), "when nobody asks for anything");
}

#[test]
fn a_pool_is_served_over_tls_to_those_who_trust_the_node_and_whom_it_trusts() {
    let dir = tempfile::tempdir().expect("a directory");
    let put = |name: &str, text: String| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).expect("a file");
        path
    };
    let key = rcgen::KeyPair::generate().expect("a key");
    // Its own authority: enough to be trusted by whoever was given the certificate.
    let address = own_address();
    let parameters = rcgen::CertificateParams::new(vec![address.ip().to_string()]).expect("a certificate");
    let certificate = parameters.self_signed(&key).expect("a certificate");
    let (certificate, key) = (put("own.pem", certificate.pem()), put("own.key", key.serialize_pem()));
    let address = format!("tls://{address}");
    let text = |path: &PathBuf| path.display().to_string();
    let (certificate_text, key_text) = (text(&certificate), text(&key));
    let flags = ["--listen", &address, "--tls-certificate", &certificate_text, "--tls-key", &key_text];
    let verify = ["--tls-authorities", &certificate_text, "--tls-verify-clients", "true"];
    let node = Node::start(1, &[&flags[..], &verify[..]].concat());
    let identity = IdentityFiles { certificate: certificate.clone(), key };
    let connect = |identity: Option<&IdentityFiles>, patience| {
        let mut config = Node::config("over tls");
        config.tls = Some(ClientTls::load(&certificate, identity).expect("certificates"));
        let seeds = [address.parse().expect("an address")];
        Pool::connect(config, PoolSelector::Id(node.pools[0].id), &seeds, patience)
    };
    let error = connect(None, Duration::from_secs(3)).map(drop).expect_err("a stranger comes in").to_string();
    assert!(error.contains("within 3s"), "{error}");
    let pool = connect(Some(&identity), PATIENCE).expect("the pool");
    let data: Vec<u8> = (0..3 * MIB).map(|i| u8::try_from(i % 251).expect("small")).collect();
    pool.blocking().write_at(&data, 4096).expect("a write");
    pool.blocking().flush().expect("a flush");
    let mut back = vec![0; data.len()];
    pool.blocking().read_at(&mut back, 4096).expect("a read");
    assert!(back == data, "what is read is what was written");
}

#[test]
fn an_operators_command_from_another_node_reaches_the_client_and_its_answer_comes_back() {
    let node = Node::start(1, &[]);
    let command = PoolCommand::Grow { size: 1 << 30 };
    let body = serde_json::to_vec(&command).expect("JSON");
    let length = u32::try_from(body.len()).expect("short");
    let mut other = Raw::greeted(&node, 0);
    let mut ask = |sequence: u64| {
        let header = MessageHeader { sequence: Sequence(sequence), ..other.header(Kind::Command, 0, length) };
        other.send(&[(header, &body)]);
        let (header, body) = other.receive();
        assert_eq!((header.kind, header.sequence), (Kind::CommandReply, Sequence(sequence)));
        serde_json::from_slice::<CommandReply>(&body).expect("a reply")
    };
    let reason = |reply| match reply {
        CommandReply::Refused { reason, .. } => reason,
        CommandReply::Done { .. } | CommandReply::Verify { .. } => panic!("it cannot be done"),
    };
    assert_eq!(reason(ask(7)), Refusal::NoCoordinator);

    let mut holder = Raw::attached(&node, 0);
    let answers = std::thread::spawn(move || {
        let (given, body) = holder.receive();
        assert_eq!(given.kind, Kind::Command);
        assert_eq!(serde_json::from_slice::<PoolCommand>(&body).expect("a command"), command);
        let reply = CommandReply::refused(Refusal::NoRoom, "not today");
        let reply = serde_json::to_vec(&reply).expect("JSON");
        let mut header = given.reply(Kind::CommandReply, Status::Ok);
        header.payload = u32::try_from(reply.len()).expect("short");
        holder.send(&[(header, &reply)]);
        // The next one is not answered: the client goes away instead.
        assert_eq!(holder.receive().0.kind, Kind::Command);
    });
    assert_eq!(ask(8), CommandReply::refused(Refusal::NoRoom, "not today"));
    assert_eq!(reason(ask(9)), Refusal::CoordinatorLost);
    answers.join().expect("the client");
    assert_eq!(reason(ask(10)), Refusal::NoCoordinator);
}
