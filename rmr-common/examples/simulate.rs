//! Runs seeds of the simulator: one with a trace to look into a failure, or many.
//!
//! `cargo run -p rmr-common --example simulate -- --seed N [--trace]`, or `--start N --seeds COUNT [--by STEP] [--go-on]`: with a
//! step of 16 all runs are of one kind; `--go-on` goes on after a seed that breaks a rule. With the feature `mutants` also `--mutant NAME`, to see what a deliberate mistake leads to.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use rmr_common::sim;

struct Arguments {
    start: u64,
    seeds: u64,
    by: u64,
    trace: bool,
    go_on: bool,
}

fn arguments() -> Result<Arguments, String> {
    let mut parsed = Arguments { start: 1, seeds: 1, by: 1, trace: false, go_on: false };
    let mut list = std::env::args().skip(1);
    while let Some(argument) = list.next() {
        let mut number = || {
            let text = list.next().ok_or_else(|| format!("{argument} needs a number"))?;
            text.parse::<u64>().map_err(|_| format!("{argument} needs a number, found '{text}'"))
        };
        match argument.as_str() {
            "--seed" | "--start" => parsed.start = number()?,
            "--seeds" => parsed.seeds = number()?,
            "--by" => parsed.by = number()?.max(1),
            "--trace" => parsed.trace = true,
            "--go-on" => parsed.go_on = true,
            #[cfg(feature = "mutants")]
            "--mutant" => {
                let name = list.next().unwrap_or_default();
                let found = rmr_common::mutants::ALL.iter().find(|m| format!("{m:?}") == name);
                rmr_common::mutants::activate(Some(*found.ok_or(format!("there is no mutant '{name}'"))?));
            }
            other => {
                return Err(format!(
                    "'{other}' is unknown; expected --seed, --start, --seeds, --by, --trace or --go-on"
                ));
            }
        }
    }
    Ok(parsed)
}

fn main() -> ExitCode {
    let arguments = match arguments() {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!("simulate: {error}");
            return ExitCode::from(2);
        }
    };
    let mut coverage = sim::Coverage::default();
    let (mut steps, mut requests, mut failed) = (0, 0, 0u64);
    for index in 0..arguments.seeds {
        let seed = arguments.start.saturating_add(index.saturating_mul(arguments.by));
        let mut out = std::io::stdout();
        let trace: Option<&mut dyn std::io::Write> = if arguments.trace { Some(&mut out) } else { None };
        let run = AssertUnwindSafe(|| sim::run(seed, trace));
        match catch_unwind(run) {
            Ok(Ok(report)) => {
                coverage.add(&report.coverage);
                steps += report.steps;
                requests += report.requests;
            }
            Ok(Err(violation)) => {
                eprintln!("{violation}");
                failed += 1;
            }
            Err(_) => {
                eprintln!("seed {seed}: the code panicked, see above");
                failed += 1;
            }
        }
        if failed > 0 && !arguments.go_on {
            return ExitCode::FAILURE;
        }
    }
    if failed > 0 {
        eprintln!("{failed} of {} seeds broke a rule", arguments.seeds);
        return ExitCode::FAILURE;
    }
    println!("{} seeds, {requests} requests, {steps} events: no rule was broken", arguments.seeds);
    for situation in sim::SITUATIONS {
        println!("{:>10} {situation}", coverage.count(situation));
    }
    ExitCode::SUCCESS
}
