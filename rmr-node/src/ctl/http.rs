//! One HTTP request to a node's admin address, bounded in time and size, with errors that name the node.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use rmr_common::text::printable;
use rmr_common::words;
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::net::TcpStream;

use crate::admin::api::{ControlError, ErrorBody};
use crate::config::DEFAULT_ADMIN_PORT;

/// Largest answer that is read: thousands of statuses.
const MAX_ANSWER: usize = 16 << 20;

/// Admin address of a node: `HOST` or `HOST:PORT`, IPv6 in brackets.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
#[serde(into = "String")]
pub struct NodeAddress {
    host: String,
    port: u16,
}

impl NodeAddress {
    /// The admin address of a node on this machine with default settings.
    #[must_use]
    pub fn local() -> Self {
        Self { host: "127.0.0.1".into(), port: DEFAULT_ADMIN_PORT }
    }
}

impl FromStr for NodeAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fail = |reason: &str| {
            format!(
                "'{text}' is no admin address: {reason}; expected HOST or HOST:PORT (port {DEFAULT_ADMIN_PORT} if absent)"
            )
        };
        let (host, port) = match text.strip_prefix('[').map(|rest| rest.split_once(']')) {
            Some(None) => return Err(fail("the bracket is not closed")),
            Some(Some((host, ""))) => (host, None),
            Some(Some((host, rest))) => (
                host,
                Some(rest.strip_prefix(':').ok_or_else(|| fail("expected a colon after the bracket"))?),
            ),
            None => match text.split_once(':') {
                Some((_, port)) if port.contains(':') => return Err(fail("an IPv6 address needs brackets")),
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            },
        };
        // Whatever else could end the host in an HTTP header is refused here.
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '%');
        if host.is_empty() || !host.chars().all(good) {
            return Err(fail(
                "the host is empty or has other characters than letters, digits, '.', '-', '_'",
            ));
        }
        let port = match port {
            None => DEFAULT_ADMIN_PORT,
            Some(port) => match port.parse() {
                Ok(0) | Err(_) => return Err(fail("the port is not a number from 1 to 65535")),
                Ok(port) => port,
            },
        };
        Ok(Self { host: host.to_owned(), port })
    }
}

impl fmt::Display for NodeAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl From<NodeAddress> for String {
    fn from(address: NodeAddress) -> Self {
        address.to_string()
    }
}

/// Why a request to a node gave no answer to work with.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum CallError {
    /// No connection could be made.
    #[error("node {node}: {reason}")]
    Unreachable {
        /// The node asked.
        node: NodeAddress,
        /// What the system says.
        reason: String,
    },
    /// There was a connection, and no complete answer came in time or at all.
    #[error("node {node}: {reason}")]
    NoAnswer {
        /// The node asked.
        node: NodeAddress,
        /// What happened.
        reason: String,
    },
    /// The node refused.
    #[error("node {node}: {error}")]
    Refused {
        /// The node asked.
        node: NodeAddress,
        /// What it said.
        error: ControlError,
    },
}

impl CallError {
    /// The refusal, if the node answered with one.
    #[must_use]
    pub const fn refusal(&self) -> Option<&ControlError> {
        match self {
            Self::Refused { error, .. } => Some(error),
            Self::Unreachable { .. } | Self::NoAnswer { .. } => None,
        }
    }

    /// Whether the request certainly changed nothing because it never reached the node.
    #[must_use]
    pub const fn never_arrived(&self) -> bool {
        matches!(self, Self::Unreachable { .. })
    }
}

/// Asks nodes; every request ends within the timeout.
#[derive(Clone, Copy, Debug)]
pub struct Client {
    /// How long a request may take, connection included.
    pub timeout: Duration,
}

impl Client {
    /// `GET path`.
    ///
    /// # Errors
    /// When there is no answer, or a refusal.
    pub async fn get<T: DeserializeOwned>(&self, node: &NodeAddress, path: &str) -> Result<T, CallError> {
        self.call(node, Method::GET, path, Vec::new()).await
    }

    /// `POST path` with a JSON body.
    ///
    /// # Errors
    /// When there is no answer, or a refusal.
    pub async fn post<T: DeserializeOwned>(
        &self,
        node: &NodeAddress,
        path: &str,
        body: &(impl Serialize + Sync),
    ) -> Result<T, CallError> {
        let body = serde_json::to_vec(body).map_err(|e| CallError::NoAnswer {
            node: node.clone(),
            reason: format!("the request cannot be written as JSON: {e}"),
        })?;
        self.call(node, Method::POST, path, body).await
    }

    /// `DELETE path`.
    ///
    /// # Errors
    /// When there is no answer, or a refusal.
    pub async fn delete<T: DeserializeOwned>(&self, node: &NodeAddress, path: &str) -> Result<T, CallError> {
        self.call(node, Method::DELETE, path, Vec::new()).await
    }

