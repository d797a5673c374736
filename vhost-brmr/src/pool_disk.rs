//! The disk behind the device is a pool: joins [`Disk`] to the pool driver of `rmr_common`.

use std::os::fd::RawFd;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use rmr_common::auth::KeyRing;
use rmr_common::client::{self, Config, Force, IoError, Notice, OverReason, PoolSelector};
use rmr_common::driver::{NO_ANSWER, PoolDriver, PoolError, discover_while};
use rmr_common::pool::{Address, BLOCK_SIZE, ClientId, MemberId, PoolSpec, TransportKind};
use rmr_common::reactor::WatchChange;
use rmr_common::throttle::Throttles;
use rmr_common::transport::rdma::{self, Fabric};
use rmr_common::transport::tls::ClientTls;
use rmr_common::words;
use vmm_sys_util::epoll::EventSet;

use crate::config::Settings;
use crate::disk::{
    Attachment, Disk, DiskError, Geometry, Operation, RangeLimits, Request, Token, ToldToStop,
};
use crate::sys;

/// Segments that a driver is advised to use at most: what fits a queue of 128 with header and status.
const MAX_SEGMENTS: u32 = 126;
/// Longest segment that a driver is advised to use, in bytes.
const MAX_SEGMENT_SIZE: u32 = 1 << 20;
/// Longest range of a discard or write-zeroes, in bytes; larger ones come as several requests.
const MAX_RANGE: u64 = 1 << 30;
/// How often the daemon looks whether RDMA devices were removed while it has no connections.
const DEVICE_BEAT: Duration = Duration::from_secs(1);
/// Of log lines of one kind, ten go through in this time.
const LOG_INTERVAL: Duration = Duration::from_secs(10);
/// Most ranges of one discard or write-zeroes.
const MAX_RANGES: u32 = 16;

/// How long nothing is said while no node answers, and the shortest time between two warnings.
const FIRST_WARNING: Duration = Duration::from_secs(1);
/// How often the same is said.
const NEXT_WARNING: Duration = Duration::from_secs(10);

/// Says in the log what the start of the daemon waits for: at once when a node could not be used, and again from time to time.
struct Waiting {
    since: Instant,
    told: Option<(Instant, String)>,
}

impl Waiting {
    fn new() -> Self {
        Self { since: Instant::now(), told: None }
    }

    fn tell(&mut self, pool: &str, reason: &str) {
        let is_early = match &self.told {
            None => reason == NO_ANSWER && self.since.elapsed() < FIRST_WARNING,
            Some((at, told)) => at.elapsed() < if told == reason { NEXT_WARNING } else { FIRST_WARNING },
        };
        if is_early {
            return;
        }
        let seconds = self.since.elapsed().as_secs();
        tracing::warn!(
            pool,
            seconds,
            "the pool is not found yet, and no front end is served before: {reason}"
        );
        self.told = Some((Instant::now(), reason.to_owned()));
    }
}

