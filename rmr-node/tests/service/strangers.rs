//! Peers that break every rule, or are not let in: they harm nobody.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rmr_common::auth::{KeyRing, SecretKey};
use rmr_common::client::PoolSelector;
use rmr_common::driver::Pool;
use rmr_common::pool::{ClientId, Epoch, MAX_NUMBER, MemberSet, PoolId};
use rmr_common::transport::tls::{ClientTls, IdentityFiles};
use rmr_common::wire::{
    Attach, DirtyAddition, Hello, Kind, MessageHeader, NONCE_SIZE, PROOF_SIZE, Proof, Role, SetView, Status,
};

use crate::support::*;

#[test]
fn garbage_and_broken_promises_close_the_connection_and_harm_nobody() {
    let mut node = Node::start(2, &[]);
    let pool = node.attach(0).unwrap();
    let hello_for = |raw: &mut Raw, id| {
        let (header, _) = raw.hello(id);
        (header.kind, header.status)
    };
    let mut foreign = Raw::connect(&node, 0);
    assert_eq!(hello_for(&mut foreign, PoolId::random()), (Kind::HelloReply, Status::NoSuchPool));
    assert!(foreign.is_closed_within(PATIENCE));
    for bytes in [b"GET / HTTP/1.1\r\n\r\n".repeat(20), vec![0; 4096], vec![0xff; 4096]] {
        let mut raw = Raw::connect(&node, 0);
        raw.stream.write_all(&bytes).unwrap();
        assert!(raw.is_closed_within(PATIENCE));
    }
    // A message before the hello, and one for another pool after it.
    let mut raw = Raw::connect(&node, 0);
    let ping = raw.header(Kind::Ping, 0, 0);
    raw.send(&[(ping, &[])]);
    assert!(raw.is_closed_within(PATIENCE));
    let mut raw = Raw::greeted(&node, 1);
    let ping = MessageHeader { pool: node.pools[0].id, ..raw.header(Kind::Ping, 0, 0) };
    raw.send(&[(ping, &[])]);
    assert!(raw.is_closed_within(PATIENCE));
    // Requests of a connection that is not attached are refused, and it lives on.
    let mut raw = Raw::greeted(&node, 0);
    let write = raw.write_header(0, 0, 4096);
    raw.send(&[(write, &[1; 4096])]);
    assert_ne!(raw.receive().0.status, Status::Ok);
    let ping = raw.header(Kind::Ping, 0, 0);
    raw.send(&[(ping, &[])]);
    assert_eq!(raw.receive().0.kind, Kind::Pong);
    let data = pattern(1, 8192);
    pool.blocking().write_at(&data, 4096).unwrap();
    let mut back = vec![0; 8192];
    pool.blocking().read_at(&mut back, 4096).unwrap();
    assert!(back == data);
    node.assert_running();
}

#[test]
fn a_connection_between_nodes_can_ask_and_cannot_attach() {
    let node = Node::start(1, &[]);
    for kind in [Kind::Attach, Kind::Write, Kind::SetView, Kind::Flush, Kind::Detach] {
        let mut raw = Raw::connect(&node, 0);
        assert_eq!(raw.hello_as(raw.pool, Role::Peer, None).0.status, Status::Ok);
        let ping = raw.header(Kind::Ping, 0, 0);
        raw.send(&[(ping, &[])]);
        assert_eq!(raw.receive().0.kind, Kind::Pong);
        let header = raw.header(kind, 0, 0);
        raw.send(&[(header, &[])]);
        assert!(raw.is_closed_within(PATIENCE), "{kind:?}");
    }
    for kind in [Kind::PullMap, Kind::Pull, Kind::Command, Kind::ChunksDone] {
        let mut raw = Raw::greeted(&node, 0);
        let header = raw.header(kind, 0, 0);
        raw.send(&[(header, &[])]);
        assert!(raw.is_closed_within(PATIENCE), "{kind:?} of a client");
    }
}

