//! A pool grows with a guest and without one, and while a copy is down: the new space is there, zero, and on every copy.

use anyhow::{Result, bail, ensure};

use super::membership::attach;
use super::system::{LIMIT, System};
use super::{Counts, Effort};
use crate::lab::{Frontend, Lab, Pool, Status};

/// A pool grows with a guest and without one, and while a copy is down.
pub(super) fn growth(lab: &Lab, effort: Effort) -> Result<Counts> {
    let mut system = System::patient(lab, effort, 3, 0)?;
    let daemon = system.patient_daemon(lab, "daemon")?;
    // Larger by half of the first size with each step.
    let sizes: Vec<_> = (2..6).map(|halves| effort.pool_mib * halves / 2).collect();
    let [first, second, third, fourth] = sizes[..] else { bail!("expected four sizes, found {sizes:?}") };
    let System { nodes, pool, .. } = &mut system;
    let mut disk = attach(&daemon)?;
    ensure!(disk.write(0, 0, &[1; 4096])? == Status::Ok, "the first block");
    ensure!(disk.write(0, sector(first), &[1; 4096])? == Status::IoError, "beyond the end");
    for _ in 0..2 {
        grow(pool, second)?;
        ensure!(disk.capacity()? == sector(second), "the device has another size than the pool");
        last_block(&mut disk, second, 7)?;
    }
    refused(pool, &format!("{}M", second - 4), "smaller")?;
    refused(pool, "900T", "cannot hold")?;

    // One copy is away meanwhile, and takes part in the larger pool when it is back.
    nodes[1].kill()?;
    pool.wait_for_level("degraded", LIMIT)?;
    grow(pool, third)?;
    last_block(&mut disk, third, 8)?;
    nodes[1].restart(lab)?;
    pool.wait_for_level("safe", LIMIT)?;
    ensure!(disk.flush(0)? == Status::Ok, "the flush with a guest");
    drop(disk);
    daemon.stop()?;
    pool.assert_identical()?;

    // No client is attached: rmrctl is the coordinator for a moment.
    for _ in 0..2 {
        grow(pool, fourth)?;
    }
    let daemon = system.patient_daemon(lab, "later")?;
    let mut disk = attach(&daemon)?;
    ensure!(disk.capacity()? == sector(fourth), "the device has another size than the pool that grew alone");
    last_block(&mut disk, fourth, 9)?;
    ensure!(
        disk.read(0, sector(third) - 8, 4096)? == (Status::Ok, vec![8; 4096]),
        "what was the last block is another one"
    );
    ensure!(disk.read(0, sector(third), 4096)? == (Status::Ok, vec![0; 4096]), "new space is not zero");
    ensure!(disk.flush(0)? == Status::Ok, "the last flush");
    drop(disk);
    daemon.stop()?;
    system.pool.assert_identical()?;
    Ok(Counts::from([("mib".to_owned(), fourth)]))
}

fn sector(mib: u64) -> u64 {
    (mib << 20) / 512
}

fn grow(pool: &Pool, mib: u64) -> Result<()> {
    pool.operate("grow", &["--size", &format!("{mib}M")]).map(|_| ())
}

fn refused(pool: &Pool, size: &str, because: &str) -> Result<()> {
    match pool.operate("grow", &["--size", size]) {
        Ok(grown) => bail!("growing to {size} was expected to be refused, and said {grown}"),
        Err(error) => {
            let words = format!("{error:#}");
            ensure!(words.contains(because), "expected '{because}', found {words}");
            Ok(())
        }
    }
}

/// Writes and reads the last block of a disk of so many MiB.
fn last_block(disk: &mut Frontend, mib: u64, byte: u8) -> Result<()> {
    let written = disk.write(0, sector(mib) - 8, &[byte; 4096])?;
    ensure!(written == Status::Ok, "the last block of {mib} MiB cannot be written: {written:?}");
    let read = disk.read(0, sector(mib) - 8, 4096)?;
    ensure!(read == (Status::Ok, vec![byte; 4096]), "the last block of {mib} MiB: {:?}", read.0);
    Ok(())
}
