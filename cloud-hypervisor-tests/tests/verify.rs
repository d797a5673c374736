//! A byte of a store is changed behind the back of everybody: a verify finds exactly that block, under load too, and mends it.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cloud_hypervisor_tests::bench::verify::{Promises, Unwritten};
use cloud_hypervisor_tests::lab::{
    self, DaemonBuilder, Lab, Node, NodeBuilder, Pool, PoolBuilder, wait_until,
};
use cloud_hypervisor_tests::scenario::{Counters, Writer};
use serde_json::{Value, json};

const MIB: u64 = 32;
const BLOCK: u64 = 4096;
/// In the half that no test damages: it would see that where it reads.
const WRITER: Writer = Writer { depth: 16, rate: 2000, span: Some(MIB << 19) };
const LIMIT: Duration = Duration::from_secs(30);
/// Exit code of `rmrctl pool verify` when copies differ.
const DIFFERENT: i32 = 5;

#[test]
fn without_a_guest_rmrctl_finds_the_block_and_repairs_it_by_the_member_that_is_trusted() -> Result<()> {
    lab::run("verify two", |lab| {
        let nodes = start_nodes(lab, &["a", "b"])?;
        let pool = create(lab, &nodes)?;
        let clean = verify(&pool, &[], 0)?;
        ensure!(clean["bytes_compared"] == MIB << 20, "{clean}");
        pool.areas()?[1].flip_byte(77 * BLOCK + 5)?;

        let found = verify(&pool, &[], DIFFERENT)?;
        ensure!(places(&found) == [(77 * BLOCK, BLOCK)], "{found}");
        ensure!(found["blocks_undecided"] == 1, "two members cannot tell who is wrong: {found}");

        let (exit, words) = pool.rmrctl_pool("verify", &["--repair", "--wait"])?;
        let is_refused = words.as_str().is_some_and(|w| w.contains("name the one to trust"));
        ensure!(exit == 1 && is_refused, "a repair without a majority was not refused: {exit} {words}");

        let mended = verify(&pool, &["--repair", "--trust", "0"], 0)?;
        ensure!(mended["blocks_repaired"] == 1, "{mended}");
        pool.wait_for_level("safe", LIMIT)?;
        pool.assert_identical()?;
        let zero = pool.areas()?[0].read(77 * BLOCK, 4096)?;
        ensure!(zero.iter().all(|byte| *byte == 0), "the copy that was trusted was overwritten");
        ensure!(verify(&pool, &[], 0)?["blocks_differing"] == 0, "after the repair");
        Ok(())
    })
}

#[test]
fn under_load_a_verify_finds_the_block_and_no_other_and_the_majority_mends_it() -> Result<()> {
    lab::run("verify three", |lab| {
        let nodes = start_nodes(lab, &["a", "b", "c"])?;
        let pool = create(lab, &nodes)?;
        let daemon = DaemonBuilder::new(&pool).start(lab)?;
        let mut promises = Promises::new(MIB << 20, 4096, 7, Unwritten::Zeroes);
        WRITER.during(&pool, &daemon, &mut promises, || check_under_load(&pool, &nodes[0]))?;
        pool.wait_for_level("safe", LIMIT)?;
        pool.assert_identical_within(LIMIT)?;
        daemon.stop()
    })
}

