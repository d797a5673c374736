//! The simulator's campaign. `RMR_SIM_SEEDS` and `RMR_SIM_START` choose how many seeds and which.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use rmr_common::sim::{self, Coverage};

const SEEDS: u64 = 3000;

fn number(name: &str, default: u64) -> u64 {
    let Ok(text) = std::env::var(name) else { return default };
    text.parse::<u64>()
        .map_err(|_| format!("{name} is '{text}', expected a number"))
        .expect("the environment")
}

#[test]
fn no_seed_breaks_a_rule_and_every_situation_is_reached() {
    let (start, seeds) = (number("RMR_SIM_START", 1), number("RMR_SIM_SEEDS", SEEDS));
    let next = AtomicU64::new(start);
    let failure = Mutex::new(None);
    let total = Mutex::new(Coverage::default());
    let work = || {
        let mut coverage = Coverage::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= start + seeds || failure.lock().unwrap().is_some() {
                break;
            }
            let run = AssertUnwindSafe(|| sim::run(seed, None));
            let violation = match catch_unwind(run) {
                Ok(Ok(report)) => {
                    coverage.add(&report.coverage);
                    continue;
                }
                Ok(Err(violation)) => violation.to_string(),
                Err(_) => {
                    sim::Violation { seed, step: 0, rule: "the code panicked, see above".into() }.to_string()
                }
            };
            failure.lock().unwrap().get_or_insert(violation);
        }
        total.lock().unwrap().add(&coverage);
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, |n| n.get().min(8)) {
            scope.spawn(work);
        }
    });
    if let Some(violation) = failure.into_inner().unwrap() {
        panic!("{violation}");
    }
    let coverage = total.into_inner().unwrap();
    // A few seeds prove nothing about situations that are rare.
    if seeds >= SEEDS {
        assert_eq!(coverage.missing(), Vec::<&str>::new(), "situations that no seed came to");
    }
}

#[test]
fn a_seed_is_the_same_run_every_time() {
    for seed in [3, 14, 159, 2653] {
        let trace = || {
            let mut text = Vec::new();
            sim::run(seed, Some(&mut text)).unwrap_or_else(|violation| panic!("{violation}"));
            text
        };
        assert!(trace() == trace(), "seed {seed}");
    }
}
