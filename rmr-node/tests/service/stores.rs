//! Stores of a running node: made, left out, closed and opened again, without a restart of the node.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rmr_common::pool::{Address, ChunkSize, MemberId, MemberSpec, PoolId, PoolSpec, StoreId, View};
use rmr_node::store::{CreateOptions, Store, ZeroPolicy};
use serde_json::{Value, json};

use crate::support::*;

/// Where stores may be made, beside the store directory.
fn places() -> String {
    format!("/dev,{}", std::env::temp_dir().display())
}

/// A node of its own process, on a directory that outlives it.
struct Keeper {
    child: Option<Child>,
    dir: PathBuf,
    data: SocketAddr,
    admin: SocketAddr,
}

impl Keeper {
    fn new(dir: &Path) -> Self {
        Self { child: None, dir: dir.to_owned(), data: own_address(), admin: own_address() }
    }

    /// Starts it with these flags, beside those that every node needs.
    fn start(&mut self, flags: &[&str]) {
        let log = std::fs::File::create(self.log_path()).expect("a node that works");
        let child = Command::new(env!("CARGO_BIN_EXE_rmr-node"))
            .args([
                "--listen",
                &self.data.to_string(),
                "--admin",
                &self.admin.to_string(),
                "--node-name",
                "keeper",
            ])
            .args(flags)
            .env_remove("RMR_LOG")
            .stderr(log)
            .stdout(Stdio::null())
            .spawn()
            .expect("a node that works");
        self.child = Some(child);
        let log = self.log_path();
        wait_for("the node serves", || {
            std::fs::read_to_string(&log).expect("a node that works").contains("serving")
        });
    }

    fn start_on_dir(&mut self) {
        let dir = self.dir.display().to_string();
        self.start(&["--store-dir", &dir, "--store-places", &places()]);
    }

    fn stop(&mut self) {
        let mut child = self.child.take().expect("a node that works");
        let kill = Command::new("kill")
            .args(["-TERM", &child.id().to_string()])
            .status()
            .expect("a node that works");
        assert!(kill.success() && child.wait().expect("a node that works").success(), "{}", self.log());
    }

    fn log_path(&self) -> PathBuf {
        self.dir.join("log")
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn ask(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let mut stream = TcpStream::connect(self.admin).expect("a node that works");
        stream.set_read_timeout(Some(PATIENCE)).expect("a node that works");
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            self.admin,
            body.len()
        );
        stream.write_all(head.as_bytes()).expect("a node that works");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("a node that works");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a node that works");
        let status = head.split(' ').nth(1).expect("a node that works").parse().expect("a node that works");
        (status, serde_json::from_str(body).unwrap_or_else(|_| json!(body)))
    }

    fn get(&self, path: &str) -> (u16, Value) {
        self.ask("GET", path, &Value::Null)
    }

    fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        self.ask("POST", path, body)
    }

    /// Creates the store of a new pool of one member.
    fn create(&self, name: &str, path: Option<&Path>) -> (u16, Value, PoolSpec) {
        let options = self.options(name);
        let mut body = json!({"spec": options.spec, "member": options.member, "view": options.view});
        if let Some(path) = path {
            body["path"] = json!(path);
        }
        let (status, answer) = self.post("/v1/stores", &body);
        (status, answer, options.spec)
    }

    fn options(&self, name: &str) -> CreateOptions {
        let (member, store) = (MemberId::all().next().expect("a node that works"), StoreId::random());
        let address = Address::tcp(self.data.ip().to_string(), self.data.port());
        CreateOptions {
            spec: PoolSpec {
                id: PoolId::random(),
                name: name.into(),
                size: 1 << 20,
                chunk_size: ChunkSize::default(),
                logical_block_size: 512,
                members: vec![MemberSpec::new(member, store, address)],
            },
            member,
            store,
            view: View::initial([(member, store)]),
            overwrite: false,
            zero: ZeroPolicy::Zero,
            max_size: None,
        }
    }

    /// The pools that are served, and the paths of the stores left out with their reasons.
    fn stores(&self) -> (Vec<String>, Vec<(String, String)>) {
        let (_, list) = self.get("/v1/stores");
        let open = list["open"]
            .as_array()
            .expect("a node that works")
            .iter()
            .map(|s| s["name"].as_str().expect("a node that works").to_owned());
        let text = |v: &Value| v.as_str().expect("a node that works").to_owned();
        let left_out = list["left_out"]
            .as_array()
            .expect("a node that works")
            .iter()
            .map(|s| (text(&s["path"]), text(&s["reason"])));
        (open.collect(), left_out.collect())
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn make(path: &Path, options: &CreateOptions) {
    Store::create(path, options, &mut |_, _| {}).expect("a node that works");
}

#[test]
fn stores_that_cannot_be_served_are_named_and_the_rest_is_served_whatever_their_names() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Keeper::new(dir.path());
    let at = |name: &str| dir.path().join(name);
    make(&at("good.store"), &node.options("good"));
    // One store under two names: a copy.
    make(&at("x.store"), &node.options("copied"));
    std::fs::copy(at("x.store"), at("y.store")).unwrap();
    // Two pools of one name, and a file that is no store.
    make(&at("1.store"), &node.options("twice"));
    make(&at("2.store"), &node.options("twice"));
    std::fs::write(at("0.store"), [7; 65536]).unwrap();
    let gone = at("gone/dev").display().to_string();
    let dir_text = dir.path().display().to_string();
    node.start(&["--store-dir", &dir_text, "--stores", &gone]);
    let (open, left_out) = node.stores();
    assert_eq!(open, ["good"], "{}", node.log());
    let mut paths: Vec<_> =
        left_out.iter().map(|(path, _)| Path::new(path).file_name().unwrap().to_owned()).collect();
    paths.sort();
    assert_eq!(paths, ["0.store", "1.store", "2.store", "dev", "x.store", "y.store"]);
    let reason = |name: &str| &left_out.iter().find(|(p, _)| p.ends_with(name)).unwrap().1;
    assert!(reason("/x.store").contains("/y.store") && reason("/y.store").contains("/x.store"));
    assert!(reason("/1.store").contains("/2.store") && reason("/2.store").contains("/1.store"));
    for (path, _) in &left_out {
        let is_told = node.log().lines().any(|l| l.contains("ERROR") && l.contains(path));
        assert!(is_told, "{path} is not in\n{}", node.log());
        let is_once = |line: &str| line.matches("(os error ").count() <= 1;
        assert!(node.log().lines().all(is_once), "{}", node.log());
    }
    let (status, health) = node.get("/v1/health");
    assert_eq!((status, health["problems"].as_array().unwrap().len()), (503, 6), "{health}");
    assert!(node.get("/metrics").1.as_str().unwrap().contains("rmr_node_stores_left_out 6\n"));
    // A client is told the reason, and not that there is no such pool, which it would believe for good.
    let copied = Store::identify(&at("x.store")).unwrap().spec.id;
    let mut raw = Raw::to(node.data, copied);
    let (header, text) = raw.hello(copied);
    assert_eq!(header.status, rmr_common::wire::Status::Stopping);
    assert!(String::from_utf8_lossy(&text).contains("left out"));

    // The operator decides: one of the copies goes, and the other one is served without a word more.
    let (status, answer) = node.post("/v1/stores/delete", &json!({"path": at("y.store")}));
    assert_eq!(status, 200, "{answer}");
    assert!(!at("y.store").exists());
    wait_for("the remaining copy is served", || node.stores().0.contains(&"copied".to_owned()));
    let (status, answer) = node.post("/v1/stores/close", &json!({"path": at("1.store")}));
    assert_eq!(status, 200, "{answer}");
    let (status, answer) = node.post("/v1/stores/open", &json!({"path": at("2.store")}));
    assert_eq!(status, 200, "{answer}");
    assert_eq!(node.stores().0, ["copied", "good", "twice"]);
    let (status, answer) = node.post("/v1/stores/open", &json!({"path": at("1.store")}));
    assert_eq!(status, 409, "{answer}");
    node.stop();
}

#[test]
fn a_store_is_closed_and_opened_again_while_the_node_runs() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Keeper::new(dir.path());
    node.start_on_dir();
    let (status, created, spec) = node.create("vm-1", None);
    assert_eq!(status, 200, "{created}");
    let path = PathBuf::from(created["path"].as_str().unwrap());
    let mut raw = Raw::to(node.data, spec.id);
    raw.hello(spec.id);
    let name = json!({"store": spec.members[0].store});
    assert_eq!(node.post("/v1/stores/close", &name).0, 200);
    assert!(raw.is_closed_within(QUICK));
    // Its file is nobody's: another process may take it.
    drop(Store::open(&path, Some(spec.id)).unwrap());
    assert_eq!(node.stores().0, Vec::<String>::new());
    let (status, health) = node.get("/v1/health");
    assert_eq!((status, health["healthy"].as_bool()), (200, Some(true)), "closed on purpose: {health}");
    assert_eq!(node.post("/v1/stores/open", &json!({"path": path})).0, 200);
    assert_eq!(node.stores(), (vec!["vm-1".to_owned()], vec![]));
    // In use, it is closed only by force.
    let held = Raw::attached_to(node.data, spec.id);
    assert_eq!(node.post("/v1/stores/close", &name).0, 409);
    drop(held);
    node.stop();
}

