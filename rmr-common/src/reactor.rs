//! How a component that owns file descriptors tells the event loop which of them to watch.
//!
//! The loop is an [`event_manager::EventManager`]; its subscriber owns everything on the thread. Components do not
//! hold on to the loop: they collect [`WatchChange`]s, and the loop applies them after each round of work.

use std::os::fd::RawFd;

use event_manager::{EventOps, Events};
use vmm_sys_util::epoll::EventSet;

/// One change of what is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WatchChange {
    /// Begin to watch a descriptor.
    Add(RawFd, EventSet),
    /// Watch for other events.
    Modify(RawFd, EventSet),
    /// Stop watching; must be applied before the descriptor is closed.
    Remove(RawFd),
}

impl WatchChange {
    /// Applies the change to the loop.
    ///
    /// # Errors
    /// What the loop says of the descriptor, e.g. that it is watched already.
    pub fn apply(self, ops: &mut EventOps<'_>) -> Result<(), event_manager::Error> {
        match self {
            Self::Add(fd, set) => ops.add(Events::new_raw(fd, set)),
            Self::Modify(fd, set) => ops.modify(Events::new_raw(fd, set)),
            Self::Remove(fd) => ops.remove(Events::new_raw(fd, EventSet::empty())),
        }
    }
}
