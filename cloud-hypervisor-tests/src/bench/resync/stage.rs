//! The stage of every measurement: two nodes on tmpfs, a pool on both, and the daemon; with what can be asked about them
//! from outside: states, counters, and the bytes that the kernel saw on a process' connections.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::bench::disk::{Disk, DiskError, DiskOptions};
use crate::bench::load::{LoadSpec, Pattern, Report, Surroundings, run_on};
use crate::lab::{Daemon, DaemonBuilder, Lab, Node, NodeBuilder, Pool, PoolBuilder, programs, wait_until};

/// How long a member may take to be missed, or to be back.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at the state of a resync: each costs the node some tenths of a millisecond.
const LOOK: Duration = Duration::from_millis(10);
/// Requests in flight of the published experiment, and the most here.
pub(super) const DEPTH: u32 = 512;
/// Longest request of any load here.
const LARGEST: u32 = 128 << 10;
/// How long a daemon may take until it listens for its next front end.
const REATTACH: Duration = Duration::from_secs(5);

/// Node `a` holds the maps; node `b` is the one that goes away and comes back.
pub(super) struct Stage<'a> {
    lab: &'a Lab,
    pub(super) a: Node,
    pub(super) b: Node,
    pub(super) pool: Pool,
    pub(super) daemon: Daemon,
}

/// What node `a` knows of the pool.
#[derive(Clone, Debug)]
pub(super) struct Look {
    /// State of member `b`: `clean`, `syncing` or `out`.
    pub(super) state_of_b: String,
    pub(super) missed_blocks: u64,
    pub(super) missed_chunks: u64,
    pub(super) chunk_bytes: u64,
    pub(super) resync_sent_bytes: u64,
    pub(super) metadata_pages: u64,
}

/// What the daemon said of its connections at its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ClientTraffic {
    pub(super) data: u64,
    pub(super) control: u64,
    pub(super) resync: u64,
}

impl<'a> Stage<'a> {
    pub(super) fn start(lab: &'a Lab, size_mib: u64) -> Result<Self> {
        let (a, b) = (NodeBuilder::new("a").start(lab)?, NodeBuilder::new("b").start(lab)?);
        let pool = PoolBuilder::new("bench").size_mib(size_mib).member(&a).member(&b).create(lab)?;
        let daemon = daemon_of(&pool).start(lab)?;
        Ok(Self { lab, a, b, pool, daemon })
    }

