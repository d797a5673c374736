//! The command line. Every option may also stand in the configuration file, under the same name; see
//! [`crate::config`] for how the two become settings.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use rmr_common::transport::rdma::ReadMode;
use serde::Deserialize;

const EXAMPLES: &str = "\
Examples:
  Serve pool vm7 to a hypervisor, waiting for the next one when it goes away:
    vhost-brmr --socket-path /run/vm7.sock --pool vm7 --node stor1:7700 --node stor2:7700

  The same for four vCPUs, and only for as long as this one hypervisor runs:
    vhost-brmr --socket-path /run/vm7.sock --socket-mode 0660 --pool vm7 --node stor1:7700 \\
        --num-queues 4 --serial vm7-root --once

  With a configuration file, one value overridden:
    vhost-brmr --config /etc/vhost-brmr/vm7.toml --read-only

  QEMU is then started with shared memory and
    -object memory-backend-memfd,id=mem,size=4G,share=on -machine q35,memory-backend=mem
    -chardev socket,id=c0,path=/run/vm7.sock,reconnect=1
    -device vhost-user-blk-pci,chardev=c0,num-queues=4

  Live migration: on the host where the guest is to go, and then QEMU there with -incoming
    vhost-brmr --socket-path /run/vm7.sock --pool vm7 --node stor1:7700 --once --incoming

Exit code: 0 after a stop that was asked for, 1 when something failed, 2 for a bad option or configuration, 3 when another
client took the pool over while the guest ran (do not start the daemon again by itself then), 4 when memory that the front end
shares was taken away.";

/// Serves one replicated disk to one virtual machine, over vhost-user-blk.
///
/// The disk is a pool on storage nodes (rmr-node). Every write goes once to every member, straight from the guest's
/// memory; the pool goes on when a node fails. One process serves one disk of one virtual machine, and uses no CPU while
/// the guest is idle.
#[derive(Clone, Debug, Default, Parser)]
#[command(name = "vhost-brmr", version, after_help = EXAMPLES)]
pub struct Args {
    /// Read the options from this TOML file, under the same names (socket-path = "/run/vm7.sock", node = ["a:1",
    /// "b:1"]). What is given on the command line goes first. Unknown names are refused.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Print what this program can do as JSON, for management software, and end.
    #[arg(long)]
    pub print_capabilities: bool,

    /// Options that may also stand in the file.
    #[command(flatten)]
    pub options: Options,
}

