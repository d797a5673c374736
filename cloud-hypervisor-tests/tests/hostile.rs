//! A hostile guest, played by a driver that owns its rings: whatever it puts there gets an error status or a stopped queue.
//! After each attack the daemon is alive, idle, and serves the next front end the data that was there before.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use cloud_hypervisor_tests::lab::frontend::{
    BUFFERS, Descriptor, MEMORY_SIZE, MEMORY_START, flag, header, range, request,
};
use cloud_hypervisor_tests::lab::{
    self, Checks, DaemonBuilder, Frontend, FrontendBuilder, NodeBuilder, PoolBuilder, Process, Status,
};
use vhost::{VhostBackend, VringConfigData};

/// What the disk holds where attacks aim; none may change it.
const PATTERN: u8 = 0x5a;
/// What attacks try to write.
const EVIL: u8 = 0x66;
/// How long an attack may wait for a completion that may rightly never come.
const PATIENCE: Duration = Duration::from_millis(300);
/// Longest wait for an error that has to come.
const ERROR_LIMIT: Duration = Duration::from_secs(30);
/// Most processor time that a daemon may use during and after one attack: far from a spin, far above its work.
const CPU_LIMIT: Duration = Duration::from_millis(200);

const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 64;
const TABLE: u64 = BUFFERS + 4096;
const DATA: u64 = BUFFERS + (64 << 10);
const END: u64 = MEMORY_START + MEMORY_SIZE;
const NEXT: u16 = flag::NEXT;
const WRITE: u16 = flag::WRITE;

/// What an attack may come to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Allowed {
    /// An error status and nothing else: the request is well-formed enough to be answered.
    Error,
    /// An error status, or no status: the chain may stop the queue, or have no place for a status.
    ErrorOrSilence,
    /// Anything but a dead daemon: the request is unusual and allowed, or what it does is the guest's own harm.
    Anything,
}

struct Attack {
    name: &'static str,
    allowed: Allowed,
    play: fn(&mut Frontend) -> Result<()>,
}

#[test]
fn a_hostile_guest_gets_errors_or_a_stopped_queue_and_the_daemon_goes_on() -> Result<()> {
    lab::run("hostile guest", |lab| {
        let (a, b) = (NodeBuilder::new("a").start(lab)?, NodeBuilder::new("b").start(lab)?);
        let pool = PoolBuilder::new("disk").size_mib(16).member(&a).member(&b).create(lab)?;
        let daemon = DaemonBuilder::new(&pool).queues(2).start(lab)?;
        {
            let mut disk = connect(daemon.socket())?;
            ensure!(disk.write(0, 0, &vec![PATTERN; 1 << 20])? == Status::Ok);
            ensure!(disk.write(0, (15 << 20) / 512, &vec![PATTERN; 1 << 20])? == Status::Ok);
        }
        let mut checks = Checks::new();
        for attack in attacks().iter().chain(&control_attacks()) {
            checks.check(attack.name, || survive(attack, daemon.socket(), daemon.process()));
        }
        for (name, bytes) in [("ones", [0xff; 4096]), ("zeroes", [0; 4096])] {
            checks.check(&format!("the hypervisor sends nothing but {name}"), || {
                let mut stream = UnixStream::connect(daemon.socket())?;
                // It may be cut off in the middle.
                let _ = stream.write_all(&bytes);
                drop(stream);
                let mut next = connect(daemon.socket()).context("the next front end is not served")?;
                ensure!(next.read(0, 0, 4096)? == (Status::Ok, vec![PATTERN; 4096]));
                Ok(())
            });
        }
        daemon.stop()?;
        checks.check("all stores are identical", || pool.assert_identical());
        checks.finish()
    })
}

fn connect(socket: &std::path::Path) -> Result<Frontend> {
    FrontendBuilder::new(socket).queue_size(128).connect()
}