/// A pool as a disk. Its specification is learned at the start; the pool is claimed when a guest uses it.
pub struct PoolDisk {
    config: Config,
    /// As of the newest view that was seen: members may come and go, and the size may grow.
    spec: PoolSpec,
    seeds: Vec<Address>,
    driver: Option<PoolDriver>,
    /// A driver that is over, kept until the loop does not watch its descriptors any more; and whether the loop was told.
    retired: Option<(PoolDriver, bool)>,
    was_active: bool,
    detaching: bool,
    refused: Option<String>,
    /// Another client attached while this one was, and how that was found.
    displaced: Option<String>,
    /// The next attachment displaces whoever holds the pool: a guest comes from there. Until one has succeeded.
    incoming: bool,
    /// A front end went away while its guest did not know yet that writes were lost.
    lost_writes: bool,
    done: Vec<(client::Token, Result<(), IoError>)>,
    notices: Vec<Notice>,
    failed: Vec<Token>,
    /// Log lines that nodes and networks can cause.
    logs: Throttles<(&'static str, Option<MemberId>)>,
}

impl PoolDisk {
    /// Asks the configured nodes for the pool, and attaches to nothing.
    ///
    /// # Errors
    /// When no node knows the pool, the nodes disagree, or none answers within the suspend timeout.
    pub fn open(settings: &Settings) -> anyhow::Result<Self> {
        let pool = &settings.pool;
        rdma::supports(pool.rdma_read_mode)?;
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let description = format!("vhost-brmr, process {} on {}", std::process::id(), host.trim());
        let mut config = Config::new(ClientId::random(), description);
        config.takeover = pool.takeover;
        config.force_from = pool.force_from.map(|member| Force { member, decided: SystemTime::now() });
        config.leg_timeout = pool.leg_timeout;
        config.suspend_timeout = pool.suspend_timeout;
        if let Some(path) = &pool.key_file {
            config.keys = KeyRing::from_file(path)?;
        }
        if let Some(files) = &pool.tls {
            config.tls = Some(ClientTls::load(&files.authorities, files.identity.as_ref())?);
        }
        config.fabric = Fabric::new(pool.rdma_read_mode);
        config.read_error_limit = pool.read_error_limit;
        config.rejoin_backoff_max = pool.rejoin_backoff_max;
        config.data_digest = pool.data_digest;
        config.bounce_memory = pool.bounce_memory;
        let selector: PoolSelector = pool.pool.to_string().parse()?;
        if config.tls.is_none()
            && let Some(node) = pool.nodes.iter().find(|node| node.transport() == TransportKind::Tls)
        {
            anyhow::bail!(
                "node {node} is reached by TLS, and no certificate authority is trusted: set tls-authorities"
            );
        }
        let (pool_name, mut waiting) = (pool.pool.to_string(), Waiting::new());
        let mut goes_on = |reason: &str| {
            waiting.tell(&pool_name, reason);
            !sys::is_stop_pending()
        };
        let spec = discover_while(config.clone(), selector, &pool.nodes, pool.suspend_timeout, &mut goes_on);
        let spec = match spec {
            Err(PoolError::GivenUp { waiting_for }) => {
                return Err(anyhow::Error::new(ToldToStop).context(format!("waited for: {waiting_for}")));
            }
            spec => spec?,
        };
        anyhow::ensure!(
            spec.logical_block_size <= 4096,
            "logical block size {}: expected at most 4096",
            spec.logical_block_size
        );
        Ok(Self {
            config,
            spec,
            seeds: pool.nodes.clone(),
            driver: None,
            retired: None,
            was_active: false,
            detaching: false,
            refused: None,
            displaced: None,
            incoming: pool.incoming,
            lost_writes: false,
            done: Vec::new(),
            notices: Vec::new(),
            failed: Vec::new(),
            logs: Throttles::new(10, LOG_INTERVAL),
        })
    }

