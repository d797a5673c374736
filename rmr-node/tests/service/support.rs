//! A node of its own process, and a connection to it that sends whatever a test wants.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rmr_common::client::{Config, PoolSelector};
use rmr_common::driver::{Pool, PoolError};
use rmr_common::pool::{
    Address, ChunkSize, ClientId, Epoch, MemberId, MemberSpec, PoolId, PoolSpec, Sequence, Slot, StoreId,
    View, ViewNumber,
};
use rmr_common::wire::{
    Attach, FRAME_HEADER_SIZE, FrameHeader, HEADER_SIZE, Hello, HelloReply, Kind, MessageHeader, NONCE_SIZE,
    Role, Status, frame_crc,
};
use rmr_node::store::{CreateOptions, Store, ZeroPolicy};

pub(crate) const MIB: u32 = 1 << 20;
pub(crate) const POOL_SIZE: u64 = 64 << 20;
/// A process that is forked while a store is made would keep its lock for a moment; so one at a time.
static FORKING: Mutex<()> = Mutex::new(());
/// Longest wait for what comes in any case: only a fault, or a machine that stands still, makes it pass.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// What is quick, on a machine that may be crowded. What must not be waited for takes longer, if it ends at all.
pub(crate) const QUICK: Duration = Duration::from_secs(10);

/// What a shell runs before a node whose disk is to fail: a write beyond the limit is then an error (EFBIG), and not the
/// end of the process.
pub(crate) const SURVIVES_LIMITS: &str = "trap '' XFSZ;";

/// A node of its own process, with as many pools of one member as asked for, `pool-0` and up.
pub(crate) struct Node {
    child: Child,
    pub(crate) address: SocketAddr,
    pub(crate) pools: Vec<PoolSpec>,
    pub(crate) log: PathBuf,
    _dir: tempfile::TempDir,
}

impl Node {
    pub(crate) fn start(pools: usize, flags: &[&str]) -> Self {
        Self::start_with("", pools, flags)
    }

    /// Starts it from a shell that runs `before` first.
    pub(crate) fn start_with(before: &str, pools: usize, flags: &[&str]) -> Self {
        let address = own_address();
        // A client that was told a tls:// address goes to no other.
        let tls = flags.iter().find(|flag| flag.starts_with("tls://"));
        let member = tls.map_or_else(|| tcp(address), |tls| tls.parse().expect("an address"));
        Self::launch(before, address, flags, |dir| {
            (0..pools).map(|i| create_pool(dir.path(), i, &member)).collect()
        })
    }

    /// Starts it with one pool whose store lies in another directory.
    pub(crate) fn start_in(directory: &Path) -> Self {
        let (address, store) = (own_address(), directory.join("pool-0.store"));
        let store = store.to_str().expect("plain characters").to_owned();
        Self::launch("", address, &["--stores", &store], |_| vec![create_pool(directory, 0, &tcp(address))])
    }

    /// Starts two nodes that have one pool together, `pool-0`, of which each serves a Clean member; the shell of each runs
    /// its command first.
    pub(crate) fn start_pair(before: [&str; 2]) -> [Self; 2] {
        let addresses = [own_address(), own_address()];
        let members = MemberId::all()
            .zip(addresses)
            .map(|(member, address)| MemberSpec::new(member, StoreId::random(), tcp(address)));
        let spec = pool_spec(0, members.collect());
        [0, 1].map(|i| {
            Self::launch(before[i], addresses[i], &[], |dir| {
                create_member(dir.path(), 0, &spec, &spec.members[i]);
                vec![spec.clone()]
            })
        })
    }

    /// Starts a node on the stores that `create` makes in its directory.
    fn launch(
        before: &str,
        address: SocketAddr,
        flags: &[&str],
        create: impl FnOnce(&tempfile::TempDir) -> Vec<PoolSpec>,
    ) -> Self {
        let forking = FORKING.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = tempfile::tempdir().expect("a directory");
        let pools = create(&dir);
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

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The store of a pool.
    pub(crate) fn store_path(&self, pool: usize) -> PathBuf {
        self.log.with_file_name(format!("pool-{pool}.store"))
    }

    /// Where it serves its pools.
    pub(crate) fn data_address(&self) -> Address {
        tcp(self.address)
    }

    /// A client that gives nobody up because the machine is crowded.
    pub(crate) fn config(name: &str) -> Config {
        let mut config = Config::new(ClientId::random(), name);
        config.leg_timeout = PATIENCE;
        config
    }

    /// Attaches a well-behaved client.
    pub(crate) fn attach(&self, pool: usize) -> Result<Pool, PoolError> {
        let selector = PoolSelector::Id(self.pools[pool].id);
        Pool::connect(Self::config("a client"), selector, &[self.data_address()], PATIENCE)
    }

    /// Attaches a well-behaved client that takes the pool from the one that has it.
    pub(crate) fn attach_over(&self, pool: usize) -> Pool {
        let mut config = Self::config("a successor");
        config.takeover = true;
        let selector = PoolSelector::Id(self.pools[pool].id);
        Pool::connect(config, selector, &[self.data_address()], PATIENCE).expect("it takes the pool")
    }

    /// Milliseconds of processor time so far.
    fn cpu_ms(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).expect("it runs");
        let fields: Vec<&str> = stat.rsplit(')').next().expect("its name").split_whitespace().collect();
        let ticks = |i: usize| fields[i].parse::<u64>().expect("a number");
        (ticks(11) + ticks(12)) * 10
    }

