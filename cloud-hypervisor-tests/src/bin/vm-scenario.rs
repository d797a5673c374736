//! Runs whole-system scenarios in a lab on this machine and prints one JSON line for each. Meant to be run inside a guest
//! (`cloud_hypervisor_tests::lab::Roce`), where everything that it starts is in the guest too.

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use cloud_hypervisor_tests::lab::Fabric;
use cloud_hypervisor_tests::scenario::{self, Effort, Outcome, Scenario};

/// Runs whole-system scenarios and prints one JSON line for each.
#[derive(Parser)]
#[command(
    version,
    max_term_width = 110,
    after_help = "Exit status: 0 if none failed (read the lines for those that were not run), 1 if one failed."
)]
struct Args {
    /// What carries the data: tcp://IP or rdma://IP, an address of this machine.
    #[arg(long, value_name = "FABRIC", required_unless_present = "list")]
    fabric: Option<Fabric>,
    /// Does as much as on real processors instead of emulated ones.
    #[arg(long)]
    full: bool,
    /// Lists the scenarios and ends.
    #[arg(long)]
    list: bool,
    /// Which to run [default: all].
    #[arg(value_name = "SCENARIO", value_parser = known)]
    scenarios: Vec<&'static Scenario>,
}

fn known(name: &str) -> Result<&'static Scenario, String> {
    let names: Vec<_> = scenario::ALL.iter().map(|scenario| scenario.name).collect();
    scenario::find(name).ok_or_else(|| format!("expected one of {}", names.join(", ")))
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("vm-scenario: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<bool> {
    let mut output = std::io::stdout();
    if args.list {
        for Scenario { name, sentence, .. } in &scenario::ALL {
            writeln!(output, "{name}: {sentence}")?;
        }
        return Ok(true);
    }
    let fabric = args.fabric.context("--fabric is missing")?;
    let effort = if args.full { Effort::FULL } else { Effort::EMULATED };
    let all: Vec<_> = scenario::ALL.iter().collect();
    let mut good = true;
    for scenario in if args.scenarios.is_empty() { &all } else { &args.scenarios } {
        let report = scenario.report(fabric, effort);
        good &= !matches!(report.outcome, Outcome::Failed(_));
        let line = serde_json::to_string(&report).context("writing a report")?;
        writeln!(output, "{line}")?;
    }
    Ok(good)
}