/// The options that may stand on the command line and in the file.
#[derive(Clone, Debug, Default, PartialEq, clap::Args, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Options {
    /// Listen on this unix socket. A stale socket is replaced; one that somebody listens on is not. Removed at the end.
    #[arg(long, value_name = "PATH", help_heading = "Hypervisor")]
    pub socket_path: Option<PathBuf>,

    /// Use this inherited descriptor instead: a listening unix socket, or one that is connected already. Without this and
    /// --socket-path, the one socket that systemd passes (LISTEN_FDS) is used.
    #[arg(long, value_name = "FDNUM", help_heading = "Hypervisor", conflicts_with = "socket_path")]
    pub fd: Option<i32>,

    /// Permissions of the socket, octal. Who may connect owns the disk. [default: 0600]
    #[arg(long, value_name = "OCTAL", help_heading = "Hypervisor")]
    pub socket_mode: Option<String>,

    /// When the hypervisor goes away: wait for the next one, or exit. [default: wait]
    #[arg(long, value_name = "WHAT", value_enum, help_heading = "Hypervisor")]
    pub on_disconnect: Option<Disconnect>,

    /// Short for --on-disconnect exit. For QEMU only: cloud-hypervisor closes the connection for each reboot of its guest.
    #[arg(long, help_heading = "Hypervisor", conflicts_with = "on_disconnect", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub once: Option<bool>,

    /// Keep the pool for so many milliseconds after the hypervisor went away with nothing in flight, so that no other client
    /// attaches before the hypervisor that takes the guest over: for local migrations and reboots of cloud-hypervisor. At most
    /// 10000. [default: 0]
    #[arg(long, value_name = "MILLISECONDS", help_heading = "Hypervisor")]
    pub linger_ms: Option<u32>,

    /// The pool to serve, by name or uuid.
    #[arg(long, value_name = "NAME|UUID", help_heading = "Pool")]
    pub pool: Option<String>,

    /// A node to ask about the pool. Repeatable; one that answers is enough, as it knows the others. Members are then used
    /// over the binding that their own addresses name (tcp, tls, rdma), whatever is said here; but if all of these are tls://
    /// addresses, members without TLS are not used.
    #[arg(long = "node", value_name = "HOST:PORT", help_heading = "Pool")]
    pub node: Option<Vec<String>>,

    /// Take the pool from the client that holds it now, which is fenced. Without this a pool in use is refused.
    #[arg(long, help_heading = "Pool", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub takeover: Option<bool>,

    /// Serve a guest that comes by live migration: leave the pool to the client that holds it until the guest arrives and starts
    /// its queues, then take it over; once. Not taken from the file.
    #[arg(long, help_heading = "Pool")]
    #[serde(skip)]
    pub incoming: bool,

    /// Go on with this member alone, whatever it has: every other copy counts as wholly stale, and writes that only they
    /// have are LOST. For a pool that waits for a member which will not come back. Not taken from the file.
    #[arg(long, value_name = "MEMBER", help_heading = "Pool")]
    #[serde(skip)]
    pub force_from: Option<u8>,

    /// Requests wait this many seconds when no member can serve them, then fail; 0 fails at once. [default: 60]
    #[arg(long, value_name = "SECONDS", help_heading = "Pool")]
    pub suspend_timeout_s: Option<u32>,

    /// A member that does not answer for so many milliseconds is dropped and resynchronised later. [default: 3000]
    #[arg(long, value_name = "MILLISECONDS", help_heading = "Pool")]
    pub leg_timeout_ms: Option<u32>,

    /// How the data of reads comes into guest memory over RDMA: written there by the node, which is given the key (direct),
    /// or a key for that read and its memory alone (window), or by a copy, so that no key of guest memory leaves the host
    /// (bounce). [default: direct]
    #[arg(long, value_name = "MODE", value_enum, help_heading = "Pool")]
    pub rdma_read_mode: Option<RdmaReadMode>,

    /// A member whose disk fails reads is resynchronised so many times within an hour, then left out until an operator brings
    /// it back with `rmrctl pool resync` or `rmrctl pool maintenance ... off`. [default: 16]
    #[arg(long, value_name = "N", help_heading = "Pool")]
    pub read_error_limit: Option<u32>,

    /// Longest pause in seconds before a member that failed again and again is brought in once more. Each failure doubles the
    /// pause, from one second on. [default: 300]
    #[arg(long, value_name = "SECONDS", help_heading = "Pool")]
    pub rejoin_backoff_max_s: Option<u32>,

    /// What is done about a guest that changes a buffer while it is being written, so that each member would get other bytes:
    /// nothing (off), repeat such a write from a copy (detect), or send every write from a copy (bounce). [default: off]
    #[arg(long, value_name = "MODE", value_enum, help_heading = "Pool")]
    pub data_digest: Option<DigestMode>,

    /// Most MiB of copies, and so of data in flight, unless data-digest is off: 1 to 1024. [default: 32]
    #[arg(long, value_name = "MIB", help_heading = "Pool")]
    pub bounce_memory_mib: Option<u32>,

    /// Queues offered to the guest, 1 to 256; one per vCPU is a good choice. [default: 1]
    #[arg(long, value_name = "N", help_heading = "Device")]
    pub num_queues: Option<u16>,

    /// Largest size of a queue: a power of two from 2 to 1024. [default: 1024]
    #[arg(long, value_name = "N", help_heading = "Device")]
    pub queue_size: Option<u16>,

    /// Serial number that the guest sees: at most 20 printable ASCII characters. [default: the pool's name or uuid, cut]
    #[arg(long, value_name = "TEXT", help_heading = "Device")]
    pub serial: Option<String>,

    /// Refuse every write.
    #[arg(long, help_heading = "Device", num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub read_only: Option<bool>,

    /// Spin for so many microseconds before sleeping, but only while the guest waits for each answer before it sends the
    /// next request, and does so within that time. 0 never spins. At most 10000. [default: 50]
    #[arg(long, value_name = "MICROSECONDS", help_heading = "Operation")]
    pub poll_us: Option<u32>,

    /// Wait so many seconds for requests in flight when a queue is stopped or the daemon ends. [default: 30]
    #[arg(long, value_name = "SECONDS", help_heading = "Operation")]
    pub drain_timeout_s: Option<u32>,

    /// File with the key of the pool, for pools that have one; only its owner may have access to it.
    #[arg(long, value_name = "FILE", help_heading = "Pool")]
    pub key_file: Option<PathBuf>,

    /// Authorities, in PEM form, whose certificates are trusted on tls:// addresses. Without it those are refused.
    #[arg(long, value_name = "FILE", help_heading = "Pool")]
    pub tls_authorities: Option<PathBuf>,

    /// Certificate to show to nodes that ask for one, in PEM form; goes with --tls-key.
    #[arg(long, value_name = "FILE", help_heading = "Pool")]
    pub tls_certificate: Option<PathBuf>,

    /// Private key of the certificate, in PEM form.
    #[arg(long, value_name = "FILE", help_heading = "Pool")]
    pub tls_key: Option<PathBuf>,

    /// Form of the log on standard error. Its level is set with RUST_LOG, e.g. RUST_LOG=debug. [default: text]
    #[arg(long, value_name = "FORMAT", value_enum, help_heading = "Operation")]
    pub log_format: Option<LogFormat>,
}