    fn log_notices(&mut self) {
        let Some(driver) = &mut self.driver else { return };
        driver.take_notices(&mut self.notices);
        let traffic = *driver.traffic();
        let changed = |n: &Notice| matches!(n, Notice::Attached(_) | Notice::Committed(_));
        if self.notices.iter().any(changed)
            && let Some(spec) = driver.spec().filter(|spec| **spec != self.spec)
        {
            // The next attachment begins with what this one learned: members may have moved.
            self.spec = spec.clone();
        }
        let pool = self.spec.name.as_str();
        let logs = &mut self.logs;
        for notice in self.notices.drain(..) {
            match notice {
                Notice::LegUp(member, address) => logs.log(("connected", Some(member)), |withheld| {
                    tracing::info!(pool, %member, %address, withheld, "connected");
                }),
                Notice::LinkLost(Some(member), address, reason) => {
                    logs.log(("connection", Some(member)), |withheld| {
                        tracing::warn!(pool, %member, %address, withheld, "connection lost: {reason}");
                    });
                }
                Notice::LinkLost(None, address, reason) => logs.log(("no connection", None), |withheld| {
                    tracing::warn!(pool, %address, withheld, "no connection: {reason}");
                }),
                Notice::Attached(view) => logs.log(("attached", None), |withheld| {
                    tracing::info!(pool, withheld, "attached with {view}");
                }),
                Notice::Committed(view) => logs.log(("view", None), |withheld| {
                    tracing::info!(pool, withheld, "{view} is committed");
                }),
                Notice::Spec(spec) => {
                    tracing::info!(pool, "{} bytes, members {}", spec.size, spec.member_set());
                }
                Notice::NoRoom(member, reason) => {
                    tracing::warn!(pool, %member, "cannot come back, its store has no room for the pool: {reason}");
                }
                Notice::Lost(members, cause, reason) => {
                    let subject = members.iter().next();
                    let cause = cause.name();
                    logs.log(("lost", subject), |withheld| {
                        tracing::warn!(
                            pool, %members, cause, withheld,
                            "members lost: {reason}; the guest goes on without them, and what they miss is recorded"
                        );
                    });
                }
                Notice::RejoinFailed { member, cause, reason, failures, pause } => {
                    let step = cause.next_step().unwrap_or("nothing has to be done");
                    let cause = cause.name();
                    logs.log(("rejoin", Some(member)), |withheld| {
                        tracing::warn!(
                            pool, %member, cause, failures, withheld,
                            "member not brought in: {reason}; next try in {:.0} s; {step}",
                            pause.as_secs_f64().ceil()
                        );
                    });
                }
                Notice::Suspended(reason) => logs.log(("suspended", None), |withheld| {
                    tracing::error!(
                        pool,
                        withheld,
                        "suspended, no current copy can be reached: {reason}; requests wait"
                    );
                }),
                Notice::Waiting(text) => logs.log(("waiting", None), |withheld| {
                    tracing::warn!(pool, withheld, "waiting: {text}");
                }),
                Notice::ReadError(member, offset, length) => logs.log(("read error", Some(member)), |withheld| {
                    tracing::error!(pool, %member, offset, length, withheld, "disk error on read, trying another copy");
                }),
                Notice::Regressed { member, known, shown } => {
                    tracing::error!(
                        pool, %member,
                        "its store went back in time (restored from a copy or a snapshot?): it was at {known} and shows {shown}; it \
                         is out until it is copied over in full"
                    );
                }
                Notice::Duplicate(store, Some(used), a, b) => {
                    tracing::error!(
                        pool, %store,
                        "{a} and {b} both show this store, so one is a copy: {used} is used; remove the other one"
                    );
                }
                Notice::Duplicate(store, None, a, b) => {
                    tracing::error!(
                        pool, %store,
                        "{a} and {b} both show this store, so one is a copy, and neither is where the pool has it: neither is \
                         used; remove the wrong one"
                    );
                }
                Notice::Verify(text) => tracing::info!(pool, "verify {text}"),
                Notice::LostWrites(members, blocks) => {
                    tracing::error!(
                        pool, %members, blocks,
                        "the machines of all current members were started anew, or their disks failed a flush: completed writes \
                         that were not flushed are lost; every request fails until the guest resets the device"
                    );
                }
                Notice::DetachFailed(members, true) => {
                    tracing::error!(
                        pool, %members,
                        "no current member has detached in order: writes that were not flushed may be lost; look at the logs \
                         of their nodes before the disk is used again"
                    );
                }
                Notice::DetachFailed(members, false) => {
                    tracing::warn!(
                        pool, %members,
                        "members have not detached in order: they are brought up to date from the others at the next attach"
                    );
                }
                Notice::Over(OverReason::Detached) => {
                    tracing::info!(pool, transport = ?driver.counters(), "detached; {traffic}");
                }
                // What it means is known above: a guest that went elsewhere is no failure.
                Notice::Over(reason @ (OverReason::Fenced(_) | OverReason::Held(_))) => {
                    tracing::warn!(pool, "{reason}");
                }
                Notice::Over(reason) => tracing::error!(pool, "{reason}"),
            }
        }
    }

