//! Runs the comparison of `make bench`: the replicated disk and what a user would pick instead, side by side.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Parser;
use cloud_hypervisor_tests::bench::compare::{Plan, WORKLOADS, Workload, compare};
use cloud_hypervisor_tests::bench::size::parse_size;
use cloud_hypervisor_tests::bench::systems::{Programs, SystemKind};

/// Compares the replicated disk with its peers on this machine. docs/benchmarks.md explains the figures.
#[derive(Parser)]
#[command(version, max_term_width = 110)]
struct Args {
    /// Systems to compare [default: brmr and quorum; without brmr, loudly, where its programs are missing].
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    systems: Vec<SystemKind>,
    /// Further systems: quorum-iothread, qsd-file, qsd-null.
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    also: Vec<SystemKind>,
    /// Workloads to run [default: all].
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', value_parser = Workload::named)]
    workloads: Vec<Workload>,
    /// How often each workload runs on each system [default: 3; with --before 16, as fewer are no evidence].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=99))]
    rounds: Option<u32>,
    /// How often the systems are started anew, the rounds being divided among these starts [default: 1; with --before as often
    /// as there are rounds, for one start can be some per cent faster than the next of the same program].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=99))]
    starts: Option<u32>,
    /// Measured seconds of each of these runs.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Size of the disks.
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = parse_size)]
    disk_size: u64,
    /// A directory on tmpfs with room for two copies of the disk per system.
    #[arg(long, value_name = "PATH", default_value = "/dev/shm")]
    directory: PathBuf,
    /// Where rmr-node, rmrctl and vhost-brmr are [default: beside this program].
    #[arg(long, value_name = "PATH")]
    bin_dir: Option<PathBuf>,
    /// The same programs of another build, to be measured side by side as brmr-before: is anything worse than it was?
    #[arg(long, value_name = "PATH")]
    before: Option<PathBuf>,
    /// qemu-storage-daemon 10 or later [default: unpacked below target/bench/qemu10, or installed].
    #[arg(long, value_name = "PATH", env = "QEMU_STORAGE_DAEMON")]
    qsd: Option<PathBuf>,
    /// Where the figures go; machine.json goes beside it.
    #[arg(long, value_name = "FILE", default_value = "target/bench/compare.json")]
    out: PathBuf,
    /// Exit with 1 when a bar is missed, or cannot be judged because brmr was not run.
    #[arg(long)]
    enforce: bool,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bench-compare: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let own = std::env::current_exe().context("finding this program")?;
    let beside = own.parent().map(PathBuf::from).unwrap_or_default();
    let mut programs = Programs::find(args.bin_dir.clone().unwrap_or(beside), args.qsd.clone());
    programs.before.clone_from(&args.before);
    let systems = systems(args, &programs)?;
    let workloads = if args.workloads.is_empty() { WORKLOADS.to_vec() } else { args.workloads.clone() };
    let rounds = args.rounds.unwrap_or(if args.before.is_some() { 16 } else { 3 });
    let plan = Plan {
        systems,
        workloads,
        rounds,
        starts: args.starts.unwrap_or(if args.before.is_some() { rounds } else { 1 }),
        cell: Duration::from_secs(args.seconds),
        disk_bytes: args.disk_size,
        directory: args.directory.clone(),
    };
    let outcome = compare(&plan, &programs, |step| println!("{step}"))?;
    outcome.save(&args.out)?;
    println!("\n{}\n\nwritten to {}", outcome.table(), args.out.display());

    let is_missed =
        !plan.systems.contains(&SystemKind::Brmr) || outcome.verdicts().iter().any(|bar| !bar.held);
    Ok(if !outcome.is_clean() || (args.enforce && is_missed) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Which systems to run. What was asked for by name must be there; of the default ones, ours may be missing.
fn systems(args: &Args, programs: &Programs) -> anyhow::Result<Vec<SystemKind>> {
    let mut systems = args.systems.clone();
    if systems.is_empty() {
        match programs.missing_for(SystemKind::Brmr) {
            None => systems.push(SystemKind::Brmr),
            Some(missing) => println!(
                "*** brmr IS NOT MEASURED: {missing}.\n*** Build it with: cargo build --release --workspace\n\
                 *** Only the peer runs; no bar is judged."
            ),
        }
        systems.push(SystemKind::Quorum);
    }
    if args.before.is_some() && !systems.contains(&SystemKind::BrmrBefore) {
        systems.push(SystemKind::BrmrBefore);
    }
    for kind in &args.also {
        if !systems.contains(kind) {
            systems.push(*kind);
        }
    }
    for kind in &systems {
        if let Some(missing) = programs.missing_for(*kind) {
            bail!("{kind} cannot be measured: {missing}");
        }
    }
    Ok(systems)
}
