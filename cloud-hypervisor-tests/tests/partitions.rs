//! Connections between nodes and daemon are cut one by one, both ways and in one direction only, under a writer that
//! remembers what it was promised; each machine is a network namespace of its own. Skipped, loudly, where those cannot be made.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cloud_hypervisor_tests::bench::verify::{Promises, Unwritten};
use cloud_hypervisor_tests::lab::{self, DaemonBuilder, Network, NodeBuilder, Pool, PoolBuilder};
use cloud_hypervisor_tests::scenario::{Writer, check_everything};

const MIB: u64 = 64;
const WRITER: Writer = Writer { depth: 16, rate: 1500, span: None };
/// How long a member may take to be missed, or to be Clean again.
const LIMIT: Duration = Duration::from_secs(40);
/// The daemon drops a leg that is silent for so long, a node gives a connection up.
const LEG_TIMEOUT_MS: &str = "800";
/// Well beyond that.
const LOST: Duration = Duration::from_millis(1600);
/// Well within.
const UNNOTICED: Duration = Duration::from_millis(250);

const HYPERVISOR: &str = "hv";
const A: &str = "a";
const B: &str = "b";
const OPERATOR: &str = "operator";

#[test]
fn every_connection_cut_in_every_direction_under_load_heals_and_no_promise_is_broken() -> Result<()> {
    let test = "partitions";
    let Some(network) = Network::new_or_say_not_run(test, &[HYPERVISOR, A, B, OPERATOR])? else {
        return Ok(());
    };
    lab::run(test, |lab| {
        let node = |name| {
            let settings = format!("leg_timeout_ms = {LEG_TIMEOUT_MS}");
            NodeBuilder::new(name).host(network.host(name)?).settings(&settings).start(lab)
        };
        let (a, b) = (node(A)?, node(B)?);
        let operator = network.host(OPERATOR)?;
        let pool =
            PoolBuilder::new("disk").size_mib(MIB).operator(operator).member(&a).member(&b).create(lab)?;
        let daemon = DaemonBuilder::new(&pool)
            .host(network.host(HYPERVISOR)?)
            .arguments(["--leg-timeout-ms", LEG_TIMEOUT_MS])
            .start(lab)?;
        let mut promises = Promises::new(MIB << 20, 4096, 11, Unwritten::Zeroes);
        let cuts = Cuts { network: &network, pool: &pool };
        let ((), report) = WRITER.during(&pool, &daemon, &mut promises, || cuts.all())?;
        ensure!(report.requests > 1000, "the writer was hardly served: {report:?}");
        check_everything(&pool, &daemon, &mut promises)?;
        daemon.stop()
    })
}

struct Cuts<'a> {
    network: &'a Network,
    pool: &'a Pool,
}

impl Cuts<'_> {
    fn all(&self) -> Result<()> {
        self.pool.wait_for_level("safe", LIMIT)?;
        let both = |x: &'static str, y: &'static str| [(x, y), (y, x)];
        self.named("too short to be noticed", || self.during(&both(HYPERVISOR, B), || rest(UNNOTICED)))?;
        for node in [B, A] {
            self.named(&format!("daemon and node {node}"), || {
                self.during(&both(HYPERVISOR, node), || self.becomes("degraded"))
            })?;
        }
        for (from, to) in both(HYPERVISOR, B) {
            self.named(&format!("what {from} sends to {to}"), || {
                self.during(&[(from, to)], || self.becomes("degraded"))
            })?;
        }
        self.named("between the nodes, which nobody needs now", || {
            self.during(&both(A, B), || {
                thread::sleep(LOST);
                ensure!(self.pool.level()? == "safe", "both members are served by the daemon");
                Ok(())
            })
        })?;
        for cut in [&both(A, B)[..], &[(A, B)]] {
            self.named(&format!("a resync that cannot begin: {cut:?}"), || {
                self.during(&both(HYPERVISOR, B), || {
                    self.becomes("degraded").and_then(|()| self.apply(cut))
                })?;
                // The daemon reaches both nodes, and B no source.
                thread::sleep(LOST);
                ensure!(self.pool.level()? != "safe", "member B was made Clean without its source");
                self.heal(cut)
            })?;
        }
        for after_ms in [900, 1300, 1700] {
            self.named(&format!("between the nodes, {after_ms} ms into the return of one"), || {
                self.during(&both(HYPERVISOR, B), || self.becomes("degraded"))?;
                thread::sleep(Duration::from_millis(after_ms));
                self.during(&both(A, B), || rest(LOST))
            })?;
        }
        // Nobody is asked meanwhile: the operator's questions to B would wait for answers.
        self.named("the cable of B", || self.unplugged(&[B], || rest(LOST)))?;
        self.named("the cables of both nodes", || self.unplugged(&[A, B], || rest(LOST)))?;
        self.named("the cable of the hypervisor", || self.unplugged(&[HYPERVISOR], || rest(LOST)))
    }

    /// One cut: afterwards the pool must become safe by itself.
    fn named(&self, what: &str, cut: impl FnOnce() -> Result<()>) -> Result<()> {
        let begin = Instant::now();
        cut().with_context(|| format!("cut: {what}"))?;
        self.pool.wait_for_level("safe", LIMIT).with_context(|| format!("after the cut: {what}"))?;
        eprintln!("  {what}: safe again after {:.1} s", begin.elapsed().as_secs_f64());
        Ok(())
    }

    fn becomes(&self, level: &str) -> Result<()> {
        self.pool.wait_for_level(level, LIMIT)
    }

    fn during(&self, cut: &[(&str, &str)], body: impl FnOnce() -> Result<()>) -> Result<()> {
        self.apply(cut)?;
        body().and(self.heal(cut))
    }

    fn apply(&self, cut: &[(&str, &str)]) -> Result<()> {
        cut.iter().try_for_each(|(from, to)| self.network.cut(from, to))
    }

    fn heal(&self, cut: &[(&str, &str)]) -> Result<()> {
        cut.iter().try_for_each(|(from, to)| self.network.heal(from, to))
    }

    fn unplugged(&self, hosts: &[&str], body: impl FnOnce() -> Result<()>) -> Result<()> {
        hosts.iter().try_for_each(|host| self.network.plug(host, false))?;
        body().and(hosts.iter().try_for_each(|host| self.network.plug(host, true)))
    }
}

fn rest(time: Duration) -> Result<()> {
    thread::sleep(time);
    Ok(())
}