#[test]
fn nobody_without_the_key_gets_further_than_the_challenge() {
    use std::os::unix::fs::PermissionsExt;
    let keys = tempfile::tempdir().unwrap();
    let file = keys.path().join("pool-0.key");
    std::fs::write(&file, [1; 32]).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let mut node = Node::start(2, &["--key-dir", keys.path().to_str().unwrap()]);
    let nonce = Some([7; NONCE_SIZE]);
    let hello = |pool: usize, nonce| {
        let mut raw = Raw::connect(&node, pool);
        let (header, body) = raw.hello_as(raw.pool, Role::Client, nonce);
        (raw, (header.kind, header.status), String::from_utf8_lossy(&body).into_owned())
    };
    let (mut raw, answer, words) = hello(0, None);
    assert_eq!(answer, (Kind::HelloReply, Status::KeyRequired));
    assert!(words.contains("requires a key") && words.contains("--key-file"), "{words}");
    assert!(raw.is_closed_within(PATIENCE));
    let (mut raw, answer, words) = hello(1, nonce);
    assert_eq!(answer, (Kind::HelloReply, Status::NoKey));
    assert!(words.contains("--key-dir"), "{words}");
    assert!(raw.is_closed_within(PATIENCE));
    // What is no key any more lets nobody in, as long as it lies there.
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(hello(0, nonce).1, (Kind::HelloReply, Status::NoKey));
    assert_eq!(hello(0, None).1, (Kind::HelloReply, Status::NoKey));
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    // After the challenge comes one proof, and nothing else.
    let body = Proof { proofs: vec![[0; PROOF_SIZE]] }.encode();
    let length = u32::try_from(body.len()).unwrap();
    for kind in [Kind::Ping, Kind::Attach, Kind::Read, Kind::Hello] {
        let (mut raw, answer, _) = hello(0, nonce);
        assert_eq!(answer, (Kind::Challenge, Status::Ok));
        let header = raw.header(kind, 0, 0);
        raw.send(&[(header, &[])]);
        assert!(raw.is_closed_within(PATIENCE), "{kind:?}");
    }
    let (mut raw, ..) = hello(0, nonce);
    let proof = raw.header(Kind::Proof, 0, length);
    raw.send(&[(proof, &body)]);
    assert_eq!(raw.receive().0.status, Status::KeyRefused);
    assert!(raw.is_closed_within(PATIENCE));
    let (mut raw, ..) = hello(0, nonce);
    let proof = raw.header(Kind::Proof, 0, length - 1);
    raw.send(&[(proof, &body[1..])]);
    assert_eq!(raw.receive().0.status, Status::KeyRefused);
    // Who has the key is let in, and the pool without one is open to all.
    let with = |key: u8, pool: usize| {
        let mut config = Node::config("a client");
        config.keys = KeyRing::new(vec![SecretKey::from_bytes([key; 32])]);
        Pool::connect(config, PoolSelector::Id(node.pools[pool].id), &[node.data_address()], PATIENCE)
    };
    assert!(with(2, 0).err().unwrap().to_string().contains("not this pool's"));
    let pool = with(1, 0).unwrap();
    pool.blocking().write_at(&[3; 4096], 0).unwrap();
    drop(pool);
    drop(node.attach(1).unwrap());
    node.stop();
}

