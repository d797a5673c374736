use super::testing::{Fixture, soft_roce};
use super::verdict::{Level, Plan, Verdict};
use super::*;
use crate::disk::Medium;

fn plan(listen: &[&str]) -> Plan {
    let listen = listen.iter().map(|text| text.parse().unwrap()).collect();
    Plan { listen, buffers: 64 << 20, built_with_rdma: true }
}

fn rdma(fixture: &Fixture, plan: &Plan) -> Verdict {
    verdict::rdma(&Machine::of(fixture.root()), plan)
}

#[test]
fn verbs_work_on_a_machine_that_has_all_they_need() {
    let verdict = rdma(&soft_roce(), &plan(&["rdma://10.77.0.1:7700"]));
    assert_eq!((verdict.level, &verdict.findings[..]), (Level::Works, &[][..]));
}

#[test]
fn each_thing_that_verbs_lack_is_named_with_what_to_do() {
    type Spoil = fn(&Fixture);
    let cases: [(Spoil, &str); 6] = [
        (|f| f.remove("sys/class/infiniband"), "rdma link add"),
        (|f| f.remove("dev/infiniband/rdma_cm"), "load the module rdma_ucm"),
        (|f| f.remove("dev/infiniband/uverbs0"), "load the module ib_uverbs"),
        (|f| f.remove("etc/libibverbs.d"), "install the package ibverbs-providers"),
        (
            |f| f.write("sys/class/infiniband/rxe0/ports/1/state", "1: DOWN\n"),
            "rxe0/1 is DOWN (LinkUp), not ACTIVE: check cable",
        ),
        (
            |f| f.remove("sys/class/infiniband/rxe0/ports/1/gids/1"),
            "rxe0/1 has no IP address: give one to roce0",
        ),
    ];
    for (spoil, words) in cases {
        let fixture = soft_roce();
        spoil(&fixture);
        // Configured, it fails; not configured, it is merely not here.
        for (listen, level) in
            [(&["rdma://0.0.0.0:7700"][..], Level::Fails), (&["tcp://0.0.0.0:7700"][..], Level::Absent)]
        {
            let verdict = rdma(&fixture, &plan(listen));
            assert_eq!(verdict.level, level, "{verdict}");
            assert!(verdict.to_string().contains(words), "expected '{words}' in {verdict}");
        }
    }
}

#[test]
fn an_address_that_no_port_has_fails_and_small_packets_are_mentioned() {
    let fixture = soft_roce();
    let verdict = rdma(&fixture, &plan(&["rdma://10.77.0.2:7700"]));
    assert_eq!(verdict.level, Level::Fails);
    assert!(
        verdict.findings[0].contains("No active port has the address of rdma://10.77.0.2:7700"),
        "{verdict}"
    );
    fixture.write("sys/class/net/roce0/mtu", "1500\n");
    let verdict = rdma(&fixture, &plan(&["rdma://10.77.0.1:7700"]));
    assert_eq!(verdict.level, Level::Works);
    assert!(
        verdict.findings[0].contains("carries 1024 bytes in a packet, so a block of 4096 takes 4"),
        "{verdict}"
    );
}

#[test]
fn a_build_without_verbs_and_locked_memory_below_the_buffers_are_said() {
    let fixture = soft_roce();
    let without = Plan { built_with_rdma: false, ..plan(&[]) };
    let verdict = rdma(&fixture, &without);
    assert_eq!(verdict.level, Level::Absent);
    assert!(verdict.findings[0].contains("built without the feature rdma"), "{verdict}");
    fixture.write("proc/self/status", "CapEff:\t0\n");
    let verdict = rdma(&fixture, &plan(&["rdma://10.77.0.1:7700"]));
    assert_eq!(verdict.level, Level::Fails);
    assert!(
        verdict.findings[0].contains("may lock 8 MiB") && verdict.findings[0].contains("64 MiB"),
        "{verdict}"
    );
    // The buffers count for io_uring and for the card.
    for (mib, level) in [(127, Level::Fails), (128, Level::Works)] {
        let limit = (mib << 20).to_string();
        fixture.write("proc/self/limits", &format!("Max locked memory  {limit}  {limit}  bytes\n"));
        let verdict = rdma(&fixture, &plan(&["rdma://10.77.0.1:7700"]));
        assert_eq!(verdict.level, level, "{mib} MiB: {verdict}");
    }
}

