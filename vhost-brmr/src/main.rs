//! The `vhost-brmr` program.

use std::process::ExitCode;

use vhost_brmr::config::Settings;
use vhost_brmr::daemon;
use vhost_brmr::disk::Disk;

fn main() -> ExitCode {
    daemon::main(open_disk)
}

fn open_disk(settings: &Settings) -> anyhow::Result<Box<dyn Disk>> {
    let nodes: Vec<_> = settings.pool.nodes.iter().map(ToString::to_string).collect();
    anyhow::bail!("this build has no pool client to reach {}", nodes.join(", "))
}
