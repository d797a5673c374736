//! Makes each deliberate mistake of `mutants`, one at a time, and runs seeds of the simulator until a rule is broken.
//! Prints which seed found which. A mistake that no seed finds shows a hole in the rules or in what runs come to.
//!
//! `make sim-mutants`. The seed that found each last is tried first; the file `mutants.seeds` has it. When that fails, because
//! the simulator or the protocol has changed, others are: first of the same kind of run, then any.
//!
//! `RMR_MUTANTS` names the mistakes to make (all), `RMR_MUTANT_SEEDS` the most seeds of each search (3000),
//! `RMR_MUTANT_SECONDS` after how long no search goes on (never). `RMR_MUTANT_RECORD=1` writes the seeds that were found to
//! the file, and the table of `docs/simulator.md`.
//!
//! The file `mutants.units` names the mistakes that no seed has found, each with the unit test that finds it: `.ci/unit-mutants`
//! makes them. They are searched for here when they are named, and when seeds are recorded. Then one that is found leaves the file.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rmr_common::mutants::{self, Mutant};
use rmr_common::sim;

const SEEDS: u64 = 3000;
const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/mutants.seeds");
const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/simulator.md");
/// The mistakes that only unit tests find.
const UNITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/mutants.units");
/// Where the table begins on that page; it goes on to the end.
const HEAD: &str = "| mistake | what is done wrong | seed | rule that it breaks |\n";
/// Characters of a rule in the table.
const RULE: usize = 90;

/// No seed has broken a rule without a mistake.
static IS_SOUND: AtomicBool = AtomicBool::new(true);

fn main() -> ExitCode {
    match run() {
        Ok(survivors) if survivors.is_empty() => ExitCode::SUCCESS,
        Ok(survivors) => {
            eprintln!(
                "NOT found: {survivors:?}. Seeds that find them may be further on, and are recorded by \
                 RMR_MUTANT_SEEDS=20000 RMR_MUTANT_RECORD=1 make sim-mutants"
            );
            ExitCode::FAILURE
        }
        Err(text) => {
            eprintln!("{text}");
            ExitCode::from(2)
        }
    }
}

/// Returns the mistakes that were not found.
fn run() -> Result<Vec<Mutant>, String> {
    let seeds = number("RMR_MUTANT_SEEDS", SEEDS)?;
    let deadline = Instant::now() + Duration::from_secs(number("RMR_MUTANT_SECONDS", 1_000_000)?);
    let is_recording = std::env::var("RMR_MUTANT_RECORD").is_ok_and(|v| v == "1");
    let named = std::env::var("RMR_MUTANTS").unwrap_or_default();
    let named: Vec<_> = named.split([',', ' ']).filter(|n| !n.is_empty()).collect();
    let chosen: Vec<Mutant> = mutants::ALL
        .iter()
        .copied()
        .filter(|m| named.is_empty() || named.contains(&format!("{m:?}").as_str()))
        .collect();
    if chosen.is_empty() || chosen.len() < named.len() {
        return Err(format!("RMR_MUTANTS names {named:?}; expected some of {:?}", mutants::ALL));
    }
    let mut known = read_known()?;
    let mut units = read_units()?;
    // A mistake may well end in a panic: that finds it too.
    std::panic::set_hook(Box::new(|_| {}));
    println!("{:<28} {:>6} {:>6}  rule that it breaks", "mistake", "seed", "s");
    let begun = Instant::now();
    let (mut survivors, mut lines) = (Vec::new(), BTreeMap::new());
    for mutant in &chosen {
        let since = Instant::now();
        let name = format!("{mutant:?}");
        let unit = units.get(&name).filter(|_| named.is_empty() && !is_recording);
        if let Some(test) = unit {
            println!("{name:<28} {:>6} {:>6}  left to a unit test: {test}", "-", "-");
            continue;
        }
        let found = find(*mutant, known.get(&name).copied(), seeds, deadline);
        let seconds = since.elapsed().as_secs_f64();
        let Some((seed, rule)) = found else {
            println!("{name:<28} {:>6} {seconds:>6.1}  NOT FOUND: {}", "-", mutant.description());
            if !units.contains_key(&name) {
                survivors.push(*mutant);
            }
            continue;
        };
        println!("{name:<28} {seed:>6} {seconds:>6.1}  {rule}");
        lines.insert(name.clone(), rule);
        units.remove(&name);
        known.insert(name, seed);
    }
    let found = lines.len();
    println!("{found} of {} mistakes were found in {:.0} s", chosen.len(), begun.elapsed().as_secs_f64());
    if is_recording {
        record(&known, &lines)?;
        let text: String = units.iter().map(|(name, test)| format!("{name} {test}\n")).collect();
        std::fs::write(UNITS, text).map_err(|e| format!("{UNITS}: {e}"))?;
    }
    if IS_SOUND.load(Ordering::Relaxed) { Ok(survivors) } else { Err("see above".into()) }
}

fn number(name: &str, default: u64) -> Result<u64, String> {
    let Ok(text) = std::env::var(name) else { return Ok(default) };
    text.parse().map_err(|error| format!("{name} is '{text}', expected a number: {error}"))
}

