//! Cables inside of the Soft-RoCE guest: pairs of network devices, each end with an RDMA device of its own, which can be cut
//! and whose devices can be removed.
//!
//! Two addresses of one machine talk through its memory as a rule, below everything that could be cut. Here the rules for
//! routes come before the table of local addresses, and send what goes to one end's address out of the other end. Soft-RoCE
//! does the same, as long as the ends have different RDMA devices: two queue pairs of one device never use the network.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::programs;

/// Longest wait for a command. Taking away a device waits for the processes that use it.
const LIMIT: Duration = Duration::from_secs(30);

/// A cable of the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cable {
    number: u8,
}

/// An end of a cable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// Where a node listens.
    Node,
    /// From where clients, and other nodes, connect to it.
    Client,
}

impl End {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Node, Self::Client];
}

impl Cable {
    /// The cables that there are.
    pub const ALL: [Self; 2] = [Self { number: 1 }, Self { number: 2 }];

    /// Whether this machine has them.
    #[must_use]
    pub fn are_there() -> bool {
        Self::ALL.iter().all(|cable| Path::new("/sys/class/net").join(cable.netdev(End::Node)).exists())
    }

    /// The address of an end.
    #[must_use]
    pub fn address(self, end: End) -> Ipv4Addr {
        Ipv4Addr::new(10, 78, self.number, if end == End::Node { 1 } else { 2 })
    }

    fn netdev(self, end: End) -> String {
        format!("cable{}{}", self.number, if end == End::Node { "n" } else { "c" })
    }

    /// The RDMA device of an end.
    #[must_use]
    pub fn device(self, end: End) -> String {
        format!("rxe{}{}", self.number, if end == End::Node { "n" } else { "c" })
    }

    /// Loses everything that this end sends from now on; neither end is told.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn cut(self, from: End) -> Result<()> {
        system("tc", &["qdisc", "add", "dev", &self.netdev(from), "root", "netem", "loss", "100%"])
    }

    /// Ends what [`Cable::cut`] began.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn mend(self, from: End) -> Result<()> {
        system("tc", &["qdisc", "delete", "dev", &self.netdev(from), "root"])
    }

    /// Takes the RDMA device of an end away, as a card is that fails or is pulled out. Returns when every process that had
    /// it open has let go of it.
    ///
    /// # Errors
    /// When that takes too long.
    pub fn remove_device(self, end: End) -> Result<Duration> {
        let began = Instant::now();
        system("rdma", &["link", "delete", &self.device(end)])?;
        Ok(began.elapsed())
    }

    /// Puts a device back that was removed.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn add_device(self, end: End) -> Result<()> {
        let (device, netdev) = (self.device(end), self.netdev(end));
        system("rdma", &["link", "add", &device, "type", "rxe", "netdev", &netdev])
    }

    /// What sets the cable up, as a script.
    pub(super) fn set_up(self) -> String {
        use std::fmt::Write;
        let mut script = String::new();
        let (node, client) = (self.netdev(End::Node), self.netdev(End::Client));
        let _ = writeln!(script, "ip link add {node} type veth peer name {client}");
        for end in End::BOTH {
            let (address, netdev) = (self.address(end), self.netdev(end));
            let _ = writeln!(
                script,
                "ip link set {netdev} mtu 9000 up
                 ip address add {address}/32 dev {netdev}
                 echo 1 >/proc/sys/net/ipv4/conf/{netdev}/accept_local
                 echo 0 >/proc/sys/net/ipv4/conf/{netdev}/rp_filter"
            );
        }
        for (from, to) in [(End::Client, End::Node), (End::Node, End::Client)] {
            let (source, address) = (self.address(from), self.address(to));
            let (out, far, table) = (self.netdev(from), self.netdev(to), 100 + u16::from(self.number));
            // For what is sent, what a connection manager asks before it accepts, and where an answer would go.
            let _ = writeln!(
                script,
                "ip route add {address} dev {out} src {source} table {table}
                 ip neighbour add {address} lladdr $(cat /sys/class/net/{far}/address) dev {out} nud permanent
                 ip rule add pref 10 to {address} iif lo lookup {table}
                 ip rule add pref 11 to {address} iif {out} lookup {table}
                 ip rule add pref 12 to {address} oif {out} lookup {table}"
            );
        }
        for end in End::BOTH {
            let (device, netdev) = (self.device(end), self.netdev(end));
            let _ = writeln!(script, "rdma link add {device} type rxe netdev {netdev}");
        }
        script
    }
}

/// What has to be set up once for all cables.
pub(super) const BEFORE: &str = "echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter
     ip rule add pref 100 lookup local
     ip rule delete pref 0";

fn system(program: &str, arguments: &[&str]) -> Result<()> {
    let what = || format!("{program} {}", arguments.join(" "));
    let mut command = Command::new(programs::system(program)?);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(what)?;
    let end = Instant::now() + LIMIT;
    while child.try_wait()?.is_none() {
        if Instant::now() > end {
            // It may be stuck in the kernel, and is not waited for.
            let _ = child.kill();
            bail!("{} did not end within {LIMIT:?}", what());
        }
        thread::sleep(Duration::from_millis(20));
    }
    let output = child.wait_with_output().with_context(what)?;
    ensure!(output.status.success(), "{}: {}", what(), String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cables_have_names_and_addresses_of_their_own_and_a_script_for_both_directions() {
        let [first, second] = Cable::ALL;
        assert_ne!(first.address(End::Node), second.address(End::Node));
        assert_eq!((first.device(End::Node), second.device(End::Client)), ("rxe1n".into(), "rxe2c".into()));
        let script = second.set_up();
        for line in [
            "ip route add 10.78.2.1 dev cable2c src 10.78.2.2",
            "ip route add 10.78.2.2 dev cable2n src 10.78.2.1",
        ] {
            assert!(script.contains(line), "{script}");
        }
    }
}
