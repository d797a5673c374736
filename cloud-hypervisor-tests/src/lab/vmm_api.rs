//! cloud-hypervisor's control interface, as far as tests need it: HTTP over a unix socket, one request for each connection.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// Longest wait for an answer: a migration is one request.
const ANSWER_LIMIT: Duration = Duration::from_secs(180);
/// Longest answer accepted; a machine's description takes a few KiB.
const MAX_ANSWER: u64 = 1 << 20;

/// The control socket of one cloud-hypervisor.
#[derive(Clone, Debug)]
pub struct VmmApi {
    socket: PathBuf,
}

impl VmmApi {
    /// The interface at this socket.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// Does what `name` says, such as `vm.pause`.
    ///
    /// # Errors
    /// When it is refused, or not answered in time.
    pub fn put(&self, name: &str, body: Option<&Value>) -> Result<Value> {
        self.request("PUT", name, body)
    }

    /// Asks for what `name` says, such as `vm.info`.
    ///
    /// # Errors
    /// As [`VmmApi::put`].
    pub fn get(&self, name: &str) -> Result<Value> {
        self.request("GET", name, None)
    }

    fn request(&self, method: &str, name: &str, body: Option<&Value>) -> Result<Value> {
        let what = || format!("{method} {name} at {}", self.socket.display());
        let mut stream = UnixStream::connect(&self.socket).with_context(what)?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        let body = body.map(Value::to_string).unwrap_or_default();
        let length = body.len();
        // In one piece: the server reads a request with one call.
        let request = format!(
            "{method} /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).with_context(what)?;
        let (status, answer) = read_answer(&mut stream).with_context(what)?;
        if !(200..300).contains(&status) {
            bail!("{}: answered with {status}: {answer}", what());
        }
        if answer.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&answer).with_context(|| format!("{}: expected JSON, found '{answer}'", what()))
    }
}

/// Status and body. The server keeps the connection open, so the header says where the body ends.
fn read_answer(stream: &mut impl Read) -> Result<(u16, String)> {
    let mut stream = stream.take(MAX_ANSWER);
    let mut bytes = Vec::new();
    let mut part = [0; 4096];
    loop {
        let text = String::from_utf8_lossy(&bytes);
        if let Some((header, body)) = text.split_once("\r\n\r\n") {
            let mut lines = header.lines();
            let status = lines.next().and_then(|line| line.split_whitespace().nth(1)).map(str::parse);
            let status = status.with_context(|| format!("expected a status line in '{header}'"))??;
            let length = lines
                .filter_map(|line| line.split_once(':'))
                .find(|(name, _)| name.eq_ignore_ascii_case("content-length"));
            let length: usize = length.map_or(Ok(0), |(_, value)| value.trim().parse())?;
            if body.len() >= length {
                return Ok((status, body.to_owned()));
            }
        }
        match stream.read(&mut part)? {
            0 => bail!("the answer ends early: '{text}'"),
            got => bytes.extend_from_slice(&part[..got]),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use serde_json::json;

    use super::*;

    /// Answers one request with `answer`, in two pieces; what was asked.
    fn asked(answer: &'static str, ask: impl FnOnce(&VmmApi) -> Result<Value>) -> (String, Result<Value>) {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("api");
        let listener = UnixListener::bind(&path).expect("listening");
        std::thread::scope(|scope| {
            let server = scope.spawn(|| {
                let (mut stream, _) = listener.accept().expect("a connection");
                let mut request = [0; 4096];
                let length = stream.read(&mut request).expect("a request");
                let (one, other) = answer.split_at(answer.len() / 2);
                stream.write_all(one.as_bytes()).expect("sent");
                std::thread::sleep(Duration::from_millis(20));
                stream.write_all(other.as_bytes()).expect("sent");
                // Kept open until the client has what it wants.
                let _ = stream.read(&mut [0; 1]);
                String::from_utf8_lossy(&request[..length]).into_owned()
            });
            let result = ask(&VmmApi::new(&path));
            (server.join().expect("the server"), result)
        })
    }

    #[test]
    fn requests_and_answers_are_those_of_cloud_hypervisor() {
        let (request, result) = asked("HTTP/1.1 204 No Content\r\nServer: x\r\n\r\n", |api| {
            api.put("vm.resize", Some(&json!({ "desired_vcpus": 2 })))
        });
        assert_eq!(result.expect("no content"), Value::Null);
        assert!(request.starts_with("PUT /api/v1/vm.resize HTTP/1.1\r\n"), "{request}");
        assert!(request.ends_with("Content-Length: 19\r\n\r\n{\"desired_vcpus\":2}"), "{request}");
        let (request, result) =
            asked("HTTP/1.1 200 OK\r\ncontent-length: 19\r\n\r\n{\"state\":\"Running\"}", |api| {
                api.get("vm.info")
            });
        assert_eq!(result.expect("content")["state"], "Running");
        assert!(request.starts_with("GET /api/v1/vm.info HTTP/1.1\r\n"), "{request}");
        let refused = "HTTP/1.1 500 Internal Server Error\r\nContent-Length: 9\r\n\r\n[\"no vm\"]";
        let error = format!("{:#}", asked(refused, |api| api.put("vm.pause", None)).1.expect_err("refused"));
        assert!(error.contains("500") && error.contains("no vm"), "{error}");
    }
}
