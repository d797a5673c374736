//! What nodes say they have done: the counters of their Prometheus pages, to be compared before and after.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::lab::{Daemon, Node};

/// What a daemon says when it has left its pool.
const DETACHED: &str = "detached";
/// Longest wait for a page.
const LIMIT: Duration = Duration::from_secs(60);

/// Counters by name, summed over everything that they are counted for.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Counters(BTreeMap<String, u64>);

impl Counters {
    /// Those of one node.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn of(node: &Node) -> Result<Self> {
        let address = node.admin_address();
        let asking = || format!("asking node '{}' at {address} for its counters", node.name());
        let mut stream = TcpStream::connect_timeout(&address, LIMIT).with_context(asking)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let question = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(question.as_bytes()).with_context(asking)?;
        let mut page = String::new();
        stream.read_to_string(&mut page).with_context(asking)?;
        ensure!(page.starts_with("HTTP/1.1 200"), "{}: it said {page}", asking());
        Ok(Self::parse(&page))
    }

    /// Those that a daemon wrote to its log when it detached from its pool, together for all times that it did.
    ///
    /// # Errors
    /// When it did not within a few seconds, after its guest has gone.
    pub fn of_daemon(daemon: &Daemon) -> Result<Self> {
        daemon.process().wait_for_log(DETACHED, LIMIT)?;
        Self::parse_log(&daemon.process().log_text())
    }

    fn parse_log(log: &str) -> Result<Self> {
        let mut counters = Self::default();
        for line in log.lines().filter(|line| line.contains(DETACHED)) {
            let (_, list) = line.split_once("Counters {").with_context(|| {
                format!("expected 'Counters {{' in what the daemon says when it detaches, found '{line}'")
            })?;
            let list = list.split('}').next().unwrap_or(list);
            for (name, value) in list.split(',').filter_map(|part| part.split_once(':')) {
                let value: u64 =
                    value.trim().parse().with_context(|| format!("the counter {name} in '{line}'"))?;
                *counters.0.entry(name.trim().to_owned()).or_default() += value;
            }
        }
        Ok(counters)
    }

    /// The value of a counter.
    ///
    /// # Errors
    /// When there is no such counter.
    pub fn get(&self, name: &str) -> Result<u64> {
        self.since(&Self::default(), name)
    }

    /// Those in the text of a page: all whose name ends with `_total`.
    fn parse(page: &str) -> Self {
        let mut counters = Self::default();
        for line in page.lines().filter(|line| !line.starts_with('#')) {
            let Some((series, value)) = line.rsplit_once(' ') else { continue };
            let name = series.split('{').next().unwrap_or(series);
            if let (true, Ok(value)) = (name.ends_with("_total"), value.parse::<u64>()) {
                *counters.0.entry(name.to_owned()).or_default() += value;
            }
        }
        counters
    }

    /// The sum of both.
    #[must_use]
    pub fn plus(mut self, other: &Self) -> Self {
        for (name, value) in &other.0 {
            *self.0.entry(name.clone()).or_default() += value;
        }
        self
    }

    /// What has been counted since `before`.
    ///
    /// # Errors
    /// When a counter went backwards: somebody was started again.
    pub fn minus(&self, before: &Self) -> Result<Self> {
        self.0
            .keys()
            .map(|name| Ok((name.clone(), self.since(before, name)?)))
            .collect::<Result<_>>()
            .map(Self)
    }

    /// Tells every counter and its value.
    pub fn each(&self, mut tell: impl FnMut(&str, u64) -> Option<u64>) {
        for (name, value) in &self.0 {
            tell(name, *value);
        }
    }

    /// How much a counter has grown since `before`.
    ///
    /// # Errors
    /// When there is no such counter, or it went backwards.
    pub fn since(&self, before: &Self, name: &str) -> Result<u64> {
        let now = self.0.get(name).with_context(|| format!("the nodes have no counter '{name}'"))?;
        let then = before.0.get(name).copied().unwrap_or(0);
        now.checked_sub(then).with_context(|| format!("the counter '{name}' went from {then} to {now}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_summed_over_their_labels_and_gauges_are_left_out() {
        let page = "HTTP/1.1 200 OK\r\n\r\n# TYPE a_total counter\na_total{m=\"0\"} 3\na_total{m=\"1 \"} 4\n\
                    gauge 9\nb_total 1\nbroken_total x\n";
        let counters = Counters::parse(page);
        assert_eq!(counters.0, [("a_total".to_owned(), 7), ("b_total".to_owned(), 1)].into());
        let twice = counters.clone().plus(&counters);
        assert_eq!(twice.since(&counters, "a_total").expect("known"), 7);
        assert!(twice.since(&counters, "gauge").is_err() && counters.since(&twice, "a_total").is_err());
        assert_eq!(counters.get("b_total").expect("known"), 1);
    }

    #[test]
    fn what_a_daemon_says_when_it_detaches_is_added_up() {
        let line = "INFO detached; bytes sent pool=\"d\" transport=Counters { sends: 3, writes: 0 }\n";
        let counters = Counters::parse_log(&format!("INFO attached\n{line}{line}")).expect("well-formed");
        assert_eq!((counters.get("sends").expect("known"), counters.get("writes").expect("known")), (6, 0));
        assert!(Counters::parse_log("INFO detached").is_err());
        assert!(Counters::parse_log("INFO detached Counters { sends: x }").is_err());
    }
}