#[test]
fn a_peer_that_sends_a_byte_now_and_then_is_dropped() {
    let node = Node::start(1, &["--leg-timeout-ms", "200"]);
    let mut raws = [Raw::connect(&node, 0), Raw::attached(&node, 0)];
    let header = raws[1].write_header(0, 0, MIB);
    let frames = [Raw::frame(&[MessageHeader::new(Kind::Hello, raws[0].pool)]), Raw::frame(&[header])];
    let end = Instant::now() + PATIENCE;
    let mut at = 0;
    let mut closed = [false; 2];
    while Instant::now() < end && closed != [true; 2] {
        for (i, raw) in raws.iter_mut().enumerate() {
            let byte = frames[i].get(at).copied().unwrap_or(0);
            // The second one has sent its head at once, and drips its payload.
            let bytes: &[u8] = if i == 1 && at == 0 { &frames[1] } else { &[byte] };
            closed[i] |=
                raw.stream.write_all(bytes).is_err() || raw.is_closed_within(Duration::from_millis(1));
        }
        at += 1;
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(closed, [true; 2], "within {PATIENCE:?} at a leg timeout of 200 ms");
}

#[test]
fn the_limits_of_connections_hold_and_let_go() {
    for flags in [["--max-connections", "30"], ["--max-connections-per-address", "30"]] {
        let mut node = Node::start(1, &[&flags[..], &["--idle-timeout-s", "60"]].concat());
        let own = if flags[0] == "--max-connections" { 23 } else { 30 };
        limits_hold(&mut node, own);
    }
}

/// One address may have so many connections.
fn limits_hold(node: &mut Node, own: usize) {
    let pool = node.attach(0).expect("it attaches");
    let mut raws: Vec<Raw> = (1..own).map(|_| Raw::greeted(node, 0)).collect();
    let mut late: Vec<Raw> = (0..20).map(|_| Raw::connect(node, 0)).collect();
    for raw in &mut late {
        assert!(raw.is_closed_within(PATIENCE), "all that come after {own}");
    }
    assert!(node.log().contains("connection refused"), "{}", node.log());
    assert!(raws.iter_mut().all(|raw| !raw.is_closed_within(Duration::from_millis(1))));
    pool.blocking().write_at(&[1; 4096], 0).expect("a write");
    node.comes_to_rest(5, Duration::from_millis(500), "with all the connections that it may have");
    drop(raws);
    wait_for("room again", || {
        let mut raw = Raw::connect(node, 0);
        !raw.is_closed_within(Duration::from_millis(50))
    });
    node.assert_running();
}

#[test]
fn connections_that_say_nothing_displace_one_another_and_nobody_else() {
    let node = Node::start(2, &["--max-connections", "64", "--idle-timeout-s", "60"]);
    let held = node.attach(0).unwrap();
    let mut silent: Vec<Raw> = (0..200).map(|_| Raw::connect(&node, 0)).collect();
    let start = Instant::now();
    drop(node.attach(1).expect("a client finds a place among them"));
    assert!(start.elapsed() < QUICK, "{:?}", start.elapsed());
    wait_for("the oldest are closed", || {
        let open = silent
            .iter_mut()
            .filter_map(|raw| (!raw.is_closed_within(Duration::from_millis(1))).then_some(()));
        open.count() <= 16
    });
    assert!(
        !silent.last_mut().unwrap().is_closed_within(Duration::from_millis(1)),
        "the newest is not closed"
    );
    held.blocking().write_at(&[1; 4096], 0).unwrap();
    let lines = node.log().lines().filter(|l| l.contains("has not said which pool")).count();
    assert!((1..20).contains(&lines), "{lines} lines in the log");
}

#[test]
fn what_strangers_say_of_themselves_forges_no_line_of_the_log() {
    let node = Node::start(1, &[]);
    let forged = "x\nFORGED INFO client attached\u{1b}[31m\u{202e}";
    let mut raw = Raw::connect(&node, 0);
    let hello = Hello {
        versions: (1, 1),
        capabilities: 0,
        role: Role::Client,
        client: ClientId::random(),
        pool_name: forged.into(),
        description: forged.into(),
        nonce: None,
    };
    let send = |raw: &mut Raw, kind, body: &[u8]| {
        let header = raw.header(kind, 0, u32::try_from(body.len()).unwrap());
        raw.send(&[(header, body)]);
        raw.receive().0.status
    };
    assert_eq!(send(&mut raw, Kind::Hello, &hello.encode()), Status::NoSuchPool);
    let mut raw = Raw::greeted(&node, 0);
    raw.epoch = Epoch(raw.epoch.0 + 1);
    let attach = Attach {
        held_ms: 0,
        client: ClientId::random(),
        takeover: true,
        rejoin: false,
        yields: false,
        description: forged.into(),
    };
    assert_eq!(send(&mut raw, Kind::Attach, &attach.encode()), Status::Ok);
    wait_for("the attach is in the log", || node.log().contains("client attached pool"));
    let log = node.log();
    assert_eq!(log.matches("\\nFORGED").count(), 2, "{log}");
    assert!(
        !log.lines().any(|line| line.starts_with("FORGED")) && !log.contains(['\u{1b}', '\u{202e}']),
        "{log}"
    );
}

#[test]
fn a_key_that_is_a_pipe_stops_nobody() {
    let keys = tempfile::tempdir().unwrap();
    let node = Node::start(2, &["--key-dir", keys.path().to_str().unwrap()]);
    let pool = node.attach(0).unwrap();
    let pipe = keys.path().join("pool-1.key");
    let made = std::process::Command::new("mkfifo").args(["-m", "600"]).arg(&pipe).status();
    assert!(made.unwrap().success());
    let mut raw = Raw::connect(&node, 1);
    assert_eq!(raw.hello(raw.pool).0.status, Status::NoKey);
    pool.blocking().write_at(&[1; 4096], 0).unwrap();
}

#[test]
fn an_epoch_that_leaves_none_for_others_is_refused() {
    let node = Node::start(1, &[]);
    let mut raw = Raw::greeted(&node, 0);
    raw.epoch = Epoch(MAX_NUMBER);
    let attach = Attach {
        held_ms: 0,
        client: ClientId::random(),
        takeover: true,
        rejoin: true,
        yields: false,
        description: "raw".into(),
    }
    .encode();
    let header = raw.header(Kind::Attach, 0, u32::try_from(attach.len()).unwrap());
    raw.send(&[(header, &attach)]);
    let (answer, words) = raw.receive();
    assert_eq!(answer.status, Status::BadRequest);
    assert!(String::from_utf8_lossy(&words).contains("reset-epoch"));
    node.attach(0).unwrap().blocking().write_at(&[1; 4096], 0).unwrap();
}

#[test]
fn a_flood_of_one_pools_client_costs_little_memory_and_leaves_other_pools_their_turn() {
    /// Ends the other thread whatever becomes of this one.
    struct Ends<'a>(&'a AtomicBool);
    impl Drop for Ends<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    // It sends no pings while it waits for the disk.
    let mut node = Node::start(2, &["--leg-timeout-ms", "60000"]);
    let pool = node.attach(0).unwrap();
    pool.blocking().write_at(&[1; 4096], 0).unwrap();
    let mut raw = Raw::attached(&node, 1);
    let reply = Raw::greeted(&node, 1).view();
    let spec = node.pools[1].clone();
    let mut view = reply;
    (view.number, view.epoch) = (view.number.next(), raw.epoch);
    let whole = DirtyAddition { members: MemberSet(0xff), offset: 4096, length: POOL_SIZE - 8192 };
    let set = |additions, more| {
        SetView { view: view.clone(), spec: spec.clone(), additions, more, attested: Default::default() }
            .encode()
    };
    let body = set(vec![whole; SetView::MAX_ADDITIONS], true);
    let before = node.resident_kib();
    let stop = AtomicBool::new(false);
    let slowest = std::thread::scope(|scope| {
        let slowest = scope.spawn(|| {
            let mut slowest = Duration::ZERO;
            while !stop.load(Ordering::Relaxed) {
                let start = Instant::now();
                pool.blocking().write_at(&[2; 4096], 8192).unwrap();
                slowest = slowest.max(start.elapsed());
            }
            slowest
        });
        let ends = Ends(&stop);
        let header = MessageHeader { view: view.number, ..raw.header(Kind::SetView, 0, length(&body)) };
        for _ in 0..150 {
            raw.send(&[(header, &body)]);
        }
        // Whole trains of other things that make work: ranges, and questions that nobody waits for.
        let discard = MessageHeader { length: 32 << 20, ..raw.header(Kind::Discard, 1, 0) };
        let digest = MessageHeader { length: 4096, ..raw.header(Kind::Digest, 1, 0) };
        for _ in 0..3 {
            raw.send(&[(discard, &[][..]); 60]);
            raw.send(&[(digest, &[][..]); 60]);
        }
        let last = set(vec![whole], false);
        let header = MessageHeader { payload: length(&last), ..header };
        raw.send(&[(header, &last)]);
        while raw.receive().0.kind != Kind::SetViewReply {}
        drop(ends);
        slowest.join().unwrap()
    });
    assert!(slowest < QUICK, "a write to another pool took {slowest:?}");
    let grown = node.resident_kib().saturating_sub(before);
    assert!(grown < 64 << 10, "{grown} KiB more after 80 MB of additions");
    node.assert_running();
}

