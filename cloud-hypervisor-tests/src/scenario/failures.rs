//! Who may hold a pool, and a front end that dies in mid-request.

use anyhow::{Result, ensure};

use super::membership::attach;
use super::system::{LIMIT, System};
use super::{Counts, Effort};
use crate::lab::frontend::{self, BUFFERS, Descriptor, flag, request};
use crate::lab::{DaemonBuilder, FrontendBuilder, Lab, Status};

/// A second daemon for a pool is refused and told who holds it.
pub(super) fn second_daemon(lab: &Lab, effort: Effort) -> Result<Counts> {
    let system = System::patient(lab, effort, 2, 0)?;
    let first = system.patient_daemon(lab, "first")?;
    let mut disk = attach(&first)?;
    ensure!(disk.write(0, 0, &[1; 4096])? == Status::Ok, "the first write");

    let said = DaemonBuilder::new(&system.pool).name("second").start_refused(lab)?;
    let holder = first.process().pid().to_string();
    ensure!(said.contains(&holder), "expected words about the holder, process {holder}; found:\n{said}");

    // The holder is not disturbed.
    ensure!(
        disk.write(0, 8, &[2; 4096])? == Status::Ok && disk.flush(0)? == Status::Ok,
        "the holder was disturbed"
    );
    drop(disk);
    first.stop()?;

    let third = system.patient_daemon(lab, "third")?;
    let mut disk = attach(&third)?;
    for (sector, byte) in [(0, 1), (8, 2)] {
        let (status, data) = disk.read(0, sector, 4096)?;
        ensure!(
            status == Status::Ok && data == [byte; 4096],
            "sector {sector}: {status:?}, {:?}",
            data.first()
        );
    }
    drop(disk);
    third.stop()?;
    system.pool.assert_identical()?;
    Ok(Counts::new())
}

/// A front end that vanishes with a full queue again and again costs nothing.
pub(super) fn vanishing_front_end(lab: &Lab, effort: Effort) -> Result<Counts> {
    const CHAINS: u16 = 42;
    const BLOCK: u64 = 4096;
    let rounds = u8::try_from(4 * effort.rounds)?;
    let system = System::patient(lab, effort, 2, 0)?;
    let daemon = system.patient_daemon(lab, "daemon")?;
    // Blocks are written with the number of the round; several chains of a round aim at the same block.
    for round in 1..=rounds {
        let mut disk = FrontendBuilder::new(daemon.socket()).queue_size(128).connect()?;
        for number in 0..CHAINS {
            let (header, status, data) = own_buffers(number);
            let sector = u64::from(number % 32) * BLOCK / 512;
            disk.put(header, &frontend::header(request::OUT, sector))?;
            disk.put(data, &[round; 4096])?;
            let first = number * 3;
            let chain = [
                Descriptor { address: header, length: 16, flags: flag::NEXT, next: first + 1 },
                Descriptor { address: data, length: 4096, flags: flag::NEXT, next: first + 2 },
                Descriptor { address: status, length: 1, flags: flag::WRITE, next: 0 },
            ];
            disk.put_chain(0, first, &chain)?;
            disk.publish(0, first)?;
        }
        // A different number of completions is seen in each round before the end.
        for _ in 0..round {
            ensure!(disk.wait_used(0, LIMIT)?.is_some(), "round {round}: a write is not answered");
        }
    }
    let mut disk = attach(&daemon)?;
    for block in 0..32 {
        let (status, data) = disk.read(0, block * BLOCK / 512, 4096)?;
        ensure!(status == Status::Ok, "block {block}: {status:?}");
        ensure!(
            data.iter().all(|byte| *byte == data[0] && (1..=rounds).contains(byte)),
            "block {block} is torn: {data:?}"
        );
    }
    ensure!(disk.flush(0)? == Status::Ok, "the last flush");
    drop(disk);
    daemon.stop()?;
    system.pool.assert_identical()?;
    Ok(Counts::from([("rounds".to_owned(), u64::from(rounds))]))
}

/// Header, status and data of one of several requests at once.
fn own_buffers(number: u16) -> (u64, u64, u64) {
    let number = u64::from(number);
    (BUFFERS + number * 64, BUFFERS + number * 64 + 32, BUFFERS + (1 << 20) + number * 4096)
}
