//! Sessions over a loopback socket: every amount of data, and peers that are not who they should be.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::*;
use crate::buffer::segments_of_buffers;
use crate::pool::PoolId;
use crate::transport::tcp::TcpConnection;
use crate::transport::{Connection, ConnectionError, Place, Receiver};
use crate::wire::{Kind, MessageHeader};

const DEAD_AFTER: Duration = Duration::from_secs(60);

/// An authority and what it has signed, as files.
struct Certificates {
    _dir: tempfile::TempDir,
    authority: PathBuf,
    identity: IdentityFiles,
}

fn certificates(names: &[&str]) -> Certificates {
    certificates_with(names, |_| {})
}

fn certificates_with(names: &[&str], change: impl FnOnce(&mut rcgen::CertificateParams)) -> Certificates {
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str, text: String| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let authority_key = rcgen::KeyPair::generate().unwrap();
    let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority = parameters.self_signed(&authority_key).unwrap();
    let issuer = rcgen::Issuer::new(parameters, authority_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    let mut own = rcgen::CertificateParams::new(names).unwrap();
    change(&mut own);
    let own = own.signed_by(&key, &issuer).unwrap();
    let identity =
        IdentityFiles { certificate: put("own.pem", own.pem()), key: put("own.key", key.serialize_pem()) };
    Certificates { authority: put("authority.pem", authority.pem()), identity, _dir: dir }
}

fn raw_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (a, listener.accept().unwrap().0)
}

fn pair(client: &ClientTls, server: &ServerTls, host: &str) -> (TcpConnection, TcpConnection) {
    let (a, b) = raw_pair();
    let a = TcpConnection::with_tls(a, DEAD_AFTER, client, host).unwrap();
    (a, TcpConnection::accepted_with_tls(b, DEAD_AFTER, server).unwrap())
}

fn trusting_pair() -> (TcpConnection, TcpConnection) {
    let files = certificates(&["node-a"]);
    let client = ClientTls::load(&files.authority, None).unwrap();
    pair(&client, &ServerTls::load(&files.identity, None).unwrap(), "node-a")
}

/// Takes messages. Says "wait" to every other question for a place.
#[derive(Default)]
struct Sink {
    asked: usize,
    waits: bool,
    data: Vec<Vec<u8>>,
    delivered: usize,
}

impl Receiver for Sink {
    fn place(&mut self, header: &MessageHeader, segments: &mut Vec<Segment>) -> Place {
        self.asked += 1;
        if self.waits && self.asked % 2 == 1 {
            return Place::Wait;
        }
        // The bytes stay where they are, however `data` grows.
        self.data.push(vec![0; header.payload as usize]);
        segments_of_buffers(self.data.last_mut().map_or(&mut [], std::slice::from_mut), segments);
        Place::Data
    }

    fn deliver(&mut self, _header: &MessageHeader, _body: &[u8]) {
        self.delivered += 1;
    }
}

/// Moves everything that can be moved in one direction until `done`, or fails.
fn exchange(
    a: &mut TcpConnection,
    b: &mut TcpConnection,
    sink: &mut Sink,
    mut done: impl FnMut(&Sink) -> bool,
) -> Result<(), ConnectionError> {
    let start = Instant::now();
    let mut back = Sink::default();
    while !done(sink) {
        a.flush()?;
        b.receive(sink)?;
        b.flush()?;
        a.receive(&mut back)?;
        assert!(start.elapsed() < DEAD_AFTER, "{} messages after {DEAD_AFTER:?}", sink.delivered);
    }
    Ok(())
}

fn write_of(bytes: &[u8]) -> MessageHeader {
    let length = u32::try_from(bytes.len()).unwrap();
    let header = MessageHeader::new(Kind::Write, PoolId::from_bytes([7; 16]));
    MessageHeader { payload: length, length, ..header }
}