fn length(body: &[u8]) -> u32 {
    u32::try_from(body.len()).expect("short")
}

#[test]
fn a_node_without_descriptors_waits_calmly_and_recovers() {
    let mut node = Node::start_with("ulimit -n 40;", 1, &[]);
    let pool = node.attach(0).unwrap();
    let raws: Vec<Raw> = (0..60).map(|_| Raw::connect(&node, 0)).collect();
    std::thread::sleep(Duration::from_millis(200));
    node.comes_to_rest(5, Duration::from_secs(1), "without descriptors");
    assert!(node.log().lines().count() < 100, "the log is flooded");
    pool.blocking().write_at(&[1; 4096], 0).unwrap();
    drop(raws);
    drop(pool);
    node.attach(0).expect("it accepts again");
    node.assert_running();
}

#[test]
fn idle_connections_cost_nothing() {
    let node = Node::start(2, &[]);
    let pool = node.attach(0).unwrap();
    pool.blocking().write_at(&[1; 4096], 0).unwrap();
    let _greeted = Raw::greeted(&node, 1);
    node.comes_to_rest(0, Duration::from_secs(2), "idle");
}

/// A frame of well-formed messages that make little sense, and how many bytes of payload follow it.
fn nonsense(raw: &Raw, rng: &mut impl rand::Rng) -> Vec<u8> {
    const KINDS: [Kind; 10] = [
        Kind::Write,
        Kind::Write,
        Kind::Read,
        Kind::Read,
        Kind::Flush,
        Kind::Discard,
        Kind::WriteZeroes,
        Kind::Ping,
        Kind::SetView,
        Kind::Attach,
    ];
    let mut headers = Vec::new();
    for _ in 0..rng.random_range(1..=12) {
        let kind = KINDS[rng.random_range(0..KINDS.len())];
        let length = [0, 1, 512, 4096, 65536, MIB][rng.random_range(0..6)];
        let payload = match kind {
            Kind::Write => length,
            Kind::SetView | Kind::Attach => length.min(4096),
            _ => 0,
        };
        headers.push(MessageHeader {
            length,
            offset: rng.random_range(0..=POOL_SIZE / 512) * 512,
            epoch: Epoch(raw.epoch.0 + u64::from(rng.random_ratio(1, 20))),
            ..raw.header(kind, rng.random_range(0..1024), payload)
        });
    }
    let payload: u32 = headers.iter().map(|h| h.payload).sum();
    let mut bytes = Raw::frame(&headers);
    bytes.resize(bytes.len() + payload as usize, 0xbd);
    bytes
}

