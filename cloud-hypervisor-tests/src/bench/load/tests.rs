//! Loads on disks that behave, and on disks that do not.

use std::process::Command;
use std::thread;

use super::super::ram_disk::{Fault, RamDisk};
use super::super::verify::Unwritten;
use super::*;

const SIZE: u64 = 1 << 20;

fn spec(pattern: Pattern) -> LoadSpec {
    LoadSpec {
        pattern,
        depth: 8,
        // By number and not by time: a crowded machine may do next to nothing in a moment.
        runtime_ms: 60_000,
        max_requests: Some(1000),
        ramp_ms: 0,
        stall_timeout_ms: 60_000,
        ..LoadSpec::default()
    }
}

fn promises() -> Promises {
    Promises::new(SIZE, 4096, 7, Unwritten::Zeroes)
}

fn verified(disk: &RamDisk, spec: &LoadSpec) -> Result<Report, LoadError> {
    let mut promises = promises();
    let spec = LoadSpec { verify_at_end: true, ..spec.clone() };
    run(disk.socket(), &spec, Surroundings { promises: Some(&mut promises), ..Surroundings::default() })
}

#[test]
fn an_honest_disk_verifies_with_one_queue_and_with_several_and_with_scattered_buffers() {
    for (queues, segment_size, block_size) in [(1, None, 4096), (4, None, 4096), (2, Some(1024), 16384)] {
        let disk = RamDisk::serve(SIZE, 4, true, Fault::None);
        let load = LoadSpec { queues, segment_size, block_size, ..spec(Pattern::RandRw) };
        let report = verified(&disk, &load).unwrap();
        assert!(report.is_good(), "{report:?}");
        assert!(report.requests > 100 && report.reads > 0 && report.reads < report.requests, "{report:?}");
        assert!(report.verified_blocks >= SIZE / 4096 && report.flush_us > 0.0, "{report:?}");
    }
}

#[test]
fn a_disk_without_indirect_descriptors_is_driven_by_chains() {
    let disk = RamDisk::serve(SIZE, 1, false, Fault::None);
    let report = verified(&disk, &LoadSpec { depth: 40, ..spec(Pattern::RandRw) }).unwrap();
    assert!(report.is_good() && report.requests > 100, "{report:?}");
}

#[test]
fn a_disk_that_forgets_a_write_is_caught() {
    let disk = RamDisk::serve(SIZE, 1, true, Fault::ForgetWrite { every: 50 });
    let report = verified(&disk, &spec(Pattern::RandRw)).unwrap();
    assert!(report.violations > 0 && !report.first_violations.is_empty(), "{report:?}");
    assert!(report.first_violations[0].contains("expected"), "{report:?}");
}

#[test]
fn an_error_is_counted_told_in_words_and_ends_the_load_unless_it_is_to_go_on() {
    let disk = RamDisk::serve(SIZE, 1, true, Fault::FailRequest { every: 40 });
    let report = run(disk.socket(), &spec(Pattern::RandWrite), Surroundings::default()).unwrap();
    assert!(report.errors >= 1 && report.requests < 100, "{report:?}");
    assert!(report.first_error.unwrap().contains("I/O error"));

    let disk = RamDisk::serve(SIZE, 1, true, Fault::FailRequest { every: 40 });
    let load = LoadSpec { continue_on_error: true, ..spec(Pattern::RandWrite) };
    let report = run(disk.socket(), &load, Surroundings::default()).unwrap();
    assert!(report.errors > 1 && report.requests > 100, "{report:?}");
}

#[test]
fn a_failed_write_is_neither_promised_nor_forbidden() {
    let disk = RamDisk::serve(SIZE, 1, true, Fault::FailRequest { every: 7 });
    let load = LoadSpec { continue_on_error: true, ..spec(Pattern::RandRw) };
    let report = verified(&disk, &load).unwrap();
    assert!(report.errors > 1 && report.verified_blocks > 0 && report.violations == 0, "{report:?}");
}

