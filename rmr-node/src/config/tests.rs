//! Defaults, refusals, and what flags override.

use std::path::Path;

use super::*;

fn config(text: &str) -> Result<Config, ConfigError> {
    Config::new(&Settings::parse(text).unwrap().with_defaults()?)
}

fn tcp(host: &str, port: u16) -> Address {
    Address::tcp(host, port)
}

#[test]
fn an_empty_file_gives_the_documented_defaults() {
    let c = config("").unwrap();
    assert_eq!(c.listen, [tcp("0.0.0.0", 7700)]);
    assert_eq!(c.admin, "127.0.0.1:7701".parse().unwrap());
    assert_eq!((c.shards, c.buffer_memory, c.max_connections), (1, 64 << 20, 256));
    assert_eq!((c.engine, c.intent_idle), (EngineChoice::Auto, Duration::from_secs(5)));
    assert_eq!(c.resync, ResyncConfig { max_inflight: 8, bytes_per_s: None });
    assert_eq!(c.log_level.as_str(), "info");
    assert!(!c.node_name.is_empty());
}

#[test]
fn a_full_file_is_read() {
    let c = config(
        r#"
        node_name = "node-a"
        listen = ["tcp://10.0.0.1:7700", "[::1]:7700"]
        advertise = ["tcp://node-a.example:7700"]
        admin = "10.0.0.1:7701"
        stores = ["/dev/vdb"]
        shards = 4
        buffer_memory = "128M"
        engine = "inline"
        max_connections = 10
        leg_timeout_ms = 700
        idle_timeout_s = 7
        intent_idle_s = 2
        stop_timeout_s = 3
        [resync]
        max_inflight = 2
        bytes_per_s = "100M"
        [admin_limits]
        max_connections = 4
        max_body = 8192
        request_timeout_s = 9
        [log]
        format = "json"
        level = "warn,rmr_node=trace"
        "#,
    )
    .unwrap();
    assert_eq!(c.listen, [tcp("10.0.0.1", 7700), tcp("::1", 7700)]);
    assert_eq!(c.buffer_memory, 128 << 20);
    assert_eq!((c.leg_timeout, c.idle_timeout), (Duration::from_millis(700), Duration::from_secs(7)));
    assert_eq!(c.resync, ResyncConfig { max_inflight: 2, bytes_per_s: Some(100 << 20) });
    assert_eq!((c.admin_limits.max_connections, c.admin_limits.max_body), (4, 8192));
    assert_eq!((c.log_format, c.log_level.as_str()), (LogFormat::Json, "warn,rmr_node=trace"));
}

#[test]
fn what_cannot_be_parsed_is_refused_with_its_line() {
    let table = [
        ("shards = 1\nshard = 2", "line 2", "unknown field `shard`"),
        ("[resync]\nmax_in_flight = 2", "line 2", "unknown field `max_in_flight`"),
        ("[logs]", "line 1", "unknown field `logs`"),
        ("\n\nshards = 0", "line 3", "0: expected a whole number from 1 to 64"),
        ("shards = -1", "line 1", "-1: expected a whole number from 1 to 64"),
        ("shards = \"many\"", "line 1", "invalid type"),
        ("max_connections = 70000", "line 1", "from 1 to 65536"),
        ("leg_timeout_ms = 1", "line 1", "from 100 to 600000"),
        ("idle_timeout_s = 0", "line 1", "from 1 to 86400"),
        ("intent_idle_s = 0", "line 1", "from 1 to 3600"),
        ("stop_timeout_s = 0", "line 1", "from 1 to 600"),
        ("[resync]\nmax_inflight = 0", "line 2", "from 1 to 1024"),
        ("[resync]\nbytes_per_s = \"1 GB\"", "line 2", "is no size"),
        ("[admin_limits]\nmax_connections = 0", "line 2", "from 1 to 1024"),
        ("[admin_limits]\nmax_body = 1", "line 2", "from 4096 to 16777216"),
        ("[admin_limits]\nrequest_timeout_s = 0", "line 2", "from 1 to 3600"),
        ("buffer_memory = \"64MB\"", "line 1", "is no size"),
        ("engine = \"fast\"", "line 1", "unknown variant `fast`"),
        ("listen = [\"http://a:1\"]", "line 1", "the scheme is neither tcp nor tls nor rdma"),
        ("admin = \"localhost\"", "line 1", "invalid socket address"),
        ("[log]\nformat = \"xml\"", "line 2", "unknown variant `xml`"),
        ("[log]\nlevel = \"loud\"", "line 2", "no such level"),
        ("[log]\nlevel = \"rmr_node=loud\"", "line 2", "log level 'rmr_node=loud'"),
        ("shards = ", "line 1", ""),
    ];
    for (text, line, problem) in table {
        let error = Settings::parse(text).expect_err(text).to_string();
        assert!(error.contains(line) && error.contains(problem), "{text}: {error}");
    }
}