    async fn call<T: DeserializeOwned>(
        &self,
        node: &NodeAddress,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<T, CallError> {
        let deadline = tokio::time::Instant::now() + self.timeout;
        let late = format!("no answer within {}", words::time(self.timeout));
        let unreachable = |reason: String| CallError::Unreachable { node: node.clone(), reason };
        let no_answer = |reason: String| CallError::NoAnswer { node: node.clone(), reason };
        let connect = TcpStream::connect((node.host.as_str(), node.port));
        let stream = match tokio::time::timeout_at(deadline, connect).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(e)) => return Err(unreachable(e.to_string())),
            Err(_) => return Err(unreachable(late)),
        };
        // The address and not the name: a node refuses names that it does not know to be its own, and cannot know them all.
        let host = stream.peer_addr().map(|peer| SocketAddr::new(peer.ip(), peer.port()).to_string());
        let exchange = exchange(stream, host.unwrap_or_else(|_| node.to_string()), method, path, body);
        match tokio::time::timeout_at(deadline, exchange).await {
            Ok(Ok((status, bytes))) => read_answer(status, &bytes).map_err(|e| match e {
                Unread::Refusal(error) => CallError::Refused { node: node.clone(), error },
                Unread::Strange(reason) => no_answer(reason),
            }),
            Ok(Err(reason)) => Err(no_answer(reason)),
            Err(_) => Err(no_answer(late)),
        }
    }
}

/// Sends one request on the connection and reads the whole answer.
async fn exchange(
    stream: TcpStream,
    host: String,
    method: Method,
    path: &str,
    body: Vec<u8>,
) -> Result<(StatusCode, Bytes), String> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, host)
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(|e| format!("request cannot be made: {e}"))?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(|e| e.to_string())?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        Ok((status, body.map_err(|e| e.to_string())?.to_bytes()))
    };
    tokio::pin!(answer);
    tokio::pin!(connection);
    // The connection moves the bytes; once it has ended, the answer has all that it will ever get.
    tokio::select! {
        biased;
        result = &mut answer => result,
        _ = &mut connection => answer.await,
    }
}

/// An answer with its texts as they may be shown on a terminal: names, descriptions and reasons in it come from whoever
/// attached to the node, or asked it.
fn shown(answer: serde_json::Value) -> serde_json::Value {
    use serde_json::Value;
    match answer {
        Value::String(text) => Value::String(printable(&text).into_owned()),
        Value::Array(items) => Value::Array(items.into_iter().map(shown).collect()),
        Value::Object(fields) => {
            Value::Object(fields.into_iter().map(|(k, v)| (printable(&k).into_owned(), shown(v))).collect())
        }
        other => other,
    }
}

enum Unread {
    Refusal(ControlError),
    Strange(String),
}

fn read_answer<T: DeserializeOwned>(status: StatusCode, body: &[u8]) -> Result<T, Unread> {
    let strange = |e: serde_json::Error| Unread::Strange(format!("the answer is not what was expected: {e}"));
    if status.is_success() {
        let answer = serde_json::from_slice(body).map_err(strange)?;
        return serde_json::from_value(shown(answer)).map_err(strange);
    }
    match serde_json::from_slice(body).and_then(|body| serde_json::from_value::<ErrorBody>(shown(body))) {
        Ok(body) => Err(Unread::Refusal(body.error)),
        Err(_) => {
            Err(Unread::Strange(format!("HTTP status {status}; is this the admin address of an rmr-node?")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_strangers_have_put_into_an_answer_gives_the_terminal_no_orders() {
        #[derive(serde::Deserialize)]
        struct Answer {
            client: String,
            size: u64,
        }
        let body = b"{\"client\":\"a\\u001b[2J\\nok\",\"size\":7}";
        let answer: Answer = read_answer(StatusCode::OK, body).ok().unwrap();
        assert_eq!((answer.client.as_str(), answer.size), ("a\\u{1b}[2J\\nok", 7));
    }

    #[test]
    fn admin_addresses_read_and_print() {
        for (text, printed) in [
            ("node-a", "node-a:7701"),
            ("node-a:1", "node-a:1"),
            ("10.0.0.1:80", "10.0.0.1:80"),
            ("[fe80::1]", "[fe80::1]:7701"),
            ("[fe80::1]:80", "[fe80::1]:80"),
        ] {
            assert_eq!(text.parse::<NodeAddress>().unwrap().to_string(), printed);
        }
        for bad in
            ["", ":1", "a:", "a:0", "a:70000", "::1", "[::1", "[::1]80", "http://a:1", "a b", "tcp://a:1"]
        {
            assert!(bad.parse::<NodeAddress>().unwrap_err().contains("expected HOST"), "{bad}");
        }
    }
}
