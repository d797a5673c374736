//! QEMU's control protocol, as far as tests need it: one command at a time, events are skipped.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// Longest wait for an answer; QEMU answers in milliseconds unless it hangs.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// Most events accepted before an answer.
const MAX_EVENTS: usize = 10_000;

/// A connection to the control socket of one QEMU.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects and negotiates.
    ///
    /// # Errors
    /// When QEMU does not answer as it should.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream =
            UnixStream::connect(socket).with_context(|| format!("connecting to {}", socket.display()))?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        let mut qmp = Self { reader: BufReader::new(stream) };
        let greeting = qmp.message()?;
        if greeting.get("QMP").is_none() {
            bail!("expected QEMU's greeting, found {greeting}");
        }
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Executes `command` and returns what it answered.
    ///
    /// # Errors
    /// When QEMU refuses it, hangs or is gone.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.reader.get_mut(), "{request}").with_context(|| format!("sending {command} to QEMU"))?;
        for _ in 0..MAX_EVENTS {
            let mut message =
                self.message().with_context(|| format!("waiting for the answer to {command}"))?;
            if let Some(error) = message.get("error") {
                bail!("QEMU refused {request}: {error}");
            }
            if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            }
        }
        bail!("QEMU sent {MAX_EVENTS} events and no answer to {command}")
    }

    fn message(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            bail!("QEMU closed its control socket");
        }
        serde_json::from_str(&line)
            .with_context(|| format!("expected JSON from QEMU, found '{}'", line.trim_end()))
    }
}
