//! vhost-user-blk for one replicated disk.
//!
//! * [`disk`] — the seam: what the device needs from the disk behind it.
//! * [`device`] — features and configuration space.
//! * [`request`] — descriptor chains to checked requests.
//! * [`queue`] — one ring.
//! * [`flight`] — requests in flight.
//! * [`memory`] — guest memory.
//! * [`frontend`] — the vhost-user messages.
//! * [`engine`] — the data path.

pub mod device;
pub mod disk;
pub mod engine;
pub mod flight;
pub mod frontend;
pub mod memory;
pub mod queue;
pub mod request;
pub mod event_loop;
pub mod socket;
pub mod sys;
