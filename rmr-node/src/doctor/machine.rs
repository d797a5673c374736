//! What the kernel says of a machine in `/proc`, `/sys` and `/dev`: memory, limits, TCP, RDMA devices. All of it is read below
//! a root directory, so that a tree of files stands for any machine, and no RDMA library is needed.

use std::fs;
use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};

use serde::Serialize;

/// Bit of `CAP_IPC_LOCK` in a capability set (capabilities(7)).
const CAP_IPC_LOCK: u32 = 14;
/// Bit of `CAP_NET_ADMIN`.
const CAP_NET_ADMIN: u32 = 12;
/// Entries of a port's address table that are looked at; cards have up to 256.
const MAX_GIDS: u32 = 256;
/// What Ethernet, IP, UDP and InfiniBand headers take of a network device's MTU (`iboe_get_mtu` of the kernel).
const ROCE_HEADERS: u32 = 96;

/// One machine.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Machine {
    /// Version of the kernel.
    pub kernel: Option<String>,
    /// Memory.
    pub memory: Memory,
    /// TCP.
    pub tcp: Tcp,
    /// RDMA.
    pub rdma: Rdma,
}

/// Memory and what may be done with it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Memory {
    /// All of it, in bytes.
    pub total: Option<u64>,
    /// What can be had without swapping, in bytes.
    pub available: Option<u64>,
    /// How much this process may lock, in bytes; none is no limit.
    pub lock_limit: Option<u64>,
    /// Whether this process is above that limit (`CAP_IPC_LOCK`).
    pub lock_privileged: bool,
    /// Huge pages that were set aside, by size. None are needed.
    pub huge_pages: Vec<HugePages>,
}

/// Huge pages of one size.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct HugePages {
    /// Size of a page in KiB.
    pub size_kib: u64,
    /// How many there are.
    pub total: u64,
    /// How many of them are free.
    pub free: u64,
}

/// Settings of TCP that matter here.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Tcp {
    /// The system's default congestion control.
    pub congestion_control: Option<String>,
    /// Those that this process may choose instead.
    pub choosable: Vec<String>,
    /// The greatest receive buffer that the kernel gives a socket by itself, in bytes.
    pub receive_buffer_max: Option<u64>,
    /// The greatest send buffer.
    pub send_buffer_max: Option<u64>,
}

/// What there is of RDMA.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Rdma {
    /// The devices.
    pub devices: Vec<RdmaDevice>,
    /// Whether `/dev/infiniband/rdma_cm` is there, by which programs connect.
    pub connection_manager: bool,
    /// What libibverbs has drivers for, by their files in `/etc/libibverbs.d`.
    pub providers: Vec<String>,
}

/// An RDMA device.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct RdmaDevice {
    /// Its name.
    pub name: String,
    /// Its firmware, if it says.
    pub firmware: Option<String>,
    /// The file in `/dev/infiniband` by which programs use it.
    pub device_file: Option<String>,
    /// Its ports.
    pub ports: Vec<RdmaPort>,
}

/// A port of an RDMA device.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct RdmaPort {
    /// Its number, from 1.
    pub number: u32,
    /// Its state, `ACTIVE` if it can be used.
    pub state: String,
    /// What it is physically, `LinkUp` or another.
    pub physical_state: String,
    /// `Ethernet` (RoCE, iWARP) or `InfiniBand`.
    pub link_layer: String,
    /// Its speed in words.
    pub rate: String,
    /// The network device that it belongs to.
    pub interface: Option<String>,
    /// That one's MTU.
    pub interface_mtu: Option<u32>,
    /// Bytes of data in a packet of RoCE, derived from that MTU.
    pub path_mtu: Option<u32>,
    /// Its addresses.
    pub gids: Vec<Gid>,
}

/// An address of a port.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Gid {
    /// Its place in the table.
    pub index: u32,
    /// The address as IP writes it.
    pub address: IpAddr,
    /// `RoCE v2`, `IB/RoCE v1`, if the kernel says.
    pub kind: Option<String>,
}

