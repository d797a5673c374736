//! Machines of a test's own network: network namespaces that hang on one switch, whose connections can be cut one by one
//! and in one direction only. Everything is inside of namespaces named after this process, and goes with the network.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};

use super::programs;

/// Namespaces of all processes' networks begin so; the number of the process follows.
const PREFIX: &str = "rmrlab";
/// A hardware address that nobody has: what is sent there is lost.
const NOBODY: &str = "02:00:de:ad:00:00";
/// Most hosts of one network: their numbers are the last byte of an address.
const MAX_HOSTS: usize = 200;

/// A host of a [`Network`].
#[derive(Clone, Debug)]
pub struct Host {
    name: String,
    namespace: String,
    number: u8,
}

impl Host {
    /// Its name in the network.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 213, 0, self.number)
    }

    /// A command that runs `program` on this host. The process that is started is the program itself.
    ///
    /// # Errors
    /// When `ip` is not installed.
    pub fn command(&self, program: &Path) -> Result<Command> {
        let mut command = Command::new(programs::system("ip")?);
        command.args(["netns", "exec", &self.namespace]).arg(program);
        Ok(command)
    }

    fn hardware_address(&self) -> String {
        format!("02:00:00:00:00:{:02x}", self.number)
    }
}

/// A command that runs `program`: on `host`, or without one on the machine itself.
pub(super) fn command_on(host: Option<&Host>, program: PathBuf) -> Result<Command> {
    host.map_or_else(|| Ok(Command::new(&program)), |host| host.command(&program))
}

/// Hosts on a switch. All of it is removed when dropped; processes on the hosts must have ended by then.
#[derive(Debug)]
pub struct Network {
    switch: String,
    hosts: Vec<Host>,
}

impl Network {
    /// A network with hosts of these names; if this machine does not allow it, says loudly that the test was not run.
    ///
    /// # Errors
    /// When namespaces can be made, and something else fails.
    pub fn new_or_say_not_run(test: &str, names: &[&str]) -> Result<Option<Self>> {
        remove_what_was_left()?;
        static PROBES: AtomicU32 = AtomicU32::new(0);
        let probe = PROBES.fetch_add(1, Ordering::Relaxed);
        let probe = format!("{PREFIX}{}-probe{probe}", std::process::id());
        if let Err(error) = ip(&["netns", "add", &probe]) {
            use std::io::Write;
            // Not by eprintln!, whose output is hidden for tests that pass.
            let text = format!("\nNOT RUN (skipped): {test}: no network namespace can be made: {error:#}");
            let _ = writeln!(std::io::stderr(), "{text}");
            return Ok(None);
        }
        ip(&["netns", "delete", &probe])?;
        Self::new(names).map(Some)
    }

    fn new(names: &[&str]) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        anyhow::ensure!(names.len() <= MAX_HOSTS, "{} hosts, expected at most {MAX_HOSTS}", names.len());
        let id = format!("{PREFIX}{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let mut network = Self { switch: format!("{id}-switch"), hosts: Vec::new() };
        let switch = network.switch.clone();
        ip(&["netns", "add", &switch])?;
        ip(&["-n", &switch, "link", "add", "switch", "type", "bridge"])?;
        ip(&["-n", &switch, "link", "set", "switch", "up"])?;
        for (number, name) in (1_u8..).zip(names) {
            let host = Host { name: (*name).to_owned(), namespace: format!("{id}-{name}"), number };
            // Noted first: what was made is removed, also when the next step fails.
            network.hosts.push(host.clone());
            let (namespace, port) = (host.namespace.as_str(), format!("port{number}"));
            ip(&["netns", "add", namespace])?;
            ip(&[
                "link", "add", "eth0", "netns", namespace, "type", "veth", "peer", "name", &port, "netns",
                &switch,
            ])?;
            ip(&["-n", &switch, "link", "set", &port, "master", "switch", "up"])?;
            let address = format!("{}/24", host.address());
            ip(&["-n", namespace, "link", "set", "lo", "up"])?;
            ip(&["-n", namespace, "link", "set", "eth0", "address", &host.hardware_address(), "up"])?;
            ip(&["-n", namespace, "address", "add", &address, "dev", "eth0"])?;
        }
        for from in &network.hosts {
            for to in network.hosts.iter().filter(|to| to.number != from.number) {
                network.set_neighbour(from, to, &to.hardware_address())?;
            }
        }
        Ok(network)
    }

    /// The host of this name.
    ///
    /// # Errors
    /// When there is none.
    pub fn host(&self, name: &str) -> Result<&Host> {
        let found = self.hosts.iter().find(|host| host.name == name);
        found.with_context(|| format!("the network has no host '{name}'"))
    }