fn survive(attack: &Attack, socket: &std::path::Path, process: &Process) -> Result<()> {
    let cpu_before = process.cpu_time()?;
    {
        let mut disk = connect(socket)?;
        disk.put(STATUS, &[0xee])?;
        disk.put(DATA, &[EVIL; 8192])?;
        disk.put(HEADER, &header(request::OUT, 0))?;
        (attack.play)(&mut disk)?;
        let patience = if attack.allowed == Allowed::Error { ERROR_LIMIT } else { PATIENCE };
        let used = disk.wait_used(0, patience)?;
        let status = Status::from(disk.get(STATUS, 1)?[0]);
        let found = match (used, status) {
            (None, Status::Other(0xee)) | (Some(_), Status::Other(0xee)) => "silence",
            (_, Status::IoError | Status::Unsupported) => "error",
            (_, Status::Ok) => "success",
            (_, Status::Other(byte)) => bail!("the status byte is {byte:#04x}, which means nothing"),
        };
        match (attack.allowed, found) {
            (Allowed::Error, "error")
            | (Allowed::ErrorOrSilence, "error" | "silence")
            | (Allowed::Anything, _) => {}
            (allowed, found) => bail!("expected {allowed:?}, found {found} (used ring: {used:?})"),
        }
    }
    ensure!(process.is_running()?, "the daemon is dead");
    let mut next = connect(socket).context("the next front end is not served")?;
    let last = (15 << 20) / 512;
    for sector in [0, last] {
        let (status, data) = next.read(0, sector, 1 << 20)?;
        ensure!(status == Status::Ok, "the next front end reads {status:?}");
        let changed = data.iter().position(|byte| *byte != PATTERN);
        ensure!(changed.is_none(), "byte {changed:?} from sector {sector} was changed by the attack");
    }
    let cpu = process.cpu_time()?.saturating_sub(cpu_before);
    ensure!(cpu <= CPU_LIMIT, "the daemon used {cpu:?} of processor time, expected at most {CPU_LIMIT:?}");
    Ok(())
}

fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor { address, length, flags, next }
}

/// Publishes one chain of header, the given data, and status, in table entries 0, 1, ….
fn chain(disk: &mut Frontend, kind: u32, sector: u64, data: &[Descriptor]) -> Result<()> {
    disk.put(HEADER, &header(kind, sector))?;
    let mut chain = vec![descriptor(HEADER, 16, NEXT, 1)];
    chain.extend((2..).zip(data).map(|(next, data)| Descriptor { flags: data.flags | NEXT, next, ..*data }));
    chain.push(descriptor(STATUS, 1, WRITE, 0));
    disk.put_chain(0, 0, &chain)?;
    disk.publish(0, 0)
}

/// Publishes exactly these table entries from 0 on.
fn raw(disk: &mut Frontend, entries: &[Descriptor]) -> Result<()> {
    disk.put_chain(0, 0, entries)?;
    disk.publish(0, 0)
}

/// Publishes a chain whose only entry is an indirect table of these entries.
fn indirect(disk: &mut Frontend, length: u32, flags: u16, entries: &[Descriptor]) -> Result<()> {
    for (address, entry) in (TABLE..).step_by(16).zip(entries) {
        disk.put(address, &entry.to_bytes())?;
    }
    raw(disk, &[descriptor(TABLE, length, flags, 1), descriptor(STATUS, 1, WRITE, 0)])
}

/// A well-formed write of one block of [`EVIL`], for attacks that are elsewhere.
fn write_chain() -> [Descriptor; 3] {
    [descriptor(HEADER, 16, NEXT, 1), descriptor(DATA, 4096, NEXT, 2), descriptor(STATUS, 1, WRITE, 0)]
}

