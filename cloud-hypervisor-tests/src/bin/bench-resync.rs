//! Measures what a resync moves and takes, and what the guest notices of it: `make bench-resync`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use cloud_hypervisor_tests::bench::resync::{Part, Plan, measure};

/// Measures the resync of a pool on this machine. docs/benchmarks.md explains the figures.
#[derive(Parser)]
#[command(version, max_term_width = 110)]
struct Args {
    /// Parts to run: amplification, experiment, pauses, costs [default: all].
    #[arg(long, value_name = "PART,…", value_delimiter = ',', value_parser = Part::named)]
    only: Vec<Part>,
    /// Data that is missed in the experiment, in GB of 10^9 bytes, down to thousandths.
    #[arg(long, value_name = "GB,…", value_delimiter = ',', value_parser = parse_gb, default_value = "1,2,5")]
    gb: Vec<u64>,
    /// Trials of each event that a guest may notice.
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..=1000))]
    trials: u16,
    /// Where the figures go.
    #[arg(long, value_name = "FILE", default_value = "target/bench/resync.json")]
    out: PathBuf,
}

/// Thousandths of a GB, which are MB.
fn parse_gb(text: &str) -> Result<u64, String> {
    let wrong = || format!("expected GB such as 5 or 0.25, from 0.001 to 1000, found \"{text}\"");
    let (whole, rest) = text.split_once('.').unwrap_or((text, "0"));
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number(whole) || !is_number(rest) || rest.len() > 3 {
        return Err(wrong());
    }
    let thousandths: u64 = format!("{rest:0<3}").parse().map_err(|_| wrong())?;
    let whole: u64 = whole.parse().map_err(|_| wrong())?;
    let mb = whole.checked_mul(1000).and_then(|mb| mb.checked_add(thousandths));
    mb.filter(|mb| (1..=1_000_000).contains(mb)).ok_or_else(wrong)
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bench-resync: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(args: Args) -> anyhow::Result<ExitCode> {
    let begin = Instant::now();
    let mut sizes_mb = args.gb;
    sizes_mb.sort_unstable();
    let parts = if args.only.is_empty() { Part::ALL.map(|(_, part)| part).to_vec() } else { args.only };
    let plan = Plan { parts, sizes_mb, trials: args.trials.into() };
    let outcome = measure(&plan, &|step| println!("{step}"))?;
    outcome.save(&args.out)?;
    println!("{}\nwritten to {}, after {:.0?}", outcome.table(), args.out.display(), begin.elapsed());
    Ok(if outcome.holds() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_to_the_thousandth_and_everything_else_is_refused() {
        assert_eq!(["1", "0.25", "5.125", "0.001"].map(|t| parse_gb(t).unwrap()), [1000, 250, 5125, 1]);
        for text in ["", ".", "1.", ".5", "0", "-1", "1e3", "0.0001", "1001", "99999999999999999999"] {
            assert!(parse_gb(text).is_err(), "{text}");
        }
    }
}