    /// Loses everything that `from` sends to `to` from now on. The other direction is as it was.
    ///
    /// # Errors
    /// When there is no such host, or the system refuses.
    pub fn cut(&self, from: &str, to: &str) -> Result<()> {
        self.set_neighbour(self.host(from)?, self.host(to)?, NOBODY)
    }

    /// Ends what [`Network::cut`] began.
    ///
    /// # Errors
    /// As [`Network::cut`].
    pub fn heal(&self, from: &str, to: &str) -> Result<()> {
        let to = self.host(to)?;
        self.set_neighbour(self.host(from)?, to, &to.hardware_address())
    }

    /// Pulls the cable of a host, or plugs it in again.
    ///
    /// # Errors
    /// When there is no such host, or the system refuses.
    pub fn plug(&self, host: &str, plugged: bool) -> Result<()> {
        let port = format!("port{}", self.host(host)?.number);
        ip(&["-n", &self.switch, "link", "set", &port, if plugged { "up" } else { "down" }])
    }

    /// Permanent entries of the neighbour table decide where a packet goes, for connections that stand as well. Nothing is
    /// told to the sender: to it, a cut looks like a network that loses what it is given.
    fn set_neighbour(&self, from: &Host, to: &Host, hardware_address: &str) -> Result<()> {
        let to = to.address().to_string();
        ip(&[
            "-n",
            &from.namespace,
            "neighbour",
            "replace",
            &to,
            "lladdr",
            hardware_address,
            "dev",
            "eth0",
            "nud",
            "permanent",
        ])
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // A device goes with its namespace. What cannot be removed now is removed by the next run.
        for namespace in self.hosts.iter().map(|host| &host.namespace).chain([&self.switch]) {
            let _ = ip(&["netns", "delete", namespace]);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    programs::output_of(Command::new(programs::system("ip")?).args(arguments)).map(|_| ())
}

/// Removes networks of processes that are gone.
fn remove_what_was_left() -> Result<()> {
    let list = programs::output_of(Command::new(programs::system("ip")?).args(["netns", "list"]))?;
    for namespace in list.lines().filter_map(|line| line.split_whitespace().next()) {
        let owner = namespace.strip_prefix(PREFIX).and_then(|rest| rest.split_once('-')).map(|(pid, _)| pid);
        match owner.map(str::parse::<u32>) {
            Some(Ok(pid)) if !Path::new(&format!("/proc/{pid}")).exists() => {
                // Another test may be at it as well.
                let _ = ip(&["netns", "delete", namespace]);
            }
            Some(Err(_)) => bail!("expected {PREFIX}PID-NAME, found namespace '{namespace}'"),
            Some(Ok(_)) | None => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::lab::wait_until;

    fn reaches(from: &Host, to: &Host) -> Result<bool> {
        // A UDP packet to a port that nobody has is answered by ICMP, which a connected socket reports as refused.
        let script =
            format!("exec 3<>/dev/udp/{}/9; echo x >&3; read -t 1 -u 3; [ $? -le 128 ]", to.address());
        let status = from.command(Path::new("/bin/bash"))?.args(["-c", &script]).output()?.status;
        Ok(status.success())
    }

    #[test]
    fn a_cut_loses_what_one_host_sends_to_one_other_and_nothing_stays_behind() -> Result<()> {
        let Some(network) = Network::new_or_say_not_run("cuts", &["a", "b", "c"])? else { return Ok(()) };
        let (a, b, c) = (network.host("a")?, network.host("b")?, network.host("c")?);
        // An answer may take its time on a crowded machine.
        let all_reach = |pairs: &[(&Host, &Host)]| {
            pairs.iter().try_for_each(|(from, to)| {
                wait_until("an answer to arrive", Duration::from_secs(30), || reaches(from, to))
            })
        };
        all_reach(&[(a, b), (b, a), (a, c)])?;
        network.cut("a", "b")?;
        // The question is lost one way and the answer the other.
        assert!(!reaches(a, b)? && !reaches(b, a)?);
        all_reach(&[(a, c), (c, b)])?;
        network.heal("a", "b")?;
        all_reach(&[(a, b), (b, a)])?;
        network.plug("b", false)?;
        assert!(!reaches(a, b)? && !reaches(c, b)?);
        all_reach(&[(a, c)])?;
        network.plug("b", true)?;
        all_reach(&[(a, b)])?;
        assert!(network.cut("a", "z").unwrap_err().to_string().contains("no host 'z'"));
        let mine = network.switch.clone();
        drop(network);
        let list = programs::output_of(Command::new(programs::system("ip")?).args(["netns", "list"]))?;
        assert!(!list.contains(&mine), "{list}");
        Ok(())
    }
}
