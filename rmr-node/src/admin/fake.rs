//! A node in memory for tests of the server and of `rmrctl`: it keeps statuses, and fails when told to.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rmr_common::pool::{
    Address, ChunkSize, ClientId, Command, CommandReply, MemberId, MemberSpec, MemberState, PoolId, PoolSpec,
    Refusal, StoreId, View,
};

use super::api::{
    ClientState, ClientStatus, ControlError, CreateStore, DeleteStore, ErrorCode, HistoryStatus, IoCounters,
    LeftOut, LinkState, Missed, NodeInfo, OpenStore, PeerStatus, PoolKey, PoolStatus, StoreChanged,
    StoreCreated, StoreList, StoreName, StoreState, UnixMs,
};
use super::{AdminLimits, AdminServer, HostNames, NodeControl, Reply};

/// A member id that the test knows to be valid.
pub(crate) fn member(index: u8) -> MemberId {
    MemberId::new(index).unwrap()
}

/// Limits small enough to be hit by a test, and large enough for a request on a crowded machine.
pub(crate) fn limits() -> AdminLimits {
    AdminLimits { max_connections: 8, max_body: 16 << 10, request_timeout: Duration::from_secs(2) }
}

/// What a healthy, empty node says of itself.
pub(crate) fn node_info(name: &str) -> NodeInfo {
    NodeInfo {
        name: name.into(),
        version: "0.1.0".into(),
        started_unix_ms: UnixMs(1_000),
        now_unix_ms: UnixMs::now(),
        data_addresses: vec![Address::tcp(name, 7700)],
        admin_address: SocketAddr::from(([127, 0, 0, 1], 7701)),
        engine: "uring".into(),
        shards: 1,
        stores: 0,
        stores_left_out: 0,
        max_stores: 16_384,
        connections: 0,
        max_connections: 256,
        buffer_bytes: 64 << 20,
        buffer_used_bytes: 0,
        buffer_lent_bytes: 0,
        transport: rmr_common::transport::Counters::default(),
        authentication_failures: crate::admin::api::AuthenticationFailures::default(),
    }
}

/// A pool of `members` members named `n0`, `n1`, …, all Clean, as member `of` sees it.
pub(crate) fn pool_status(name: &str, members: u8, of: u8) -> PoolStatus {
    let line = |id| {
        // Deterministic, so that statuses made apart for the members of one pool agree.
        let store = StoreId::from_bytes([id + 1; 16]);
        MemberSpec::new(member(id), store, Address::tcp(format!("n{id}"), 7700))
    };
    let spec = PoolSpec {
        id: PoolId::from_bytes([0xAA; 16]),
        name: name.into(),
        size: 64 << 20,
        chunk_size: ChunkSize::default(),
        logical_block_size: 512,
        members: (0..members).map(line).collect(),
    };
    let view = View::initial(spec.members.iter().map(|m| (m.id, m.store)));
    status_of(
        &CreateStore {
            spec,
            member: member(of),
            view,
            path: None,
            overwrite: false,
            assume_zero: false,
            max_size_bytes: None,
        },
        &format!("n{of}"),
    )
}

/// A client that is attached.
pub(crate) fn client(attached_unix_ms: u64) -> ClientStatus {
    ClientStatus {
        id: ClientId::from_bytes([0xCC; 16]),
        text: "vhost-brmr on hv-1, pid 77".into(),
        address: "10.0.0.9:40000".into(),
        state: ClientState::Attached,
        attached_unix_ms: Some(UnixMs(attached_unix_ms)),
    }
}

/// A store that is left out, of a pool that [`pool_status`] makes.
pub(crate) fn left_out(path: &str, pool: &str, of: u8) -> LeftOut {
    LeftOut {
        path: path.into(),
        pool: Some(PoolId::from_bytes([0xAA; 16])),
        name: Some(pool.into()),
        member: Some(member(of)),
        store: Some(StoreId::from_bytes([of + 1; 16])),
        reason: "I/O error".into(),
        closed: false,
        since_unix_ms: UnixMs(1_000),
        attempts: 1,
        next_attempt_s: Some(1),
    }
}

/// Sets the state of a member in the view of a status and makes it a later view.
pub(crate) fn set_state(status: &mut PoolStatus, index: u8, state: MemberState) {
    status.view.number = status.view.number.next();
    status.view.members.iter_mut().find(|m| m.id == member(index)).unwrap().state = state;
}

