//! The host's end of the channel to the guest's agent (`init.sh` says what goes over it).
//! One thread reads answers and hands each to the command that waits for it; the guest's end is noticed at once.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

/// Longest answer accepted, in characters: far beyond any report of a test, and still bounded.
const MAX_ANSWER: u64 = 64 << 20;

/// What a command in the guest said and how it ended.
#[derive(Clone, Debug)]
pub struct Output {
    /// Exit status; above 128 for a signal, as the shell counts.
    pub exit: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    /// The standard output of a command that had to succeed.
    ///
    /// # Errors
    /// When it did not; the error carries all that it said.
    pub fn success(self) -> Result<String> {
        if self.exit != 0 {
            bail!(
                "the guest's command ended with status {}: {}{}",
                self.exit,
                self.stdout,
                self.stderr.trim_end()
            );
        }
        Ok(self.stdout)
    }
}

/// Time from the end of the channel to the exit status of the hypervisor.
const EXIT_LIMIT: Duration = Duration::from_secs(1);

/// A command that runs in the guest.
#[derive(Debug)]
pub struct Command {
    script: String,
    answer: mpsc::Receiver<Output>,
}

impl Command {
    /// Waits for the end of the command. `alive` is asked now and then, and its error ends the wait.
    pub(in crate::lab) fn wait_while(
        self,
        limit: Duration,
        alive: impl Fn() -> Result<()>,
    ) -> Result<Output> {
        let started = Instant::now();
        loop {
            match self.answer.recv_timeout(Duration::from_millis(200)) {
                Ok(output) => return Ok(output),
                Err(mpsc::RecvTimeoutError::Timeout) => alive()?,
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    // A hypervisor that ends closes the channel some moments before its exit status is there.
                    let hung_up = Instant::now();
                    while hung_up.elapsed() < EXIT_LIMIT {
                        alive()?;
                        std::thread::sleep(EXIT_LIMIT / 50);
                    }
                    bail!("the guest's agent hung up during: {}", self.script);
                }
            }
            if started.elapsed() > limit {
                bail!("the guest still runs after {:.1} s: {}", limit.as_secs_f64(), self.script);
            }
        }
    }

    /// Whether the command has ended.
    #[must_use]
    pub fn poll(&self) -> Option<Output> {
        self.answer.try_recv().ok()
    }
}

/// The connection to one guest's agent.
pub(in crate::lab) struct Agent {
    shared: Arc<Mutex<Waiting>>,
    ready: mpsc::Receiver<String>,
    writer: Mutex<Box<dyn Write + Send>>,
}

#[derive(Default)]
struct Waiting {
    next_id: u64,
    commands: HashMap<u64, mpsc::Sender<Output>>,
    hung_up: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Message {
    Ready { ready: String },
    Answer { id: u64, exit: i32, stdout: String, stderr: String },
}

impl Agent {
    /// Serves the channel made of `reader` and `writer` until the guest hangs up.
    pub(in crate::lab) fn new(
        reader: impl Read + Send + 'static,
        writer: impl Write + Send + 'static,
    ) -> Self {
        let shared = Arc::new(Mutex::new(Waiting::default()));
        let (ready_sender, ready) = mpsc::channel();
        let for_reader = Arc::clone(&shared);
        thread::spawn(move || {
            if let Err(error) = serve(reader, &for_reader, &ready_sender) {
                eprintln!("lab: the channel to the guest's agent: {error:#}");
            }
            let mut waiting = lock(&for_reader);
            waiting.hung_up = true;
            waiting.commands.clear();
        });
        Self { shared, ready, writer: Mutex::new(Box::new(writer)) }
    }

    /// Waits for the agent's first words: the version of the guest's kernel.
    pub(in crate::lab) fn wait_ready(
        &self,
        limit: Duration,
        alive: impl Fn() -> Result<()>,
    ) -> Result<String> {
        let started = Instant::now();
        loop {
            match self.ready.recv_timeout(Duration::from_millis(200)) {
                Ok(kernel) => return Ok(kernel),
                Err(mpsc::RecvTimeoutError::Timeout) => alive()?,
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    alive()?;
                    bail!("the guest hung up before its agent was ready");
                }
            }
            if started.elapsed() > limit {
                bail!("the guest's agent is not ready after {:.1} s", limit.as_secs_f64());
            }
        }
    }

