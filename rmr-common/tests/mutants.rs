//! Makes each deliberate mistake of `mutants`, one at a time, and runs seeds of the simulator until a rule is broken.
//! Prints which seed found which. A mistake that no seed finds shows a hole in the rules or in what runs come to.
//!
//! `make sim-mutants`. `RMR_MUTANTS` names the mistakes to make (all), `RMR_MUTANT_SEEDS` the most seeds of each (3000).

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rmr_common::mutants::{self, Mutant};
use rmr_common::sim;

const SEEDS: u64 = 3000;

struct Outcome {
    /// The first seed that breaks a rule, and the rule.
    found: Option<(u64, String)>,
    took: Duration,
}

fn main() -> ExitCode {
    let seeds = match std::env::var("RMR_MUTANT_SEEDS").map(|text| text.parse::<u64>()) {
        Err(_) => SEEDS,
        Ok(Ok(seeds)) => seeds,
        Ok(Err(error)) => {
            eprintln!("RMR_MUTANT_SEEDS: expected a number: {error}");
            return ExitCode::from(2);
        }
    };
    let named = std::env::var("RMR_MUTANTS").unwrap_or_default();
    let named: Vec<_> = named.split([',', ' ']).filter(|n| !n.is_empty()).collect();
    let chosen: Vec<Mutant> = mutants::ALL
        .iter()
        .copied()
        .filter(|m| named.is_empty() || named.contains(&format!("{m:?}").as_str()))
        .collect();
    if chosen.is_empty() || chosen.len() < named.len() {
        eprintln!("RMR_MUTANTS names {named:?}; expected some of {:?}", mutants::ALL);
        return ExitCode::from(2);
    }
    if let Some(violation) = first_violation(None, 20) {
        eprintln!("without a mistake seed {} breaks a rule: {}", violation.0, violation.1);
        return ExitCode::FAILURE;
    }
    // A mistake may well end in a panic: that finds it too.
    std::panic::set_hook(Box::new(|_| {}));
    let survivors = run_all(&chosen, seeds);
    if survivors.is_empty() {
        println!("all {} mistakes were found", chosen.len());
        return ExitCode::SUCCESS;
    }
    eprintln!("NOT found within {seeds} seeds: {survivors:?}");
    ExitCode::FAILURE
}

/// Prints one line for each mutant as it is found, and returns those that were not.
fn run_all(chosen: &[Mutant], seeds: u64) -> Vec<Mutant> {
    let next = AtomicUsize::new(0);
    let survivors = Mutex::new(Vec::new());
    println!("{:<28} {:>6} {:>6}  found by", "mistake", "seed", "s");
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, |n| n.get().min(8)) {
            scope.spawn(|| {
                while let Some(&mutant) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let outcome = try_mutant(mutant, seeds);
                    let name = format!("{mutant:?}");
                    let seconds = outcome.took.as_secs_f64();
                    match outcome.found {
                        Some((seed, rule)) => println!("{name:<28} {seed:>6} {seconds:>6.1}  {rule}"),
                        None => {
                            println!(
                                "{name:<28} {:>6} {seconds:>6.1}  NOT FOUND: {}",
                                "-",
                                mutant.description()
                            );
                            survivors.lock().expect("no thread panics").push(mutant);
                        }
                    }
                }
            });
        }
    });
    survivors.into_inner().expect("no thread panics")
}

fn try_mutant(mutant: Mutant, seeds: u64) -> Outcome {
    let begun = Instant::now();
    let found = first_violation(Some(mutant), seeds);
    Outcome { found, took: begun.elapsed() }
}

fn first_violation(mutant: Option<Mutant>, seeds: u64) -> Option<(u64, String)> {
    mutants::activate(mutant);
    let found = (1..=seeds).find_map(|seed| {
        let run = AssertUnwindSafe(|| sim::run(seed, None));
        match catch_unwind(run) {
            Ok(Ok(_)) => None,
            Ok(Err(violation)) => Some((seed, violation.rule)),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no words");
                Some((seed, format!("a panic: {text}")))
            }
        }
    });
    mutants::activate(None);
    found
}
