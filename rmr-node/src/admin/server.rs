//! The HTTP server: one thread, one request per connection, and a limit on everything that a caller could hold on to.
//!
//! Connections are closed after their request, and a caller who sends half of one has seconds. When all connections that may be
//! open are, one that waits for its caller is closed for the next: half-sent requests lock nobody out. Stopping never waits for
//! anybody.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rmr_common::throttle::Throttle;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tracing::{debug, info, warn};

use super::connections::{Connections, Work};
use super::{HostNames, NodeControl, routes};

/// How long a connection may live beyond the time that its request may take: to read and write the bytes.
const TRANSFER_GRACE: Duration = Duration::from_secs(10);
/// How long a caller has to send the head of a request, from the connection on.
const HEAD_LIMIT: Duration = Duration::from_secs(5);
/// How often closed connections are looked for while all places are taken.
const PLACE_PAUSE: Duration = Duration::from_millis(20);
/// How long to wait after a failed accept (no descriptors left) before the next.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long requests in progress may go on once the server is told to stop.
const STOP_GRACE: Duration = Duration::from_secs(2);

/// What callers of the admin API can take up at most.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AdminLimits {
    /// Connections served at once. One more takes the place of one that waits for its caller, or waits itself where the node
    /// works at the requests of all.
    pub max_connections: usize,
    /// Largest body of a request in bytes.
    pub max_body: usize,
    /// How long a request may take before it is answered with a timeout; creating a store may take longer.
    pub request_timeout: Duration,
}

/// The running admin server. Dropping it stops it.
pub struct AdminServer {
    local_addr: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl AdminServer {
    /// Binds `address` and serves `control`, under these host names, from a thread of its own.
    ///
    /// # Errors
    /// When the address cannot be bound or the thread cannot be made.
    pub fn start(
        address: SocketAddr,
        limits: AdminLimits,
        names: HostNames,
        control: Arc<dyn NodeControl>,
    ) -> io::Result<Self> {
        let context = |e: io::Error| io::Error::new(e.kind(), format!("admin address {address}: {e}"));
        let listener = std::net::TcpListener::bind(address).map_err(context)?;
        listener.set_nonblocking(true)?;
        let local_addr = listener.local_addr()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel();
        let (report, started) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new().name("admin".into()).spawn(move || {
            runtime.block_on(async {
                match TcpListener::from_std(listener) {
                    Ok(listener) => {
                        let _ = report.send(Ok(()));
                        serve(listener, limits, names, control, stopped).await;
                    }
                    Err(e) => {
                        let _ = report.send(Err(e));
                    }
                }
            });
        })?;
        started.recv().map_err(|_| io::Error::other("the admin thread ended before it began"))??;
        info!(address = %local_addr, "admin API is up");
        Ok(Self { local_addr, stop: Some(stop), thread: Some(thread) })
    }

    /// Where it listens; tells the port when it was bound to port 0.
    #[must_use]
    pub const fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Stops accepting, gives requests in progress two seconds, and ends the thread.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            warn!("the admin thread had panicked");
        }
    }
}

impl Drop for AdminServer {
    fn drop(&mut self) {
        self.end();
    }
}

async fn serve(
    listener: TcpListener,
    limits: AdminLimits,
    names: HostNames,
    control: Arc<dyn NodeControl>,
    mut stopped: oneshot::Receiver<()>,
) {
    let router = routes::router(control, limits, names);
    let permits = Arc::new(Semaphore::new(limits.max_connections));
    let connections = Connections::default();
    let mut refused = Throttle::default();
    loop {
        let next = async {
            let accepted = listener.accept().await;
            (place(&permits, &connections, accepted.is_ok()).await, accepted)
        };
        let (permit, accepted) = tokio::select! {
            _ = &mut stopped => break,
            next = next => next,
        };
        match accepted {
            Ok((stream, peer)) => {
                let (router, work) = (router.clone(), Work::default());
                let listed = connections.add(peer, work.clone());
                let number = listed.number();
                let lifetime = limits.request_timeout + TRANSFER_GRACE;
                let task = tokio::spawn(async move {
                    serve_connection(stream, peer, router, work, lifetime).await;
                    drop((listed, permit));
                });
                connections.closed_by(number, task.abort_handle());
            }
            Err(error) => {
                refused.log(|withheld| warn!(%error, withheld, "admin connection not accepted"));
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    let all = u32::try_from(limits.max_connections).unwrap_or(u32::MAX);
    // Whatever is still going on after the grace ends with the runtime.
    let _ = tokio::time::timeout(STOP_GRACE, permits.acquire_many(all)).await;
}

/// A place for a connection that has come; for none, any that is there.
async fn place(
    permits: &Arc<Semaphore>,
    connections: &Connections,
    has_come: bool,
) -> Option<OwnedSemaphorePermit> {
    if !has_come {
        return None;
    }
    if let Ok(permit) = Arc::clone(permits).try_acquire_owned() {
        return Some(permit);
    }
    loop {
        if let Some(peer) = connections.close_one() {
            debug!(%peer, "admin connection closed for another one: it waited for its caller");
        }
        let permit = Arc::clone(permits).acquire_owned();
        // All may be at work, and one of them may come to wait for its caller.
        if let Ok(permit) = tokio::time::timeout(PLACE_PAUSE, permit).await {
            return permit.ok();
        }
    }
}

async fn serve_connection(
    stream: TcpStream,
    peer: SocketAddr,
    router: axum::Router,
    work: Work,
    lifetime: Duration,
) {
    let service = TowerToHyperService::new(router.layer(axum::Extension(work.clone())));
    let connection = hyper::server::conn::http1::Builder::new()
        .keep_alive(false)
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    loop {
        match tokio::time::timeout(lifetime, &mut connection).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => return debug!(%peer, %error, "admin connection ended early"),
            Err(_) if work.is_going_on() => (),
            Err(_) => return debug!(%peer, "admin connection took too long"),
        }
    }
}