#[test]
fn a_rate_is_kept() {
    let load = LoadSpec { rate: Some(500), runtime_ms: 400, max_requests: None, ..spec(Pattern::RandWrite) };
    // A crowded machine may take some of the time away, and never makes it faster.
    let mut kept = false;
    for _ in 0..20 {
        let disk = RamDisk::serve(SIZE, 1, true, Fault::None);
        let report = run(disk.socket(), &load, Surroundings::default()).unwrap();
        assert!(report.requests <= 220, "{report:?}");
        kept |= report.requests >= 180;
        if kept {
            break;
        }
    }
    assert!(kept, "fewer than nine tenths of the rate in each of 20 runs");
}

#[test]
fn a_stop_from_another_thread_ends_the_load_in_good_order() {
    let disk = RamDisk::serve(SIZE, 1, true, Fault::None);
    let stop = AtomicBool::new(false);
    let load = LoadSpec { max_requests: None, ..spec(Pattern::RandWrite) };
    let report = thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(200));
            stop.store(true, Ordering::Relaxed);
        });
        run(disk.socket(), &load, Surroundings { stop: Some(&stop), ..Surroundings::default() }).unwrap()
    });
    assert!(report.is_good() && report.requests > 0 && report.seconds < 30.0, "{report:?}");
}

#[test]
fn a_disk_that_falls_silent_is_an_error_after_the_stall_timeout() {
    let disk = RamDisk::serve(SIZE, 1, true, Fault::SilentAfter { requests: 20 });
    // The answers of its attachment have as long.
    let load = LoadSpec { stall_timeout_ms: 3000, ..spec(Pattern::RandWrite) };
    let error = run(disk.socket(), &load, Surroundings::default()).unwrap_err();
    assert!(matches!(error, LoadError::Disk(DiskError::Stalled { in_flight: 8, .. })), "{error}");
}

#[test]
fn a_daemon_that_never_answers_is_an_error_after_the_stall_timeout() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("silent.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let load = LoadSpec { stall_timeout_ms: 200, ..spec(Pattern::Read) };
    let error = run(&socket, &load, Surroundings::default()).unwrap_err().to_string();
    assert!(error.contains("no answer within 200ms") && error.contains("silent.sock"), "{error}");
}

#[test]
fn the_end_of_the_daemon_ends_the_load_at_once() {
    let disk = RamDisk::serve(SIZE, 1, true, Fault::SilentAfter { requests: 20 });
    let mut daemon = Command::new("sleep").arg("2").spawn().unwrap();
    let watched = [Watched { role: Role::Client, pid: daemon.id() }];
    let begin = Instant::now();
    let around = Surroundings { watched: &watched, ..Surroundings::default() };
    let error = run(disk.socket(), &spec(Pattern::RandWrite), around).unwrap_err();
    daemon.wait().unwrap();
    assert!(matches!(error, LoadError::Disk(DiskError::DaemonEnded { .. })), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
}

#[test]
fn what_makes_no_sense_is_refused_in_words() {
    let disk = RamDisk::serve(SIZE, 1, true, Fault::None);
    let refused =
        |load: LoadSpec| run(disk.socket(), &load, Surroundings::default()).unwrap_err().to_string();
    assert!(refused(LoadSpec { block_size: 1000, ..LoadSpec::default() }).contains("multiples of 512"));
    let disk = RamDisk::serve(SIZE, 1, true, Fault::None);
    let refused =
        |load: LoadSpec| run(disk.socket(), &load, Surroundings::default()).unwrap_err().to_string();
    assert!(refused(LoadSpec { queues: 3, ..LoadSpec::default() }).contains("the disk has 1"));
    let disk = RamDisk::serve(SIZE, 1, true, Fault::None);
    let refused =
        |load: LoadSpec| run(disk.socket(), &load, Surroundings::default()).unwrap_err().to_string();
    assert!(refused(LoadSpec { size: Some(1 << 30), ..LoadSpec::default() }).contains("does not fit"));
}
