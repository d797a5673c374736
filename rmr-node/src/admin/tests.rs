//! The admin server over real sockets: routes, refusals and limits.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rmr_common::pool::{Command, CommandReply, Refusal, StoreId};
use serde_json::{Value, json};

use super::api::{ControlError, CreateStore, ErrorCode, StoreState};
use super::fake::{self, FakeNode, client, member, pool_status};

/// What is quick, on a machine that may be crowded: less than any wait without a bound of its own takes.
const QUICK: Duration = Duration::from_secs(15);

/// Sends bytes and reads until the server closes: status code and body.
fn exchange(node: &FakeNode, request: &[u8]) -> (u16, String) {
    let mut stream = TcpStream::connect(node.address()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    // A server that refuses early may close before it has read everything.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer:?}"));
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

fn request(node: &FakeNode, line: &str, headers: &str, body: &str) -> (u16, String) {
    let text = format!(
        "{line} HTTP/1.1\r\nhost: localhost\r\n{headers}content-length: {}\r\n\r\n{body}",
        body.len()
    );
    exchange(node, text.as_bytes())
}

fn get(node: &FakeNode, path: &str) -> (u16, Value) {
    let (status, body) = request(node, &format!("GET {path}"), "", "");
    (status, serde_json::from_str(&body).unwrap())
}

fn post(node: &FakeNode, body: &str) -> (u16, Value) {
    let (status, body) = request(node, "POST /v1/stores", "content-type: application/json\r\n", body);
    (status, serde_json::from_str(&body).unwrap())
}

fn delete(node: &FakeNode, path: &str) -> (u16, Value) {
    let (status, body) = request(node, &format!("DELETE {path}"), "", "");
    (status, serde_json::from_str(&body).unwrap())
}

fn create_request() -> CreateStore {
    let status = pool_status("vm-1", 2, 0);
    CreateStore {
        spec: status.spec,
        member: member(0),
        view: status.view,
        path: None,
        overwrite: false,
        assume_zero: false,
        max_size_bytes: None,
    }
}

fn code(answer: &Value) -> &str {
    assert!(answer["error"]["message"].as_str().is_some_and(|m| !m.is_empty()), "{answer}");
    answer["error"]["code"].as_str().unwrap()
}

#[test]
fn a_store_is_created_shown_and_deleted() {
    let node = FakeNode::start("n0");
    let create = create_request();
    let store = create.spec.members[0].store;
    let (status, created) = post(&node, &serde_json::to_string(&create).unwrap());
    assert_eq!((status, created["store"].as_str()), (200, Some(store.to_string().as_str())));

    let (status, list) = get(&node, "/v1/pools");
    assert_eq!((status, list["pools"].as_array().unwrap().len()), (200, 1));
    for key in ["vm-1", &create.spec.id.to_string()] {
        let (status, pool) = get(&node, &format!("/v1/pools/{key}"));
        assert_eq!(status, 200);
        assert_eq!(pool["spec"], serde_json::to_value(&create.spec).unwrap());
        assert_eq!(pool["view"], serde_json::to_value(&create.view).unwrap());
        assert_eq!(pool["store_state"], json!({"state": "serving"}));
    }
    assert_eq!(get(&node, "/v1/node").1["stores"], 1);

    assert_eq!(delete(&node, &format!("/v1/stores/{store}")), (200, json!({"store": store})));
    assert_eq!(get(&node, "/v1/pools").1["pools"], json!([]));
}

#[test]
fn what_is_not_there_is_refused_in_words() {
    let node = FakeNode::start("n0");
    for (answer, status, name) in [
        (get(&node, "/v1/pools/vm-9"), 404, "not_found"),
        (get(&node, "/v1/pools/-bad-"), 400, "invalid"),
        (get(&node, "/v2/pools"), 404, "not_found"),
        (delete(&node, "/v1/pools"), 405, "method"),
        (delete(&node, "/v1/stores/not-a-uuid"), 400, "invalid"),
        (delete(&node, &format!("/v1/stores/{}", StoreId::random())), 404, "not_found"),
        (delete(&node, &format!("/v1/stores/{}?forced=true", StoreId::random())), 400, "invalid"),
    ] {
        assert_eq!((answer.0, code(&answer.1)), (status, name), "{}", answer.1);
    }
}

#[test]
fn a_command_gets_the_clients_words_and_nonsense_never_reaches_it() {
    let node = FakeNode::start("n0");
    let ask = |path: &str, body: &str| {
        let line = format!("POST {path}");
        let (status, body) = request(&node, &line, "content-type: application/json\r\n", body);
        (status, serde_json::from_str::<Value>(&body).unwrap())
    };
    node.state.lock().unwrap().replies.push_back(CommandReply::refused(Refusal::NoRoom, "too large"));
    let good = r#"{"command":"grow","size":1073741824}"#;
    let (status, reply) = ask("/v1/pools/vm-1/commands", good);
    let words = json!({"result": "refused", "reason": "no_room", "text": "too large"});
    assert_eq!((status, reply), (200, words));
    for (path, body) in [
        ("/v1/pools/-bad-/commands", good),
        ("/v1/pools/vm-1/commands", r#"{"command":"grow"}"#),
        ("/v1/pools/vm-1/commands", r#"{"command":"shrink","size":1}"#),
        ("/v1/pools/vm-1/commands", r#"{"command":"maintenance","member":9,"on":true}"#),
        ("/v1/pools/vm-1/commands", "["),
    ] {
        let (status, answer) = ask(path, body);
        assert_eq!((status, code(&answer)), (400, "invalid"), "{path} {body}");
    }
    assert_eq!(node.state.lock().unwrap().commands, [Command::Grow { size: 1 << 30 }]);
}

#[test]
fn malformed_requests_to_create_are_refused_before_the_service_sees_them() {
    let node = FakeNode::start("n0");
    let good = serde_json::to_value(create_request()).unwrap();
    let with = |pointer: &str, value: Value| {
        let mut changed = good.clone();
        *changed.pointer_mut(pointer).unwrap() = value;
        changed.to_string()
    };
    let mut unknown = good.clone();
    unknown["colour"] = json!("blue");
    let other_store = json!(StoreId::random());
    for (body, problem) in [
        ("{".to_owned(), "Failed to parse the request body as JSON"),
        ("[]".to_owned(), "Failed to deserialize"),
        (unknown.to_string(), "unknown field `colour`"),
        (with("/spec/size", json!(1)), "pool size 1 bytes"),
        (with("/spec/chunk_size", json!(3)), "chunk size 3 bytes"),
        (with("/spec/name", json!("a/b")), "pool name 'a/b'"),
        (with("/spec/members/0/address", json!("nowhere")), "is no address"),
        (with("/member", json!(9)), "member id 9"),
        (with("/member", json!(5)), "member 5 is not in the pool"),
        (with("/view/members", json!([])), "a view has 1 to 8 members"),
        (with("/view/members/0/store", other_store), "expected the same"),
        (with("/path", json!("relative")), "expected an absolute path"),
    ] {
        let (status, answer) = post(&node, &body);
        assert_eq!((status, code(&answer)), (400, "invalid"), "{body}: {answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(problem), "{answer}");
    }
    let (status, answer) = request(&node, "POST /v1/stores", "", &good.to_string());
    assert_eq!(status, 415, "{answer}");
    assert_eq!(node.store_count(), 0);
}

#[test]
fn a_body_larger_than_the_limit_is_refused() {
    let node = FakeNode::start("n0");
    let (status, answer) = post(&node, &" ".repeat(fake::limits().max_body + 1));
    assert_eq!((status, code(&answer)), (413, "too_large"));
}

#[test]
fn a_refusal_of_the_service_reaches_the_caller_with_its_status() {
    let node = FakeNode::start("n0");
    let body = serde_json::to_string(&create_request()).unwrap();
    for (error_code, status) in [
        (ErrorCode::HoldsData, 409),
        (ErrorCode::NoSpace, 507),
        (ErrorCode::Busy, 503),
        (ErrorCode::Internal, 500),
    ] {
        node.state.lock().unwrap().refuse_create =
            Some(ControlError::new(error_code, "/dev/vdb has an ext4"));
        let (found, answer) = post(&node, &body);
        assert_eq!(found, status);
        assert_eq!(answer["error"], json!({"code": error_code, "message": "/dev/vdb has an ext4"}));
    }
}

#[test]
fn a_service_that_does_not_answer_costs_a_timeout_and_not_the_server() {
    let node = FakeNode::start("n0");
    node.state.lock().unwrap().pools_hang = true;
    let (status, answer) = get(&node, "/v1/pools");
    assert_eq!((status, code(&answer)), (504, "timeout"));
    assert_eq!(get(&node, "/v1/node").0, 200);
}

#[test]
fn a_creation_may_take_longer_than_a_request_but_its_body_may_not() {
    let node = FakeNode::start("n0");
    node.state.lock().unwrap().create_takes = fake::limits().request_timeout * 2;
    assert_eq!(post(&node, &serde_json::to_string(&create_request()).unwrap()).0, 200);
    let begun = Instant::now();
    let head = "POST /v1/stores HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{";
    assert_eq!(exchange(&node, head.as_bytes()).0, 504);
    assert!(begun.elapsed() < QUICK);
}

#[test]
fn the_errors_of_stores_keep_their_words_and_get_a_code() {
    use crate::store::StoreError;
    let path = std::path::PathBuf::from("/dev/vdb");
    let io = |kind: std::io::ErrorKind| StoreError::Io {
        path: path.clone(),
        what: "write",
        source: std::io::Error::from(kind),
    };
    for (error, code) in [
        (StoreError::FileHasData(path.clone()), ErrorCode::HoldsData),
        (StoreError::Busy { path: path.clone(), holder: "a mount" }, ErrorCode::InUse),
        (StoreError::TooSmall { path: path.clone(), found: 1, needed: 2 }, ErrorCode::NoSpace),
        (StoreError::NotADisk(path.clone()), ErrorCode::Invalid),
        (io(std::io::ErrorKind::StorageFull), ErrorCode::NoSpace),
        (io(std::io::ErrorKind::NotFound), ErrorCode::Invalid),
        (io(std::io::ErrorKind::Other), ErrorCode::Internal),
    ] {
        let words = error.to_string();
        assert_eq!(ControlError::from(error), ControlError::new(code, words));
    }
}

#[test]
fn a_store_with_a_client_is_deleted_only_by_force() {
    let node = FakeNode::start("n0");
    let mut status = pool_status("vm-1", 2, 0);
    status.client = Some(client(1));
    let store = status.store;
    node.hold(status);
    assert_eq!(delete(&node, &format!("/v1/stores/{store}")).0, 409);
    assert_eq!(delete(&node, &format!("/v1/stores/{store}?force=true")).0, 200);
}

#[test]
fn health_follows_the_stores() {
    let node = FakeNode::start("n0");
    assert_eq!(get(&node, "/v1/health"), (200, json!({"healthy": true, "stores": 0, "problems": []})));
    let mut status = pool_status("vm-1", 2, 0);
    status.store_state = StoreState::Waiting { reason: "member 1 must come first".into() };
    node.hold(status.clone());
    let waiting = json!({
        "healthy": true, "stores": 1, "problems": ["pool 'vm-1' member 0: member 1 must come first"],
    });
    assert_eq!(get(&node, "/v1/health"), (200, waiting));
    status.store_state = StoreState::Failed { reason: "I/O error on /dev/vdb".into() };
    node.hold(status);
    let (status, health) = get(&node, "/v1/health");
    assert_eq!((status, &health["healthy"]), (503, &json!(false)));
    assert_eq!(health["problems"][0], "pool 'vm-1' member 0: I/O error on /dev/vdb");
}

#[test]
fn health_follows_the_stores_left_out_but_for_those_that_were_closed() {
    let node = FakeNode::start("n0");
    node.state.lock().unwrap().left_out.push(fake::left_out("/dev/vdb", "vm-1", 0));
    let (status, health) = get(&node, "/v1/health");
    let words = "store /dev/vdb of pool 'vm-1' member 0 is left out: I/O error";
    assert_eq!((status, &health["healthy"], &health["problems"]), (503, &json!(false), &json!([words])));
    assert_eq!(get(&node, "/v1/pools").1["left_out"][0]["path"], "/dev/vdb");
    node.state.lock().unwrap().left_out[0].closed = true;
    let (status, health) = get(&node, "/v1/health");
    assert_eq!((status, health["problems"].as_array().unwrap().len()), (200, 1), "{health}");
}

#[test]
fn a_store_is_named_by_an_absolute_path_or_its_uuid() {
    let node = FakeNode::start("n0");
    let ask = |route: &str, body: &Value| {
        let line = format!("POST /v1/stores/{route}");
        let (status, answer) = request(&node, &line, "content-type: application/json\r\n", &body.to_string());
        (status, serde_json::from_str::<Value>(&answer).unwrap())
    };
    for (route, body) in [
        ("open", json!({})),
        ("open", json!({"store": StoreId::random()})),
        ("open", json!({"path": "/dev/vdb", "force": true})),
        ("close", json!({"path": "vdb"})),
        ("delete", json!({"path": "/dev/vdb", "colour": 1})),
    ] {
        let (status, answer) = ask(route, &body);
        assert_eq!((status, code(&answer)), (400, "invalid"), "{route} {body}");
    }
    assert_eq!(ask("close", &json!({"path": "/dev/vdb"})).0, 404);
}

#[test]
fn the_metrics_page_is_prometheus_text() {
    let node = FakeNode::start("n0");
    node.hold(pool_status("vm-1", 2, 0));
    let (status, page) = request(&node, "GET /metrics", "", "");
    assert_eq!(status, 200);
    assert!(page.contains("# TYPE rmr_store_writes_total counter\n"), "{page}");
}

#[test]
fn requests_for_another_host_are_refused_on_every_route() {
    let node = FakeNode::start("n0");
    for line in ["GET /v1/node", "DELETE /v1/stores/x", "POST /v1/stores", "GET /nowhere", "PUT /v1/node"] {
        let text = format!("{line} HTTP/1.1\r\nhost: evil.example:7701\r\ncontent-length: 0\r\n\r\n");
        let (status, body) = exchange(&node, text.as_bytes());
        let answer: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((status, code(&answer)), (403, "forbidden"), "{line}: {answer}");
    }
    let (status, _) = exchange(&node, b"GET /v1/node HTTP/1.0\r\n\r\n");
    assert_eq!(status, 200);
}

#[test]
fn requests_that_are_sent_half_lock_nobody_out() {
    let node = FakeNode::start("n0");
    let body = "POST /v1/stores HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{";
    for start in ["", "GET /v1/node HTTP/1.1\r\nhost: localhost\r\n", body] {
        let half = || {
            let mut stream = TcpStream::connect(node.address()).unwrap();
            stream.write_all(start.as_bytes()).unwrap();
            stream
        };
        let _halves: Vec<_> = (0..3 * fake::limits().max_connections).map(|_| half()).collect();
        let begun = Instant::now();
        assert_eq!(get(&node, "/v1/node").0, 200);
        assert!(begun.elapsed() < fake::limits().request_timeout, "{start:?}: {:?}", begun.elapsed());
    }
}

#[test]
fn requests_that_the_node_works_at_are_not_closed_for_others_and_leave_a_reserve() {
    let node = FakeNode::start("n0");
    node.state.lock().unwrap().create_takes = Duration::from_secs(3);
    let create = serde_json::to_string(&create_request()).unwrap();
    std::thread::scope(|scope| {
        let ask = || scope.spawn(|| post(&node, &create).0);
        let creations: Vec<_> = (0..fake::limits().max_connections).map(|_| ask()).collect();
        while node.state.lock().unwrap().requests.len() < 6 {
            std::thread::sleep(Duration::from_millis(5));
        }
        // Three quarters of the connections may be taken so. Others are served, and no matter how many of them come.
        for _ in 0..2 * fake::limits().max_connections {
            assert_eq!(get(&node, "/v1/node").0, 200);
        }
        let mut statuses: Vec<_> = creations.into_iter().map(|c| c.join().unwrap()).collect();
        statuses.sort_unstable();
        assert_eq!(statuses, [200, 200, 200, 200, 200, 200, 503, 503]);
    });
}

#[test]
fn a_caller_has_seconds_to_send_the_head_of_a_request() {
    let node = FakeNode::start("n0");
    let mut silent = TcpStream::connect(node.address()).unwrap();
    silent.write_all(b"GET /v1/node HTTP/1.1\r\nhost: local").unwrap();
    silent.set_read_timeout(Some(QUICK)).unwrap();
    let mut answer = Vec::new();
    // Closed, with an answer or without.
    silent.read_to_end(&mut answer).unwrap();
}

#[test]
fn stopping_does_not_wait_for_a_silent_caller_longer_than_the_grace() {
    let node = FakeNode::start("n0");
    let address = node.address();
    let mut silent = TcpStream::connect(&address).unwrap();
    // Answered, so the connection made after it is known to be accepted too.
    silent.write_all(b"GET /v1/no").unwrap();
    assert_eq!(get(&node, "/v1/node").0, 200);
    let begun = Instant::now();
    drop(node);
    assert!(begun.elapsed() < QUICK, "{:?}", begun.elapsed());
    assert!(TcpStream::connect(&address).is_err());
}

#[test]
fn an_address_in_use_is_named() {
    let node = FakeNode::start("n0");
    let address = node.address().parse().unwrap();
    let error =
        super::AdminServer::start(address, fake::limits(), super::HostNames::default(), node.control())
            .err()
            .unwrap();
    assert!(error.to_string().contains(&format!("admin address {address}: ")), "{error}");
}

#[test]
fn a_reply_carries_the_answer_of_another_thread_and_a_dropped_one_is_a_refusal() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (responder, reply) = super::reply();
    let thread = std::thread::spawn(move || responder.send(Ok(7)));
    assert_eq!(runtime.block_on(reply), Ok(7));
    thread.join().unwrap();
    let (responder, reply) = super::reply::<u8>();
    drop(responder);
    assert_eq!(runtime.block_on(reply).unwrap_err().code, ErrorCode::Busy);
}