/// Writes down which seeds found what, and what rules were broken.
fn record(known: &BTreeMap<String, u64>, rules: &BTreeMap<String, String>) -> Result<(), String> {
    let page = std::fs::read_to_string(PAGE).map_err(|e| format!("{PAGE}: {e}"))?;
    let (before, old) = page.split_once(HEAD).ok_or_else(|| format!("{PAGE} has no line '{HEAD}'"))?;
    let (mut seeds, mut table) = (String::new(), format!("{HEAD}|---|---|---|---|\n"));
    for mutant in mutants::ALL {
        let name = format!("{mutant:?}");
        let Some(seed) = known.get(&name) else { continue };
        writeln!(seeds, "{name} {seed}").map_err(|e| e.to_string())?;
        let line = match rules.get(&name) {
            Some(rule) => {
                let is_long = rule.chars().count() > RULE;
                let rule: String = rule.chars().take(RULE).collect::<String>().replace('|', "/");
                let (rule, rest) = (rule.trim_end(), if is_long { " …" } else { "" });
                format!("| {name} | {} | {seed} | {rule}{rest} |", mutant.description())
            }
            // It was not tried now.
            None => {
                old.lines().find(|l| l.starts_with(&format!("| {name} |"))).unwrap_or_default().to_owned()
            }
        };
        writeln!(table, "{line}").map_err(|e| e.to_string())?;
    }
    std::fs::write(FILE, seeds).map_err(|e| format!("{FILE}: {e}"))?;
    std::fs::write(PAGE, before.to_owned() + &table).map_err(|e| format!("{PAGE}: {e}"))
}

fn read_known() -> Result<BTreeMap<String, u64>, String> {
    let text = std::fs::read_to_string(FILE).map_err(|e| format!("{FILE}: {e}"))?;
    let line = |line: &str| {
        let (name, seed) = line.split_once(' ').ok_or(format!("{FILE}: '{line}' is no name and seed"))?;
        let seed = seed.parse().map_err(|e| format!("{FILE}: '{line}': {e}"))?;
        Ok((name.to_owned(), seed))
    };
    text.lines().map(line).collect()
}

fn read_units() -> Result<BTreeMap<String, String>, String> {
    let text = std::fs::read_to_string(UNITS).map_err(|e| format!("{UNITS}: {e}"))?;
    let line = |line: &str| match line.split_once(' ') {
        Some((name, test)) if mutants::ALL.iter().any(|m| format!("{m:?}") == name) => {
            Ok((name.to_owned(), test.to_owned()))
        }
        _ => Err(format!("{UNITS}: '{line}'; expected a test after one of {:?}", mutants::ALL)),
    };
    text.lines().map(line).collect()
}

/// The first seed that breaks a rule with this mistake made, and the rule.
fn find(mutant: Mutant, known: Option<u64>, most: u64, deadline: Instant) -> Option<(u64, String)> {
    let Some(known) = known else { return search(mutant, (1..=most).collect(), deadline) };
    if let Some(rule) = broken(mutant, known) {
        return Some((known, rule));
    }
    // Seeds that break many rules are found at once among all.
    let few = (1..=50.min(most)).collect();
    search(mutant, few, deadline).or_else(|| {
        let same_kind = (0..most / 2).map(|i| known % sim::KINDS + i * sim::KINDS);
        let any = (51..=most / 2).filter(|seed| seed % sim::KINDS != known % sim::KINDS);
        search(mutant, same_kind.chain(any).collect(), deadline)
    })
}

fn search(mutant: Mutant, seeds: Vec<u64>, deadline: Instant) -> Option<(u64, String)> {
    let next = AtomicU64::new(0);
    let found: Mutex<Option<(u64, String)>> = Mutex::new(None);
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let seed = usize::try_from(index).ok().and_then(|i| seeds.get(i)).copied();
            let is_found = found.lock().expect("no thread panics").as_ref().is_some_and(|(i, _)| *i < index);
            let Some(seed) = seed.filter(|_| !is_found && Instant::now() < deadline) else { break };
            if let Some(rule) = broken(mutant, seed) {
                let mut found = found.lock().expect("no thread panics");
                if found.as_ref().is_none_or(|(i, _)| index < *i) {
                    *found = Some((index, rule));
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, |n| n.get().min(8)) {
            scope.spawn(work);
        }
    });
    let found = found.into_inner().expect("no thread panics");
    found.and_then(|(index, rule)| Some((*seeds.get(usize::try_from(index).ok()?)?, rule)))
}

/// The rule that one run breaks because of the mistake.
fn broken(mutant: Mutant, seed: u64) -> Option<String> {
    let rule = violation(Some(mutant), seed)?;
    let Some(own) = violation(None, seed) else { return Some(rule) };
    IS_SOUND.store(false, Ordering::Relaxed);
    eprintln!("seed {seed} breaks a rule without any mistake: {own}");
    None
}

/// The rule that one run breaks.
fn violation(mutant: Option<Mutant>, seed: u64) -> Option<String> {
    mutants::activate(mutant);
    let run = AssertUnwindSafe(|| sim::run(seed, None));
    let rule = match catch_unwind(run) {
        Ok(Ok(_)) => None,
        Ok(Err(violation)) => Some(violation.rule),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no words");
            Some(format!("a panic: {text}"))
        }
    };
    mutants::activate(None);
    rule
}
