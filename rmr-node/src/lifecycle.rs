//! Life of the process: a request to stop that every event loop can watch, and what is told to the service manager.
//!
//! SIGTERM or SIGINT asks for a graceful stop; a second one ends the process at once.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Exit code of a process that was told twice to stop.
const EXIT_IMPATIENT: i32 = 1;

/// The request to stop, shared by all threads of the service.
///
/// The descriptor becomes readable with the request and stays so: any number of loops may watch it, level-triggered,
/// and none may read it.
#[derive(Clone, Debug)]
pub struct Shutdown {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    requested: AtomicBool,
    event: EventFd,
}

impl Shutdown {
    /// A request that nobody has made yet.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn new() -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        Ok(Self { shared: Arc::new(Shared { requested: AtomicBool::new(false), event }) })
    }

    /// Asks to stop. Asking again changes nothing.
    pub fn request(&self) {
        self.shared.requested.store(true, Ordering::Release);
        if let Err(error) = self.shared.event.write(1) {
            // Only a counter near 2^64 refuses, and then the descriptor is readable already.
            warn!(%error, "shutdown event not written");
        }
    }

    /// Whether somebody asked to stop.
    #[must_use]
    pub fn requested(&self) -> bool {
        self.shared.requested.load(Ordering::Acquire)
    }

    /// Makes SIGTERM and SIGINT ask to stop, from a thread that waits for them; the second one ends the process.
    ///
    /// # Errors
    /// When the handlers or the thread cannot be made.
    pub fn on_signals(&self) -> io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        // Registered before this returns, so that no signal after it is missed.
        let (mut terminate, mut interrupt) = {
            let _guard = runtime.enter();
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
        };
        let shutdown = self.clone();
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            runtime.block_on(async {
                loop {
                    let name = tokio::select! {
                        _ = terminate.recv() => "SIGTERM",
                        _ = interrupt.recv() => "SIGINT",
                    };
                    if shutdown.requested() {
                        warn!(signal = name, "second signal: ending at once");
                        std::process::exit(EXIT_IMPATIENT);
                    }
                    info!(signal = name, "stopping");
                    shutdown.request();
                    notify(&[NotifyState::Stopping]);
                }
            });
        })?;
        Ok(())
    }
}

impl AsRawFd for Shutdown {
    fn as_raw_fd(&self) -> RawFd {
        self.shared.event.as_raw_fd()
    }
}

/// Tells the service manager, if there is one, that the node serves, with a line for `systemctl status`.
pub fn ready(status: &str) {
    notify(&[NotifyState::Ready, NotifyState::Status(status)]);
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        warn!(%error, "service manager not told");
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

    use super::*;

    fn readable(shutdown: &Shutdown) -> bool {
        let epoll = Epoll::new().unwrap();
        let event = EpollEvent::new(EventSet::IN, 1);
        epoll.ctl(ControlOperation::Add, shutdown.as_raw_fd(), event).unwrap();
        epoll.wait(0, &mut [EpollEvent::default()]).unwrap() == 1
    }

    #[test]
    fn a_request_is_seen_by_every_clone_and_stays() {
        let shutdown = Shutdown::new().unwrap();
        let other = shutdown.clone();
        assert!(!other.requested() && !readable(&other));
        shutdown.request();
        shutdown.request();
        assert!(other.requested());
        assert!(readable(&other) && readable(&other) && readable(&shutdown));
    }
}