    /// Notes what the driver's end means.
    fn settle(&mut self) {
        let Some(driver) = &self.driver else { return };
        self.was_active |= driver.is_active();
        self.incoming &= !self.was_active;
        let Some(reason) = driver.over() else { return };
        let is_displaced = self.was_active && matches!(reason, OverReason::Fenced(_) | OverReason::Held(_));
        if is_displaced && !self.detaching {
            self.displaced = Some(reason.to_string());
        } else if *reason != OverReason::Detached && !is_displaced {
            self.refused = Some(reason.to_string());
            return;
        }
        if driver.in_flight() == 0
            && !driver.has_completions()
            && self.done.is_empty()
            && self.failed.is_empty()
        {
            self.lost_writes |= driver.has_lost_writes();
            if let Some(mut driver) = self.driver.take() {
                driver.retire();
                self.retired = Some((driver, false));
            }
            self.detaching = false;
            self.was_active = false;
        }
    }
}

impl Disk for PoolDisk {
    fn geometry(&self) -> Geometry {
        let granularity = u32::try_from(BLOCK_SIZE).unwrap_or(4096);
        let ranges = RangeLimits { max_length: MAX_RANGE, max_ranges: MAX_RANGES, granularity };
        Geometry {
            size: self.spec.size,
            logical_block_size: self.spec.logical_block_size,
            physical_block_size: granularity,
            optimal_io_size: 0,
            max_segments: MAX_SEGMENTS,
            max_segment_size: MAX_SEGMENT_SIZE,
            discard: Some(ranges),
            write_zeroes: Some(ranges),
        }
    }

    fn attach(&mut self) {
        let mut config = self.config.clone();
        config.takeover |= self.incoming;
        // Forced once: what other members get from now on is not to be thrown away by the next guest.
        self.config.force_from = None;
        match PoolDriver::with_spec(config, self.spec.clone(), &self.seeds)
            .context("cannot start the pool client")
        {
            Ok(driver) => self.driver = Some(driver),
            Err(error) => self.refused = Some(words::error(error.as_ref())),
        }
    }

    fn detach(&mut self) {
        self.displaced = None;
        if let Some(driver) = &mut self.driver {
            self.detaching = true;
            driver.detach();
        }
        self.settle();
    }

    fn reset(&mut self) {
        if self.lost_writes || self.driver.as_ref().is_some_and(PoolDriver::has_lost_writes) {
            tracing::warn!(pool = %self.spec.name, "the guest has reset the device; it starts from what the members have");
        }
        self.lost_writes = false;
        // A guest that begins anew reads from the disk whatever it needs, and nothing of before is in its memory.
        self.displaced = None;
        if let Some(driver) = &mut self.driver {
            driver.acknowledge_loss();
        }
    }

    fn attachment(&self) -> Attachment<'_> {
        match (&self.refused, &self.displaced, &self.driver) {
            (Some(reason), ..) => Attachment::Refused(reason),
            (None, Some(reason), _) => Attachment::Displaced(reason),
            (None, None, None) => Attachment::Detached,
            (None, None, Some(_)) if self.detaching => Attachment::Detaching,
            (None, None, Some(_)) if self.was_active => Attachment::Attached,
            (None, None, Some(_)) => Attachment::Attaching,
        }
    }

    fn submit(&mut self, token: Token, request: Request<'_>) {
        let Some(driver) = self.driver.as_mut().filter(|_| !self.lost_writes) else {
            return self.failed.push(token);
        };
        let operation = match request.operation {
            Operation::Read => client::Operation::Read,
            Operation::Write => client::Operation::Write,
            Operation::Flush => client::Operation::Flush,
            // A discarded range of a pool reads as zeroes, so both say the same when the space may be given back.
            Operation::Discard | Operation::WriteZeroes { unmap: true } => client::Operation::Discard,
            Operation::WriteZeroes { unmap: false } => client::Operation::WriteZeroes,
        };
        driver.submit(client::Token(token.0), operation, request.offset, request.length, request.segments);
    }