fn status_of(request: &CreateStore, node: &str) -> PoolStatus {
    let own = request.spec.member(request.member).unwrap();
    let peer = |m: &MemberSpec| PeerStatus {
        member: m.id,
        link: LinkState::Idle,
        state_since_unix_ms: None,
        missed: Missed { chunks: 0, blocks: Some(0) },
        condition: None,
    };
    PoolStatus {
        spec: request.spec.clone(),
        node: node.into(),
        member: request.member,
        store: own.store,
        path: request.path.clone().unwrap_or_else(|| {
            PathBuf::from(format!("/stores/{}-{}.store", request.spec.id, request.member))
        }),
        store_state: StoreState::Serving,
        view: request.view.clone(),
        client: None,
        peers: request.spec.members.iter().filter(|m| m.id != own.id).map(peer).collect(),
        io: IoCounters::default(),
        latency: None,
        resync: None,
        authentication: crate::admin::api::Authentication::None,
        key_fingerprints: Vec::new(),
        max_size_bytes: Some(8 * request.spec.size),
        history: HistoryStatus::default(),
        disk: None,
    }
}

/// What a fake node holds and how it is to fail.
#[derive(Default)]
pub(crate) struct FakeState {
    pub(crate) stores: BTreeMap<StoreId, PoolStatus>,
    /// Stores that the node leaves out.
    pub(crate) left_out: Vec<LeftOut>,
    /// Refuse the next creations with this.
    pub(crate) refuse_create: Option<ControlError>,
    /// Refuse deletions with this.
    pub(crate) refuse_delete: Option<ControlError>,
    /// Create, and answer only after this.
    pub(crate) create_takes: Duration,
    /// Never answer when asked for pools.
    pub(crate) pools_hang: bool,
    /// What commands are answered with, in turn; then that nobody is attached.
    pub(crate) replies: VecDeque<CommandReply>,
    /// Commands so far.
    pub(crate) commands: Vec<Command>,
    /// What was asked to be created so far.
    pub(crate) requests: Vec<CreateStore>,
}

/// The [`NodeControl`] of a fake node.
pub(crate) struct FakeControl {
    info: NodeInfo,
    state: Arc<Mutex<FakeState>>,
}

impl NodeControl for FakeControl {
    fn node_info(&self) -> Reply<NodeInfo> {
        let mut info = self.info.clone();
        info.now_unix_ms = UnixMs::now();
        info.stores = u32::try_from(self.state.lock().unwrap().stores.len()).unwrap();
        Box::pin(async move { Ok(info) })
    }

    fn pools(&self) -> Reply<Vec<PoolStatus>> {
        let state = self.state.lock().unwrap();
        if state.pools_hang {
            return Box::pin(std::future::pending());
        }
        let pools = state.stores.values().cloned().collect();
        Box::pin(async move { Ok(pools) })
    }

    fn create_store(&self, request: CreateStore) -> Reply<StoreCreated> {
        let mut state = self.state.lock().unwrap();
        if let Some(error) = state.refuse_create.clone() {
            return Box::pin(async move { Err(error) });
        }
        let status = status_of(&request, &self.info.name);
        let created = StoreCreated { store: status.store, path: status.path.clone(), warnings: Vec::new() };
        state.requests.push(request);
        state.stores.insert(status.store, status);
        let takes = state.create_takes;
        Box::pin(async move {
            tokio::time::sleep(takes).await;
            Ok(created)
        })
    }

    fn delete_store(&self, store: StoreId, request: DeleteStore) -> Reply<()> {
        let mut state = self.state.lock().unwrap();
        let result = match (&state.refuse_delete, state.stores.get(&store)) {
            (Some(error), _) => Err(error.clone()),
            (None, None) => Err(ControlError::new(ErrorCode::NotFound, format!("no store {store} here"))),
            (None, Some(status)) if status.client.is_some() && !request.force => {
                Err(ControlError::new(ErrorCode::InUse, "a client is attached"))
            }
            (None, Some(_)) => {
                state.stores.remove(&store);
                Ok(())
            }
        };
        Box::pin(async move { result })
    }