fn check_under_load(pool: &Pool, node: &Node) -> Result<()> {
    let writes = |before: &Counters| Counters::of(node)?.since(before, "rmr_store_writes_total");
    wait_until("the guest to write", LIMIT, || Ok(writes(&Counters::default())? > 100))?;
    let before = Counters::of(node)?;
    let clean = verify(pool, &[], 0).context("under load, with nothing wrong")?;
    ensure!(writes(&before)? > 0, "nothing was written during the verify: {clean}");
    ensure!(clean["blocks_differing"] == 0 && clean["blocks_unsettled"] == 0, "a false alarm: {clean}");

    // In the half that the guest leaves alone: it would see the damage where it reads.
    let block = (MIB << 20) / BLOCK - 300;
    pool.areas()?[2].flip_byte(block * BLOCK + 4095)?;
    let found = verify(pool, &[], DIFFERENT)?;
    ensure!(places(&found) == [(block * BLOCK, BLOCK)], "{found}");
    ensure!(found.pointer("/differences/0/wrong") == Some(&json!([2])), "{found}");

    let started = Instant::now();
    let mended = verify(pool, &["--repair"], 0)?;
    println!("found and repaired under load in {:?}", started.elapsed());
    ensure!(mended["blocks_repaired"] == 1 && mended["blocks_differing"] == 1, "{mended}");
    pool.wait_for_level("safe", LIMIT)?;

    // One that is interrupted says where to go on.
    let started = begin_yielding(pool)?;
    let (exit, second) = pool.rmrctl_pool("verify", &[])?;
    ensure!(exit == 1, "a second verify at the same time was not refused: {second}");
    thread::sleep(Duration::from_millis(2500));
    let (_, cancelled) = pool.rmrctl_pool("verify-cancel", &[])?;
    let most = started.elapsed().as_secs() + 3;
    let report = &cancelled["report"];
    ensure!(report.pointer("/state/name") == Some(&json!("cancelled")), "{report}");
    let (next, compared) = (report["next_chunk"].as_u64(), report["bytes_compared"].as_u64());
    ensure!(next.is_some_and(|chunk| (1..=most).contains(&chunk)), "at 1 MiB per second: {report}");
    ensure!(
        compared.is_some_and(|bytes| bytes <= most << 20),
        "more than {most} MiB, faster than was allowed: {report}"
    );
    let rest = verify(pool, &["--from-chunk", "31"], 0)?;
    ensure!(rest["bytes_compared"] == 1 << 20, "{rest}");
    Ok(())
}

/// Begins a slow verify that yields to the guest; returns when it was begun.
///
/// A guest is quiet for it after a twentieth of a second without a request, which a crowded machine makes it now and then.
fn begin_yielding(pool: &Pool) -> Result<Instant> {
    let mut begun = Value::Null;
    for _ in 0..20 {
        let started = Instant::now();
        let exit;
        (exit, begun) = pool.rmrctl_pool("verify", &["--rate", "1M"])?;
        ensure!(
            exit == 0 && begun.pointer("/report/state/name") == Some(&json!("running")),
            "{exit} {begun}"
        );
        if begun.pointer("/report/yielding") == Some(&json!(true)) {
            return Ok(started);
        }
        pool.rmrctl_pool("verify-cancel", &[])?;
    }
    bail!("the guest writes, and it does not yield: {begun}")
}

/// A verify to its end; its report.
fn verify(pool: &Pool, arguments: &[&str], expected: i32) -> Result<Value> {
    let (exit, found) = pool.rmrctl_pool("verify", &[&["--wait"], arguments].concat())?;
    ensure!(
        exit == expected,
        "rmrctl pool verify {arguments:?} ended with {exit}, expected {expected}: {found:#}"
    );
    let report = found.get("report").cloned().with_context(|| format!("no report in {found}"))?;
    ensure!(report.pointer("/state/name") == Some(&json!("done")), "{report}");
    Ok(report)
}

/// The ranges that differ, by first byte and length.
fn places(report: &Value) -> Vec<(u64, u64)> {
    let number = |difference: &Value, name: &str| difference[name].as_u64().unwrap_or(u64::MAX);
    let list = report["differences"].as_array();
    list.into_iter().flatten().map(|d| (number(d, "offset"), number(d, "length"))).collect()
}

fn start_nodes(lab: &Lab, names: &[&str]) -> Result<Vec<Node>> {
    names.iter().map(|name| NodeBuilder::new(name).start(lab)).collect()
}

fn create(lab: &Lab, nodes: &[Node]) -> Result<Pool> {
    let builder = PoolBuilder::new("disk").size_mib(MIB);
    nodes.iter().fold(builder, |pool, node| pool.member(node)).create(lab)
}