impl RdmaPort {
    /// Whether data can pass.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.state == "ACTIVE"
    }
}

impl Machine {
    /// The machine whose `/proc`, `/sys`, `/dev` and `/etc` are below `root`. What cannot be read is absent.
    #[must_use]
    pub fn of(root: &Path) -> Self {
        let tree = Tree(root);
        Self {
            kernel: tree.text("proc/sys/kernel/osrelease"),
            memory: tree.memory(),
            tcp: tree.tcp(),
            rdma: Rdma {
                devices: tree.rdma_devices(),
                connection_manager: tree.path("dev/infiniband/rdma_cm").exists(),
                providers: tree
                    .names("etc/libibverbs.d")
                    .iter()
                    .filter_map(|name| name.strip_suffix(".driver").map(str::to_owned))
                    .collect(),
            },
        }
    }
}

/// What a block device's queue says of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct BlockQueue {
    /// `write back` or `write through`.
    pub write_cache: Option<String>,
    /// Most bytes of one discard; 0 is none.
    pub discard_max_bytes: Option<u64>,
    /// Most bytes that the device zeroes by itself at once; 0 is none.
    pub write_zeroes_max_bytes: Option<u64>,
}

impl BlockQueue {
    /// That of the block device with these numbers, or of the disk that it is a partition of.
    #[must_use]
    pub fn of(root: &Path, major: u32, minor: u32) -> Self {
        let tree = Tree(root);
        let device = format!("sys/dev/block/{major}:{minor}");
        let inside = |name: &str| {
            let own = tree.text(&format!("{device}/queue/{name}"));
            own.or_else(|| tree.text(&format!("{device}/../queue/{name}")))
        };
        let number = |name: &str| inside(name).and_then(|text| text.parse().ok());
        Self {
            write_cache: inside("write_cache"),
            discard_max_bytes: number("discard_max_bytes"),
            write_zeroes_max_bytes: number("write_zeroes_max_bytes"),
        }
    }
}

struct Tree<'a>(&'a Path);