#[test]
fn tcp_works_unless_an_address_is_foreign_and_tells_which_congestion_control_is_used() {
    let fixture = soft_roce();
    let tcp = |fixture: &Fixture, unbound: &[(Address, String)]| {
        verdict::tcp(&Machine::of(fixture.root()), unbound)
    };
    let verdict = tcp(&fixture, &[]);
    assert_eq!(verdict.level, Level::Works);
    assert_eq!(verdict.findings, ["The system's congestion control is bbr; connections use cubic."]);
    fixture.write("proc/sys/net/ipv4/tcp_available_congestion_control", "bbr\n");
    assert_eq!(tcp(&fixture, &[]).level, Level::Limited);
    fixture.write("proc/sys/net/ipv4/tcp_congestion_control", "reno\n");
    assert_eq!(tcp(&fixture, &[]).level, Level::Works);
    fixture.write("proc/sys/net/ipv4/tcp_wmem", "4096 16384 65536\n");
    let verdict = tcp(&fixture, &[]);
    assert!(verdict.level == Level::Limited && verdict.findings[0].contains("tcp_wmem"), "{verdict}");
    let foreign = ("tcp://192.0.2.1:1".parse().unwrap(), "cannot assign".to_owned());
    let verdict = tcp(&fixture, &[foreign]);
    assert_eq!(verdict.level, Level::Fails);
    assert!(verdict.findings[0].contains("Cannot listen on tcp://192.0.2.1:1: cannot assign."), "{verdict}");
}

#[test]
fn tls_is_absent_without_certificates_and_fails_with_bad_ones() {
    let listening = plan(&["tls://0.0.0.0:1"]);
    assert_eq!(verdict::tls(&plan(&[]), None, &[]).level, Level::Absent);
    assert_eq!(verdict::tls(&listening, None, &[]).level, Level::Fails);
    assert_eq!(verdict::tls(&listening, Some(&Ok(())), &[]).level, Level::Works);
    let verdict = verdict::tls(&listening, Some(&Err("no such file".to_owned())), &[]);
    assert!(verdict.level == Level::Fails && verdict.findings[0].contains("no such file"), "{verdict}");
}