    fn cancel(&mut self) {
        if let Some(driver) = &mut self.driver {
            driver.cancel();
        }
    }

    fn completions(&mut self, done: &mut Vec<(Token, Result<(), DiskError>)>) {
        if let Some(driver) = &mut self.driver {
            driver.completions(&mut self.done);
        }
        done.extend(self.failed.drain(..).map(|token| (token, Err(DiskError::Failed))));
        done.extend(self.done.drain(..).map(|(token, result)| (Token(token.0), result.map_err(disk_error))));
    }

    fn watch_changes(&mut self, changes: &mut Vec<WatchChange>) {
        if let Some((driver, is_told)) = &mut self.retired {
            driver.watch_changes(changes);
            *is_told = true;
        }
        if let Some(driver) = &mut self.driver {
            driver.watch_changes(changes);
        }
    }

    fn ready(&mut self, fd: RawFd, set: EventSet) {
        if let Some(driver) = &mut self.driver {
            driver.ready(fd, set);
        }
    }

    fn upkeep(&mut self) {
        // The loop has carried out what it was told.
        self.retired.take_if(|(_, is_told)| *is_told);
        match &mut self.driver {
            Some(driver) => driver.upkeep(),
            // Without connections nobody else would hear that a device was removed.
            None if self.config.fabric.has_devices() => self.config.fabric.let_go(),
            None => {}
        }
        self.log_notices();
        self.settle();
    }

    fn fabric(&self) -> Option<Fabric> {
        Some(self.config.fabric.clone())
    }

    fn timeout(&self) -> Option<Duration> {
        // Some are finished by what is done after completions were taken, and nothing else wakes the loop for them.
        let is_due = !self.failed.is_empty() || self.retired.is_some();
        if is_due || self.driver.as_ref().is_some_and(PoolDriver::has_completions) {
            return Some(Duration::ZERO);
        }
        if self.driver.is_none() && self.config.fabric.has_devices() {
            return Some(DEVICE_BEAT);
        }
        self.driver.as_ref().filter(|d| d.over().is_none()).map(PoolDriver::timeout)
    }
}

const fn disk_error(error: IoError) -> DiskError {
    match error {
        IoError::Cancelled => DiskError::Cancelled,
        IoError::Suspended => DiskError::Suspended,
        IoError::LostWrites => DiskError::LostWrites,
        IoError::Fenced => DiskError::Fenced,
        IoError::Memory => DiskError::Memory,
        IoError::BadRange | IoError::Media | IoError::Detached | IoError::TooMany => DiskError::Failed,
    }
}

