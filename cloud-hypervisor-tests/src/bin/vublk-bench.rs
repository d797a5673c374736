//! Load generator for any vhost-user-blk socket: behaves like a guest, verifies what it reads on request, and reports
//! rates, latencies and the processor time that the daemons behind the socket spend per request.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Parser, ValueEnum};
use cloud_hypervisor_tests::bench::disk::{Disk, DiskOptions};
use cloud_hypervisor_tests::bench::load::{LoadSpec, Pattern, Report, Surroundings, run_on};
use cloud_hypervisor_tests::bench::processes::{Role, Watched};
use cloud_hypervisor_tests::bench::size::{parse_size, parse_size_u32};
use cloud_hypervisor_tests::bench::verify::{Promises, Unwritten};

/// Puts a load on a vhost-user-blk disk and measures it.
#[derive(Parser)]
#[command(version, max_term_width = 110)]
struct Args {
    /// The socket on which the daemon listens.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Order and direction of the requests.
    #[arg(long, value_enum, default_value_t = Order::Randread)]
    rw: Order,
    /// Reads in a hundred requests of rw and randrw.
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=100))]
    rwmixread: u32,
    /// Bytes of a request.
    #[arg(long, value_name = "SIZE", default_value = "4k", value_parser = parse_size_u32)]
    bs: u32,
    /// Greatest piece of a request's scatter/gather list [default: one piece per request].
    #[arg(long, value_name = "SIZE", value_parser = parse_size_u32)]
    segment_size: Option<u32>,
    /// Requests in flight, over all queues.
    #[arg(long, value_name = "N", default_value_t = 1)]
    iodepth: u32,
    /// Requests per second, due at moments fixed beforehand [default: the next follows a completion].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rate: Option<u32>,
    /// Seconds during which requests are issued and measured.
    #[arg(long, value_name = "SECONDS", default_value = "4", value_parser = parse_seconds)]
    runtime: Duration,
    /// Seconds of load before that, unmeasured.
    #[arg(long, value_name = "SECONDS", default_value = "0.5", value_parser = parse_seconds)]
    ramp: Duration,
    /// End after this many requests, those of the ramp included, if that is earlier.
    #[arg(long, value_name = "N")]
    max_requests: Option<u64>,
    /// Virtqueues to use.
    #[arg(long, value_name = "N", default_value_t = 1)]
    num_queues: u16,
    /// Entries of each virtqueue [default: 128, or as many as the requests in flight need].
    #[arg(long, value_name = "N")]
    queue_size: Option<u16>,
    /// First byte of the range that is used.
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = parse_size)]
    offset: u64,
    /// Bytes of the range that is used [default: the rest of the disk].
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    size: Option<u64>,
    /// Seed of places, mix and data.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Stamp every block that is written, check every block that is read, and read the range at the end.
    #[arg(long)]
    verify: bool,
    /// With --verify: blocks that were never written must read as zeroes.
    #[arg(long, requires = "verify")]
    fresh: bool,
    /// With --verify: the file that keeps what was promised, for a later run to check.
    #[arg(long, value_name = "FILE", requires = "verify")]
    promises: Option<PathBuf>,
    /// Leave out the flush that ends a load with writes. Write speed without it is not a write speed.
    #[arg(long)]
    no_flush_at_end: bool,
    /// Go on after a request that failed, and exit with 0.
    #[arg(long)]
    continue_on_error: bool,
    /// Seconds without a completion, with requests in flight, after which the disk counts as dead.
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = parse_seconds)]
    stall_timeout: Duration,
    /// A process to measure, client:PID or server:PID; repeatable. The end of a client process ends the load.
    #[arg(long, value_name = "ROLE:PID")]
    pid: Vec<Watched>,
    /// A JSON file with a list of loads to run one after the other instead of the one that the options describe.
    #[arg(long, value_name = "FILE")]
    script: Option<PathBuf>,
    /// Report as JSON: an object, or a list with --script.
    #[arg(long)]
    json: bool,
}

