//! The operator's override, `rmrctl pool force-from`, with real programs: what it refuses, that it waits until the other members
//! have heard of it, and what becomes of a guest whose copy was decided against. Each machine is a network namespace of its
//! own. Skipped, loudly, where those cannot be made.

use std::process::{Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cloud_hypervisor_tests::lab::{
    self, Daemon, DaemonBuilder, FrontendBuilder, Lab, Network, Node, NodeBuilder, Pool, PoolBuilder, Status,
};
use serde_json::Value;

const MIB: u64 = 64;
const LIMIT: Duration = Duration::from_secs(40);
const LEG_TIMEOUT_MS: &str = "800";
/// Well beyond that.
const LOST: Duration = Duration::from_millis(2400);

/// Exit code of a daemon whose disk another client took.
const DISPLACED: i32 = 3;

const HYPERVISOR: &str = "hv";
const A: &str = "a";
const B: &str = "b";
const OPERATOR: &str = "operator";

const GIVEN_UP: &str = "--yes-lose-what-others-have";
const GONE: &str = "--unreachable-are-gone";

#[test]
fn a_guest_whose_copy_was_given_up_runs_on_until_that_copy_hears_of_it_and_is_fenced_then() -> Result<()> {
    let test = "forced, with a guest";
    let Some(network) = Network::new_or_say_not_run(test, &[HYPERVISOR, A, B, OPERATOR])? else {
        return Ok(());
    };
    lab::run(test, |lab| {
        let (_nodes, pool) = pool(lab, &network)?;
        let daemon = guest(lab, &network, &pool, "guest")?;
        let mut disk = FrontendBuilder::new(daemon.socket()).connect()?;
        ensure!(disk.write(0, 0, &[1; 4096])? == Status::Ok && disk.flush(0)? == Status::Ok);
        cut(&network, HYPERVISOR, B)?;
        ensure!(disk.write(0, 8, &[2; 4096])? == Status::Ok, "member A alone");

        // The operator sees both, and the guest that uses A.
        let said = refusal(&pool, &["1", GIVEN_UP])?;
        ensure!(said.contains("nothing was done") && said.contains("stop it first"), "{said}");
        // B has to find out for itself that the guest is gone.
        thread::sleep(LOST);
        // Then B alone.
        cut(&network, OPERATOR, A)?;
        cut(&network, A, B)?;
        let said = refusal(&pool, &["1"])?;
        ensure!(said.contains("nothing was done") && said.contains(GIVEN_UP), "{said}");
        let said = refusal(&pool, &["1", GIVEN_UP])?;
        ensure!(said.contains("nothing was done") && said.contains("member 0"), "{said}");
        ensure!(said.contains("was not seen") && said.contains(GONE), "{said}");
        let forced = answer(&pool.operator("force-from", &["1", GIVEN_UP, GONE])?.output()?)?;
        ensure!(states(&forced) == ["out", "clean"], "{forced}");
        ensure!(
            forced["untold"] == Value::Array(Vec::new()),
            "those who are gone are not waited for: {forced}"
        );
        ensure!(disk.write(0, 16, &[3; 4096])? == Status::Ok, "nobody has told A, nor its guest");

        // A can be reached again, though not by the guest's way to B: it is told, and the guest of the older branch is fenced.
        heal(&network, OPERATOR, A)?;
        heal(&network, A, B)?;
        pool.operate("resync", &[])?;
        // It cannot go on with what it has in memory: its daemon ends, and says why.
        let status = daemon.process().wait_exit(LIMIT)?;
        ensure!(status.code() == Some(DISPLACED), "ended with {status}: {}", daemon.process().log_text());
        drop(disk);
        pool.assert_identical()?;

        heal(&network, HYPERVISOR, B)?;
        let daemon = guest(lab, &network, &pool, "the next guest")?;
        let mut disk = FrontendBuilder::new(daemon.socket()).connect()?;
        for (sector, expected) in [(0, 1), (8, 0), (16, 0)] {
            let (status, found) = disk.read(0, sector, 4096)?;
            ensure!(
                status == Status::Ok && found == [expected; 4096],
                "sector {sector}: {:?}",
                found.first()
            );
        }
        drop(disk);
        daemon.stop()
    })
}

#[test]
fn forcing_waits_for_a_while_until_every_member_that_was_seen_has_heard_of_it() -> Result<()> {
    let test = "forced, and told";
    let Some(network) = Network::new_or_say_not_run(test, &[HYPERVISOR, A, B, OPERATOR])? else {
        return Ok(());
    };
    lab::run(test, |lab| {
        let (_nodes, pool) = pool(lab, &network)?;
        let daemon = guest(lab, &network, &pool, "guest")?;
        let mut disk = FrontendBuilder::new(daemon.socket()).connect()?;
        ensure!(disk.write(0, 0, &[1; 4096])? == Status::Ok && disk.flush(0)? == Status::Ok);
        drop(disk);
        daemon.stop()?;

        // Nothing is in the way.
        let forced = answer(&pool.operator("force-from", &["1", GIVEN_UP])?.output()?)?;
        ensure!(forced["untold"] == Value::Array(Vec::new()), "{forced}");
        ensure!(
            states(&forced)[1] == "clean" && states(&forced)[0] != "out",
            "A has not heard of it: {forced}"
        );
        pool.operate("resync", &[])?;

        // A hears of it with the maps that it takes over from B, and has no way to B for some seconds.
        cut(&network, A, B)?;
        let mut rmrctl = pool.operator("force-from", &["1", GIVEN_UP])?;
        let mut child = rmrctl.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        thread::sleep(Duration::from_secs(5));
        let ended = child.try_wait()?;
        ensure!(ended.is_none(), "it did not wait for A: {ended:?}");
        heal(&network, A, B)?;
        let forced = answer(&child.wait_with_output()?)?;
        ensure!(forced["untold"] == Value::Array(Vec::new()), "{forced}");
        ensure!(states(&forced)[0] != "out", "A has not heard of it: {forced}");
        pool.operate("resync", &[])?;
        pool.assert_identical()?;

        // It does not wait for ever, and says whom it could not tell.
        cut(&network, A, B)?;
        let began = Instant::now();
        let output = pool.operator("force-from", &["0", GIVEN_UP])?.output()?;
        let forced = answer(&output)?;
        ensure!(began.elapsed() > Duration::from_secs(15), "after {:?}", began.elapsed());
        ensure!(forced["untold"] == serde_json::json!([1]), "{forced}");
        ensure!(states(&forced) == ["clean", "out"], "{forced}");
        let said = forced.to_string() + &String::from_utf8_lossy(&output.stderr);
        ensure!(said.contains("could not be told of this"), "{said}");
        heal(&network, A, B)?;
        pool.operate("resync", &[])?;
        pool.assert_identical()
    })
}

fn pool(lab: &Lab, network: &Network) -> Result<([Node; 2], Pool)> {
    let node = |name| {
        let settings = format!("leg_timeout_ms = {LEG_TIMEOUT_MS}");
        NodeBuilder::new(name).host(network.host(name)?).settings(&settings).start(lab)
    };
    let nodes = [node(A)?, node(B)?];
    let builder = PoolBuilder::new("disk").size_mib(MIB).operator(network.host(OPERATOR)?);
    let pool = builder.member(&nodes[0]).member(&nodes[1]).create(lab)?;
    Ok((nodes, pool))
}

fn guest(lab: &Lab, network: &Network, pool: &Pool, name: &str) -> Result<Daemon> {
    let host = network.host(HYPERVISOR)?;
    let daemon = DaemonBuilder::new(pool).name(name).host(host);
    let daemon = daemon.arguments(["--leg-timeout-ms", LEG_TIMEOUT_MS]).start(lab)?;
    pool.wait_for_level("safe", LIMIT)?;
    Ok(daemon)
}

fn cut(network: &Network, x: &str, y: &str) -> Result<()> {
    network.cut(x, y).and_then(|()| network.cut(y, x))
}

fn heal(network: &Network, x: &str, y: &str) -> Result<()> {
    network.heal(x, y).and_then(|()| network.heal(y, x))
}

/// What `rmrctl` said that did nothing.
fn refusal(pool: &Pool, arguments: &[&str]) -> Result<String> {
    let output = pool.operator("force-from", arguments)?.output()?;
    let said =
        String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.code() == Some(1), "{:?}: {said}", output.status);
    Ok(said)
}

fn answer(output: &Output) -> Result<Value> {
    let (text, said) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{}: {text}{said}", output.status);
    let last = serde_json::Deserializer::from_str(&text).into_iter::<Value>().last();
    last.context("no answer")?.with_context(|| format!("expected JSON, found '{text}'"))
}

fn states(forced: &Value) -> Vec<&str> {
    let members = forced["view"]["members"].as_array().map_or(&[][..], Vec::as_slice);
    members.iter().filter_map(|m| m["state"].as_str()).collect()
}
