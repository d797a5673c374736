//! Which connections the admin server has, and which of them gives its place to a new one.
//!
//! A connection that waits for its caller, with half a request or half an answer, is worth nothing to anybody else. When all
//! places are taken, the oldest of these is closed for the one that comes: of the address that has most of them.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::task::AbortHandle;

/// The number of requests of one connection that the node works at. It tells a caller who waits for a disk to be zeroed from
/// one who keeps a connection for nothing.
#[derive(Clone, Debug, Default)]
pub(super) struct Work(Arc<AtomicU32>);

impl Work {
    pub(super) fn is_going_on(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }

    /// Says that a request was read whole, and is worked at until the guard is dropped.
    pub(super) fn begin(&self) -> WorkGuard {
        self.0.fetch_add(1, Ordering::Relaxed);
        WorkGuard(self.clone())
    }
}

/// Work that ends when this is dropped.
pub(super) struct WorkGuard(Work);

impl Drop for WorkGuard {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One connection.
struct Open {
    number: u64,
    peer: IpAddr,
    work: Work,
    /// Closes it; absent until its task runs.
    task: Option<AbortHandle>,
}

/// All connections of the server, oldest first.
#[derive(Clone, Default)]
pub(super) struct Connections(Arc<Mutex<List>>);

#[derive(Default)]
struct List {
    open: Vec<Open>,
    next: u64,
}

/// A connection in the list; dropped, it is off it.
pub(super) struct Listed {
    connections: Connections,
    number: u64,
}

impl Connections {
    fn list(&self) -> MutexGuard<'_, List> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a connection on the list.
    pub(super) fn add(&self, peer: SocketAddr, work: Work) -> Listed {
        let mut list = self.list();
        let number = list.next;
        list.next += 1;
        list.open.push(Open { number, peer: peer.ip(), work, task: None });
        Listed { connections: self.clone(), number }
    }

    /// Says how a connection is closed.
    pub(super) fn closed_by(&self, number: u64, task: AbortHandle) {
        if let Some(open) = self.list().open.iter_mut().find(|open| open.number == number) {
            open.task = Some(task);
        }
    }

    /// Closes the connection that is worth least, if there is one that waits for its caller.
    pub(super) fn close_one(&self) -> Option<IpAddr> {
        let list = self.list();
        let waits = |open: &&Open| open.task.is_some() && !open.work.is_going_on();
        let count = |peer: IpAddr| list.open.iter().filter(waits).filter(|open| open.peer == peer).count();
        // Of several with the same count `max_by_key` takes the last.
        let victim = list.open.iter().rev().filter(waits).max_by_key(|open| count(open.peer))?;
        if let Some(task) = &victim.task {
            task.abort();
        }
        Some(victim.peer)
    }
}

impl Listed {
    /// The connection's number.
    pub(super) const fn number(&self) -> u64 {
        self.number
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.connections.list().open.retain(|open| open.number != self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_that_waits_of_the_address_with_most_of_them_is_closed() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let connections = Connections::default();
            assert_eq!(connections.close_one(), None);
            let open = |host: u8| {
                let peer = SocketAddr::from(([10, 0, 0, host], 1));
                let (connections, work) = (connections.clone(), Work::default());
                let listed = connections.add(peer, work.clone());
                let task = tokio::spawn(std::future::pending::<()>());
                connections.closed_by(listed.number(), task.abort_handle());
                (listed, work, task)
            };
            let one = open(1);
            let twos = [open(2), open(2), open(2)];
            let at_work = twos[0].1.begin();
            let closed = |task: &tokio::task::JoinHandle<()>| task.is_finished();
            assert!(connections.close_one().is_some());
            tokio::task::yield_now().await;
            let all = |list: &[&(Listed, Work, tokio::task::JoinHandle<()>)]| {
                list.iter().map(|open| closed(&open.2)).collect::<Vec<_>>()
            };
            assert_eq!(all(&[&one, &twos[0], &twos[1], &twos[2]]), [false, false, true, false]);
            drop(at_work);
        });
    }
}