/// How data of reads comes into guest memory over RDMA.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RdmaReadMode {
    /// The node writes it there.
    #[default]
    Direct,
    /// The node writes it there, by a key that reaches that memory alone and is invalid before the read completes.
    Window,
    /// It is copied there from memory of the daemon.
    Bounce,
}

impl From<RdmaReadMode> for ReadMode {
    fn from(mode: RdmaReadMode) -> Self {
        match mode {
            RdmaReadMode::Direct => Self::Direct,
            RdmaReadMode::Window => Self::Window,
            RdmaReadMode::Bounce => Self::Bounce,
        }
    }
}

/// What happens when the hypervisor goes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Disconnect {
    /// Wait for the next one.
    Wait,
    /// End.
    Exit,
}

/// What is done about buffers that change while they are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DigestMode {
    /// Nothing.
    #[default]
    Off,
    /// Detect it, and repeat from a copy.
    Detect,
    /// Always copy.
    Bounce,
}

/// Form of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

impl Options {
    /// These options, with those of `file` where nothing is said here.
    #[must_use]
    pub fn or(self, file: Self) -> Self {
        // Either of two options that exclude each other, given here, overrides the other of the file.
        let file_path = file.socket_path.filter(|_| self.fd.is_none());
        let file_fd = file.fd.filter(|_| self.socket_path.is_none());
        let file_once = file.once.filter(|_| self.on_disconnect.is_none());
        let file_disconnect = file.on_disconnect.filter(|_| self.once.is_none());
        Self {
            socket_path: self.socket_path.or(file_path),
            fd: self.fd.or(file_fd),
            socket_mode: self.socket_mode.or(file.socket_mode),
            on_disconnect: self.on_disconnect.or(file_disconnect),
            once: self.once.or(file_once),
            linger_ms: self.linger_ms.or(file.linger_ms),
            pool: self.pool.or(file.pool),
            node: self.node.or(file.node),
            takeover: self.takeover.or(file.takeover),
            // Never from a file: who arrived once does not arrive again when the daemon is started anew.
            incoming: self.incoming,
            // Never from a file: what is forced once must not be forced again.
            force_from: self.force_from,
            suspend_timeout_s: self.suspend_timeout_s.or(file.suspend_timeout_s),
            leg_timeout_ms: self.leg_timeout_ms.or(file.leg_timeout_ms),
            rdma_read_mode: self.rdma_read_mode.or(file.rdma_read_mode),
            read_error_limit: self.read_error_limit.or(file.read_error_limit),
            rejoin_backoff_max_s: self.rejoin_backoff_max_s.or(file.rejoin_backoff_max_s),
            data_digest: self.data_digest.or(file.data_digest),
            bounce_memory_mib: self.bounce_memory_mib.or(file.bounce_memory_mib),
            num_queues: self.num_queues.or(file.num_queues),
            queue_size: self.queue_size.or(file.queue_size),
            serial: self.serial.or(file.serial),
            read_only: self.read_only.or(file.read_only),
            poll_us: self.poll_us.or(file.poll_us),
            drain_timeout_s: self.drain_timeout_s.or(file.drain_timeout_s),
            key_file: self.key_file.or(file.key_file),
            tls_authorities: self.tls_authorities.or(file.tls_authorities),
            tls_certificate: self.tls_certificate.or(file.tls_certificate),
            tls_key: self.tls_key.or(file.tls_key),
            log_format: self.log_format.or(file.log_format),
        }
    }
}
