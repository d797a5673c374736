//! QEMU's own vhost-user-blk back end over a plain file: the lab proves itself on it, independent of the project's daemons.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Lab, Process, programs};

const START_LIMIT: Duration = Duration::from_secs(60);

/// A `qemu-storage-daemon` to be.
#[derive(Clone, Debug)]
pub struct StorageDaemonBuilder {
    name: String,
    size_mib: u64,
    queues: u16,
    logical_block_size: u32,
    writable: bool,
}

impl StorageDaemonBuilder {
    /// A writable disk of 64 MiB with one queue.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), size_mib: 64, queues: 1, logical_block_size: 512, writable: true }
    }

    /// Size in MiB.
    #[must_use]
    pub fn size_mib(mut self, size_mib: u64) -> Self {
        self.size_mib = size_mib;
        self
    }

    /// Number of virtqueues.
    #[must_use]
    pub fn queues(mut self, queues: u16) -> Self {
        self.queues = queues;
        self
    }

    /// The logical block size that guests see.
    #[must_use]
    pub fn logical_block_size(mut self, bytes: u32) -> Self {
        self.logical_block_size = bytes;
        self
    }

    /// Refuses writes.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.writable = false;
        self
    }

    /// Starts it over a new file of zeroes on tmpfs.
    ///
    /// # Errors
    /// When it is not installed or does not come up.
    pub fn start(&self, lab: &Lab) -> Result<StorageDaemon> {
        let Self { name, size_mib, queues, logical_block_size, writable } = self;
        let (socket, file) = (lab.path(format!("{name}.sock")), lab.memory_path(format!("{name}.raw")));
        File::create(&file)?.set_len(size_mib << 20).with_context(|| format!("sizing {}", file.display()))?;
        let mut command = Command::new(programs::system("qemu-storage-daemon")?);
        let write = if *writable { "on" } else { "off" };
        command
            .args(["--blockdev", &format!("file,node-name=disk,filename={},discard=unmap", file.display())])
            .arg("--export")
            .arg(format!(
                "vhost-user-blk,id=disk,node-name=disk,writable={write},num-queues={queues},\
                 logical-block-size={logical_block_size},addr.type=unix,addr.path={}",
                socket.display()
            ));
        let process = Process::spawn(lab, name, command)?;
        process.wait_for_socket(&socket, START_LIMIT)?;
        Ok(StorageDaemon { process, socket, file })
    }
}

/// A running `qemu-storage-daemon`; killed when dropped.
#[derive(Debug)]
pub struct StorageDaemon {
    process: Process,
    socket: PathBuf,
    file: PathBuf,
}

impl StorageDaemon {
    /// Where it serves vhost-user.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The disk's contents.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The process.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }
}