/// The names that fio uses.
#[derive(Clone, Copy, ValueEnum)]
enum Order {
    Read,
    Write,
    Randread,
    Randwrite,
    #[value(name = "rw")]
    Mixed,
    Randrw,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("vublk-bench: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let loads = loads(args)?;
    let mut disk = Disk::attach(disk_options(args, &loads))?;
    let mut promises = args.verify.then(|| recall(args, &loads, disk.capacity())).transpose()?;

    let mut reports = Vec::new();
    let mut outcome = Ok(());
    for load in &loads {
        let surroundings = Surroundings { watched: &args.pid, stop: None, promises: promises.as_mut() };
        match run_on(&mut disk, load, surroundings) {
            Ok(report) => reports.push(report),
            // What was promised until then is still worth keeping.
            Err(error) => {
                outcome = Err(error);
                break;
            }
        }
    }
    if let (Some(path), Some(promises)) = (&args.promises, &promises) {
        let text = serde_json::to_vec(promises)?;
        fs::write(path, text).with_context(|| format!("writing the promises to {}", path.display()))?;
    }
    print(args, &reports)?;
    outcome?;
    let is_bad = |(load, report): (&LoadSpec, &Report)| {
        report.violations > 0 || (report.errors > 0 && !load.continue_on_error)
    };
    Ok(if loads.iter().zip(&reports).any(is_bad) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn loads(args: &Args) -> anyhow::Result<Vec<LoadSpec>> {
    if let Some(path) = &args.script {
        let text = fs::read(path).with_context(|| format!("reading the script {}", path.display()))?;
        let loads: Vec<LoadSpec> = serde_json::from_slice(&text)
            .with_context(|| format!("{} is not a list of loads", path.display()))?;
        if loads.is_empty() {
            bail!("{} holds no load, expected at least one", path.display());
        }
        return Ok(loads);
    }
    let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    Ok(vec![LoadSpec {
        name: "load".into(),
        pattern: match args.rw {
            Order::Read => Pattern::Read,
            Order::Write => Pattern::Write,
            Order::Randread => Pattern::RandRead,
            Order::Randwrite => Pattern::RandWrite,
            Order::Mixed => Pattern::Rw,
            Order::Randrw => Pattern::RandRw,
        },
        read_percent: args.rwmixread,
        block_size: args.bs,
        segment_size: args.segment_size,
        depth: args.iodepth,
        queues: args.num_queues,
        rate: args.rate,
        runtime_ms: milliseconds(args.runtime),
        ramp_ms: milliseconds(args.ramp),
        max_requests: args.max_requests,
        offset: args.offset,
        size: args.size,
        seed: args.seed,
        verify_at_end: args.verify,
        flush_at_end: !args.no_flush_at_end,
        continue_on_error: args.continue_on_error,
        stall_timeout_ms: milliseconds(args.stall_timeout),
    }])
}

/// Attaches so that every load of a script fits.
fn disk_options(args: &Args, loads: &[LoadSpec]) -> DiskOptions {
    DiskOptions {
        socket: args.socket.clone(),
        queues: loads.iter().map(|load| load.queues).max().unwrap_or(1),
        queue_size: args.queue_size,
        depth: loads.iter().map(|load| load.depth).max().unwrap_or(1),
        buffer_size: loads.iter().map(|load| load.block_size).max().unwrap_or(4096),
        segment_size: loads.iter().filter_map(|load| load.segment_size).min(),
        seed: args.seed,
        daemons: args
            .pid
            .iter()
            .filter(|process| process.role == Role::Client)
            .map(|process| process.pid)
            .collect(),
        stall_timeout: args.stall_timeout,
    }
}

fn recall(args: &Args, loads: &[LoadSpec], capacity: u64) -> anyhow::Result<Promises> {
    if let Some(path) = args.promises.as_deref().filter(|path| path.exists()) {
        return read_promises(path);
    }
    let unit = loads.iter().map(|load| load.block_size).min().unwrap_or(4096).min(4096);
    let unwritten = if args.fresh { Unwritten::Zeroes } else { Unwritten::Anything };
    Ok(Promises::new(capacity, unit, rand::random(), unwritten))
}

fn read_promises(path: &Path) -> anyhow::Result<Promises> {
    let text = fs::read(path).with_context(|| format!("reading the promises {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} holds no promises", path.display()))
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let wrong = |_| format!("expected seconds from 0, found \"{text}\"");
    text.parse()
        .map_err(|error: std::num::ParseFloatError| error.to_string())
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string()))
        .map_err(wrong)
}

fn print(args: &Args, reports: &[Report]) -> anyhow::Result<()> {
    if args.json {
        let text = match (reports, &args.script) {
            ([report], None) => serde_json::to_string_pretty(report)?,
            _ => serde_json::to_string_pretty(reports)?,
        };
        println!("{text}");
        return Ok(());
    }
    for report in reports {
        println!(
            "{}: {:.0} IOPS, {:.1} MB/s in {:.2} s ({} requests, {} reads, {} errors, {} late)",
            report.name,
            report.iops,
            report.mb_s,
            report.seconds,
            report.requests,
            report.reads,
            report.errors,
            report.late
        );
        println!(
            "  latency µs: mean {:.1}, p50 {:.1}, p99 {:.1}, p99.9 {:.1}, max {:.1}; final flush {:.1}",
            report.mean_us, report.p50_us, report.p99_us, report.p999_us, report.max_us, report.flush_us
        );
        println!(
            "  generator: {:.2} µs per request, {:.1} % of a core",
            report.own_cpu_us_per_io, report.own_cpu_pct
        );
        for process in &report.processes {
            println!(
                "  {:?} {}: {:.2} µs per request, {:.1} % of a core, {:.3} switches per request, {} KiB of its own",
                process.role,
                process.pid,
                process.cpu_us_per_io,
                process.cpu_pct,
                process.switches_per_io,
                process.memory.own_kib
            );
        }
        if args.verify {
            println!("  {} blocks verified, {} violations", report.verified_blocks, report.violations);
        }
        for text in report.first_error.iter().chain(&report.first_violations) {
            println!("  {text}");
        }
    }
    Ok(())
}