    fn stores(&self) -> Reply<StoreList> {
        let state = self.state.lock().unwrap();
        let open = state.stores.values().map(|p| OpenStore {
            path: p.path.clone(),
            pool: p.spec.id,
            name: p.spec.name.clone(),
            store: p.store,
            stage: "open".into(),
        });
        let (node, open, left_out) = (self.info.name.clone(), open.collect(), state.left_out.clone());
        let (problems, data_addresses) = (Vec::new(), self.info.data_addresses.clone());
        Box::pin(async move { Ok(StoreList { node, open, left_out, problems, data_addresses }) })
    }

    fn open_store(&self, path: PathBuf) -> Reply<StoreChanged> {
        let mut state = self.state.lock().unwrap();
        let at = state.left_out.iter().position(|l| l.path == path);
        let result = match at.map(|at| state.left_out.remove(at)) {
            Some(entry) => Ok(StoreChanged { path, store: entry.store, name: entry.name, notes: Vec::new() }),
            None => Err(ControlError::new(ErrorCode::Invalid, "no such store")),
        };
        Box::pin(async move { result })
    }

    fn close_store(&self, name: StoreName) -> Reply<StoreChanged> {
        let mut state = self.state.lock().unwrap();
        let is_it = |p: &PoolStatus| name.path.as_ref() == Some(&p.path) || name.store == Some(p.store);
        let found = state.stores.values().find(|p| is_it(p)).cloned();
        let result = match found {
            Some(p) if p.client.is_some() && !name.force => {
                Err(ControlError::new(ErrorCode::InUse, "a client is attached"))
            }
            Some(p) => {
                state.stores.remove(&p.store);
                let mut entry = left_out("/", &p.spec.name, 0);
                (entry.path, entry.store, entry.closed) = (p.path.clone(), Some(p.store), true);
                state.left_out.push(entry);
                Ok(StoreChanged {
                    path: p.path,
                    store: Some(p.store),
                    name: Some(p.spec.name),
                    notes: vec![],
                })
            }
            None => Err(ControlError::new(ErrorCode::NotFound, "no such store")),
        };
        Box::pin(async move { result })
    }

    fn delete_store_at(&self, name: StoreName) -> Reply<StoreChanged> {
        let mut state = self.state.lock().unwrap();
        let is_it = |l: &LeftOut| name.path.as_ref() == Some(&l.path) || name.store == l.store;
        let at = state.left_out.iter().position(is_it);
        let result = match at.map(|at| state.left_out.remove(at)) {
            Some(entry) => {
                Ok(StoreChanged { path: entry.path, store: entry.store, name: entry.name, notes: Vec::new() })
            }
            None => Err(ControlError::new(ErrorCode::NotFound, "no such store")),
        };
        Box::pin(async move { result })
    }

    fn command(&self, _pool: PoolKey, command: Command) -> Reply<CommandReply> {
        let mut state = self.state.lock().unwrap();
        state.commands.push(command);
        let nobody = || CommandReply::refused(Refusal::NoCoordinator, "nobody is attached");
        let reply = state.replies.pop_front().unwrap_or_else(nobody);
        Box::pin(async move { Ok(reply) })
    }
}

/// A fake node with a running admin server.
pub(crate) struct FakeNode {
    server: AdminServer,
    control: Arc<FakeControl>,
    pub(crate) state: Arc<Mutex<FakeState>>,
}

impl FakeNode {
    /// Starts a node that advertises `tcp://NAME:7700`.
    pub(crate) fn start(name: &str) -> Self {
        let state = Arc::new(Mutex::new(FakeState::default()));
        let control = Arc::new(FakeControl { info: node_info(name), state: Arc::clone(&state) });
        // On a host of this process alone: nobody else gets the port when the server has ended.
        let [_, high, middle, low] = std::process::id().to_be_bytes();
        let any = SocketAddr::from(([127, 64 | high, middle, low], 0));
        let server = AdminServer::start(any, limits(), HostNames::default(), control.clone()).unwrap();
        Self { server, control, state }
    }

    /// Its admin address as text.
    pub(crate) fn address(&self) -> String {
        self.server.local_addr().to_string()
    }

    /// What its server asks.
    pub(crate) fn control(&self) -> Arc<FakeControl> {
        Arc::clone(&self.control)
    }

    /// Puts a status into the node.
    pub(crate) fn hold(&self, status: PoolStatus) {
        self.state.lock().unwrap().stores.insert(status.store, status);
    }

    /// How many stores it holds.
    pub(crate) fn store_count(&self) -> usize {
        self.state.lock().unwrap().stores.len()
    }
}
