//! Disks that fail a flush, under real clients: the nodes run in the test's own process, where their disks can be told to.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;

use rmr_common::client::{IoError, PoolSelector};
use rmr_common::driver::Pool;
use rmr_common::pool::{Address, ChunkSize, MemberId, MemberSpec, PoolId, PoolSpec, StoreId, View};
use rmr_node::config::{Config, Settings};
use rmr_node::disk::faults;
use rmr_node::lifecycle::Shutdown;
use rmr_node::store::{CreateOptions, Store, ZeroPolicy};

use crate::support::*;

/// The faults are those of the whole process.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Nodes of one pool, each with a member of it.
struct Nodes {
    spec: PoolSpec,
    stores: Vec<PathBuf>,
    running: Vec<(Shutdown, JoinHandle<anyhow::Result<()>>)>,
    _dir: tempfile::TempDir,
}

impl Nodes {
    fn start(count: usize) -> Self {
        // Not in memory, where nothing needs a flush.
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        let addresses: Vec<_> = (0..count).map(|_| own_address()).collect();
        let members: Vec<MemberSpec> = MemberId::all()
            .zip(&addresses)
            .map(|(id, at)| {
                MemberSpec::new(id, StoreId::random(), Address::tcp(at.ip().to_string(), at.port()))
            })
            .collect();
        let spec = PoolSpec {
            id: PoolId::random(),
            name: "pool".into(),
            size: POOL_SIZE,
            chunk_size: ChunkSize::default(),
            logical_block_size: 512,
            members: members.clone(),
        };
        let (mut stores, mut running) = (Vec::new(), Vec::new());
        for (line, address) in members.iter().zip(&addresses) {
            let path = dir.path().join(format!("{}.store", line.id));
            let options = CreateOptions {
                spec: spec.clone(),
                member: line.id,
                store: line.store,
                view: View::initial(members.iter().map(|m| (m.id, m.store))),
                overwrite: false,
                zero: ZeroPolicy::Zero,
                max_size: None,
            };
            Store::create(&path, &options, &mut |_, _| {}).expect("the store is created");
            let own = Settings {
                listen: Some(vec![Address::tcp(address.ip().to_string(), address.port())]),
                admin: Some("127.0.0.1:0".parse().expect("an address")),
                stores: Some(vec![path.clone()]),
                ..Settings::default()
            };
            let config = Config::new(&own.with_defaults().expect("defaults")).expect("a configuration");
            let shutdown = Shutdown::new().expect("a switch");
            let ends = shutdown.clone();
            running.push((shutdown, std::thread::spawn(move || rmr_node::service::run(config, ends))));
            stores.push(path);
        }
        Self { spec, stores, running, _dir: dir }
    }

    fn attach(&self) -> Pool {
        let addresses: Vec<_> = self.spec.members.iter().map(|m| m.address.clone()).collect();
        Pool::connect(Node::config("a client"), PoolSelector::Id(self.spec.id), &addresses, PATIENCE)
            .expect("the pool attaches")
    }

    fn stop(&mut self) {
        for (shutdown, thread) in self.running.drain(..) {
            shutdown.request();
            thread.join().expect("no panic").expect("it ends in order");
        }
    }
}

#[test]
fn a_member_that_fails_a_flush_leaves_the_pool_and_is_brought_up_to_date_again() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let mut nodes = Nodes::start(2);
    let pool = nodes.attach();
    let blocking = pool.blocking();
    for i in 0..16 {
        blocking.write_at(&pattern(i, 8192), i * (1 << 20)).expect("a write");
    }
    faults::fail_flushes(1);
    blocking.flush().expect("the other member has flushed");
    assert_eq!(faults::flushes_to_fail(), 0);
    let is_lost = || pool.status().is_some_and(|s| s.counters.views > 1);
    wait_for("the member leaves the view", is_lost);
    for member in nodes.spec.member_set().iter() {
        assert!(blocking.wait_until_clean(member, PATIENCE), "member {member} comes back");
    }
    blocking.flush().expect("all members flush");
    drop(pool);
    nodes.stop();
    let [a, b] = [0, 1].map(|i| {
        let superblock = Store::open(&nodes.stores[i], None).expect("a store").superblock().clone();
        assert!(!superblock.flush_failed, "the attachment has dealt with it");
        let offset = usize::try_from(superblock.layout.data_offset).expect("small");
        std::fs::read(&nodes.stores[i]).expect("a file")[offset..].to_vec()
    });
    assert!(a == b && a[..8192] == pattern(0, 8192)[..]);
}

#[test]
fn a_pool_whose_only_copy_failed_a_flush_serves_nothing_until_the_loss_is_acknowledged() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let mut nodes = Nodes::start(1);
    let pool = nodes.attach();
    let blocking = pool.blocking();
    blocking.write_at(&pattern(1, 8192), 0).expect("a write");
    faults::fail_flushes(1);
    assert_eq!(blocking.flush(), Err(IoError::Media));
    let lost = || blocking.flush() == Err(IoError::LostWrites);
    wait_for("the client hears of the loss", lost);
    pool.acknowledge_loss();
    wait_for("requests are served again", || blocking.flush().is_ok());
    drop(pool);
    nodes.stop();
    let store = Store::open(&nodes.stores[0], None).expect("a store");
    assert!(!store.superblock().flush_failed, "the attachment has dealt with it");
}