    pub(crate) fn resident_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("it runs");
        let line = status.lines().find(|l| l.starts_with("VmRSS")).expect("it has memory");
        line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number")
    }

    /// Waits until the node uses at most so many percent of one processor for as long as `time`. It may have work left from
    /// before; one that spins, or is woken again and again, never comes to rest.
    pub(crate) fn comes_to_rest(&self, percent: u64, time: Duration, what: &str) {
        let mut loads = Vec::new();
        while loads.last().is_none_or(|load| *load > percent) {
            assert!(loads.len() < 20, "{what}: {loads:?} percent of a processor, each for {time:?}");
            let before = self.cpu_ms();
            std::thread::sleep(time);
            loads.push((self.cpu_ms() - before) * 100 / u64::try_from(time.as_millis()).expect("short"));
        }
    }

    /// Asks it to stop, and returns how long that took.
    pub(crate) fn stop(&mut self) -> Duration {
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

    /// From now on the kernel refuses the node's writes at and beyond this offset of any file. The node must have been
    /// started with [`SURVIVES_LIMITS`].
    pub(crate) fn limit_files(&self, bytes: u64) {
        let _forking = FORKING.lock().unwrap_or_else(PoisonError::into_inner);
        let (pid, limit) = (self.child.id().to_string(), format!("--fsize={bytes}:"));
        let status = Command::new("prlimit").args(["--pid", &pid, &limit]).status();
        assert!(status.expect("prlimit runs").success());
    }

    /// The answer of the admin API to a GET of this path, with its head.
    pub(crate) fn admin_get(&self, path: &str) -> String {
        let log = self.log();
        let rest = log.split("admin=").nth(1).expect("the node logs its admin address");
        let digits = |c: char| c.is_ascii_digit() || c == '.' || c == ':';
        let address = &rest[..rest.find(|c| !digits(c)).unwrap_or(rest.len())];
        let mut stream = TcpStream::connect(address).expect("the admin API listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")
            .expect("a request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    }

    /// Waits for the end of a node that was asked to stop; returns whether it was in good order, and how long it took.
    pub(crate) fn ended(&mut self) -> (bool, Duration) {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("it is ours") {
                return (status.success(), start.elapsed());
            }
            assert!(start.elapsed() < PATIENCE, "it does not stop:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn terminate(&self) {
        let _forking = FORKING.lock().unwrap_or_else(PoisonError::into_inner);
        let kill = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status();
        assert!(kill.expect("kill runs").success());
    }

    pub(crate) fn assert_running(&mut self) {
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
pub(crate) fn own_address() -> SocketAddr {
    static NEXT_PORT: AtomicU16 = AtomicU16::new(7700);
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    let host = Ipv4Addr::new(127, 64 | high, middle, low);
    SocketAddr::from((host, NEXT_PORT.fetch_add(1, Ordering::Relaxed)))
}

fn tcp(address: SocketAddr) -> Address {
    Address::tcp(address.ip().to_string(), address.port())
}

fn create_pool(dir: &Path, index: usize, address: &Address) -> PoolSpec {
    let member = MemberId::all().next().expect("there are members");
    let spec = pool_spec(index, vec![MemberSpec::new(member, StoreId::random(), address.clone())]);
    create_member(dir, index, &spec, &spec.members[0]);
    spec
}

fn pool_spec(index: usize, members: Vec<MemberSpec>) -> PoolSpec {
    PoolSpec {
        id: PoolId::random(),
        name: format!("pool-{index}"),
        size: POOL_SIZE,
        chunk_size: ChunkSize::default(),
        logical_block_size: 512,
        members,
    }
}

/// Creates the store of one member, all of whose pool are Clean.
fn create_member(dir: &Path, index: usize, spec: &PoolSpec, member: &MemberSpec) {
    let options = CreateOptions {
        spec: spec.clone(),
        member: member.id,
        store: member.store,
        view: View::initial(spec.members.iter().map(|m| (m.id, m.store))),
        overwrite: false,
        zero: ZeroPolicy::Zero,
        max_size: None,
    };
    let path = dir.join(format!("pool-{index}.store"));
    Store::create(&path, &options, &mut |_, _| {}).expect("the store is created");
}

pub(crate) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A peer that is written out by hand.
pub(crate) struct Raw {
    pub(crate) stream: TcpStream,
    pub(crate) pool: PoolId,
    pub(crate) epoch: Epoch,
    view: ViewNumber,
    /// The view that the node showed in its hello.
    shown: Option<View>,
    table: Vec<MessageHeader>,
}

impl Raw {
    pub(crate) fn connect(node: &Node, pool: usize) -> Self {
        Self::to(node.address, node.pools[pool].id)
    }

    /// A connection to a node at an address.
    pub(crate) fn to(address: SocketAddr, pool: PoolId) -> Self {
        let stream = TcpStream::connect(address).expect("it listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream.set_write_timeout(Some(PATIENCE)).expect("a timeout");
        Self { stream, pool, epoch: Epoch(0), view: ViewNumber(0), shown: None, table: Vec::new() }
    }

    /// A connection that was greeted.
    pub(crate) fn greeted(node: &Node, pool: usize) -> Self {
        Self::connect(node, pool).greet()
    }

    fn greet(self) -> Self {
        let mut raw = self;
        let body = raw.hello(raw.pool);
        let reply = HelloReply::decode(&body.1).expect("a hello reply");
        (raw.epoch, raw.view) = (reply.epoch, reply.view.number);
        raw.shown = Some(reply.view);
        raw
    }

    /// The view that the node showed when it greeted the connection.
    pub(crate) fn view(&self) -> View {
        self.shown.clone().expect("it was greeted")
    }

    /// A connection that holds its pool.
    pub(crate) fn attached(node: &Node, pool: usize) -> Self {
        Self::attached_to(node.address, node.pools[pool].id)
    }

    /// The same, to a node at an address.
    pub(crate) fn attached_to(address: SocketAddr, pool: PoolId) -> Self {
        let mut raw = Self::to(address, pool).greet();
        let (header, _) = raw.try_attach().expect("an answer");
        assert_eq!((header.kind, header.status), (Kind::AttachReply, Status::Ok));
        raw
    }

    /// Asks for the pool under the next epoch; the answer, or the end of the connection.
    pub(crate) fn try_attach(&mut self) -> std::io::Result<(MessageHeader, Vec<u8>)> {
        self.epoch = Epoch(self.epoch.0 + 1);
        let attach = Attach {
            client: ClientId::random(),
            takeover: true,
            rejoin: false,
            yields: false,
            description: "raw".into(),
            held_ms: 0,
        }
        .encode();
        let header = self.header(Kind::Attach, 0, u32::try_from(attach.len()).expect("short"));
        self.send(&[(header, &attach)]);
        self.try_receive()
    }

    pub(crate) fn hello(&mut self, pool: PoolId) -> (MessageHeader, Vec<u8>) {
        self.hello_as(pool, Role::Client, None)
    }

    pub(crate) fn hello_as(
        &mut self,
        pool: PoolId,
        role: Role,
        nonce: Option<[u8; NONCE_SIZE]>,
    ) -> (MessageHeader, Vec<u8>) {
        let hello = Hello {
            versions: (rmr_common::wire::PROTOCOL_VERSION, rmr_common::wire::PROTOCOL_VERSION),
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

    pub(crate) fn header(&self, kind: Kind, slot: u16, payload: u32) -> MessageHeader {
        MessageHeader {
            slot: Slot(slot),
            payload,
            epoch: self.epoch,
            view: self.view,
            sequence: Sequence(u64::from(slot) + 1),
            ..MessageHeader::new(kind, self.pool)
        }
    }

    pub(crate) fn write_header(&self, slot: u16, offset: u64, length: u32) -> MessageHeader {
        MessageHeader { offset, length, ..self.header(Kind::Write, slot, length) }
    }

    pub(crate) fn read_header(&self, slot: u16, offset: u64, length: u32) -> MessageHeader {
        MessageHeader { offset, length, ..self.header(Kind::Read, slot, 0) }
    }

    /// The head of a frame with these messages.
    pub(crate) fn frame(headers: &[MessageHeader]) -> Vec<u8> {
        let table: Vec<u8> = headers.iter().flat_map(MessageHeader::encode).collect();
        let payload = headers.iter().map(|h| h.payload).sum();
        let count = u16::try_from(headers.len()).expect("few");
        let frame = FrameHeader { count, payload, checksum: frame_crc(&table) };
        [frame.encode().as_slice(), &table].concat()
    }

    pub(crate) fn send(&mut self, messages: &[(MessageHeader, &[u8])]) {
        let headers: Vec<_> = messages.iter().map(|(h, _)| *h).collect();
        let mut bytes = Self::frame(&headers);
        messages.iter().for_each(|(_, payload)| bytes.extend_from_slice(payload));
        self.stream.write_all(&bytes).expect("it takes it");
    }

    /// The next message.
    pub(crate) fn receive(&mut self) -> (MessageHeader, Vec<u8>) {
        self.try_receive().expect("a message")
    }

    pub(crate) fn try_receive(&mut self) -> std::io::Result<(MessageHeader, Vec<u8>)> {
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
    pub(crate) fn is_closed_within(&mut self, time: Duration) -> bool {
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

pub(crate) fn pattern(seed: u64, length: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length as usize);
    while bytes.len() < length as usize {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length as usize);
    bytes
}
