//! The `vhost-brmr` program.

use std::process::ExitCode;

use vhost_brmr::daemon;
use vhost_brmr::pool_disk::PoolDisk;

fn main() -> ExitCode {
    daemon::main(PoolDisk::open)
}
