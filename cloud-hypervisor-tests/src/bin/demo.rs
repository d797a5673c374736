//! What `make demo` runs: two nodes, a pool, a disk under load, a node that dies and one that is stale, told step by step.
//! Every line that begins with "ok" was checked a moment before; the first check that fails ends the program with 1.

use std::fmt::Display;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cloud_hypervisor_tests::bench::disk::{Disk, DiskOptions};
use cloud_hypervisor_tests::bench::load::{self, LoadSpec, Pattern, Report, Surroundings};
use cloud_hypervisor_tests::bench::processes::{Role, Watched};
use cloud_hypervisor_tests::bench::verify::{DiskCheck, Promises, Unwritten};
use cloud_hypervisor_tests::lab::{
    self, Daemon, DaemonBuilder, Lab, Node, NodeBuilder, Pool, PoolBuilder, programs, stores,
};
use serde_json::Value;

const POOL: &str = "demo";
const DISK_MIB: u64 = 256;
/// The part of the disk that the load works on.
const WORKING_SET: u64 = 64 << 20;
const CALM: Duration = Duration::from_secs(4);
const UNDER_FAULT: Duration = Duration::from_secs(8);
/// When, in the load under which it happens, the node is killed.
const KILL_AFTER: Duration = Duration::from_secs(3);
/// How long requests are watched to wait while only a stale copy can be reached.
const REFUSAL: Duration = Duration::from_secs(3);
/// How long anything else may take.
const LIMIT: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    match lab::run("demo", demo) {
        Ok(()) => {
            println!("\nEverything above was checked and holds.");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("\ndemo: FAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn demo(lab: &Lab) -> Result<()> {
    title("Two storage nodes, each with its own directory of stores");
    let mut a = start_node(lab, "a")?;
    let mut b = start_node(lab, "b")?;

    title("A pool: one replicated disk with a copy on each node");
    let pool = PoolBuilder::new(POOL).size_mib(DISK_MIB).member(&a).member(&b);
    say(format_args!("$ rmrctl --node {} {}", a.admin_address(), pool.create_arguments().join(" ")));
    let pool = pool.create(lab)?;
    for node in [&a, &b] {
        say(format_args!("the copy of node {} is {}", node.name(), store_of(&pool, node)?.display()));
    }

    title("vhost-brmr offers the disk to one virtual machine on a vhost-user socket");
    let daemon = start_daemon(lab, &pool, "first")?;

    title(
        "A guest's load: 4 KiB reads and writes, 32 in flight; each block written is remembered, each read is checked",
    );
    let mut promises = Promises::new(DISK_MIB << 20, 4096, u64::from(std::process::id()), Unwritten::Zeroes);
    let report = run_load(&daemon, &mut promises, CALM, 1)?;
    describe(&report);
    proved("no request failed, and every block read held what was promised");
    pool.assert_identical_within(LIMIT)?;
    proved("the two copies are the same, byte for byte");
    show_status(&[&a, &b])?;
    expect_level(&pool, "safe")?;

    title("The same load, and node b is killed with SIGKILL in the middle of it");
    let report = kill_under_load(&daemon, &b, &mut promises)?;
    describe(&report);
    proved("no request failed, no promise was broken: the guest lost a node and saw a pause, not an error");
    say(format_args!(
        "the longest that one request took, in {} s: {:.1} ms",
        UNDER_FAULT.as_secs(),
        report.max_us / 1e3
    ));

    title("What the operator sees");
    show_status(&[&a, &b])?;
    expect_level(&pool, "degraded")?;
    let missed = missed_bytes(&pool)?;
    let areas = pool.areas()?;
    let different = stores::different_blocks(&areas[0], &areas[1])? as u64;
    ensure!(different > 0, "expected copies that differ, found none: nothing was written after the kill");
    ensure!(
        different * 4096 <= missed,
        "{different} blocks differ, but only {missed} bytes are on record as missed"
    );
    proved(&format!(
        "{different} blocks differ now; {} blocks are on record at node a as missed by member 1, none was forgotten",
        missed / 4096
    ));

    title(
        "The guest ends. Then only the stale node is up, and a guest is started: the case in which mirrors lose data",
    );
    daemon.stop()?;
    say("vhost-brmr: stopped");
    a.stop()?;
    say("node a, the only current copy: stopped");
    restart(lab, &mut b)?;
    let daemon = start_daemon(lab, &pool, "second")?;
    stale_copy_alone(lab, &daemon, &mut a, &mut promises)?;

    title("Node b is back beside node a: it is brought up to date by itself, from node to node");
    rejoin(&pool, &[&a, &b], &daemon, &mut promises)?;

    title(
        "Somebody puts an old copy of node b's store back: as good as new, and older than what was promised",
    );
    daemon.stop()?;
    let daemon = rolled_back(lab, &pool, &a, &mut b, &mut promises)?;

    title("Everything stops in order");
    daemon.stop()?;
    for node in [&a, &b] {
        node.stop()?;
        let store = stores::inspect(&store_of(&pool, node)?)?;
        let closed = store.pointer("/superblock/clean_shutdown").and_then(Value::as_bool);
        ensure!(closed == Some(true), "the store of node {} is not closed in order: {store}", node.name());
    }
    proved("vhost-brmr and both nodes ended with status 0, and their stores are closed in order");
    Ok(())
}

/// Only node b runs, whose copy is stale and which cannot know it. Nothing may be read from it, until node a is back.
fn stale_copy_alone(lab: &Lab, daemon: &Daemon, a: &mut Node, promises: &mut Promises) -> Result<()> {
    thread::scope(|scope| {
        let reader = scope.spawn(|| read_everything(daemon, promises));
        thread::sleep(REFUSAL);
        ensure!(!reader.is_finished(), "a read was answered although the only current copy was down");
        let log = daemon.process().log_text();
        let waiting = log.lines().rfind(|line| line.contains("waiting"));
        say(format_args!(
            "vhost-brmr says: {}",
            waiting.context("vhost-brmr does not say what it waits for")?.trim()
        ));
        proved(&format!(
            "for {} s the guest's reads waited; not one was answered from the stale copy",
            REFUSAL.as_secs()
        ));

        restart(lab, a)?;
        let check = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
        ensure_good(&check)?;
        proved(&format!(
            "the pool went on by itself: all {} blocks of the disk were read, and each held what was promised",
            check.blocks
        ));
        Ok(())
    })
}

/// A member that was away is connected again, and has to be Clean again by itself within [`LIMIT`].
fn rejoin(pool: &Pool, nodes: &[&Node], daemon: &Daemon, promises: &mut Promises) -> Result<()> {
    // Members are brought back in by the client that is attached, and that is so while a guest is there.
    let guest = Disk::attach(disk_options(daemon))?;
    let begun = Instant::now();
    pool.wait_for_level("safe", LIMIT)
        .context("member 1 did not become Clean again by itself, expected rejoin and resync")?;
    show_status(nodes)?;
    proved(&format!(
        "member 1 was brought up to date and is Clean again after {:.1} s",
        begun.elapsed().as_secs_f64()
    ));
    drop(guest);
    pool.assert_identical_within(LIMIT)?;
    proved("the two copies are the same again, byte for byte");
    let check = read_everything(daemon, promises)?;
    ensure_good(&check)?;
    proved(&format!("all {} blocks of the disk were read, and each held what was promised", check.blocks));
    Ok(())
}

/// Node b's store is copied, used, and replaced by the copy while no guest runs. The next guest must not read from it.
fn rolled_back(lab: &Lab, pool: &Pool, a: &Node, b: &mut Node, promises: &mut Promises) -> Result<Daemon> {
    let store = store_of(pool, b)?;
    let copy = store.with_extension("copy");
    b.stop()?;
    std::fs::copy(&store, &copy).context("copying the store of node b")?;
    restart(lab, b)?;
    let daemon = start_daemon(lab, pool, "third")?;
    describe(&run_load(&daemon, promises, CALM / 2, 3)?);
    daemon.stop()?;
    b.stop()?;
    std::fs::rename(&copy, &store).context("putting the copy back")?;
    say(format_args!(
        "node b: stopped, {} replaced by its copy from before that load, started",
        store.display()
    ));
    restart(lab, b)?;

    show_status(&[a, b])?;
    expect_level(pool, "degraded")?;
    let daemon = start_daemon(lab, pool, "fourth")?;
    let check = read_everything(&daemon, promises)?;
    ensure_good(&check)?;
    let log = daemon.process().log_text();
    let noticed = log.lines().find(|line| line.contains("went back in time"));
    say(format_args!(
        "vhost-brmr says: {}",
        noticed.context("vhost-brmr does not say what it found")?.trim()
    ));
    proved(&format!("all {} blocks were read, and not one came from the old copy", check.blocks));
    let guest = Disk::attach(disk_options(&daemon))?;
    expect_level(pool, "safe")?;
    drop(guest);
    pool.assert_identical_within(LIMIT)?;
    proved("node b was copied over in full, and the two copies are the same again");
    Ok(daemon)
}

fn start_node(lab: &Lab, name: &str) -> Result<Node> {
    let node = NodeBuilder::new(name).on_disk().start(lab)?;
    describe_node(&node);
    Ok(node)
}

fn restart(lab: &Lab, node: &mut Node) -> Result<()> {
    node.restart(lab)?;
    describe_node(node);
    Ok(())
}

fn describe_node(node: &Node) {
    say(format_args!(
        "rmr-node {}: process {}, clients at {}, operators at {}",
        node.name(),
        node.process().pid(),
        node.data_address(),
        node.admin_address()
    ));
}

fn start_daemon(lab: &Lab, pool: &Pool, name: &str) -> Result<Daemon> {
    let daemon = DaemonBuilder::new(pool).name(name).start(lab)?;
    say(format_args!("vhost-brmr: process {}, socket {}", daemon.process().pid(), daemon.socket().display()));
    Ok(daemon)
}

fn run_load(daemon: &Daemon, promises: &mut Promises, time: Duration, seed: u64) -> Result<Report> {
    let spec = LoadSpec {
        name: "load".into(),
        pattern: Pattern::RandRw,
        depth: 32,
        ramp_ms: 0,
        runtime_ms: u64::try_from(time.as_millis())?,
        size: Some(WORKING_SET),
        seed,
        verify_at_end: true,
        ..LoadSpec::default()
    };
    let watched = [Watched { role: Role::Client, pid: daemon.process().pid() }];
    let surroundings =
        Surroundings { watched: &watched, promises: Some(promises), ..Surroundings::default() };
    let report = load::run(daemon.socket(), &spec, surroundings)?;
    ensure!(report.errors == 0, "{} requests failed, the first: {:?}", report.errors, report.first_error);
    ensure!(report.violations == 0, "{} promises broken: {:?}", report.violations, report.first_violations);
    ensure!(report.verified_blocks > 0 && report.requests > report.reads, "the load did nothing: {report:?}");
    Ok(report)
}

fn kill_under_load(daemon: &Daemon, node: &Node, promises: &mut Promises) -> Result<Report> {
    thread::scope(|scope| {
        let load = scope.spawn(|| run_load(daemon, promises, UNDER_FAULT, 2));
        thread::sleep(KILL_AFTER);
        // A load that is over by now has failed, and says why below.
        let is_under_load = !load.is_finished();
        node.kill()?;
        say(format_args!("kill -9 {} (node {})", node.process().pid(), node.name()));
        let report = load.join().map_err(|_| anyhow::anyhow!("the load panicked"))??;
        ensure!(is_under_load, "the load ended before the node was killed");
        Ok(report)
    })
}

fn read_everything(daemon: &Daemon, promises: &mut Promises) -> Result<DiskCheck> {
    Ok(promises.check_disk(&mut Disk::attach(disk_options(daemon))?, 3)?)
}

fn disk_options(daemon: &Daemon) -> DiskOptions {
    DiskOptions {
        depth: 16,
        buffer_size: 128 << 10,
        daemons: vec![daemon.process().pid()],
        ..DiskOptions::new(daemon.socket())
    }
}

fn ensure_good(check: &DiskCheck) -> Result<()> {
    ensure!(check.is_good() && check.blocks > 0, "the disk does not hold what was promised: {check:?}");
    Ok(())
}

fn describe(report: &Report) {
    say(format_args!(
        "{} requests, {:.0} per second; median {:.0} µs, p99 {:.0} µs; {} blocks checked",
        report.requests, report.iops, report.p50_us, report.p99_us, report.verified_blocks
    ));
}

fn expect_level(pool: &Pool, level: &str) -> Result<()> {
    pool.wait_for_level(level, LIMIT)?;
    proved(&format!("rmrctl calls the pool {level}"));
    Ok(())
}

/// What the status says of a member.
fn member(status: &Value, id: u64) -> Result<&Value> {
    let members = status.pointer("/assessment/members").and_then(Value::as_array);
    let found = members.and_then(|members| members.iter().find(|member| member["member"] == id));
    found.with_context(|| format!("rmrctl status has no member {id} at /assessment/members: {status}"))
}

fn missed_bytes(pool: &Pool) -> Result<u64> {
    let status = pool.status()?;
    let missed = member(&status, 1)?.get("missed_bytes").and_then(Value::as_u64);
    missed.with_context(|| format!("rmrctl status does not say what member 1 missed: {status}"))
}

fn store_of(pool: &Pool, node: &Node) -> Result<PathBuf> {
    let areas = pool.areas()?;
    let found = areas.into_iter().find(|area| area.path.starts_with(node.store_dir()));
    Ok(found.with_context(|| format!("node {} has no store of the pool", node.name()))?.path)
}

/// Runs `rmrctl status` as an operator would, and shows command and output.
fn show_status(nodes: &[&Node]) -> Result<()> {
    let mut command = Command::new(programs::own("rmrctl")?);
    let mut shown = String::from("rmrctl");
    for node in nodes {
        let admin = node.admin_address().to_string();
        shown += &format!(" --node {admin}");
        command.args(["--node", &admin]);
    }
    say(format_args!("$ {shown} status"));
    let output = command.arg("status").output().context("starting rmrctl")?;
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        say(line);
    }
    // 3 and 4 are answers: degraded, suspended.
    if !matches!(output.status.code(), Some(0 | 3 | 4)) {
        bail!("rmrctl failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim_end());
    }
    Ok(())
}

fn title(text: &str) {
    println!("\n{text}");
}

fn say(text: impl Display) {
    println!("    {text}");
}

fn proved(text: &str) {
    println!("ok  {text}");
}
