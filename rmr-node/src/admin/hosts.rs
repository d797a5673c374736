//! By which names the admin API may be called.
//!
//! A web page in an operator's browser can have its own name resolve to a node's address (DNS rebinding), and then speaks to
//! the node as if it came from there. It cannot hide its name: the browser puts it into `Host`. A request that names a host which
//! is not this node is refused. Addresses in numbers cannot be made to point elsewhere, and are not refused.

use std::net::{IpAddr, Ipv6Addr};

use axum::http::uri::Authority;
use axum::http::{HeaderMap, Uri, Version, header};

/// Names that mean the machine itself.
const LOOPBACK: [&str; 2] = ["localhost", "localhost.localdomain"];

/// The host names of a node.
#[derive(Clone, Default, Debug)]
pub struct HostNames(Vec<String>);

impl HostNames {
    /// These names, and those of the loopback.
    #[must_use]
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        Self(names.into_iter().map(|name| plain_name(&name)).filter(|name| !name.is_empty()).collect())
    }

    fn knows(&self, host: &str) -> bool {
        let name = plain_name(host);
        let numbers = name.trim_start_matches('[').trim_end_matches(']');
        numbers.parse::<IpAddr>().is_ok()
            || numbers.split_once('%').is_some_and(|(ip, _)| ip.parse::<Ipv6Addr>().is_ok())
            || LOOPBACK.contains(&name.as_str())
            || name.ends_with(".localhost")
            || self.0.contains(&name)
    }

    /// Whether a request is meant for this node.
    ///
    /// # Errors
    /// In words: it names no host, several, or another one.
    pub(super) fn check(&self, version: Version, uri: &Uri, headers: &HeaderMap) -> Result<(), String> {
        let mut given = headers.get_all(header::HOST).iter();
        let host = match (given.next(), given.next()) {
            (Some(host), None) => Some(host),
            // Monitors that speak HTTP/1.0 send none. Browsers always do.
            (None, _) if version <= Version::HTTP_10 => None,
            (None, _) => return Err("the request has no Host header, expected one".to_owned()),
            (Some(_), Some(_)) => return Err("the request has several Host headers, expected one".to_owned()),
        };
        let host = match host {
            Some(value) => {
                let text = value.to_str().unwrap_or_default();
                let authority: Result<Authority, _> = text.parse();
                Some(authority.map_err(|_| "the Host header is malformed, expected HOST or HOST:PORT")?)
            }
            None => None,
        };
        for authority in host.iter().chain(uri.authority()) {
            if !self.knows(authority.host()) {
                return Err(format!(
                    "this node does not go by the name '{}': a web page may have sent the request without the knowledge of who \
                     looks at it. If the name is right, add\n  admin_names = [\"{0}\"]\nto the node's configuration and \
                     restart the node, or use its IP address",
                    authority.host()
                ));
            }
        }
        Ok(())
    }
}

/// A name as it is compared: without case, and without the dot of the root.
fn plain_name(name: &str) -> String {
    let lower = name.to_ascii_lowercase();
    lower.strip_suffix('.').map_or_else(|| lower.clone(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(version: Version, uri: &str, hosts: &[&str]) -> Result<(), String> {
        let names = HostNames::new(["node-a".to_owned(), "Admin.Example.".to_owned()]);
        let mut headers = HeaderMap::new();
        for host in hosts {
            headers.append(header::HOST, host.parse().unwrap());
        }
        names.check(version, &uri.parse().unwrap(), &headers)
    }

    #[test]
    fn a_node_answers_to_its_names_its_addresses_and_the_loopback() {
        for host in [
            "node-a",
            "NODE-A:7701",
            "node-a.",
            "admin.example:80",
            "localhost:7701",
            "a.localhost",
            "127.0.0.1:7701",
            "10.0.0.1",
            "[::1]:7701",
            "[fe80::1]",
        ] {
            assert_eq!(check(Version::HTTP_11, "/v1/node", &[host]), Ok(()), "{host}");
        }
        assert_eq!(check(Version::HTTP_10, "/v1/health", &[]), Ok(()));
    }

    #[test]
    fn other_names_are_refused_however_they_are_given() {
        for host in
            ["evil.example:7701", "node-a.evil.example", "127.0.0.1.evil.example", "localhost.evil", "node-b"]
        {
            let error = check(Version::HTTP_11, "/v1/node", &[host]).expect_err(host);
            assert!(error.contains("admin_names = [\""), "{error}");
        }
        assert!(check(Version::HTTP_10, "/v1/node", &["evil.example"]).is_err());
        assert!(check(Version::HTTP_11, "http://evil.example/v1/node", &["node-a"]).is_err());
        for hosts in [&[][..], &["node-a", "node-a"], &[""], &["a b"], &["node-a/x"]] {
            assert!(check(Version::HTTP_11, "/v1/node", hosts).is_err(), "{hosts:?}");
        }
    }
}