impl Tree<'_> {
    fn path(&self, path: &str) -> PathBuf {
        self.0.join(path)
    }

    fn text(&self, path: &str) -> Option<String> {
        let text = fs::read_to_string(self.path(path)).ok()?;
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    }

    /// What lies in a directory, in order.
    fn names(&self, path: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path(path)) else { return Vec::new() };
        let mut names: Vec<_> =
            entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
        names.sort();
        names
    }

    fn memory(&self) -> Memory {
        let info = self.text("proc/meminfo").unwrap_or_default();
        let bytes = |name: &str| {
            let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
        };
        let limits = self.text("proc/self/limits").unwrap_or_default();
        let locked = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"));
        Memory {
            total: bytes("MemTotal"),
            available: bytes("MemAvailable"),
            lock_limit: locked.and_then(|line| line.split_whitespace().next()?.parse().ok()),
            lock_privileged: self.has_capability(CAP_IPC_LOCK),
            huge_pages: self.names("sys/kernel/mm/hugepages").iter().filter_map(|n| self.huge(n)).collect(),
        }
    }

    fn has_capability(&self, bit: u32) -> bool {
        let status = self.text("proc/self/status").unwrap_or_default();
        let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        set.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).is_some_and(|set| set >> bit & 1 == 1)
    }

    fn huge(&self, name: &str) -> Option<HugePages> {
        let size_kib = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
        let number = |file: &str| self.text(&format!("sys/kernel/mm/hugepages/{name}/{file}"))?.parse().ok();
        Some(HugePages { size_kib, total: number("nr_hugepages")?, free: number("free_hugepages")? })
    }

    fn tcp(&self) -> Tcp {
        let setting = |name: &str| self.text(&format!("proc/sys/net/ipv4/{name}"));
        // Who may not administer the network may only choose among the allowed ones.
        let list = if self.has_capability(CAP_NET_ADMIN) {
            "tcp_available_congestion_control"
        } else {
            "tcp_allowed_congestion_control"
        };
        let greatest = |name: &str| setting(name)?.split_whitespace().nth(2)?.parse().ok();
        Tcp {
            congestion_control: setting("tcp_congestion_control"),
            choosable: setting(list).unwrap_or_default().split_whitespace().map(str::to_owned).collect(),
            receive_buffer_max: greatest("tcp_rmem"),
            send_buffer_max: greatest("tcp_wmem"),
        }
    }

    fn rdma_devices(&self) -> Vec<RdmaDevice> {
        let files: Vec<(String, String)> = self
            .names("sys/class/infiniband_verbs")
            .into_iter()
            .filter(|file| self.path("dev/infiniband").join(file).exists())
            .filter_map(|file| Some((self.text(&format!("sys/class/infiniband_verbs/{file}/ibdev"))?, file)))
            .collect();
        let device = |name: String| {
            let base = format!("sys/class/infiniband/{name}");
            let ports = self.names(&format!("{base}/ports"));
            let file = files.iter().find(|(device, _)| *device == name);
            RdmaDevice {
                firmware: self.text(&format!("{base}/fw_ver")),
                device_file: file.map(|(_, file)| format!("/dev/infiniband/{file}")),
                ports: ports.iter().filter_map(|port| self.rdma_port(&base, port.parse().ok()?)).collect(),
                name,
            }
        };
        self.names("sys/class/infiniband").into_iter().map(device).collect()
    }

    fn rdma_port(&self, device: &str, number: u32) -> Option<RdmaPort> {
        let base = format!("{device}/ports/{number}");
        // States are written as "4: ACTIVE".
        let word = |name: &str| {
            let text = self.text(&format!("{base}/{name}"))?;
            Some(text.split_once(": ").map_or(text.as_str(), |(_, word)| word).to_owned())
        };
        let mut places = self.names(&format!("{base}/gids"));
        places.retain(|place| place.parse::<u32>().is_ok_and(|index| index < MAX_GIDS));
        places.sort_by_key(|place| place.parse::<u32>().unwrap_or(MAX_GIDS));
        let gids: Vec<_> = places.iter().filter_map(|place| self.gid(&base, place)).collect();
        let interface = places.iter().find_map(|place| self.text(&format!("{base}/gid_attrs/ndevs/{place}")));
        let mtu = |name: &String| self.text(&format!("sys/class/net/{name}/mtu"))?.parse().ok();
        let interface_mtu = interface.as_ref().and_then(mtu);
        let link_layer = word("link_layer").unwrap_or_else(|| "unknown".to_owned());
        Some(RdmaPort {
            number,
            state: word("state")?,
            physical_state: word("phys_state").unwrap_or_else(|| "unknown".to_owned()),
            path_mtu: interface_mtu.filter(|_| link_layer == "Ethernet").and_then(path_mtu),
            link_layer,
            rate: self.text(&format!("{base}/rate")).unwrap_or_else(|| "unknown".to_owned()),
            interface,
            interface_mtu,
            gids,
        })
    }

    fn gid(&self, port: &str, place: &str) -> Option<Gid> {
        let address: Ipv6Addr = self.text(&format!("{port}/gids/{place}"))?.parse().ok()?;
        if address.is_unspecified() {
            return None;
        }
        let address = address.to_ipv4_mapped().map_or(IpAddr::V6(address), IpAddr::V4);
        let kind = self.text(&format!("{port}/gid_attrs/types/{place}"));
        Some(Gid { index: place.parse().ok()?, address, kind })
    }
}

