//! Restarts of the daemon under a front end that connects again at the moment of the hang-up, as cloud-hypervisor does. A connection
//! that is refused is tried again; one that is made and then breaks is the end of its disk.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use cloud_hypervisor_tests::lab::{
    self, Checks, Daemon, DaemonBuilder, FrontendBuilder, Lab, NodeBuilder, Pool, PoolBuilder, SocketUnit,
    Status,
};

/// How often each end of a daemon is tried. One that closes its connection before its listening socket loses one front end in ten at the
/// least.
const ENDS: usize = 25;
/// How often the daemon is killed while its socket is held for it.
const KILLS: usize = 10;
const PATIENCE: Duration = Duration::from_secs(60);

/// A message without payload (code, version 1, no length), and GET_FEATURES' answer of 20 bytes.
const SET_OWNER: [u32; 3] = [3, 1, 0];
const GET_FEATURES: [u32; 3] = [1, 1, 0];
const ANSWER: usize = 20;

/// Asks for the features, as every front end does first.
fn negotiate(mut stream: &UnixStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    for message in [SET_OWNER, GET_FEATURES] {
        stream.write_all(&message.map(u32::to_ne_bytes).concat())?;
    }
    stream.read_exact(&mut [0; ANSWER])
}

fn wait_for_hang_up(mut stream: &UnixStream) -> Result<()> {
    match stream.read(&mut [0; ANSWER]) {
        Ok(0) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
        other => bail!("expected the end of the connection, found {other:?}"),
    }
}

fn start_pool(lab: &Lab) -> Result<(lab::Node, Pool)> {
    let node = NodeBuilder::new("a").start(lab)?;
    let pool = PoolBuilder::new("disk").size_mib(32).member(&node).create(lab)?;
    Ok((node, pool))
}

/// Descriptor numbers of a daemon: of its listening socket, and the highest of the others.
fn listener_and_highest(daemon: &Daemon) -> Result<(u64, u64)> {
    let unix = fs::read_to_string("/proc/net/unix")?;
    // The fourth field is flags, where 10000 is a listener; the seventh is the inode.
    let listeners: Vec<String> = unix
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|fields| fields.len() >= 7 && fields[3] == "00010000")
        .map(|fields| format!("socket:[{}]", fields[6]))
        .collect();
    let (mut listening, mut highest) = (Vec::new(), 0);
    for entry in fs::read_dir(format!("/proc/{}/fd", daemon.process().pid()))? {
        let entry = entry?;
        let number: u64 = entry.file_name().to_string_lossy().parse()?;
        let target = fs::read_link(entry.path()).unwrap_or_default();
        if listeners.iter().any(|listener| target.as_os_str() == listener.as_str()) {
            listening.push(number);
        } else {
            highest = highest.max(number);
        }
    }
    ensure!(listening.len() == 1, "expected one listening socket, found descriptors {listening:?}");
    Ok((listening[0], highest))
}

#[test]
fn a_front_end_that_connects_again_at_the_hang_up_is_refused_however_the_daemon_ends() -> Result<()> {
    lab::run("hang-ups", |lab| {
        let (_node, pool) = start_pool(lab)?;
        for (signal, name) in [(libc::SIGKILL, "SIGKILL"), (libc::SIGTERM, "SIGTERM")] {
            let mut lost = 0;
            for round in 0..ENDS {
                // By a name of its own: what a killed one leaves must not be taken for the socket of the next.
                let daemon = DaemonBuilder::new(&pool).name(&format!("{name}-{round}")).start(lab)?;
                let path = daemon.socket();
                let first = UnixStream::connect(path)?;
                negotiate(&first)?;
                // Connects within microseconds, on a thread that waits for nothing else.
                let again = thread::scope(|scope| {
                    let again = scope.spawn(|| wait_for_hang_up(&first).map(|()| UnixStream::connect(path)));
                    daemon.process().signal(signal)?;
                    again.join().map_err(|_| anyhow::anyhow!("the front end panicked"))?
                })?;
                if let Ok(again) = again {
                    // The connection was made, so a daemon must serve it.
                    lost += usize::from(negotiate(&again).is_err());
                }
                daemon.process().wait_exit(PATIENCE)?;
            }
            ensure!(lost == 0, "{lost} of {ENDS} front ends connected to a daemon that died of {name}");
        }
        Ok(())
    })
}

#[test]
fn the_listening_socket_of_a_daemon_in_use_is_its_highest_descriptor() -> Result<()> {
    lab::run("descriptors", |lab| {
        let (_node, pool) = start_pool(lab)?;
        let daemon = DaemonBuilder::new(&pool).queues(4).start(lab)?;
        let (listener, highest) = {
            let mut disk = FrontendBuilder::new(daemon.socket()).queues(4).connect()?;
            ensure!(disk.flush(0)? == Status::Ok);
            listener_and_highest(&daemon)?
        };
        ensure!(listener > highest, "the listener is descriptor {listener}, another one is {highest}");
        daemon.stop()
    })
}

#[test]
fn a_daemon_whose_socket_is_held_for_it_loses_no_front_end_however_often_it_is_killed() -> Result<()> {
    lab::run("socket unit", |lab| {
        let (_node, pool) = start_pool(lab)?;
        let unit = SocketUnit::listen(lab, "disk")?;
        let builder = DaemonBuilder::new(&pool).socket_unit(&unit);
        let mut daemon = builder.start(lab)?;
        let mut checks = Checks::new();
        checks.check("no connection is refused or broken in ten kills, and data is where it was", || {
            for round in 0..KILLS {
                let data = [u8::try_from(round)? + 1; 4096];
                let mut disk = FrontendBuilder::new(unit.path()).connect()?;
                if round > 0 {
                    let (status, before) = disk.read(0, 0, 4096)?;
                    ensure!(
                        status == Status::Ok && before == [data[0] - 1; 4096],
                        "round {round}: {status:?}"
                    );
                }
                ensure!(disk.write(0, 0, &data)? == Status::Ok && disk.flush(0)? == Status::Ok);
                drop(disk);
                let first = connect(unit.path())?;
                negotiate(&first).with_context(|| format!("round {round}"))?;
                thread::scope(|scope| {
                    let again = scope.spawn(|| -> Result<()> {
                        wait_for_hang_up(&first)?;
                        let again = connect(unit.path())?;
                        negotiate(&again).with_context(|| format!("after kill {round}"))
                    });
                    daemon.kill()?;
                    daemon = builder.start(lab)?;
                    again.join().map_err(|_| anyhow::anyhow!("the front end panicked"))?
                })?;
            }
            Ok(())
        });
        checks.check("a daemon that is told to stop leaves the socket to the next one", || {
            daemon.stop()?;
            let waits = connect(unit.path())?;
            daemon = builder.start(lab)?;
            negotiate(&waits).context("the connection that was made while no daemon ran")
        });
        checks.finish()
    })
}

fn connect(path: &Path) -> Result<UnixStream> {
    UnixStream::connect(path).with_context(|| format!("connecting to {}", path.display()))
}
