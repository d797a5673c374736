//! Trees of files that stand for machines.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

/// A directory in which a machine is built file by file.
pub(super) struct Fixture(tempfile::TempDir);

impl Fixture {
    pub(super) fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    pub(super) fn root(&self) -> &Path {
        self.0.path()
    }

    pub(super) fn write(&self, path: &str, text: &str) {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().expect("a file has a directory")).expect("made");
        fs::write(path, text).expect("written");
    }

    pub(super) fn remove(&self, path: &str) {
        let path = self.root().join(path);
        if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.expect("removed");
    }

    pub(super) fn link(&self, path: &str, target: &str) {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().expect("a file has a directory")).expect("made");
        symlink(target, path).expect("linked");
    }
}

/// A guest with Soft-RoCE, as Debian's kernel describes it.
pub(super) fn soft_roce() -> Fixture {
    let fixture = Fixture::new();
    let port = "sys/class/infiniband/rxe0/ports/1";
    for (path, text) in [
        ("proc/sys/kernel/osrelease", "6.1.0-56-amd64\n"),
        ("proc/meminfo", "MemTotal:        1500000 kB\nMemFree: 1 kB\nMemAvailable:    1000000 kB\n"),
        (
            "proc/self/limits",
            "Limit                     Soft Limit           Hard Limit           Units\n\
             Max locked memory         8388608              8388608              bytes\n",
        ),
        ("proc/self/status", "Name:\trmr-node\nCapEff:\t000001ffffffffff\n"),
        ("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "8\n"),
        ("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "3\n"),
        ("proc/sys/net/ipv4/tcp_congestion_control", "bbr\n"),
        ("proc/sys/net/ipv4/tcp_available_congestion_control", "reno cubic bbr\n"),
        ("proc/sys/net/ipv4/tcp_allowed_congestion_control", "reno cubic\n"),
        ("proc/sys/net/ipv4/tcp_rmem", "4096\t131072\t6291456\n"),
        ("proc/sys/net/ipv4/tcp_wmem", "4096\t16384\t4194304\n"),
        ("etc/libibverbs.d/rxe.driver", "driver rxe\n"),
        ("etc/libibverbs.d/mlx5.driver", "driver mlx5\n"),
        ("etc/libibverbs.d/README", "\n"),
        ("dev/infiniband/rdma_cm", ""),
        ("dev/infiniband/uverbs0", ""),
        ("sys/class/infiniband_verbs/uverbs0/ibdev", "rxe0\n"),
        ("sys/class/infiniband_verbs/abi_version", "6\n"),
        ("sys/class/net/roce0/mtu", "9000\n"),
    ] {
        fixture.write(path, text);
    }
    for (path, text) in [
        ("state", "4: ACTIVE\n"),
        ("phys_state", "5: LinkUp\n"),
        ("link_layer", "Ethernet\n"),
        ("rate", "2.5 Gb/sec (1X SDR)\n"),
        ("gids/0", "fe80:0000:0000:0000:0000:0000:0000:0001\n"),
        ("gids/1", "0000:0000:0000:0000:0000:ffff:0a4d:0001\n"),
        ("gids/2", "0000:0000:0000:0000:0000:0000:0000:0000\n"),
        ("gid_attrs/ndevs/0", "roce0\n"),
        ("gid_attrs/types/1", "RoCE v2\n"),
        ("gid_attrs/ndevs/1", "roce0\n"),
    ] {
        fixture.write(&format!("{port}/{path}"), text);
    }
    fixture
}