/// The greatest packet of InfiniBand that fits a network device's MTU.
fn path_mtu(interface_mtu: u32) -> Option<u32> {
    let room = interface_mtu.checked_sub(ROCE_HEADERS)?;
    [4096, 2048, 1024, 512, 256].into_iter().find(|mtu| *mtu <= room)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::testing::{Fixture, soft_roce};

    #[test]
    fn an_empty_tree_is_a_machine_of_which_nothing_is_known() {
        let fixture = Fixture::new();
        let machine = Machine::of(fixture.root());
        assert_eq!((machine.kernel, machine.memory.total, machine.memory.lock_limit), (None, None, None));
        assert!(machine.rdma.devices.is_empty() && !machine.rdma.connection_manager);
        assert!(machine.tcp.choosable.is_empty() && machine.memory.huge_pages.is_empty());
    }

    #[test]
    fn everything_of_a_soft_roce_machine_is_read() {
        let machine = Machine::of(soft_roce().root());
        assert_eq!(machine.kernel.as_deref(), Some("6.1.0-56-amd64"));
        assert_eq!(machine.memory.total, Some(1_500_000 << 10));
        assert_eq!((machine.memory.lock_limit, machine.memory.lock_privileged), (Some(8 << 20), true));
        assert_eq!(machine.memory.huge_pages, [HugePages { size_kib: 2048, total: 8, free: 3 }]);
        assert_eq!(machine.tcp.congestion_control.as_deref(), Some("bbr"));
        assert_eq!(machine.tcp.choosable, ["reno", "cubic", "bbr"]);
        assert_eq!(machine.tcp.receive_buffer_max, Some(6_291_456));
        assert_eq!(machine.rdma.providers, ["mlx5", "rxe"]);
        assert!(machine.rdma.connection_manager);
        let [device] = &machine.rdma.devices[..] else { panic!("{:?}", machine.rdma) };
        assert_eq!(device.device_file.as_deref(), Some("/dev/infiniband/uverbs0"));
        let [port] = &device.ports[..] else { panic!("{device:?}") };
        assert!(port.is_active() && port.link_layer == "Ethernet" && port.physical_state == "LinkUp");
        assert_eq!((port.interface.as_deref(), port.path_mtu), (Some("roce0"), Some(4096)));
        let addresses: Vec<_> = port.gids.iter().map(|gid| (gid.index, gid.address.to_string())).collect();
        assert_eq!(addresses, [(0, "fe80::1".to_owned()), (1, "10.77.0.1".to_owned())]);
        assert_eq!(port.gids[1].kind.as_deref(), Some("RoCE v2"));
    }

    #[test]
    fn a_process_without_privileges_has_only_the_allowed_choices() {
        let fixture = soft_roce();
        fixture.write("proc/self/status", "Name:\tx\nCapEff:\t0000000000000000\n");
        let machine = Machine::of(fixture.root());
        assert!(!machine.memory.lock_privileged);
        assert_eq!(machine.tcp.choosable, ["reno", "cubic"]);
        fixture.write(
            "proc/self/limits",
            "Max locked memory         unlimited            unlimited            bytes\n",
        );
        assert_eq!(Machine::of(fixture.root()).memory.lock_limit, None);
    }

    #[test]
    fn packets_of_roce_are_the_greatest_that_fit_the_mtu() {
        for (interface, expected) in
            [(9000, Some(4096)), (4200, Some(4096)), (1500, Some(1024)), (600, Some(256)), (300, None)]
        {
            assert_eq!(path_mtu(interface), expected, "{interface}");
        }
    }

    #[test]
    fn a_partition_has_the_queue_of_its_disk() {
        let fixture = Fixture::new();
        fixture.write("sys/block/sda/queue/write_cache", "write back\n");
        fixture.write("sys/block/sda/queue/discard_max_bytes", "0\n");
        fixture.write("sys/block/sda/sda1/partition", "1\n");
        fixture.link("sys/dev/block/8:1", "../../block/sda/sda1");
        fixture.link("sys/dev/block/8:0", "../../block/sda");
        for minor in [0, 1] {
            let queue = BlockQueue::of(fixture.root(), 8, minor);
            assert_eq!(queue.write_cache.as_deref(), Some("write back"));
            assert_eq!((queue.discard_max_bytes, queue.write_zeroes_max_bytes), (Some(0), None));
        }
    }
}