    /// Attaches as a guest that can have [`DEPTH`] requests of any size here in flight.
    pub(super) fn attach(&self) -> Result<Disk> {
        let options = DiskOptions {
            depth: DEPTH,
            buffer_size: LARGEST,
            daemons: vec![self.daemon.process().pid()],
            ..DiskOptions::new(self.daemon.socket())
        };
        let begin = Instant::now();
        loop {
            match Disk::attach(options.clone()) {
                Ok(mut disk) => {
                    // A daemon claims its pool when it is first used; nothing may be taken away before it has it.
                    let claim =
                        LoadSpec { pattern: Pattern::Read, max_requests: Some(1), ..LoadSpec::default() };
                    run(&mut disk, &LoadSpec { ramp_ms: 0, ..claim })?;
                    return Ok(disk);
                }
                Err(DiskError::Attach { .. }) if begin.elapsed() < REATTACH => std::thread::sleep(LOOK),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Takes node `b` away, as a crash would, and waits until `a` has that on record.
    pub(super) fn lose_b(&self) -> Result<()> {
        self.b.kill()?;
        self.wait_for_b("out").map(|_| ())
    }

    /// Starts node `b` again, and waits until its resync has begun.
    pub(super) fn return_b(&mut self) -> Result<()> {
        self.b.restart(self.lab)?;
        // It may be over by the time of the look.
        self.wait_for(|state| state != "out", "member b to rejoin").map(|_| ())
    }

    /// Node `a` dies, and comes back with what it has on disk.
    pub(super) fn restart_a(&mut self) -> Result<()> {
        self.a.kill()?;
        self.a.restart(self.lab)
    }

    /// Waits until member `b` is in `state`; returns when that was seen.
    pub(super) fn wait_for_b(&self, state: &str) -> Result<Instant> {
        self.wait_for(|found| found == state, &format!("member b to be {state}"))
    }

    fn wait_for(&self, wanted: impl Fn(&str) -> bool, what: &str) -> Result<Instant> {
        let begin = Instant::now();
        let mut last = String::new();
        while begin.elapsed() < PATIENCE {
            self.daemon.process().ensure_running(what)?;
            last = self.look()?.state_of_b;
            if wanted(&last) {
                return Ok(Instant::now());
            }
            std::thread::sleep(LOOK);
        }
        bail!("waited {PATIENCE:?} for {what}, in vain: it is {last}")
    }

    /// Asks node `a`.
    pub(super) fn look(&self) -> Result<Look> {
        let status = self.a.admin_get(&format!("/v1/pools/{}", self.pool.name()))?;
        let number = |pointer: &str| {
            let value = status.pointer(pointer).and_then(Value::as_u64);
            value.with_context(|| format!("expected a number at {pointer} of {status}"))
        };
        let b = status.pointer("/view/members/1/state").and_then(Value::as_str);
        Ok(Look {
            state_of_b: b.with_context(|| format!("expected the state of member b in {status}"))?.to_owned(),
            // Absent while nothing is missed.
            missed_blocks: number("/peers/0/missed/blocks").unwrap_or(0),
            missed_chunks: number("/peers/0/missed/chunks")?,
            chunk_bytes: number("/spec/chunk_size")?,
            resync_sent_bytes: number("/io/resync_sent_bytes")?,
            metadata_pages: number("/io/metadata_pages")?,
        })
    }

    /// Missed blocks that member `b` has written since its process began.
    pub(super) fn blocks_written_by_resync(&self) -> Result<u64> {
        let status = self.b.admin_get(&format!("/v1/pools/{}", self.pool.name()))?;
        let value = status.pointer("/io/resync_written_blocks").and_then(Value::as_u64);
        value.with_context(|| format!("expected a number of blocks in {status}"))
    }

    /// Bytes that the daemon's TCP connections carried so far, both ways, by the kernel's own count.
    pub(super) fn client_tcp_bytes(&self) -> Result<u64> {
        let text = programs::output_of(Command::new(programs::system("ss")?).args(["-tinpHO"]))?;
        Ok(tcp_bytes_of(&text, self.daemon.process().pid()))
    }

    /// Ends the daemon in order, and returns what it says of its connections.
    pub(super) fn stop_daemon(&self) -> Result<ClientTraffic> {
        self.daemon.stop()?;
        let log = self.daemon.process().log_text();
        parse_traffic(&log).with_context(|| format!("no line of traffic in the daemon's log:\n{log}"))
    }

    /// Waits until the pool is safe, and compares both stores byte for byte. The daemon must have ended.
    pub(super) fn assert_identical(&self) -> Result<()> {
        self.pool.assert_identical_within(PATIENCE)
    }
}

/// Runs a load that must not meet an error.
pub(super) fn run(disk: &mut Disk, spec: &LoadSpec) -> Result<Report> {
    run_until(disk, spec, None)
}

/// The same, with a way to end it early.
pub(super) fn run_until(
    disk: &mut Disk,
    spec: &LoadSpec,
    stop: Option<&std::sync::atomic::AtomicBool>,
) -> Result<Report> {
    let report = run_on(disk, spec, Surroundings { stop, ..Surroundings::default() })?;
    ensure!(report.is_good(), "{}: {}", spec.name, report.first_error.unwrap_or_default());
    Ok(report)
}

/// How the daemon is started for measurements: one queue that holds 512 requests.
pub(super) fn daemon_of(pool: &Pool) -> DaemonBuilder {
    DaemonBuilder::new(pool).arguments(["--queue-size", "1024"])
}

/// Waits until the pool is safe by what `rmrctl` says.
pub(super) fn wait_safe(pool: &Pool) -> Result<()> {
    wait_until("the pool to be safe", PATIENCE, || Ok(pool.level()? == "safe"))
}

/// Sums what `ss -tinpHO` says of the sockets of a process.
fn tcp_bytes_of(text: &str, pid: u32) -> u64 {
    let mine = format!("pid={pid},");
    let lines = text.lines().filter(|line| line.contains(&mine));
    let value = |word: &str| -> Option<u64> {
        word.strip_prefix("bytes_sent:").or_else(|| word.strip_prefix("bytes_received:"))?.parse().ok()
    };
    lines.flat_map(str::split_whitespace).filter_map(value).sum()
}

/// Reads the daemon's last line of traffic: for each class the bytes of both directions together.
fn parse_traffic(log: &str) -> Option<ClientTraffic> {
    let line = log.lines().rfind(|line| line.contains("bytes sent and received:"))?;
    let (_, figures) = line.split_once("bytes sent and received:")?;
    let class = |name: &str| -> Option<u64> {
        let (_, rest) = figures.split_once(name)?;
        let mut words = rest.split([' ', ',']).filter(|word| !word.is_empty());
        let sent: u64 = words.next()?.parse().ok()?;
        let received: u64 = words.nth(1)?.parse().ok()?;
        Some(sent + received)
    };
    Some(ClientTraffic { data: class("data")?, control: class("control")?, resync: class("resync")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_a_process_are_summed_over_its_sockets_and_nobody_elses() {
        let text = "ESTAB 0 0 127.0.0.1:1 127.0.0.1:2 users:((\"x\",pid=12,fd=3)) cubic bytes_sent:100 bytes_acked:101 bytes_received:7\n\
                    ESTAB 0 0 127.0.0.1:2 127.0.0.1:1 users:((\"y\",pid=123,fd=3)) cubic bytes_sent:1000 bytes_received:1000\n\
                    ESTAB 0 0 127.0.0.1:3 127.0.0.1:4 users:((\"x\",pid=12,fd=4)) cubic bytes_received:30";
        assert_eq!(tcp_bytes_of(text, 12), 137);
        assert_eq!(tcp_bytes_of(text, 1), 0);
    }

    #[test]
    fn the_last_line_of_traffic_counts() {
        let log = "x detached; bytes sent and received: data 1 and 1, control 1 and 1, resync 9 and 9\n\
                   x detached; bytes sent and received: data 10 and 2, control 30 and 4, resync 0 and 5\nended";
        assert_eq!(parse_traffic(log), Some(ClientTraffic { data: 12, control: 34, resync: 5 }));
        assert_eq!(parse_traffic("nothing"), None);
    }
}