fn attacks() -> Vec<Attack> {
    use Allowed::{Anything, Error, ErrorOrSilence};
    const INDIRECT: u16 = flag::INDIRECT;
    let attack = |name, allowed, play| Attack { name, allowed, play };
    let mut attacks = vec![
        // The available ring.
        attack("the available index jumps beyond the queue's size", ErrorOrSilence, |disk| {
            disk.set_avail_index(0, disk.avail_index(0).wrapping_add(1000))?;
            disk.kick(0)
        }),
        attack("the available index goes backwards", ErrorOrSilence, |disk| {
            disk.set_avail_index(0, 0_u16.wrapping_sub(1))?;
            disk.kick(0)
        }),
        attack("a head is outside of the descriptor table", ErrorOrSilence, |disk| {
            disk.put_chain(0, 0, &write_chain())?;
            disk.publish(0, 128)
        }),
        attack("a head is far outside of the descriptor table", ErrorOrSilence, |disk| {
            disk.publish(0, u16::MAX)
        }),
        attack("the same head is available 128 times", Anything, |disk| {
            disk.put(HEADER, &header(request::IN, 0))?;
            let [head, data, status] = write_chain();
            disk.put_chain(0, 0, &[head, Descriptor { flags: NEXT | WRITE, ..data }, status])?;
            for entry in 0..128 {
                disk.put_avail(0, entry, 0)?;
            }
            disk.set_avail_index(0, 128)?;
            disk.kick(0)
        }),
        attack("a thousand kicks with nothing available", Anything, |disk| {
            (0..1000).try_for_each(|_| disk.kick(0))
        }),
        // The shape of chains.
        attack("a chain is a loop", ErrorOrSilence, |disk| {
            raw(disk, &[descriptor(HEADER, 16, NEXT, 1), descriptor(DATA, 512, NEXT, 0)])
        }),
        attack("a descriptor is its own successor", ErrorOrSilence, |disk| {
            raw(disk, &[descriptor(HEADER, 16, NEXT, 0)])
        }),
        attack("the data is a loop that never reaches a status", ErrorOrSilence, |disk| {
            raw(
                disk,
                &[
                    descriptor(HEADER, 16, NEXT, 1),
                    descriptor(DATA, 512, NEXT, 2),
                    descriptor(DATA, 512, NEXT, 1),
                ],
            )
        }),
        attack("a chain goes on outside of the table", ErrorOrSilence, |disk| {
            raw(disk, &[descriptor(HEADER, 16, NEXT, 4000)])
        }),
        attack("a chain is a header alone", ErrorOrSilence, |disk| {
            raw(disk, &[descriptor(HEADER, 16, 0, 0)])
        }),
        attack("a chain is a status alone", ErrorOrSilence, |disk| {
            raw(disk, &[descriptor(STATUS, 1, WRITE, 0)])
        }),
        attack("a chain is one empty descriptor", ErrorOrSilence, |disk| raw(disk, &[Descriptor::default()])),
        attack("the status cannot be written", ErrorOrSilence, |disk| {
            let [head, data, _] = write_chain();
            raw(disk, &[head, data, descriptor(STATUS, 1, 0, 0)])
        }),
        attack("the status has no byte", ErrorOrSilence, |disk| {
            let [head, data, _] = write_chain();
            raw(disk, &[head, data, descriptor(STATUS, 0, WRITE, 0)])
        }),
        attack("the status is outside of memory", ErrorOrSilence, |disk| {
            let [head, data, _] = write_chain();
            raw(disk, &[head, data, descriptor(END, 1, WRITE, 0)])
        }),
        attack("the header can be written by the device", ErrorOrSilence, |disk| {
            let [head, data, status] = write_chain();
            raw(disk, &[Descriptor { flags: NEXT | WRITE, ..head }, data, status])
        }),
        attack("the header is too short", ErrorOrSilence, |disk| {
            raw(disk, &[descriptor(HEADER, 4, NEXT, 1), descriptor(STATUS, 1, WRITE, 0)])
        }),
        attack("the header has no byte", ErrorOrSilence, |disk| {
            raw(disk, &[descriptor(HEADER, 0, NEXT, 1), descriptor(STATUS, 1, WRITE, 0)])
        }),
        attack("the header is outside of memory", ErrorOrSilence, |disk| {
            let [_, data, status] = write_chain();
            raw(disk, &[descriptor(0, 16, NEXT, 1), data, status])
        }),
        attack("the header begins inside of memory and ends outside", ErrorOrSilence, |disk| {
            let [_, data, status] = write_chain();
            raw(disk, &[descriptor(END - 8, 16, NEXT, 1), data, status])
        }),
        attack("a readable descriptor follows a writable one", ErrorOrSilence, |disk| {
            let [head, data, status] = write_chain();
            raw(
                disk,
                &[
                    head,
                    Descriptor { flags: NEXT | WRITE, ..data },
                    Descriptor { flags: NEXT, next: 3, ..data },
                    status,
                ],
            )
        }),
        attack("a read's header is split over descriptors", Anything, |disk| {
            disk.put(HEADER, &header(request::IN, 0))?;
            let (first, second) = (descriptor(HEADER, 8, NEXT, 1), descriptor(HEADER + 8, 8, NEXT, 2));
            raw(
                disk,
                &[first, second, descriptor(DATA, 4096, NEXT | WRITE, 3), descriptor(STATUS, 1, WRITE, 0)],
            )
        }),
        // Data.
        attack("data is outside of memory", ErrorOrSilence, |disk| {
            chain(disk, request::OUT, 0, &[descriptor(0xdead_0000_0000, 4096, 0, 0)])
        }),
        attack("data ends outside of memory", ErrorOrSilence, |disk| {
            chain(disk, request::OUT, 0, &[descriptor(END - 512, 4096, 0, 0)])
        }),
        attack("data wraps around the end of addresses", ErrorOrSilence, |disk| {
            chain(disk, request::OUT, 0, &[descriptor(u64::MAX - 511, 4096, 0, 0)])
        }),
        attack("read data is outside of memory", ErrorOrSilence, |disk| {
            chain(disk, request::IN, 0, &[descriptor(0xdead_0000_0000, 4096, WRITE, 0)])
        }),
        attack("a segment has the greatest length", ErrorOrSilence, |disk| {
            chain(disk, request::OUT, 0, &[descriptor(DATA, u32::MAX, 0, 0)])
        }),
        attack("the lengths of all segments overflow 32 bits", ErrorOrSilence, |disk| {
            chain(disk, request::IN, 0, &[descriptor(DATA, 0xffff_f000, WRITE, 0); 100])
        }),
        attack("more than the disk is read", Error, |disk| {
            chain(disk, request::IN, 0, &[descriptor(DATA, 8 << 20, WRITE, 0); 3])
        }),
        attack("a read has an empty segment", Anything, |disk| {
            chain(disk, request::IN, 0, &[descriptor(DATA, 0, WRITE, 0), descriptor(DATA, 4096, WRITE, 0)])
        }),
        attack("a read has no data", Anything, |disk| chain(disk, request::IN, 0, &[])),
        attack("a write has no data", Anything, |disk| chain(disk, request::OUT, 0, &[])),
        attack("a write is no multiple of a sector", Error, |disk| {
            chain(disk, request::OUT, 0, &[descriptor(DATA, 100, 0, 0)])
        }),
        attack("a read is no multiple of a sector", Error, |disk| {
            chain(disk, request::IN, 0, &[descriptor(DATA, 4097, WRITE, 0)])
        }),
        attack("a write has data that only the device writes", ErrorOrSilence, |disk| {
            chain(disk, request::OUT, 0, &[descriptor(DATA, 4096, WRITE, 0)])
        }),
        attack("a read has data that the device may not write", ErrorOrSilence, |disk| {
            chain(disk, request::IN, 0, &[descriptor(DATA, 4096, 0, 0)])
        }),
        attack("a read is aimed at the rings themselves", Anything, |disk| {
            chain(disk, request::IN, 0, &[descriptor(MEMORY_START, 64 << 10, WRITE, 0)])
        }),
        // Places on the disk.
        attack("a write begins at the end of the disk", Error, |disk| {
            chain(disk, request::OUT, (16 << 20) / 512, &[descriptor(DATA, 4096, 0, 0)])
        }),
        attack("a write crosses the end of the disk", Error, |disk| {
            chain(disk, request::OUT, (16 << 20) / 512 - 1, &[descriptor(DATA, 4096, 0, 0)])
        }),
        attack("a sector is the greatest number", Error, |disk| {
            chain(disk, request::OUT, u64::MAX, &[descriptor(DATA, 4096, 0, 0)])
        }),
        attack("a sector's byte offset overflows to zero", Error, |disk| {
            chain(disk, request::OUT, 1 << 55, &[descriptor(DATA, 4096, 0, 0)])
        }),
        attack("a read's sector plus length overflows", Error, |disk| {
            chain(disk, request::IN, u64::MAX - 7, &[descriptor(DATA, 4096, WRITE, 0)])
        }),
        // Indirect tables.
        attack("an indirect table is empty", ErrorOrSilence, |disk| indirect(disk, 0, INDIRECT, &[])),
        attack("an indirect table's length is no multiple of 16", ErrorOrSilence, |disk| {
            indirect(disk, 47, INDIRECT, &write_chain())
        }),
        attack("an indirect table is as long as can be", ErrorOrSilence, |disk| {
            indirect(disk, 0xffff_fff0, INDIRECT, &[descriptor(HEADER, 16, NEXT, 0)])
        }),
        attack("an indirect table is outside of memory", ErrorOrSilence, |disk| {
            raw(disk, &[descriptor(END, 48, INDIRECT, 0)])
        }),
        attack("an indirect table is a loop", ErrorOrSilence, |disk| {
            indirect(disk, 32, INDIRECT, &[descriptor(HEADER, 16, NEXT, 1), descriptor(DATA, 512, NEXT, 0)])
        }),
        attack("an indirect table goes on outside of itself", ErrorOrSilence, |disk| {
            indirect(disk, 32, INDIRECT, &[descriptor(HEADER, 16, NEXT, 1), descriptor(DATA, 512, NEXT, 9)])
        }),
        attack("an indirect table holds another", ErrorOrSilence, |disk| {
            indirect(
                disk,
                32,
                INDIRECT,
                &[descriptor(HEADER, 16, NEXT, 1), descriptor(TABLE, 32, INDIRECT, 0)],
            )
        }),
        attack("an indirect table holds itself", ErrorOrSilence, |disk| {
            indirect(disk, 16, INDIRECT, &[descriptor(TABLE, 16, INDIRECT, 0)])
        }),
        // Discard and write-zeroes.
        attack("a request has an unknown type", Error, |disk| chain(disk, 0x7777_7777, 0, &[])),
    ];
    attacks.extend([
        attack("a discard crosses the end of the disk", Error, |disk| {
            disk.put(DATA, &range((16 << 20) / 512 - 8, 16, 0))?;
            chain(disk, request::DISCARD, 0, &[descriptor(DATA, 16, 0, 0)])
        }),
        attack("a discard's sector plus count overflows", Error, |disk| {
            disk.put(DATA, &range(u64::MAX - 3, u32::MAX, 0))?;
            chain(disk, request::DISCARD, 0, &[descriptor(DATA, 16, 0, 0)])
        }),
        attack("a discard has the unmap flag, which it must not", Error, |disk| {
            disk.put(DATA, &range(0, 8, 1))?;
            chain(disk, request::DISCARD, 0, &[descriptor(DATA, 16, 0, 0)])
        }),
        attack("write-zeroes has unknown flags", Error, |disk| {
            disk.put(DATA, &range(0, 8, 0x8000_0002))?;
            chain(disk, request::WRITE_ZEROES, 0, &[descriptor(DATA, 16, 0, 0)])
        }),
        attack("write-zeroes covers four thousand million sectors", Error, |disk| {
            disk.put(DATA, &range(0, u32::MAX, 0))?;
            chain(disk, request::WRITE_ZEROES, 0, &[descriptor(DATA, 16, 0, 0)])
        }),
        attack("a discard's range is cut short", Error, |disk| {
            disk.put(DATA, &range(0, 8, 0))?;
            chain(disk, request::DISCARD, 0, &[descriptor(DATA, 15, 0, 0)])
        }),
        attack("a discard has no range", Error, |disk| chain(disk, request::DISCARD, 0, &[])),
        attack("a discard has more ranges than were offered, the last one beyond the end", Error, |disk| {
            (0..4096).try_for_each(|number| disk.put(DATA + number * 16, &range(1 << 40, 8, 0)))?;
            chain(disk, request::DISCARD, 0, &[descriptor(DATA, 65536, 0, 0)])
        }),
        attack("a discard's range is outside of memory", ErrorOrSilence, |disk| {
            chain(disk, request::DISCARD, 0, &[descriptor(END, 16, 0, 0)])
        }),
        attack("a serial is read into too little", Anything, |disk| {
            chain(disk, request::GET_ID, 0, &[descriptor(DATA, 5, WRITE, 0)])
        }),
        attack("a serial is read into nothing", Anything, |disk| chain(disk, request::GET_ID, 0, &[])),
    ]);
    attacks
}

