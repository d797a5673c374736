//! One test's own directories and its logs: made before the test's first step, removed after its last.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use super::Fabric;

/// How much of the end of each log is shown when a test fails.
const LOG_TAIL_BYTES: u64 = 6 << 10;
/// Pause between two looks at a condition: short against every wait in the lab, long enough to cost nothing.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Runs one whole-system test, and shows the tails of its logs if it fails by error or by panic.
///
/// # Errors
/// What `body` returned, or a directory that cannot be made.
pub fn run(name: &str, body: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    run_on(Fabric::from_environment()?, name, body)
}

/// As [`run`], with nodes that listen on `fabric` whatever the environment says.
///
/// # Errors
/// As [`run`].
pub fn run_on<T>(fabric: Fabric, name: &str, body: impl FnOnce(&Lab) -> Result<T>) -> Result<T> {
    let started = Instant::now();
    let lab = Lab::new(name, fabric)?;
    let result = body(&lab);
    if result.is_err() {
        lab.show_logs();
    }
    eprintln!("lab: '{name}' took {:.1} s", started.elapsed().as_secs_f64());
    result
}

/// The workspace of one running test. With `RMR_KEEP` set, its directories survive the test.
#[derive(Debug)]
pub struct Lab {
    name: String,
    fabric: Fabric,
    disk: TempDir,
    memory: TempDir,
    logs: Mutex<Vec<PathBuf>>,
}

impl Lab {
    fn new(name: &str, fabric: Fabric) -> Result<Self> {
        let keep = std::env::var_os("RMR_KEEP").is_some();
        let make = |base: &str| {
            tempfile::Builder::new()
                .prefix("rmr-lab-")
                .disable_cleanup(keep)
                .tempdir_in(base)
                .with_context(|| format!("making the test's directory below {base}"))
        };
        let lab = Self {
            name: name.to_owned(),
            fabric,
            disk: make("/tmp")?,
            memory: make("/dev/shm")?,
            logs: Mutex::default(),
        };
        if keep {
            eprintln!(
                "lab: '{name}' keeps {} and {}",
                lab.disk.path().display(),
                lab.memory.path().display()
            );
        }
        Ok(lab)
    }

    /// The name the test gave.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What carries the data of the test's nodes.
    #[must_use]
    pub fn fabric(&self) -> Fabric {
        self.fabric
    }

    /// A path in the test's directory on disk: sockets, configuration, logs, stores that want O_DIRECT.
    #[must_use]
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.disk.path().join(name)
    }

    /// A path in the test's directory on tmpfs: stores that want speed.
    #[must_use]
    pub fn memory_path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.memory.path().join(name)
    }

    /// A new log file's path; its tail is shown when the test fails. A name used before gets a number.
    pub(super) fn log(&self, name: &str) -> PathBuf {
        let mut logs = self.logs.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let path = (1..)
            .map(|n| self.path(if n == 1 { format!("{name}.log") } else { format!("{name}-{n}.log") }))
            .find(|path| !logs.contains(path))
            .unwrap_or_else(|| self.path(name));
        logs.push(path.clone());
        path
    }

    fn show_logs(&self) {
        let logs = self.logs.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for path in logs.iter() {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            eprintln!("---- '{}': end of {name} ----\n{}", self.name, tail(path, LOG_TAIL_BYTES).trim_end());
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if thread::panicking() {
            self.show_logs();
        }
    }
}

/// The last `bytes` of a text file, or why it cannot be read.
pub(super) fn tail(path: &Path, bytes: u64) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = fs::File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(bytes)))?;
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    };
    read().unwrap_or_else(|error| format!("({}: {error})", path.display()))
}

/// A TCP port of 127.0.0.1 that nobody listens on, never the same one twice in this process.
///
/// It lies below the range from which the kernel takes ports of outgoing connections: a node that is killed must find its
/// port free when it comes back.
///
/// # Errors
/// When no such port is left.
pub fn free_port() -> Result<u16> {
    const FIRST: u32 = 12_000;
    const COUNT: u32 = 20_000;
    static TAKEN: AtomicU32 = AtomicU32::new(0);
    // Test processes that run side by side begin far apart.
    let start = std::process::id().wrapping_mul(4099);
    for _ in 0..COUNT {
        let offset = start.wrapping_add(TAKEN.fetch_add(1, Ordering::Relaxed)) % COUNT;
        let port = u16::try_from(FIRST + offset)?;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("all TCP ports from {FIRST} to {} are in use", FIRST + COUNT - 1)
}

/// Waits until `condition` holds, or fails with the name of `what` was waited for when `limit` is over.
///
/// # Errors
/// On time-out, or what `condition` returned.
pub fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let started = Instant::now();
    while !condition()? {
        if started.elapsed() > limit {
            bail!("waited {:.1} s for {what}, in vain", limit.as_secs_f64());
        }
        thread::sleep(POLL_INTERVAL);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_ports_are_different_and_can_be_listened_on() {
        let ports: Vec<_> = (0..50).map(|_| free_port().expect("a free port")).collect();
        let listeners: Vec<_> =
            ports.iter().map(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port))).collect();
        assert!(listeners.iter().all(Result::is_ok), "{listeners:?}");
        assert!(ports.iter().all(|port| *port < 32_768), "{ports:?}");
    }

    #[test]
    fn a_wait_in_vain_names_what_was_awaited_and_a_test_leaves_nothing_behind() -> Result<()> {
        let mut left = Vec::new();
        let error = run("vain", |lab| {
            left = vec![lab.path("x"), lab.memory_path("y")];
            left.iter().try_for_each(|path| fs::write(path, "z"))?;
            assert_ne!(lab.log("a"), lab.log("a"));
            wait_until("rain", Duration::from_millis(50), || Ok(false))
        });
        assert!(error.unwrap_err().to_string().contains("rain"));
        assert!(left.iter().all(|path| !path.exists() && !path.parent().is_some_and(Path::exists)));
        Ok(())
    }
}
