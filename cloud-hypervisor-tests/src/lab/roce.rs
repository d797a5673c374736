//! A virtual machine with Soft-RoCE in which the whole system runs over real verbs: nodes, daemon, front end and test in
//! one guest, because no RDMA device reaches into this machine itself. Nothing that is timed in it means anything: emulated
//! processors do a few thousand round trips per second. Assert counts and contents.
//!
//! The lab is at home in it: a program of this crate that runs inside makes nodes and pools as a test outside does, on
//! the [`Fabric`] that it is given, so a scenario goes from TCP to verbs by its address alone.
//!
//! ```no_run
//! use cloud_hypervisor_tests::lab::{self, RoceBuilder, Transport};
//!
//! # fn main() -> anyhow::Result<()> {
//! lab::run("a node listens on verbs", |lab| {
//!     let roce = RoceBuilder::new("roce").own_program("rmr-node")?.boot(lab)?;
//!     let address = roce.fabric(Transport::Rdma).endpoint(7700);
//!     roce.vm().run(&format!("rmr-node --listen {address} --store-dir /dev/shm --check-config"))?;
//!     Ok(())
//! })
//! # }
//! ```

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use super::cable::{BEFORE, Cable};
use super::fabric::{Fabric, Transport};
use super::guest::ImageBuilder;
use super::{Lab, Vm, VmBuilder, programs};

/// The guest's address; TCP and verbs both answer there.
pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The RDMA device.
pub const DEVICE: &str = "rxe0";

/// Kernel modules beyond those of every guest. Without `crc32_generic` rxe cannot be set up, and does not say why.
const MODULES: [&str; 7] =
    ["dummy", "veth", "sch_netem", "crc32_generic", "ib_uverbs", "rdma_ucm", "rdma_rxe"];
/// Tools of the machine that set it up and prove that it works.
const PROGRAMS: [&str; 8] =
    ["ip", "tc", "rdma", "ibv_devices", "ibv_devinfo", "ibv_rc_pingpong", "rping", "taskset"];
/// How libibverbs learns of the provider of rxe.
const DRIVER_FILE: &str = "/etc/libibverbs.d/rxe.driver";
/// The guest's programs, libraries and most stores are in its memory.
const MEMORY_MIB: u32 = 1536;
/// The disk that the guest has at `/tmp`, for stores that want O_DIRECT. It takes only what is written.
const DISK_BYTES: u64 = 2 << 30;

/// A machine with Soft-RoCE to be.
#[derive(Clone, Debug)]
pub struct RoceBuilder {
    vm: VmBuilder,
    name: String,
    programs: Vec<PathBuf>,
}

impl RoceBuilder {
    /// One processor, on which all processes share their time: two that talk over rxe from different emulated processors
    /// are ten times slower.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let vm = VmBuilder::new(name).cpus(1).memory_mib(MEMORY_MIB);
        Self { vm, name: name.to_owned(), programs: Vec::new() }
    }

    /// Adds a program that was built for this test, with its libraries; it is in `/usr/bin` of the guest.
    #[must_use]
    pub fn program(mut self, path: impl Into<PathBuf>) -> Self {
        self.programs.push(path.into());
        self
    }

    /// Adds one of the project's own programs.
    ///
    /// # Errors
    /// When it has not been built.
    pub fn own_program(self, name: &str) -> Result<Self> {
        Ok(self.program(programs::own(name)?))
    }

    /// Boots the machine and waits until its RDMA port is active.
    ///
    /// # Errors
    /// When something is missing on this machine, the guest does not come up, or its port does not.
    pub fn boot(self, lab: &Lab) -> Result<Roce> {
        let mut image = ImageBuilder::new().file(DRIVER_FILE).file(provider_library()?);
        for module in MODULES {
            image = image.module(module);
        }
        for program in PROGRAMS {
            image = image.program(program);
        }
        let disk = lab.path(format!("{}.disk", self.name));
        File::create(&disk)
            .and_then(|file| file.set_len(DISK_BYTES))
            .with_context(|| format!("making {}", disk.display()))?;
        let image = image.build()?.with_programs(lab, &self.name, &self.programs)?;
        let initramfs = image.initramfs.clone();
        // Nothing on the disk outlives the machine, so nothing need reach this machine's own disk.
        let drive = format!("file={},if=none,id=scratch,format=raw,cache=unsafe", disk.display());
        let device = "virtio-blk-pci,drive=scratch".to_owned();
        let arguments = ["-drive".to_owned(), drive, "-device".to_owned(), device];
        let vm = self.vm.arguments(arguments).image(image).boot(lab)?;
        // The guest has it in its memory; the test's directory need not hold it any longer.
        fs::remove_file(&initramfs).with_context(|| format!("removing {}", initramfs.display()))?;
        vm.run(&set_up_script()).context("setting up Soft-RoCE")?;
        Ok(Roce { vm })
    }
}

/// A booted machine with Soft-RoCE; killed when dropped.
pub struct Roce {
    vm: Vm,
}

impl Roce {
    /// The machine.
    #[must_use]
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// Where nodes listen that run in the guest.
    #[must_use]
    pub fn fabric(&self, transport: Transport) -> Fabric {
        Fabric::new(transport, HOST)
    }

    /// What `rdma link` says of the device.
    ///
    /// # Errors
    /// When the guest does not answer or the device is gone.
    pub fn link(&self) -> Result<String> {
        self.vm.run(&format!("rdma link show {DEVICE}/1"))
    }

    /// Powers the guest off.
    ///
    /// # Errors
    /// When it does not go down in time.
    pub fn shutdown(self) -> Result<()> {
        self.vm.shutdown()
    }
}

/// The library through which libibverbs speaks to rxe; its name carries the version of their interface.
fn provider_library() -> Result<PathBuf> {
    let install = "run cloud-hypervisor-tests/install-deps.sh";
    let directory = PathBuf::from("/usr/lib/x86_64-linux-gnu/libibverbs");
    let entries = fs::read_dir(&directory)
        .with_context(|| format!("the providers of verbs in {}; {install}", directory.display()))?;
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with("librxe-rdmav") && name.ends_with(".so") {
            return Ok(path);
        }
    }
    bail!("{} has no librxe-rdmav*.so: {install}", directory.display())
}

/// The network device is one that only loops back; its packets are large enough that 4 KiB fit into one.
fn set_up_script() -> String {
    format!(
        "set -e
         mkfs.ext4 -q /dev/vda
         mount -t ext4 /dev/vda /tmp
         ip link set lo up
         ip link add roce0 type dummy
         ip link set roce0 mtu 9000 up
         ip address add {HOST}/24 dev roce0
         rdma link add {DEVICE} type rxe netdev roce0
         {BEFORE}
         {}
         tries=0
         until grep -q ACTIVE /sys/class/infiniband/{DEVICE}/ports/1/state; do
             tries=$((tries + 1))
             if [ $tries -gt 100 ]; then rdma link >&2; exit 1; fi
             sleep 0.1
         done",
        Cable::ALL.map(Cable::set_up).concat()
    )
}
