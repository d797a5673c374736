//! A byte of a store is changed behind the back of everybody: a verify finds exactly that block, under load too, and mends it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::system::{LIMIT, System};
use super::{Counters, Counts, Effort, Writer};
use crate::lab::{Lab, Node, Pool, wait_until};

const BLOCK: u64 = 4096;
/// Exit code of `rmrctl pool verify` when copies differ.
const DIFFERENT: i32 = 5;

/// Without a guest `rmrctl` finds the block and repairs it by the member that is trusted.
pub(super) fn by_trust(lab: &Lab, effort: Effort) -> Result<Counts> {
    let System { pool, nodes: _nodes, .. } = System::patient(lab, halved(effort), 2, 0)?;
    let clean = verify(&pool, &[], 0)?;
    ensure!(clean["bytes_compared"] == pool.size(), "{clean}");
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
    Ok(Counts::from([("bytes_compared".to_owned(), pool.size())]))
}

/// Under load a verify finds the block that was damaged and no other, and the majority mends it.
pub(super) fn by_majority(lab: &Lab, effort: Effort) -> Result<Counts> {
    let mut system = System::patient(lab, halved(effort), 3, 0)?;
    let daemon = system.patient_daemon(lab, "daemon")?;
    // In the half that is not damaged: it would see that where it reads.
    let writer = Writer { span: Some(system.pool.size() / 2), ..system.writer() };
    let System { nodes, pool, promises, .. } = &mut system;
    let (compared, report) = writer.during(pool, &daemon, promises, || {
        find_and_mend(pool, &nodes[0])?;
        interrupt(pool, effort.slow_bytes_per_s)
    })?;
    pool.wait_for_level("safe", LIMIT)?;
    pool.assert_identical_within(LIMIT)?;
    daemon.stop()?;
    Ok(Counts::from([
        ("requests".to_owned(), report.requests),
        ("bytes_before_interruption".to_owned(), compared),
    ]))
}

/// The whole pool is compared again and again.
fn halved(effort: Effort) -> Effort {
    Effort { pool_mib: effort.pool_mib / 2, ..effort }
}

fn find_and_mend(pool: &Pool, node: &Node) -> Result<()> {
    let writes = |before: &Counters| Counters::of(node)?.since(before, "rmr_store_writes_total");
    wait_until("the guest to write", LIMIT, || Ok(writes(&Counters::default())? > 100))?;
    let before = Counters::of(node)?;
    let clean = verify(pool, &[], 0).context("under load, with nothing wrong")?;
    ensure!(writes(&before)? > 0, "nothing was written during the verify: {clean}");
    ensure!(clean["blocks_differing"] == 0 && clean["blocks_unsettled"] == 0, "a false alarm: {clean}");

    let block = pool.size() / BLOCK - 300;
    pool.areas()?[2].flip_byte(block * BLOCK + 4095)?;
    let found = verify(pool, &[], DIFFERENT)?;
    ensure!(places(&found) == [(block * BLOCK, BLOCK)], "{found}");
    ensure!(found.pointer("/differences/0/wrong") == Some(&json!([2])), "{found}");

    let mended = verify(pool, &["--repair"], 0)?;
    ensure!(mended["blocks_repaired"] == 1 && mended["blocks_differing"] == 1, "{mended}");
    pool.wait_for_level("safe", LIMIT)
}

/// A verify that is interrupted says where to go on. It was no faster than it was allowed, and yielded to the guest. Returns
/// what it had compared.
fn interrupt(pool: &Pool, bytes_per_s: u64) -> Result<u64> {
    let last_chunk = (pool.size() >> 20) - 1;
    let rate = bytes_per_s.to_string();
    let began = Instant::now();
    let (exit, begun) = pool.rmrctl_pool("verify", &["--rate", &rate])?;
    ensure!(exit == 0 && begun.pointer("/report/state/name") == Some(&json!("running")), "{exit} {begun}");
    let (exit, second) = pool.rmrctl_pool("verify", &[])?;
    ensure!(exit == 1, "a second verify at the same time was not refused: {second}");
    let (mut yielded, mut last) = (false, begun["report"].clone());
    let under_way = wait_until("the verify to get on, and to yield to the guest", LIMIT, || {
        yielded |= last["yielding"] == true;
        let (exit, status) = pool.rmrctl_pool("verify-status", &[])?;
        ensure!(exit == 0, "verify-status ended with {exit}: {status}");
        last = status["report"].clone();
        ensure!(last.pointer("/state/name") == Some(&json!("running")), "{last}");
        Ok(yielded && last["next_chunk"].as_u64().is_some_and(|chunk| chunk > 0))
    });
    under_way.with_context(|| format!("it yielded: {yielded}; it said {last}"))?;
    let (_, cancelled) = pool.rmrctl_pool("verify-cancel", &[])?;
    let report = &cancelled["report"];
    ensure!(report.pointer("/state/name") == Some(&json!("cancelled")), "{report}");
    let next = report["next_chunk"].as_u64();
    ensure!(next.is_some_and(|chunk| (1..=last_chunk).contains(&chunk)), "at {rate} bytes/s: {report}");
    let compared = report["bytes_compared"].as_u64().context("a report without bytes_compared")?;
    // It may be ahead by what it begins with.
    let allowed = bytes_per_s * (began.elapsed() + Duration::from_secs(2)).as_secs() + (1 << 20);
    ensure!(compared <= allowed, "{compared} bytes, expected at most {allowed} by now: {report}");
    let rest = verify(pool, &["--from-chunk", &last_chunk.to_string()], 0)?;
    ensure!(rest["bytes_compared"] == 1 << 20, "{rest}");
    Ok(compared)
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
