//! A pool goes from one daemon to the next, as it does when a guest is migrated: at the first ring of the next guest, no earlier,
//! and without losing a member.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vhost::VhostBackend;

use super::membership::attach;
use super::system::{LIMIT, System, patient_daemon};
use super::{Counts, Effort};
use crate::lab::{DaemonBuilder, Lab, Status};

/// A pool is handed over at the first ring of the next guest and no earlier.
pub(super) fn handover(lab: &Lab, effort: Effort) -> Result<Counts> {
    let system = System::patient(lab, effort, 2, 0)?;
    let pool = &system.pool;
    let rounds = u8::try_from(2 * effort.rounds)?;
    let mut daemon = system.patient_daemon(lab, "round-0")?;
    let mut disk = attach(&daemon)?;
    let mut slowest = Duration::ZERO;
    for round in 1..=rounds {
        let data = [round; 4096];
        let written = disk.write(0, 8, &data)?;
        ensure!(written == Status::Ok, "the write of round {round}: {written:?}");
        // A daemon for a guest to come does not disturb the one that is there.
        let next = patient_daemon(pool, effort).name(&format!("round-{round}")).arguments(["--incoming"]);
        let next = next.start(lab)?;
        ensure!(disk.read(0, 8, 4096)? == (Status::Ok, data.to_vec()), "the holder of round {round} reads");
        disk.connection().get_vring_base(0)?;
        let started = Instant::now();
        let mut next_disk = attach(&next)?;
        ensure!(
            next_disk.read(0, 8, 4096)? == (Status::Ok, data.to_vec()),
            "the next of round {round} reads"
        );
        slowest = slowest.max(started.elapsed());
        daemon.process().ensure_running("its pool was handed over")?;
        drop(disk);
        daemon.stop().with_context(|| format!("round {round}"))?;
        (daemon, disk) = (next, next_disk);
        let level = pool.level()?;
        ensure!(level == "safe", "after round {round} the pool is {level}");
    }
    // The right to take over is used up.
    let refused = DaemonBuilder::new(pool).name("late").start_refused(lab)?;
    ensure!(refused.contains("held by"), "{refused}");
    thread::sleep(Duration::from_millis(100));
    let written = disk.write(0, 16, &[1; 4096])?;
    ensure!(written == Status::Ok, "the holder was disturbed: {written:?}");
    pool.assert_identical_within(LIMIT)?;
    Ok(Counts::from([
        ("rounds".to_owned(), u64::from(rounds)),
        ("slowest_ms".to_owned(), u64::try_from(slowest.as_millis())?),
    ]))
}
