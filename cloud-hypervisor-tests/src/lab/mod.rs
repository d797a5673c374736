//! The laboratory: everything a whole-system test needs to set a topology up, break it and look at what is left.
//! A test is a closure given to [`run`]; whatever it started or wrote is gone afterwards, and the logs are shown if it failed.
//!
//! ```no_run
//! use cloud_hypervisor_tests::lab::{self, DaemonBuilder, Disk, NodeBuilder, PoolBuilder, VmBuilder};
//!
//! # fn main() -> anyhow::Result<()> {
//! lab::run("a guest reads what it wrote", |lab| {
//!     let a = NodeBuilder::new("a").start(lab)?;
//!     let b = NodeBuilder::new("b").start(lab)?;
//!     let pool = PoolBuilder::new("disk0").member(&a).member(&b).create(lab)?;
//!     let daemon = DaemonBuilder::new(&pool).start(lab)?;
//!     let vm = VmBuilder::new("guest").disk(Disk::vhost_user(daemon.socket())).boot(lab)?;
//!     vm.run("echo hello | dd of=/dev/vda bs=4k conv=sync oflag=direct")?;
//!     vm.shutdown()?;
//!     drop(daemon);
//!     pool.assert_identical()
//! })
//! # }
//! ```

pub mod cable;
pub mod checks;
pub mod daemon;
pub mod fabric;
pub mod frontend;
pub mod guest;
pub mod netns;
pub mod node;
pub mod pool;
pub mod process;
pub mod programs;
pub mod qmp;
pub mod roce;
pub mod storage_daemon;
pub mod stores;
mod sys;
pub mod vm;
pub mod vmm_api;
mod workspace;

pub use checks::Checks;
pub use daemon::{Daemon, DaemonBuilder, SocketUnit};
pub use fabric::{Fabric, Transport};
pub use frontend::{Frontend, FrontendBuilder, Status};
pub use guest::{Command, Image, ImageBuilder, Output};
pub use netns::{Host, Network};
pub use node::{Node, NodeBuilder};
pub use pool::{Pool, PoolBuilder};
pub use process::Process;
pub use roce::{Roce, RoceBuilder};
pub use storage_daemon::StorageDaemonBuilder;
pub use vm::{Disk, Hypervisor, Vm, VmBuilder};
pub use vmm_api::VmmApi;
pub use workspace::{Lab, free_port, run, run_on, wait_until};