#[test]
fn nonsense_of_one_pools_clients_never_reaches_another_pool() {
    use rand::{Rng, SeedableRng};
    let mut node = Node::start(3, &["--buffer-memory", "8M"]);
    let pool = node.attach(0).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for (attacker, pool) in [(1, 1), (2, 2), (3, 2)] {
            let (node, stop) = (&node, &stop);
            scope.spawn(move || {
                let mut rng = rand::rngs::StdRng::seed_from_u64(attacker);
                while !stop.load(Ordering::Relaxed) {
                    let mut raw = Raw::greeted(node, pool);
                    if rng.random_ratio(4, 5) {
                        // It is whoever attached last that may write; nobody looks at the answer.
                        raw.epoch = Epoch(raw.epoch.0 + 1);
                        let client = ClientId::random();
                        let body = Attach {
                            client,
                            takeover: true,
                            rejoin: false,
                            yields: false,
                            description: "raw".into(),
                            held_ms: 0,
                        }
                        .encode();
                        let header = raw.header(Kind::Attach, 0, u32::try_from(body.len()).unwrap());
                        raw.send(&[(header, &body)]);
                        if raw.try_receive().is_err() {
                            continue;
                        }
                    }
                    raw.stream.set_write_timeout(Some(Duration::from_millis(20))).unwrap();
                    raw.stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
                    for _ in 0..rng.random_range(1..20) {
                        let bytes = nonsense(&raw, &mut rng);
                        let cut = if rng.random_ratio(1, 8) {
                            rng.random_range(0..bytes.len())
                        } else {
                            bytes.len()
                        };
                        if raw.stream.write_all(&bytes[..cut]).is_err() || cut < bytes.len() {
                            break;
                        }
                        if rng.random() {
                            // Takes some of the answers, or none.
                            let _ = raw.stream.read(&mut vec![0; 1 << 20]);
                        }
                    }
                }
            });
        }
        let start = Instant::now();
        for round in 0.. {
            if start.elapsed() > Duration::from_secs(4) {
                break;
            }
            let (at, data) = ((round % 8) << 21, pattern(round, 3 * MIB / 2));
            pool.blocking().write_at(&data, at).unwrap();
            let mut back = vec![0; data.len()];
            pool.blocking().read_at(&mut back, at).unwrap();
            assert!(back == data, "round {round}");
        }
        stop.store(true, Ordering::Relaxed);
    });
    node.assert_running();
    assert!(!node.log().contains("panicked"), "{}", node.log());
    node.comes_to_rest(5, Duration::from_secs(1), "when nobody asks for anything");
}