#[test]
fn pool_keys_are_absent_without_a_directory_and_fail_with_a_file_that_others_may_read() {
    use std::os::unix::fs::PermissionsExt;
    let absent = verdict::keys(None);
    assert!(absent.level == Level::Absent && absent.findings[0].contains("No authentication"), "{absent}");
    let directory = tempfile::tempdir().unwrap();
    let put = |name: &str, mode| {
        let path = directory.path().join(name);
        std::fs::write(&path, [1; 32]).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    put("good.key", 0o600);
    put("no-key.txt", 0o644);
    assert_eq!(verdict::keys(Some(bad_keys(directory.path()))).level, Level::Works);
    put("open.key.old", 0o644);
    let verdict = verdict::keys(Some(bad_keys(directory.path())));
    assert!(verdict.level == Level::Fails && verdict.findings[0].contains("open.key.old"), "{verdict}");
    assert_eq!(verdict.findings.len(), 1, "{verdict}");
    assert_eq!(verdict::keys(Some(bad_keys(&directory.path().join("gone")))).level, Level::Fails);
}

#[test]
fn memory_is_compared_with_the_buffers() {
    let machine = Machine::of(soft_roce().root());
    for (mib, level) in [(64, Level::Works), (600, Level::Limited), (1000, Level::Fails)] {
        let verdict = verdict::memory(&machine, &Plan { buffers: mib << 20, ..plan(&[]) });
        assert_eq!(verdict.level, level, "{verdict}");
    }
    assert_eq!(verdict::memory(&Machine::of(Fixture::new().root()), &plan(&[])).level, Level::Limited);
}

#[test]
fn the_engine_is_judged_by_what_is_configured() {
    let machine = Machine::of(soft_roce().root());
    let good = Engine {
        problem: None,
        missing_operations: Vec::new(),
        deferred_work: true,
        registered_buffers: true,
    };
    let judge = |engine: &Engine, wanted| verdict::engine(&machine, &plan(&[]), engine, wanted).level;
    assert_eq!(judge(&good, true), Level::Works);
    let none = Engine { problem: Some("Function not implemented".to_owned()), ..good.clone() };
    assert_eq!((judge(&none, false), judge(&none, true)), (Level::Limited, Level::Fails));
    assert_eq!(judge(&Engine { registered_buffers: false, ..good.clone() }, false), Level::Limited);
    assert_eq!(
        judge(&Engine { missing_operations: vec!["FALLOCATE".to_owned()], ..good }, false),
        Level::Limited
    );
}

#[test]
fn stores_without_direct_io_or_in_memory_are_limited() {
    let facts = probe::DirectoryFacts {
        medium: Medium::File,
        direct: true,
        alignment: 512,
        punches_holes: true,
        zeroes_ranges: true,
    };
    let judge = |facts| {
        let directory = StoreDirectory { path: "/s".into(), problem: None, facts: Some(facts) };
        verdict::store_directory(&directory).level
    };
    assert_eq!(judge(facts.clone()), Level::Works);
    assert_eq!(judge(probe::DirectoryFacts { direct: false, ..facts.clone() }), Level::Limited);
    assert_eq!(judge(probe::DirectoryFacts { punches_holes: false, ..facts.clone() }), Level::Limited);
    assert_eq!(
        judge(probe::DirectoryFacts { medium: Medium::Memory, direct: false, ..facts }),
        Level::Limited
    );
    let broken = StoreDirectory { path: "/s".into(), problem: Some("read-only".to_owned()), facts: None };
    assert_eq!(verdict::store_directory(&broken).level, Level::Fails);
}

#[test]
fn the_exit_code_is_that_of_the_worst_verdict_and_json_has_every_part() {
    let mut report = Report::for_client();
    for (level, code) in [
        (Level::Works, EXIT_WORKS),
        (Level::Absent, EXIT_WORKS),
        (Level::Limited, EXIT_LIMITED),
        (Level::Fails, EXIT_FAILS),
    ] {
        let one = |level| Verdict { subject: "x".to_owned(), level, findings: Vec::new() };
        report.verdicts = vec![one(Level::Works), one(level)];
        assert_eq!(report.exit_code(), code);
    }
    let json: serde_json::Value = serde_json::from_str(&report.render(true).unwrap()).unwrap();
    for pointer in
        ["/machine/memory/total", "/machine/tcp/choosable", "/machine/rdma/devices", "/verdicts/1/level"]
    {
        assert!(json.pointer(pointer).is_some(), "{pointer} is missing in {json}");
    }
}

#[test]
fn this_machine_is_examined_for_a_node_and_its_tcp_works() {
    let directory = tempfile::tempdir().unwrap();
    let settings = Settings {
        listen: Some(vec!["tcp://127.0.0.1:0".parse().unwrap()]),
        store_dir: Some(directory.path().to_owned()),
        ..Settings::default()
    };
    let config = Config::new(&settings.with_defaults().unwrap()).unwrap();
    let report = Report::for_node(&config);
    let tcp = report.verdicts.iter().find(|verdict| verdict.subject == "tcp://").unwrap();
    assert_ne!(tcp.level, Level::Fails, "{tcp}");
    let text = report.to_string();
    for words in ["kernel: ", "store_dir: ", "io_uring: ", "rdma://: "] {
        assert!(text.contains(words), "'{words}' is missing in {text}");
    }
}
