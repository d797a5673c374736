//! Connections between nodes and daemon are cut one by one, both ways and in one direction only, under a writer that
//! remembers what it was promised; each machine is a network namespace of its own. Skipped, loudly, where those cannot be made.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cloud_hypervisor_tests::bench::verify::{Promises, Unwritten};
use cloud_hypervisor_tests::lab::{self, DaemonBuilder, Network, NodeBuilder, Pool, PoolBuilder, wait_until};
use cloud_hypervisor_tests::scenario::{Writer, check_everything};
use serde_json::Value;

const MIB: u64 = 64;
const WRITER: Writer = Writer { depth: 16, rate: 1500, span: None };
/// How long a member may take to be missed, or to be Clean again.
const LIMIT: Duration = Duration::from_secs(40);
/// The daemon drops a leg that is silent for so long, a node gives a connection up.
const LEG_TIMEOUT_MS: &str = "800";
/// So slow that what is missed in a cut takes some seconds, and a resync can be met under way.
const RESYNC_BYTES_PER_S: u64 = 3 << 20;
/// Well beyond the timeout.
const LOST: Duration = Duration::from_millis(2400);
/// Well within.
const UNNOTICED: Duration = Duration::from_millis(250);
/// How often a cut of that length is tried: on a crowded machine what makes it may take longer than the timeout.
const TRIES: u32 = 10;

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
            let settings =
                format!("leg_timeout_ms = {LEG_TIMEOUT_MS}\n[resync]\nbytes_per_s = {RESYNC_BYTES_PER_S}");
            NodeBuilder::new(name).host(network.host(name)?).settings(&settings).start(lab)
        };
        let (a, b) = (node(A)?, node(B)?);
        let operator = network.host(OPERATOR)?;
        let pool =
            PoolBuilder::new("disk").size_mib(MIB).operator(operator).member(&a).member(&b).create(lab)?;
        let daemon = DaemonBuilder::new(&pool)
            .host(network.host(HYPERVISOR)?)
            .arguments(["--leg-timeout-ms", LEG_TIMEOUT_MS])
            // The test cuts the same member off again and again.
            .arguments(["--rejoin-backoff-max-s", "1"])
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
        let mut unnoticed = false;
        for _ in 0..TRIES {
            let view = self.view()?;
            self.named("too short to be noticed", || self.during(&both(HYPERVISOR, B), || rest(UNNOTICED)))?;
            unnoticed = self.view()? == view;
            if unnoticed {
                break;
            }
        }
        ensure!(unnoticed, "{TRIES} times a cut of {UNNOTICED:?} was noticed");
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
        for under_way in ["begun", "half done"] {
            self.named(&format!("between the nodes, with the resync of one {under_way}"), || {
                self.during(&both(HYPERVISOR, B), || {
                    self.becomes("degraded")?;
                    rest(LOST)
                })?;
                let left = self.resyncs()?;
                if under_way == "half done" {
                    wait_until("half of the resync", LIMIT, || Ok(self.missed_by_b()? < left / 2))?;
                }
                ensure!(self.pool.level()? != "safe", "the resync had ended before the cut");
                self.during(&both(A, B), || {
                    rest(LOST)?;
                    ensure!(self.pool.level()? != "safe", "member B was made Clean without its source");
                    Ok(())
                })
            })?;
        }
        // Nobody is asked meanwhile: the operator's questions to B would wait for answers.
        let view = self.view()?;
        self.named("the cable of B", || self.unplugged(&[B], || rest(LOST)))?;
        ensure!(self.view()? != view, "the daemon did not notice that B was gone");
        self.named("the cables of both nodes", || self.unplugged(&[A, B], || rest(LOST)))?;
        self.named("the cable of the hypervisor", || {
            self.unplugged(&[HYPERVISOR], || {
                wait_until("the nodes to miss their client", LIMIT, || Ok(self.client()? != "attached"))
            })
        })
    }

    /// Epoch and number of the view that the nodes tell.
    fn view(&self) -> Result<String> {
        let status = self.pool.status()?;
        Ok(format!("view {} of epoch {}", status["view"], status["epoch"]))
    }

    /// What the nodes say of their client.
    fn client(&self) -> Result<String> {
        let status = self.pool.status()?;
        let state = status.pointer("/assessment/client/state").and_then(Value::as_str);
        Ok(state.unwrap_or("none").to_owned())
    }

    /// Bytes that member B misses, as the operator is told.
    fn missed_by_b(&self) -> Result<u64> {
        let status = self.pool.status()?;
        let missed = status.pointer("/assessment/members/1/missed_bytes").and_then(Value::as_u64);
        missed.with_context(|| format!("expected what member 1 misses, found {status}"))
    }

    /// Waits until member B is Syncing; what it misses then.
    fn resyncs(&self) -> Result<u64> {
        wait_until("member B to be Syncing", LIMIT, || {
            Ok(self.pool.status()?.pointer("/assessment/members/1/state") == Some(&"syncing".into()))
        })?;
        self.missed_by_b()
    }

    /// One cut: afterwards the daemon must be attached again and the pool safe, by themselves.
    fn named(&self, what: &str, cut: impl FnOnce() -> Result<()>) -> Result<()> {
        let begin = Instant::now();
        cut().with_context(|| format!("cut: {what}"))?;
        wait_until("the daemon to be attached and the pool to be safe", LIMIT, || {
            Ok(self.client()? == "attached" && self.pool.level()? == "safe")
        })
        .with_context(|| format!("after the cut: {what}"))?;
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