#[test]
fn what_breaks_a_rule_is_refused_by_name() {
    let table = [
        ("node_name = \"\"", "node_name: '': expected 1 to 64"),
        ("node_name = \"a b\"", "node_name: 'a b'"),
        ("listen = []", "listen: no address"),
        ("listen = [\"a:1\"]", "listen: tcp://a:1: expected a numeric IP address"),
        ("listen = [\"tls://10.0.0.1:1\"]", "listen: tls://10.0.0.1:1: tls needs a certificate and a key"),
        ("[tls]\nkey = \"k\"", "tls: expected certificate and key, found only one"),
        ("[tls]\nverify_clients = true", "tls: verify_clients needs authorities"),
        ("listen = [\"10.0.0.1:1\", \"tcp://10.0.0.1:1\"]", "listen: tcp://10.0.0.1:1 is given twice"),
        ("advertise = [\"0.0.0.0:7700\"]", "advertise: tcp://0.0.0.0:7700 stands for every address"),
        ("advertise = [\"[::]:7700\"]", "advertise: tcp://[::]:7700 stands for every address"),
        ("advertise = [\"a:0\"]", "advertise: tcp://a:0: port 0"),
        ("stores = [\"/a\", \"/a\"]", "stores: /a is given twice"),
        ("buffer_memory = 1", "buffer_memory: 1 bytes: expected 8 MiB to 64 GiB"),
        ("buffer_memory = \"65G\"", "buffer_memory: 65 GiB: expected 8 MiB to 64 GiB"),
        ("buffer_memory = 8388609", "a multiple of 4096 bytes"),
        ("store_places = [\"dev/vdb\"]", "store_places: dev/vdb: expected an absolute path"),
        ("admin_names = [\"a:7701\"]", "admin_names: 'a:7701': expected a host name"),
        ("store_dir = \"/nonexistent\"", "store_dir: /nonexistent is no directory"),
    ];
    for (text, problem) in table {
        let error = config(text).expect_err(text).to_string();
        assert!(error.contains(problem), "{text}: {error}");
    }
}

#[test]
fn a_missing_file_is_named() {
    let error = Settings::read(Path::new("/nonexistent.toml")).unwrap_err().to_string();
    assert_eq!(error, "configuration file /nonexistent.toml: No such file or directory (os error 2)");
}

#[test]
fn flags_win_over_the_file_and_the_file_over_defaults() {
    let file = Settings::parse("shards = 2\nnode_name = \"file\"\n[resync]\nmax_inflight = 3").unwrap();
    let flags = Settings {
        node_name: Some("flag".into()),
        resync: ResyncSettings { bytes_per_s: Some(ByteSize(5)), ..ResyncSettings::default() },
        ..Settings::default()
    };
    let c = Config::new(&flags.over(file).with_defaults().unwrap()).unwrap();
    assert_eq!((c.node_name.as_str(), c.shards), ("flag", 2));
    assert_eq!(c.resync, ResyncConfig { max_inflight: 3, bytes_per_s: Some(5) });
}

#[test]
fn the_printed_configuration_reads_back_as_itself() {
    let full = Settings::parse("[log]\nlevel = \"debug\"").unwrap().with_defaults().unwrap();
    let printed = full.to_toml().unwrap();
    assert_eq!(Settings::parse(&printed).unwrap(), full, "{printed}");
    assert!(printed.contains("intent_idle_s = 5"), "{printed}");
}

#[test]
fn every_setting_but_the_store_directory_has_a_default() {
    let defaults = toml::Table::try_from(Settings::default().with_defaults().unwrap()).unwrap();
    let documented = include_str!("../../../docs/configuration.md");
    let mut keys = Vec::new();
    for (key, value) in &defaults {
        match value.as_table() {
            Some(table) => keys.extend(table.keys().map(|k| format!("{key}.{k}"))),
            None => keys.push(key.clone()),
        }
    }
    keys.push("store_dir".into());
    assert_eq!(keys.len(), 26, "{keys:?}");
    for key in keys {
        assert!(documented.contains(&format!("| `{key}` |")), "{key} is not in docs/configuration.md");
    }
}

#[test]
fn what_is_advertised_comes_from_the_bound_addresses_unless_set() {
    let c = config("").unwrap();
    assert_eq!(c.advertised(&[tcp("10.0.0.1", 7000)]).unwrap(), [tcp("10.0.0.1", 7000)]);
    match c.advertised(&[tcp("0.0.0.0", 7000)]) {
        Ok(told) => {
            assert!(wildcard(&told[0]).is_none(), "{}", told[0]);
            assert_eq!(told[0].port(), 7000);
        }
        // A machine without a route has nothing to tell.
        Err(e) => assert!(e.to_string().contains("set advertise"), "{e}"),
    }
    let c = config("advertise = [\"a:1\"]").unwrap();
    assert_eq!(c.advertised(&[tcp("0.0.0.0", 7000)]).unwrap(), [tcp("a", 1)]);
    assert_eq!(with_host(&tcp("::", 5), "fe80::1".parse().unwrap()), tcp("fe80::1", 5));
}

#[test]
fn stores_of_the_directory_are_opened_once_each() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["b.store", "a.store", "notes.txt"] {
        std::fs::write(dir.path().join(name), "").unwrap();
    }
    let (a, b) = (dir.path().join("a.store"), dir.path().join("b.store"));
    let text = format!("store_dir = {:?}\nstores = [\"/dev/vdb\", {b:?}]", dir.path());
    let c = config(&text).unwrap();
    assert_eq!(c.stores_to_open().unwrap(), [PathBuf::from("/dev/vdb"), b, a]);
    let (pool, member) = (PoolId::random(), MemberId::new(2).unwrap());
    assert_eq!(c.new_store_path(pool, member), Some(dir.path().join(format!("{pool}-2.store"))));
}
