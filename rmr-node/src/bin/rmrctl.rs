//! `rmrctl`: creates, shows and deletes replicated disks on storage nodes.

use std::process::ExitCode;

use clap::Parser;
use rmr_node::ctl::{self, Cli};

fn main() -> ExitCode {
    ExitCode::from(ctl::run(&Cli::parse()))
}