/// What a broken hypervisor may send: refused, or the connection is closed.
fn control_attacks() -> Vec<Attack> {
    let attack = |name, play| Attack { name, allowed: Allowed::Anything, play };
    vec![
        attack("a queue gets a size that is no power of two", |disk| {
            ensure!(disk.connection().set_vring_num(0, 100).is_err(), "it was accepted");
            Ok(())
        }),
        attack("a queue gets a size of zero", |disk| {
            ensure!(disk.connection().set_vring_num(0, 0).is_err(), "it was accepted");
            Ok(())
        }),
        attack("a queue gets rings outside of memory", |disk| {
            let size = disk.queue_size();
            let addresses = VringConfigData {
                queue_max_size: size,
                queue_size: size,
                flags: 0,
                desc_table_addr: 0x1000,
                used_ring_addr: 0x2000,
                avail_ring_addr: 0x3000,
                log_addr: None,
            };
            ensure!(disk.connection().set_vring_addr(0, &addresses).is_err(), "it was accepted");
            Ok(())
        }),
        attack("features are set that were never offered", |disk| {
            ensure!(disk.connection().set_features(u64::MAX).is_err(), "it was accepted");
            Ok(())
        }),
        attack("the configuration is read far beyond its end", |disk| {
            // Answered with nothing or refused; never with bytes of the daemon's memory.
            if let Ok(bytes) = disk.config(200, 56) {
                ensure!(bytes.iter().all(|byte| *byte == 0), "{bytes:?}");
            }
            Ok(())
        }),
    ]
}
