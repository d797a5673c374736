//! The admin API of a node: HTTP and JSON on a thread of its own, apart from the I/O shards.
//!
//! [`api`] has the types that go over the wire, shared with `rmrctl`; [`NodeControl`] is the seam through which the
//! server asks the service; [`AdminServer`] serves it within fixed limits; [`metrics`] writes the Prometheus page.

pub mod api;
mod connections;
#[cfg(test)]
pub(crate) mod fake;
mod hosts;
pub mod metrics;
mod routes;
mod server;
mod stores;
#[cfg(test)]
mod tests;
pub mod words;

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;

use rmr_common::pool::{Command, CommandReply, StoreId};
use tokio::sync::oneshot;

pub use hosts::HostNames;
pub use server::{AdminLimits, AdminServer};

use api::{
    ControlError, CreateStore, DeleteStore, ErrorCode, NodeInfo, PoolKey, PoolStatus, StoreChanged,
    StoreCreated, StoreList, StoreName,
};

/// The answer of the service to one request of the admin API.
pub type Reply<T> = Pin<Box<dyn Future<Output = Result<T, ControlError>> + Send>>;

/// A reply that an event loop gives later, without a runtime: the two ends of one answer.
#[must_use]
pub fn reply<T: Send + 'static>() -> (Responder<T>, Reply<T>) {
    let (sender, receiver) = oneshot::channel();
    let reply = async {
        receiver.await.unwrap_or_else(|_| Err(ControlError::new(ErrorCode::Busy, "the node is stopping")))
    };
    (Responder(sender), Box::pin(reply))
}

/// The end of a [`reply`] that answers. Dropping it answers that the node is stopping, so no caller waits for ever.
#[derive(Debug)]
pub struct Responder<T>(oneshot::Sender<Result<T, ControlError>>);

impl<T> Responder<T> {
    /// Answers. Nothing happens when the caller has given up.
    pub fn send(self, answer: Result<T, ControlError>) {
        // The other end is gone when the request timed out.
        let _ = self.0.send(answer);
    }
}

/// What the admin API needs of the running service.
///
/// Methods are called on the admin thread and must not block it: they hand the request to the shard that owns the
/// state and return a future that resolves with its answer. A future that is dropped (the request timed out) does not
/// take back what was asked.
pub trait NodeControl: Send + Sync + 'static {
    /// What this node is and how full it is.
    fn node_info(&self) -> Reply<NodeInfo>;

    /// One status for each open store, in any order.
    fn pools(&self) -> Reply<Vec<PoolStatus>>;

    /// Creates a member store, opens it and serves it. The specification and the view have been validated, and the
    /// view names the member with the specification's store. A store, a pool or another pool's name that is here
    /// already is refused with [`ErrorCode::Exists`].
    fn create_store(&self, request: CreateStore) -> Reply<StoreCreated>;

    /// Closes a store and destroys its metadata; a file that the node made in its store directory is removed.
    fn delete_store(&self, store: StoreId, request: DeleteStore) -> Reply<()>;

    /// The stores of the node, open and left out.
    fn stores(&self) -> Reply<StoreList>;

    /// Opens a store that was left out or closed, or another one at a path.
    fn open_store(&self, path: PathBuf) -> Reply<StoreChanged>;

    /// Closes a store, which stays as it is and is not opened again by itself.
    fn close_store(&self, name: StoreName) -> Reply<StoreChanged>;

    /// Deletes a store that is open or left out. Of what is left out and cannot be read, the node only stops to know.
    fn delete_store_at(&self, name: StoreName) -> Reply<StoreChanged>;

    /// Gives a command to the client that is attached to the pool, wherever that is: to this node, or to that of another
    /// member. A refusal of the client is a reply; it may take as long as devices take to zero themselves.
    fn command(&self, pool: PoolKey, command: Command) -> Reply<CommandReply>;
}
