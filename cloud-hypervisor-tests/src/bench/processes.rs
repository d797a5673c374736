//! Processor time, context switches and memory of running processes, from `/proc`.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// On which side of the wire a process works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// On the hypervisor host: the vhost-user daemon.
    Client,
    /// On a storage host.
    Server,
}

/// A process to measure. Its text form is `client:PID` or `server:PID`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watched {
    /// Its side.
    pub role: Role,
    /// Its process number.
    pub pid: u32,
}

impl FromStr for Watched {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("expected client:PID or server:PID, found \"{text}\"");
        let (role, pid) = text.split_once(':').ok_or_else(wrong)?;
        let role = match role {
            "client" => Role::Client,
            "server" => Role::Server,
            _ => return Err(wrong()),
        };
        Ok(Self { role, pid: pid.parse().map_err(|_| wrong())? })
    }
}

/// What a process has used up to one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Nanoseconds on a processor, by thread.
    threads: BTreeMap<u32, u64>,
    /// The same for all threads that ever were, in ticks.
    ticks: u64,
    switches: u64,
    memory: Memory,
}

/// Resident memory, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// All of it, the guest's memory included.
    pub resident_kib: u64,
    /// Without shared memory: what the process has beyond the guest's memory.
    pub own_kib: u64,
    /// The greatest that all of it ever was.
    pub peak_kib: u64,
}

/// `USER_HZ`, which is 100 on every Linux that runs here.
const TICK: Duration = Duration::from_millis(10);

impl Snapshot {
    /// Reads it now.
    pub fn take(pid: u32) -> io::Result<Self> {
        let mut threads = BTreeMap::new();
        let mut switches = 0;
        for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
            let entry = entry?;
            let Some(tid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // A thread may end between the listing and the reading; it then counts through `ticks`.
            let Ok(cpu) = fs::read_to_string(entry.path().join("schedstat")) else { continue };
            let Ok(status) = fs::read_to_string(entry.path().join("status")) else { continue };
            threads.insert(tid, cpu.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0));
            switches +=
                field(&status, "voluntary_ctxt_switches") + field(&status, "nonvoluntary_ctxt_switches");
        }
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let memory = Memory {
            resident_kib: field(&status, "VmRSS"),
            own_kib: field(&status, "RssAnon") + field(&status, "RssFile"),
            peak_kib: field(&status, "VmHWM"),
        };
        Ok(Self { threads, ticks: ticks_of(&stat), switches, memory })
    }

    /// Processor time since `earlier`, by the threads' exact clocks; by the process's coarse one where threads that
    /// have ended since make the exact sum too small.
    #[must_use]
    pub fn cpu_since(&self, earlier: &Self) -> Duration {
        let used =
            |(tid, now): (&u32, &u64)| now.saturating_sub(earlier.threads.get(tid).copied().unwrap_or(0));
        let exact = Duration::from_nanos(self.threads.iter().map(used).sum());
        let coarse = TICK * u32::try_from(self.ticks.saturating_sub(earlier.ticks)).unwrap_or(u32::MAX);
        if coarse > exact + TICK * 2 { coarse } else { exact }
    }

    /// Context switches since `earlier`, of the threads that are there now.
    #[must_use]
    pub fn switches_since(&self, earlier: &Self) -> u64 {
        self.switches.saturating_sub(earlier.switches)
    }

    /// Memory at that moment.
    #[must_use]
    pub fn memory(&self) -> Memory {
        self.memory
    }
}

/// Processor time of the calling thread.
pub fn own_cpu() -> io::Result<Duration> {
    let text = fs::read_to_string("/proc/thread-self/schedstat")?;
    Ok(Duration::from_nanos(text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0)))
}

fn field(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// `utime` and `stime` of `/proc/PID/stat`: fields 14 and 15, counted after the name, which may hold anything.
fn ticks_of(stat: &str) -> u64 {
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    after_name.split_whitespace().skip(11).take(2).filter_map(|word| word.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_blanks_and_brackets_does_not_shift_the_ticks() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 5115 163672 0 130 11 22 386 69 20 0 1";
        assert_eq!(ticks_of(stat), 33);
    }

    #[test]
    fn processor_time_of_a_busy_process_is_its_time() {
        let pid = std::process::id();
        let before = Snapshot::take(pid).unwrap();
        let own_before = own_cpu().unwrap();
        let mut value = 0_u64;
        while own_cpu().unwrap() - own_before < Duration::from_millis(100) {
            value = std::hint::black_box(value.wrapping_add(1));
        }
        let used = Snapshot::take(pid).unwrap().cpu_since(&before);
        assert!(used >= Duration::from_millis(95), "{used:?}");
        assert!(Snapshot::take(pid).unwrap().memory().own_kib > 100);
    }

    #[test]
    fn a_watched_process_is_written_as_role_and_number() {
        assert_eq!("client:12".parse(), Ok(Watched { role: Role::Client, pid: 12 }));
        assert!("node:12".parse::<Watched>().unwrap_err().contains("client:PID"));
        assert!("client:x".parse::<Watched>().is_err());
    }
}