#[test]
fn a_pool_is_served_over_tls_to_those_who_trust_the_node_and_whom_it_trusts() {
    let dir = tempfile::tempdir().expect("a directory");
    let put = |name: &str, text: String| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).expect("a file");
        path
    };
    let key = rcgen::KeyPair::generate().expect("a key");
    // Its own authority: enough to be trusted by whoever was given the certificate.
    let address = own_address();
    let parameters = rcgen::CertificateParams::new(vec![address.ip().to_string()]).expect("a certificate");
    let certificate = parameters.self_signed(&key).expect("a certificate");
    let (certificate, key) = (put("own.pem", certificate.pem()), put("own.key", key.serialize_pem()));
    let address = format!("tls://{address}");
    let text = |path: &PathBuf| path.display().to_string();
    let (certificate_text, key_text) = (text(&certificate), text(&key));
    let flags = ["--listen", &address, "--tls-certificate", &certificate_text, "--tls-key", &key_text];
    let verify = ["--tls-authorities", &certificate_text, "--tls-verify-clients", "true"];
    let node = Node::start(1, &[&flags[..], &verify[..]].concat());
    let identity = IdentityFiles { certificate: certificate.clone(), key };
    let connect = |identity: Option<&IdentityFiles>, patience| {
        let mut config = Node::config("over tls");
        config.tls = Some(ClientTls::load(&certificate, identity).expect("certificates"));
        let seeds = [address.parse().expect("an address")];
        Pool::connect(config, PoolSelector::Id(node.pools[0].id), &seeds, patience)
    };
    let error = connect(None, Duration::from_secs(3)).map(drop).expect_err("a stranger comes in").to_string();
    assert!(error.contains("within 3 s"), "{error}");
    let pool = connect(Some(&identity), PATIENCE).expect("the pool");
    let data: Vec<u8> = (0..3 * MIB).map(|i| u8::try_from(i % 251).expect("small")).collect();
    pool.blocking().write_at(&data, 4096).expect("a write");
    pool.blocking().flush().expect("a flush");
    let mut back = vec![0; data.len()];
    pool.blocking().read_at(&mut back, 4096).expect("a read");
    assert!(back == data, "what is read is what was written");
}

#[test]
fn a_message_for_another_pool_than_the_one_that_was_greeted_closes_the_connection_and_changes_nothing() {
    let node = Node::start(2, &[]);
    let mut raw = Raw::attached(&node, 0);
    let header = MessageHeader { pool: node.pools[1].id, ..raw.write_header(0, 0, 4096) };
    raw.send(&[(header, &[7; 4096])]);
    assert!(raw.is_closed_within(PATIENCE));
    for pool in 0..2 {
        let mut back = vec![1; 4096];
        node.attach(pool).unwrap().blocking().read_at(&mut back, 0).unwrap();
        assert!(back.iter().all(|b| *b == 0), "pool {pool}");
    }
}