#[cfg(test)]
#[allow(unsafe_code, dead_code, clippy::expect_used)]
#[path = "../../rmr-common/src/driver/fake_node.rs"]
mod fake_node;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Instant;

    use rmr_common::buffer::Segment;
    use rmr_common::pool::{ChunkSize, MemberId, MemberSpec, PoolId, StoreId};

    use super::fake_node::{FakeNode, eventually};
    use super::*;

    /// A pool whose only node is not there.
    fn unreachable(suspend_timeout: Duration) -> PoolDisk {
        let address = Address::tcp("127.0.0.1", 1);
        let member = MemberId::all().next().unwrap();
        let spec = PoolSpec {
            id: PoolId::random(),
            name: "p".into(),
            size: 1 << 20,
            chunk_size: ChunkSize::default(),
            logical_block_size: 512,
            members: vec![MemberSpec::new(member, StoreId::random(), address.clone())],
        };
        disk(spec, suspend_timeout)
    }

    fn disk(spec: PoolSpec, suspend_timeout: Duration) -> PoolDisk {
        let mut config = Config::new(ClientId::random(), "a test");
        config.suspend_timeout = suspend_timeout;
        config.reconnect_interval = Duration::from_millis(10);
        PoolDisk {
            config,
            seeds: spec.members.iter().map(|member| member.address.clone()).collect(),
            spec,
            driver: None,
            retired: None,
            was_active: false,
            detaching: false,
            refused: None,
            displaced: None,
            incoming: false,
            lost_writes: false,
            done: Vec::new(),
            notices: Vec::new(),
            failed: Vec::new(),
            logs: Throttles::default(),
        }
    }

    fn submit(disk: &mut PoolDisk, token: u64, offset: u64) {
        let segments: [Segment; 0] = [];
        let request = Request { operation: Operation::Discard, offset, length: 4096, segments: &segments };
        disk.submit(Token(token), request);
    }

    #[test]
    fn a_request_that_ends_together_with_the_attachment_is_completed() {
        let mut disk = unreachable(Duration::from_millis(50));
        disk.attach();
        submit(&mut disk, 7, 0);
        disk.detach();
        let (mut done, deadline) = (Vec::new(), Instant::now() + Duration::from_secs(60));
        while done.is_empty() {
            assert!(Instant::now() < deadline, "the request is lost");
            std::thread::sleep(Duration::from_millis(5));
            // In the order of a turn of the loop.
            disk.completions(&mut done);
            disk.upkeep();
        }
        assert_eq!(done, [(Token(7), Err(DiskError::Suspended))]);
        disk.upkeep();
        assert!(matches!(disk.attachment(), Attachment::Detached));
        // Nothing of the attachment is kept once the loop watches nothing of it.
        assert!(disk.retired.is_some());
        assert_eq!(disk.timeout(), Some(Duration::ZERO));
        let mut changes = Vec::new();
        disk.watch_changes(&mut changes);
        assert!(!changes.is_empty() && disk.retired.is_some());
        disk.upkeep();
        assert!(disk.retired.is_none());
        assert_eq!(disk.timeout(), None);
    }

    #[test]
    fn the_loop_does_not_sleep_over_a_request_that_is_finished() {
        let mut disk = unreachable(Duration::from_secs(60));
        disk.attach();
        disk.upkeep();
        assert_ne!(disk.timeout(), Some(Duration::ZERO));
        submit(&mut disk, 1, 1 << 40);
        disk.upkeep();
        assert_eq!(disk.timeout(), Some(Duration::ZERO));
    }

    /// A disk with a node, in the turns of the loop.
    struct Turns {
        disk: PoolDisk,
        watched: BTreeSet<RawFd>,
        done: Vec<(Token, Result<(), DiskError>)>,
    }

    impl Turns {
        fn new(node: &FakeNode) -> Self {
            let disk = disk(node.spec(), Duration::from_secs(60));
            Self { disk, watched: BTreeSet::new(), done: Vec::new() }
        }

        fn turn(&mut self) {
            self.watched.iter().for_each(|fd| self.disk.ready(*fd, EventSet::IN));
            self.disk.completions(&mut self.done);
            self.disk.upkeep();
            let mut changes = Vec::new();
            self.disk.watch_changes(&mut changes);
            for change in changes {
                match change {
                    WatchChange::Add(fd, _) => drop(self.watched.insert(fd)),
                    WatchChange::Modify(..) => {}
                    WatchChange::Remove(fd) => drop(self.watched.remove(&fd)),
                }
            }
        }

        fn until(&mut self, what: &str, mut condition: impl FnMut(&mut Self) -> bool) {
            eventually(what, || {
                self.turn();
                condition(self)
            });
        }

        fn attach(&mut self) {
            self.disk.attach();
            self.until("the attachment", |t| matches!(t.disk.attachment(), Attachment::Attached));
        }

        fn detach(&mut self) {
            self.disk.detach();
            self.until("the detachment", |t| matches!(t.disk.attachment(), Attachment::Detached));
        }

        fn request(&mut self, operation: Operation) -> Result<(), DiskError> {
            let length = if operation == Operation::Flush { 0 } else { 4096 };
            self.disk.submit(Token(7), Request { operation, offset: 0, length, segments: &[] });
            self.until("the completion", |t| !t.done.is_empty());
            self.done.remove(0).1
        }
    }

    #[test]
    fn lost_writes_are_not_forgotten_with_the_front_end_that_was_not_told() {
        let node = FakeNode::start();
        let mut turns = Turns::new(&node);
        turns.attach();
        assert_eq!(turns.request(Operation::Discard), Ok(()));
        // The machine loses power with what was not flushed.
        {
            let mut state = node.state();
            state.host_boot = 2;
            state.cut = true;
        }
        turns.until("the loss", |t| t.disk.driver.as_ref().is_some_and(PoolDriver::has_lost_writes));
        assert_eq!(turns.request(Operation::Discard), Err(DiskError::LostWrites));
        for _ in 0..2 {
            turns.detach();
            turns.attach();
            assert_eq!(turns.request(Operation::Discard), Err(DiskError::Failed), "by another front end");
        }
        turns.disk.reset();
        assert_eq!(turns.request(Operation::Discard), Ok(()));
        // And once more, by a guest that stays and resets its device.
        {
            let mut state = node.state();
            state.host_boot = 3;
            state.cut = true;
        }
        turns.until("the loss", |t| t.disk.driver.as_ref().is_some_and(PoolDriver::has_lost_writes));
        turns.disk.reset();
        assert_eq!(turns.request(Operation::Discard), Ok(()));
        turns.detach();
        turns.attach();
        assert_eq!(turns.request(Operation::Flush), Ok(()));
    }

    #[test]
    fn what_is_meant_for_one_attachment_is_not_done_by_the_next() {
        let node = FakeNode::start();
        let mut turns = Turns::new(&node);
        turns.disk.incoming = true;
        let member = node.spec().members[0].id;
        turns.disk.config.force_from = Some(Force { member, decided: SystemTime::now() });
        turns.disk.attach();
        assert!(turns.disk.config.force_from.is_none(), "forced once");
        assert!(turns.disk.incoming, "not attached yet");
        turns.until("the attachment", |t| matches!(t.disk.attachment(), Attachment::Attached));
        turns.turn();
        assert!(!turns.disk.incoming, "the guest has come");
        assert!(!turns.disk.config.takeover);
        turns.detach();
        assert!(turns.watched.is_empty(), "watched by nobody");
    }

    #[test]
    fn a_client_that_was_displaced_says_so_until_the_guest_begins_anew() {
        let node = FakeNode::start();
        let mut turns = Turns::new(&node);
        turns.attach();
        node.state().fences = true;
        assert_eq!(turns.request(Operation::Discard), Err(DiskError::Fenced));
        turns.until("the end", |t| matches!(t.disk.attachment(), Attachment::Displaced(_)));
        node.state().fences = false;
        turns.disk.reset();
        turns.until("the end of the driver", |t| matches!(t.disk.attachment(), Attachment::Detached));
        turns.attach();
        assert_eq!(turns.request(Operation::Discard), Ok(()));
        // A front end that leaves is not displaced, whatever the nodes say meanwhile.
        node.state().holds = true;
        turns.disk.submit(
            Token(8),
            Request { operation: Operation::Discard, offset: 0, length: 4096, segments: &[] },
        );
        turns.turn();
        turns.disk.detach();
        {
            let mut state = node.state();
            (state.holds, state.fences) = (false, true);
        }
        turns.until("the end", |t| matches!(t.disk.attachment(), Attachment::Detached));
        assert_eq!(turns.done, [(Token(8), Err(DiskError::Fenced))]);
    }
}
