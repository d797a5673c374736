//! The HTTP server: one thread, one request per connection, and a limit on everything that a caller could hold on to.
//!
//! Connections are closed after their request. So an idle or slow caller costs one of a few permits for a bounded
//! time, and stopping never waits for anybody.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use rmr_common::throttle::Throttle;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, oneshot};
use tracing::{debug, info, warn};

use super::{NodeControl, routes};

/// How long a connection may live beyond the time that its request may take: to read and write the bytes.
const TRANSFER_GRACE: Duration = Duration::from_secs(10);
/// How long to wait after a failed accept (no descriptors left) before the next.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long requests in progress may go on once the server is told to stop.
const STOP_GRACE: Duration = Duration::from_secs(2);

/// What callers of the admin API can take up at most.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AdminLimits {
    /// Connections served at once; more wait in the listen queue of the kernel.
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
    /// Binds `address` and serves `control` from a thread of its own.
    ///
    /// # Errors
    /// When the address cannot be bound or the thread cannot be made.
    pub fn start(
        address: SocketAddr,
        limits: AdminLimits,
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
                        serve(listener, limits, control, stopped).await;
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
    control: Arc<dyn NodeControl>,
    mut stopped: oneshot::Receiver<()>,
) {
    let router = routes::router(control, limits);
    let permits = Arc::new(Semaphore::new(limits.max_connections));
    let mut refused = Throttle::default();
    loop {
        let next = async {
            // The permit first: a caller beyond the limit waits in the kernel and costs no descriptor.
            let permit = Arc::clone(&permits).acquire_owned().await;
            (permit, listener.accept().await)
        };
        let (permit, accepted) = tokio::select! {
            _ = &mut stopped => break,
            next = next => next,
        };
        match accepted {
            Ok((stream, peer)) => {
                let router = router.clone();
                tokio::spawn(async move {
                    serve_connection(stream, peer, router, limits.request_timeout + TRANSFER_GRACE).await;
                    drop(permit);
                });
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

async fn serve_connection(stream: TcpStream, peer: SocketAddr, router: axum::Router, lifetime: Duration) {
    let long_work = routes::LongWork::default();
    let service = TowerToHyperService::new(router.layer(axum::Extension(long_work.clone())));
    let connection = hyper::server::conn::http1::Builder::new()
        .keep_alive(false)
        .header_read_timeout(None)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    loop {
        match tokio::time::timeout(lifetime, &mut connection).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => return debug!(%peer, %error, "admin connection ended early"),
            Err(_) if long_work.is_going_on() => (),
            Err(_) => return debug!(%peer, "admin connection took too long"),
        }
    }
}
