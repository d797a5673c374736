//! A signal asks to stop. In a program of its own, as it would disturb other tests of the same process.

use std::os::fd::AsRawFd;
use std::process::Command;

use rmr_node::lifecycle::Shutdown;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

#[test]
fn sigterm_asks_to_stop() {
    let shutdown = Shutdown::new().unwrap();
    shutdown.on_signals().unwrap();
    assert!(!shutdown.requested());
    let own = std::process::id().to_string();
    assert!(Command::new("kill").args(["-TERM", &own]).status().unwrap().success());
    let epoll = Epoll::new().unwrap();
    let event = EpollEvent::new(EventSet::IN, 1);
    epoll.ctl(ControlOperation::Add, shutdown.as_raw_fd(), event).unwrap();
    assert_eq!(epoll.wait(60_000, &mut [EpollEvent::default()]).unwrap(), 1);
    assert!(shutdown.requested());
}