#[test]
fn data_of_every_size_arrives_as_it_was_sent() {
    for waits in [false, true] {
        let (mut a, mut b) = trusting_pair();
        let sizes = [1, 511, 512, 4096, 16 << 10, (16 << 10) + 1, 100_000, 1 << 20, 1 << 20, 1 << 20, 4096];
        let pattern = |i: usize, k: usize| u8::try_from((i * 31 + k) % 251).unwrap();
        let mut data: Vec<Vec<u8>> =
            sizes.iter().enumerate().map(|(i, &n)| (0..n).map(|k| pattern(i, k)).collect()).collect();
        for bytes in &mut data {
            let header = write_of(bytes);
            a.queue_data(&header, None, &mut |segments| {
                segments_of_buffers(std::slice::from_mut(bytes), segments);
            });
        }
        let mut sink = Sink { waits, ..Sink::default() };
        exchange(&mut a, &mut b, &mut sink, |s| s.delivered == sizes.len()).unwrap();
        assert_eq!(sink.data, data, "waits: {waits}");
        assert!(!a.wants_to_send());
    }
}

#[test]
fn nothing_that_is_decrypted_waits_for_the_socket_to_be_readable() {
    let (mut a, mut b) = trusting_pair();
    // Small messages, many to a record: the socket is drained long before they are all delivered.
    for _ in 0..500 {
        a.queue(&MessageHeader::new(Kind::Ping, PoolId::from_bytes([7; 16])), None);
    }
    let mut sink = Sink::default();
    exchange(&mut a, &mut b, &mut sink, |s| s.delivered > 0).unwrap();
    a.flush().unwrap();
    let socket = b.descriptor().expect("a socket");
    let readable = Epoll::new().unwrap();
    readable.ctl(ControlOperation::Add, socket, EpollEvent::new(EventSet::IN, 0)).unwrap();
    while sink.delivered < 500 {
        let patience = i32::try_from(DEAD_AFTER.as_millis()).unwrap();
        let ready = readable.wait(patience, &mut [EpollEvent::default()]).unwrap();
        assert_eq!(ready, 1, "{} of 500 delivered, and nothing left to be read", sink.delivered);
        b.receive(&mut sink).unwrap();
    }
}

#[test]
fn a_node_of_another_authority_or_name_is_refused() {
    let (ours, theirs) = (certificates(&["node-a"]), certificates(&["node-a"]));
    let server = ServerTls::load(&theirs.identity, None).unwrap();
    let trusts_ours = ClientTls::load(&ours.authority, None).unwrap();
    let trusts_theirs = ClientTls::load(&theirs.authority, None).unwrap();
    for (client, host) in [(&trusts_ours, "node-a"), (&trusts_theirs, "node-b")] {
        let (mut a, mut b) = pair(client, &server, host);
        a.queue(&MessageHeader::new(Kind::Ping, PoolId::from_bytes([7; 16])), None);
        let error = exchange(&mut a, &mut b, &mut Sink::default(), |_| false).unwrap_err();
        assert!(error.to_string().contains("TLS: "), "{host}: {error}");
    }
}

#[test]
fn a_client_without_a_certificate_is_refused_where_one_is_asked_for() {
    let files = certificates(&["node-a"]);
    let server = ServerTls::load(&files.identity, Some(&files.authority)).unwrap();
    let stranger = ClientTls::load(&files.authority, None).unwrap();
    let known = ClientTls::load(&files.authority, Some(&files.identity)).unwrap();
    let talk = |client: &ClientTls| {
        let (mut a, mut b) = pair(client, &server, "node-a");
        a.queue(&MessageHeader::new(Kind::Ping, PoolId::from_bytes([7; 16])), None);
        let mut sink = Sink::default();
        let result = exchange(&mut a, &mut b, &mut sink, |s| s.delivered == 1);
        (result, sink.delivered)
    };
    let (refused, delivered) = talk(&stranger);
    assert!(refused.unwrap_err().to_string().contains("TLS: "));
    assert_eq!(delivered, 0);
    assert_eq!(talk(&known).1, 1);
}

