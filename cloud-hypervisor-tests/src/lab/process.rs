//! Child processes of a test: their output goes to a log file in the test's directory, and they never outlive it.
//! Every wait is bounded and ends early, with the log's tail in the error, when the process dies instead.

use std::fs::File;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, OnceLock, mpsc};
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use anyhow::{Context, Result, bail};

use super::workspace::{self, Lab};
use super::{sys, wait_until};

/// How much of a dead process' log its error carries.
const ERROR_TAIL_BYTES: u64 = 2 << 10;
/// How long a process that is dropped may take to end after SIGKILL; only the kernel's own work is left then.
const REAP_LIMIT: Duration = Duration::from_secs(60);

/// A running child process; killed with SIGKILL when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    log: PathBuf,
    pid: u32,
    child: Mutex<Child>,
}

impl Process {
    /// Starts `command`, its standard output and error going to one new log of `lab`.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn spawn(lab: &Lab, name: &str, mut command: Command) -> Result<Self> {
        let log = lab.log(name);
        let output = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        Self::adopt(name, log, command)
    }

    /// Starts `command` with the standard streams it has been given; `log` is what it writes by itself.
    pub(crate) fn adopt(name: &str, log: PathBuf, command: Command) -> Result<Self> {
        let program = command.get_program().to_owned();
        let child = spawn_from_lasting_thread(command)
            .with_context(|| format!("starting {} as '{name}'", program.display()))?;
        Ok(Self { name: name.to_owned(), log, pid: child.id(), child: Mutex::new(child) })
    }

    /// The name given at the start.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process id; it stays this process' own until it has been waited for.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The log file.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Everything logged so far.
    #[must_use]
    pub fn log_text(&self) -> String {
        workspace::tail(&self.log, u64::MAX)
    }

    /// The exit status if the process has ended.
    ///
    /// # Errors
    /// When the system cannot tell.
    pub fn exit_status(&self) -> Result<Option<ExitStatus>> {
        let mut child = self.child.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        child.try_wait().with_context(|| format!("asking for the state of '{}'", self.name))
    }

    /// Whether the process has not ended yet.
    ///
    /// # Errors
    /// When the system cannot tell.
    pub fn is_running(&self) -> Result<bool> {
        Ok(self.exit_status()?.is_none())
    }

    /// Processor time that the process has used so far, all threads together.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn cpu_time(&self) -> Result<Duration> {
        /// The unit of proc(5)'s times on every Linux that Debian builds.
        const TICKS_PER_SECOND: u64 = 100;
        let path = format!("/proc/{}/stat", self.pid);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path} of '{}'", self.name))?;
        // The second field is a name in parentheses that may hold anything; user and system time are 11 and 12 after it.
        let fields = text.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().skip(11).take(2));
        let ticks: Option<u64> =
            fields.and_then(|fields| fields.map(|field| field.parse::<u64>().ok()).sum());
        let ticks =
            ticks.with_context(|| format!("expected the fields of proc(5) in {path}, found '{text}'"))?;
        Ok(Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND))
    }

    /// Resident memory of the process in bytes, without memory that it shares with others, such as a guest's.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn own_memory(&self) -> Result<u64> {
        let path = format!("/proc/{}/status", self.pid);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path} of '{}'", self.name))?;
        let kib = |field: &str| -> Option<u64> {
            text.lines().find_map(|line| line.strip_prefix(field))?.trim().strip_suffix(" kB")?.parse().ok()
        };
        let sum = kib("RssAnon:").zip(kib("RssFile:")).map(|(anonymous, file)| (anonymous + file) << 10);
        sum.with_context(|| format!("expected RssAnon and RssFile in {path}, found '{text}'"))
    }

    /// Demands that the process runs, for the sake of `what`.
    ///
    /// # Errors
    /// When it has ended; the error carries the end of its log.
    pub fn ensure_running(&self, what: &str) -> Result<()> {
        if let Some(status) = self.exit_status()? {
            bail!(
                "'{}' ended ({status}) while {what} was awaited; its last words:\n{}",
                self.name,
                workspace::tail(&self.log, ERROR_TAIL_BYTES).trim_end()
            );
        }
        Ok(())
    }

    /// Waits until `condition` holds while the process runs.
    ///
    /// # Errors
    /// When `limit` passes, when the process ends first, or what `condition` returned.
    pub fn wait_until(
        &self,
        what: &str,
        limit: Duration,
        mut condition: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        wait_until(&format!("{what} of '{}'", self.name), limit, || {
            if condition()? {
                return Ok(true);
            }
            self.ensure_running(what)?;
            Ok(false)
        })
    }

    /// Waits for a line of the log that contains `text`.
    ///
    /// # Errors
    /// As [`Process::wait_until`].
    pub fn wait_for_log(&self, text: &str, limit: Duration) -> Result<()> {
        self.wait_until(&format!("'{text}' in the log"), limit, || Ok(self.log_text().contains(text)))
    }

    /// Waits until a unix socket exists at `path`.
    ///
    /// # Errors
    /// As [`Process::wait_until`].
    pub fn wait_for_socket(&self, path: &Path, limit: Duration) -> Result<()> {
        self.wait_until(&format!("the socket {}", path.display()), limit, || {
            Ok(fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()))
        })
    }

    /// Waits until somebody accepts TCP connections at `address`.
    ///
    /// # Errors
    /// As [`Process::wait_until`].
    pub fn wait_for_port(&self, address: SocketAddr, limit: Duration) -> Result<()> {
        self.wait_until(
            &format!("a listener on {address}"),
            limit,
            || Ok(TcpStream::connect(address).is_ok()),
        )
    }

    /// Waits for the process to end by itself.
    ///
    /// # Errors
    /// When it still runs after `limit`.
    pub fn wait_exit(&self, limit: Duration) -> Result<ExitStatus> {
        let started = Instant::now();
        loop {
            if let Some(status) = self.exit_status()? {
                return Ok(status);
            }
            if started.elapsed() > limit {
                bail!("'{}' (pid {}) still runs after {:.1} s", self.name, self.pid, limit.as_secs_f64());
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends `signal` if the process still runs.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn signal(&self, signal: libc::c_int) -> Result<()> {
        // Held over the signal: as long as nobody waits for the child, the id cannot pass to another process.
        let mut child = self.child.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if child.try_wait()?.is_none() {
            sys::signal(self.pid, signal)
                .with_context(|| format!("sending signal {signal} to '{}'", self.name))?;
        }
        Ok(())
    }

    /// Kills the process with SIGKILL, as a crash would, and waits until it is gone.
    ///
    /// # Errors
    /// When it does not go.
    pub fn kill(&self) -> Result<()> {
        self.signal(libc::SIGKILL)?;
        self.wait_exit(REAP_LIMIT).map(|_| ())
    }

    /// Asks the process to end with SIGTERM and waits for its exit status.
    ///
    /// # Errors
    /// When it still runs after `limit`.
    pub fn terminate(&self, limit: Duration) -> Result<ExitStatus> {
        self.signal(libc::SIGTERM)?;
        self.wait_exit(limit)
    }

    /// Asks the process to end with SIGTERM and demands exit status 0.
    ///
    /// # Errors
    /// When it still runs after `limit` or ended in another way.
    pub fn stop_cleanly(&self, limit: Duration) -> Result<()> {
        let status = self.terminate(limit)?;
        if !status.success() {
            let how = status.signal().map_or_else(|| status.to_string(), |signal| format!("signal {signal}"));
            bail!("'{}' answered SIGTERM with {how}, expected exit status 0", self.name);
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            eprintln!("lab: cleaning up: {error:#}");
        }
    }
}

/// Starts `command` from a thread that lives as long as this process. The signal that children get at their parent's
/// death comes when the *thread* that started them ends, and threads of tests may end while their children are wanted.
fn spawn_from_lasting_thread(mut command: Command) -> io::Result<Child> {
    type Request = (Command, mpsc::SyncSender<io::Result<Child>>);
    static SPAWNER: OnceLock<mpsc::Sender<Request>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, requests) = mpsc::channel::<Request>();
        thread::spawn(move || {
            for (mut command, answer) in requests {
                // Whoever asked may be gone; the child then dies when its handle is dropped here, unwanted.
                if let Err(mpsc::SendError(Ok(mut child))) = answer.send(command.spawn()) {
                    let _ = child.kill().and_then(|()| child.wait());
                }
            }
        });
        sender
    });
    sys::die_with_parent(&mut command);
    let (sender, answer) = mpsc::sync_channel(1);
    let gone = || io::Error::other("the thread that starts processes is gone");
    spawner.send((command, sender)).map_err(|_| gone())?;
    answer.recv().map_err(|_| gone())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_process_that_dies_while_it_is_awaited_is_reported_with_its_last_words() -> Result<()> {
        workspace::run("dies", |lab| {
            let process = Process::spawn(lab, "short", shell("echo no such pool >&2; exit 3"))?;
            let error = process.wait_for_log("ready", Duration::from_secs(60)).unwrap_err().to_string();
            assert!(error.contains("exit status: 3") && error.contains("no such pool"), "{error}");
            Ok(())
        })
    }

    #[test]
    fn a_process_outlives_the_thread_that_asked_for_it_but_not_its_handle() -> Result<()> {
        workspace::run("outlives", |lab| {
            let process = thread::scope(|scope| {
                scope.spawn(|| Process::spawn(lab, "long", shell("sleep 600"))).join().expect("no panic")
            })?;
            thread::sleep(Duration::from_millis(100));
            assert!(process.is_running()?);
            let proc = PathBuf::from(format!("/proc/{}", process.pid()));
            assert!(proc.exists());
            drop(process);
            assert!(!proc.exists());
            Ok(())
        })
    }

    #[test]
    fn processor_time_and_memory_are_those_of_the_process() -> Result<()> {
        workspace::run("busy", |lab| {
            let busy = Process::spawn(lab, "busy", shell("while :; do :; done"))?;
            let idle = Process::spawn(lab, "idle", shell("sleep 600"))?;
            wait_until("processor time", Duration::from_secs(60), || {
                Ok(busy.cpu_time()? > Duration::from_millis(100))
            })?;
            assert!(idle.cpu_time()? < Duration::from_millis(100));
            let memory = idle.own_memory()?;
            assert!((64 << 10..64 << 20).contains(&memory), "{memory}");
            idle.kill()?;
            assert!(idle.own_memory().is_err());
            Ok(())
        })
    }

    #[test]
    fn a_process_that_ignores_sigterm_is_an_error_within_the_limit() -> Result<()> {
        workspace::run("stubborn", |lab| {
            let process =
                Process::spawn(lab, "stubborn", shell("trap '' TERM; echo up; while :; do sleep 0.1; done"))?;
            process.wait_for_log("up", Duration::from_secs(60))?;
            let error = process.stop_cleanly(Duration::from_millis(200)).unwrap_err().to_string();
            assert!(error.contains("still runs after 0.2 s"), "{error}");
            process.kill()
        })
    }
}