#[test]
fn a_store_on_a_path_is_remembered_and_its_file_goes_with_it() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = other.path().join("data");
    let mut node = Keeper::new(dir.path());
    node.start_on_dir();
    let (status, created, spec) = node.create("vm-1", Some(&path));
    assert_eq!(status, 200, "{created}");
    node.stop();
    node.start_on_dir();
    assert_eq!(node.stores().0, ["vm-1"]);
    let store = spec.members[0].store;
    assert_eq!(node.ask("DELETE", &format!("/v1/stores/{store}"), &Value::Null).0, 200);
    assert!(!path.exists());
    node.stop();
    node.start_on_dir();
    assert_eq!(node.stores(), (vec![], vec![]));
    node.stop();
    // A node that can remember nothing says what to write into its configuration.
    node.start(&["--store-places", &places()]);
    let (status, answer, _) = node.create("vm-1", Some(&path));
    let text = answer["error"]["message"].as_str().unwrap();
    assert!(status == 400 && text.contains(&format!("stores = [\"{}\"]", path.display())), "{answer}");
    assert!(!path.exists());
}

#[test]
fn what_is_refused_leaves_no_file_and_what_is_there_is_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Keeper::new(dir.path());
    let dir_text = dir.path().display().to_string();
    node.start(&["--store-dir", &dir_text, "--max-stores", "1", "--store-places", &places()]);
    // The list of stores elsewhere may be there, and is empty.
    let list = dir.path().join("other-stores.json");
    let files = || {
        let others = std::fs::read_to_string(&list).unwrap_or_default();
        assert!(!others.contains("path"), "{others}");
        let mut names: Vec<_> =
            std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.retain(|name| name != "other-stores.json");
        names.sort();
        names
    };
    let (link, aim) = (dir.path().join("link"), dir.path().join("aim"));
    std::os::unix::fs::symlink(&aim, &link).unwrap();
    let before = files();
    let refused = |path: Option<&Path>, words: &str| {
        let (status, answer, _) = node.create("vm-1", path);
        let text = answer["error"]["message"].as_str().unwrap_or_default().to_owned();
        assert!(status >= 400 && text.contains(words), "{path:?}: {answer}");
        assert_eq!(files(), before, "{path:?}");
    };
    refused(Some(&link), "symbolic link");
    refused(Some(Path::new("/dev/no-such-device")), "no file is made below /dev");
    std::fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink("/tmp", &link).unwrap();
    refused(Some(&link.join("store")), "by a symbolic link");
    // Outside of what the node was given nothing is made, and nothing is opened.
    refused(Some(Path::new("/etc/hosts")), "store_places = [");
    refused(Some(&dir.path().join("../../etc/hosts")), "store_places = [");
    let (status, answer) = node.post("/v1/stores/open", &json!({"path": "/etc/hosts"}));
    assert!(status == 403 && answer.to_string().contains("store_places"), "{answer}");
    assert_eq!(node.create("vm-1", None).0, 200);
    let before = files();
    let (status, answer, _) = node.create("vm-2", None);
    assert_eq!((status, files()), (507, before.clone()), "{answer}");
    let (status, answer, _) = node.create("vm-1", None);
    assert_eq!((status, files()), (507, before), "{answer}");
    // What was asked for twice was made once.
    let options = node.options("vm-3");
    let store = node.get("/v1/stores").1["open"][0]["store"].clone();
    assert_eq!(node.ask("DELETE", &format!("/v1/stores/{}", store.as_str().unwrap()), &Value::Null).0, 200);
    let body = json!({"spec": options.spec, "member": options.member, "view": options.view});
    let answers: Vec<_> = std::thread::scope(|scope| {
        let ask = || node.post("/v1/stores", &body);
        [scope.spawn(ask), scope.spawn(ask)].into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(
        answers.iter().all(|(status, _)| *status == 200) && answers[0].1["path"] == answers[1].1["path"],
        "{answers:?}"
    );
    // Of two pools of one name at once, one is made, and the other one leaves nothing.
    node.stop();
}

#[test]
fn of_two_pools_of_one_name_at_once_one_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Keeper::new(dir.path());
    node.start_on_dir();
    for round in 0..5 {
        let name = format!("vm-{round}");
        let statuses: Vec<u16> = std::thread::scope(|scope| {
            let make = || node.create(&name, None).0;
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(make)).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert_eq!(statuses.iter().filter(|s| **s == 200).count(), 1, "{statuses:?}");
    }
    let files = std::fs::read_dir(dir.path())
        .unwrap()
        .filter(|e| e.as_ref().unwrap().path().extension().is_some_and(|e| e == "store"));
    assert_eq!(files.count(), 5);
    node.stop();
}