#[test]
fn a_peer_that_does_not_speak_tls_is_refused() {
    let files = certificates(&["node-a"]);
    let (a, b) = raw_pair();
    let mut a = TcpConnection::new(a, DEAD_AFTER).unwrap();
    let server = ServerTls::load(&files.identity, None).unwrap();
    let mut b = TcpConnection::accepted_with_tls(b, DEAD_AFTER, &server).unwrap();
    a.queue(&MessageHeader::new(Kind::Ping, PoolId::from_bytes([7; 16])), None);
    let error = exchange(&mut a, &mut b, &mut Sink::default(), |_| false).unwrap_err();
    assert!(error.to_string().contains("TLS: ") || error.to_string().contains("RMR"), "{error}");
}

#[test]
fn files_that_are_not_what_they_should_be_are_named() {
    let files = certificates(&["node-a"]);
    let absent = PathBuf::from("/nonexistent/authority.pem");
    let error = ClientTls::load(&absent, None).unwrap_err().to_string();
    assert!(error.contains("/nonexistent/authority.pem: expected certificates in PEM form"), "{error}");
    let error = ClientTls::load(&files.identity.key, None).unwrap_err().to_string();
    assert!(error.contains("own.key: expected certificates in PEM form: there is none"), "{error}");
    let swapped = IdentityFiles {
        certificate: files.identity.certificate.clone(),
        key: files.identity.certificate.clone(),
    };
    let error = ServerTls::load(&swapped, None).unwrap_err().to_string();
    assert!(error.contains("expected a private key in PEM form"), "{error}");
    let other = certificates(&["node-a"]);
    let mixed =
        IdentityFiles { certificate: files.identity.certificate.clone(), key: other.identity.key.clone() };
    assert!(matches!(ServerTls::load(&mixed, None), Err(TlsError::Identity { .. })));
}

/// Looks for a pool at a node with this certificate, as a client that trusts this authority.
fn discover_at(node: &Certificates, authority: &Path) -> (crate::driver::PoolError, Duration) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tls://{}", listener.local_addr().unwrap());
    let tls = ServerTls::load(&node.identity, None).unwrap();
    // It ends with the test's process.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut connection = TcpConnection::accepted_with_tls(stream.unwrap(), DEAD_AFTER, &tls).unwrap();
            let mut sink = Sink::default();
            while connection.receive(&mut sink).is_ok() && connection.flush().is_ok() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    });
    let mut config = crate::client::Config::new(crate::pool::ClientId::random(), "a test");
    config.tls = Some(ClientTls::load(authority, None).unwrap());
    let selector = crate::client::PoolSelector::Name("p".into());
    let seeds = [address.parse().unwrap()];
    let start = Instant::now();
    let error = crate::driver::discover(config, selector, &seeds, DEAD_AFTER).unwrap_err();
    (error, start.elapsed())
}

#[test]
fn a_node_whose_certificate_is_not_accepted_ends_the_search_at_once_with_advice() {
    let good = certificates(&["127.0.0.1"]);
    let expired = certificates_with(&["127.0.0.1"], |parameters| {
        parameters.not_before = rcgen::date_time_ymd(2020, 1, 1);
        parameters.not_after = rcgen::date_time_ymd(2021, 1, 1);
    });
    let other_name = certificates(&["elsewhere"]);
    for (node, authority, words) in [
        (&expired, &expired.authority, "has expired"),
        (&other_name, &other_name.authority, "does not name the host"),
        (&good, &other_name.authority, "is of no authority that is trusted here"),
    ] {
        let (error, took) = discover_at(node, authority);
        let text = error.to_string();
        assert!(matches!(error, crate::driver::PoolError::Distrust(_)), "{text}");
        assert!(text.contains(words) && text.contains("tls://127.0.0.1:"), "{text}");
        assert!(took < Duration::from_secs(20), "{took:?}");
    }
}