    /// Starts `script` in the guest.
    pub(in crate::lab) fn start(&self, script: &str) -> Result<Command> {
        let (sender, answer) = mpsc::channel();
        let id = {
            let mut waiting = lock(&self.shared);
            if waiting.hung_up {
                bail!("the guest is gone; not run: {script}");
            }
            waiting.next_id += 1;
            let id = waiting.next_id;
            waiting.commands.insert(id, sender);
            id
        };
        let line = format!("{id} {}\n", base64_encode(script.as_bytes()));
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        writer
            .write_all(line.as_bytes())
            .and_then(|()| writer.flush())
            .context("sending a command to the guest")?;
        Ok(Command { script: script.to_owned(), answer })
    }
}

fn serve(reader: impl Read, shared: &Mutex<Waiting>, ready: &mpsc::Sender<String>) -> Result<()> {
    let mut reader = BufReader::new(reader);
    loop {
        let mut line = Vec::new();
        // An error here is a guest that was killed: its socket is reset. That is the hang-up, and no news.
        let length = reader.by_ref().take(MAX_ANSWER).read_until(b'\n', &mut line).unwrap_or(0);
        if length == 0 {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&line);
        let Some(start) = text.find('{') else { continue };
        let message = serde_json::from_str(text[start..].trim_end());
        match message.with_context(|| format!("expected a JSON line, found '{}'", text.trim_end()))? {
            // Nobody waits for it any more when the guest says it a second time.
            Message::Ready { ready: kernel } => drop(ready.send(kernel)),
            Message::Answer { id, exit, stdout, stderr } => {
                let output =
                    Output { exit, stdout: base64_decode(&stdout)?, stderr: base64_decode(&stderr)? };
                if let Some(command) = lock(shared).commands.remove(&id) {
                    // The test may have given up on the command.
                    let _ = command.send(output);
                }
            }
        }
    }
}

fn lock(waiting: &Mutex<Waiting>) -> MutexGuard<'_, Waiting> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

fn base64_encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits =
            group.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        for place in 0..4 {
            let digit = BASE64[(bits >> (18 - 6 * place)) as usize & 63];
            text.push(if place <= group.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

fn base64_decode(text: &str) -> Result<String> {
    let (mut bytes, mut bits, mut held) = (Vec::with_capacity(text.len() / 4 * 3), 0_u32, 0);
    for character in text.trim_end_matches('=').bytes() {
        let digit = (0_u32..).zip(BASE64).find(|(_, known)| **known == character);
        let (digit, _) = digit.with_context(|| format!("'{}' is not base64", character.escape_ascii()))?;
        bits = bits << 6 | digit;
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push(((bits >> held) & 0xff).to_le_bytes()[0]);
        }
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn base64_of_every_length_is_what_the_tools_of_the_guest_expect() {
        let known = [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("µ>?", "wrU+Pw=="),
        ];
        for (plain, encoded) in known {
            assert_eq!(base64_encode(plain.as_bytes()), encoded);
            assert_eq!(base64_decode(encoded).expect("valid"), plain);
        }
        assert!(base64_decode("no base64!").is_err());
    }

    #[test]
    fn answers_reach_their_own_commands_and_a_hang_up_ends_every_wait() {
        let (host, guest) = UnixStream::pair().expect("socket pair");
        let agent = Agent::new(host.try_clone().expect("clone"), host);
        let first = agent.start("true").expect("sent");
        let second = agent.start("false").expect("sent");
        let third = agent.start("sleep").expect("sent");
        let mut lines = BufReader::new(&guest).lines();
        assert_eq!(lines.next().expect("line").expect("text"), "1 dHJ1ZQ==");
        (&guest).write_all(b"noise\r\n{\"ready\":\"6.1\"}\n").expect("written");
        (&guest).write_all(b"{\"id\":2,\"exit\":1,\"stdout\":\"\",\"stderr\":\"Zm9v\"}\n").expect("written");
        (&guest).write_all(b"{\"id\":1,\"exit\":0,\"stdout\":\"Zm9v\",\"stderr\":\"\"}\n").expect("written");
        let limit = Duration::from_secs(10);
        assert_eq!(agent.wait_ready(limit, || Ok(())).expect("ready"), "6.1");
        assert_eq!(first.wait_while(limit, || Ok(())).expect("answer").success().expect("0"), "foo");
        let error = second.wait_while(limit, || Ok(())).expect("answer").success().unwrap_err().to_string();
        assert!(error.contains("status 1") && error.contains("foo"), "{error}");
        drop(lines);
        drop(guest);
        assert!(third.wait_while(limit, || Ok(())).unwrap_err().to_string().contains("hung up"));
        assert!(agent.start("true").is_err());
    }
}
