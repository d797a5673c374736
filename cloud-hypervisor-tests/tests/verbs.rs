//! The whole system over real verbs: one guest with Soft-RoCE, everything inside it. First that the guest's verbs work at
//! all, with tools of others; what fails after that is ours.

use anyhow::{Result, ensure};
use cloud_hypervisor_tests::lab::{self, Checks, Roce, RoceBuilder, roce};

#[test]
fn the_whole_system_runs_over_the_verbs_of_soft_roce() -> Result<()> {
    lab::run("verbs", |lab| {
        let roce = RoceBuilder::new("roce")
            .own_program("rmr-node")?
            .own_program("rmrctl")?
            .own_program("vhost-brmr")?
            .boot(lab)?;
        let mut checks = Checks::new();
        check_the_guest(&roce, &mut checks);
        roce.shutdown()?;
        checks.finish()
    })
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
    checks.check("the project's programs find their libraries in the guest", || {
        vm.run("rmr-node --version && rmrctl --version && vhost-brmr --version").map(|_| ())
    });
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
