//! The whole system over real verbs: one guest with Soft-RoCE, everything inside it. First that the guest's verbs work at
//! all, with tools of others; what fails after that is ours. Then the scenarios, some on TCP, which must hold in the guest
//! before verbs can be blamed for anything, and on verbs those whose turn is each time, or all. `make test-verbs ALL=1 TIMES=20`
//! and the like, and the variables below, say which and how often.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use cloud_hypervisor_tests::lab::{self, Checks, Fabric, Roce, RoceBuilder, Transport, roce};
use cloud_hypervisor_tests::scenario::{self, Outcome, Report, Scenario, Turn};

/// Names of scenarios, separated by blanks: only these are run.
const ONLY: &str = "RMR_SCENARIOS";
/// Set to anything but nothing: all scenarios are run, not only those whose turn is each time.
const ALL: &str = "RMR_ALL";
/// How often those on verbs are run.
const TIMES: &str = "RMR_TIMES";
/// Those that are also run on TCP.
const ON_TCP: [&str; 3] = ["io", "resync", "cuts"];
/// Longest time of one scenario: seconds, or a minute for the longest, on an idle machine.
const SCENARIO_LIMIT: Duration = Duration::from_secs(400);

#[test]
fn the_whole_system_runs_over_the_verbs_of_soft_roce() -> Result<()> {
    lab::run("verbs", |lab| {
        let roce = RoceBuilder::new("roce")
            .own_program("rmr-node")?
            .own_program("rmrctl")?
            .own_program("vhost-brmr")?
            .program(env!("CARGO_BIN_EXE_vm-scenario"))
            .boot(lab)?;
        let mut checks = Checks::new();
        check_the_guest(&roce, &mut checks);
        let wanted = wanted();
        let on_tcp: Vec<_> = wanted.iter().copied().filter(|name| ON_TCP.contains(name)).collect();
        check_scenarios(&roce, roce.fabric(Transport::Tcp), &on_tcp, &mut checks);
        for _ in 0..times()? {
            check_scenarios(&roce, roce.fabric(Transport::Rdma), &wanted, &mut checks);
        }
        roce.shutdown()?;
        checks.finish()
    })
}

/// The scenarios that are to be run.
fn wanted() -> Vec<&'static str> {
    let only = std::env::var(ONLY).ok();
    let all = std::env::var(ALL).is_ok_and(|text| !text.is_empty());
    let is_wanted = |scenario: &&Scenario| match &only {
        Some(only) => only.split_whitespace().any(|name| name == scenario.name),
        None => all || scenario.turn == Turn::Always,
    };
    scenario::ALL.iter().filter(is_wanted).map(|scenario| scenario.name).collect()
}

/// How often the scenarios are run over verbs, one time after the other.
fn times() -> Result<u32> {
    let Ok(text) = std::env::var(TIMES) else { return Ok(1) };
    text.parse().with_context(|| format!("{TIMES}: expected a number, found '{text}'"))
}

fn check_the_guest(roce: &Roce, checks: &mut Checks) {
    let vm = roce.vm();
    checks.check("the guest has an RDMA device whose port is active", || {
        let link = roce.link()?;
        ensure!(link.contains("state ACTIVE") && link.contains("netdev roce0"), "{link}");
        let devices = vm.run("ibv_devices")?;
        ensure!(devices.contains(roce::DEVICE), "{devices}");
        Ok(())
    });
    checks.check("ibv_rc_pingpong sends over a reliable connection", || {
        let device = format!("-d {} -g 1", roce::DEVICE);
        let said = vm.run(&against_a_server(
            &format!("ibv_rc_pingpong {device} -n 100"),
            &format!("ibv_rc_pingpong {device} -n 100 {}", roce::HOST),
        ))?;
        ensure!(said.contains("100 iters"), "{said}");
        Ok(())
    });
    checks.check("rping connects by address, reads and writes remote memory, and verifies", || {
        let host = roce::HOST;
        let said = vm.run(&against_a_server(
            &format!("rping -s -a {host} -C 10"),
            &format!("rping -c -a {host} -C 10 -V -v"),
        ))?;
        ensure!(said.contains("rdma-ping-9"), "expected ten pings, found: {said}");
        Ok(())
    });
    checks.check("the doctor says that verbs work here, and at no other address", || {
        let doctor = |host: &str| {
            let listen = format!("--node-name guest --listen rdma://{host}:7700 --store-dir /tmp");
            vm.try_run(&format!("rmr-node doctor --json {listen}"))
        };
        let said = doctor(&roce::HOST.to_string())?;
        let report: serde_json::Value =
            serde_json::from_str(&said.stdout).with_context(|| format!("expected JSON, found {said:?}"))?;
        let verdicts = report["verdicts"].as_array().cloned().unwrap_or_default();
        let verbs = verdicts.iter().find(|verdict| verdict["subject"] == "rdma://");
        ensure!(verbs.is_some_and(|verdict| verdict["level"] == "works"), "{said:?}");
        let elsewhere = doctor("10.77.0.9")?;
        ensure!(
            elsewhere.exit == 4 && elsewhere.stdout.contains("No active port has the address"),
            "{elsewhere:?}"
        );
        Ok(())
    });
    checks.check("the project's programs find their libraries in the guest", || {
        vm.run("rmr-node --version && rmrctl --version && vhost-brmr --version").map(|_| ())
    });
}

fn check_scenarios(roce: &Roce, fabric: Fabric, names: &[&str], checks: &mut Checks) {
    for name in names {
        let sentence = scenario::find(name).map_or("", |scenario| scenario.sentence);
        let sentence = format!("{name} on {fabric}: {sentence}");
        let result = scenario::run_in_guest(roce, fabric, name, SCENARIO_LIMIT);
        if let Ok(Report { outcome: Outcome::NotRun(why), .. }) = &result {
            checks.not_run(&sentence, why);
            continue;
        }
        checks.check(&sentence, || match result?.outcome {
            Outcome::Failed(why) => bail!("{why}"),
            _ => Ok(()),
        });
    }
}

/// A script that runs `client` beside `server`, leaving the server more time to listen when it was too slow.
fn against_a_server(server: &str, client: &str) -> String {
    format!(
        "for seconds in 1 3 9; do
             {server} >server 2>&1 &
             sleep $seconds
             {client} 2>client && exit 0
             kill $! 2>/dev/null
         done
         cat server client >&2
         exit 1"
    )
}
