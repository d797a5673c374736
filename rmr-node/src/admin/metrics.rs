//! The Prometheus page: what `GET /metrics` answers, in text format 0.0.4.
//!
//! Written by hand from the same statuses that the JSON routes give, so both always agree.

use std::fmt::{Display, Write};

use rmr_common::pool::MemberState;

use super::api::{ClientState, LeftOut, NodeInfo, PeerCondition, PoolStatus, StoreState};

/// Content type of the page.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The page for one node, its stores, and those that it left out.
#[must_use]
pub fn page(node: &NodeInfo, pools: &[PoolStatus], left_out: &[LeftOut]) -> String {
    let mut page = Page { text: String::with_capacity(4096) };
    page.node(node);
    page.left_out(left_out);
    page.stores(pools);
    page.peers(pools);
    page.text
}

struct Page {
    text: String,
}

impl Page {
    fn node(&mut self, node: &NodeInfo) {
        let labels = [("name", node.name.as_str()), ("version", node.version.as_str())];
        self.family("rmr_node_info", "gauge", "Name and version of the node.");
        self.sample("rmr_node_info", &labels, 1);
        let started = Seconds(node.started_unix_ms.0);
        self.single("rmr_node_start_time_seconds", "gauge", "When the process started.", started);
        self.single("rmr_node_connections", "gauge", "Open data connections.", node.connections);
        self.single("rmr_node_connections_max", "gauge", "Limit of data connections.", node.max_connections);
        self.single("rmr_node_buffer_bytes", "gauge", "Buffer memory.", node.buffer_bytes);
        self.single("rmr_node_buffer_used_bytes", "gauge", "Buffer memory in use.", node.buffer_used_bytes);
        self.single(
            "rmr_node_buffer_lent_bytes",
            "gauge",
            "Buffer memory lent to clients over RDMA, to write to.",
            node.buffer_lent_bytes,
        );
        let t = &node.transport;
        for (name, help, value) in [
            ("rmr_tcp_sent_bytes_total", "Bytes sent over TCP, copied by the kernel.", t.tcp_sent_bytes),
            (
                "rmr_tcp_received_bytes_total",
                "Bytes received over TCP, copied by the kernel.",
                t.tcp_received_bytes,
            ),
            (
                "rmr_rdma_data_copied_bytes_total",
                "Data copied by the processor for RDMA.",
                t.data_copied_bytes,
            ),
            ("rmr_rdma_body_copied_bytes_total", "Control messages copied for RDMA.", t.body_copied_bytes),
            ("rmr_rdma_sends_total", "RDMA sends posted.", t.sends),
            ("rmr_rdma_writes_total", "RDMA writes posted.", t.writes),
            (
                "rmr_rdma_writes_with_immediate_total",
                "RDMA writes posted that end a write.",
                t.writes_with_immediate,
            ),
            ("rmr_rdma_windows_bound_total", "Memory windows bound for peers.", t.windows_bound),
            ("rmr_rdma_windows_invalidated_total", "Their keys made invalid.", t.windows_invalidated),
            ("rmr_rdma_receives_total", "RDMA receive buffers used.", t.receives),
            ("rmr_rdma_posts_total", "Chains of work posted.", t.posts),
        ] {
            self.single(name, "counter", help, value);
        }
        let failures = &node.authentication_failures;
        let name = "rmr_authentication_failures_total";
        self.family(name, "counter", "Connections not let in because of a pool's key.");
        for (reason, count) in [
            ("missing", failures.missing),
            ("wrong", failures.wrong),
            ("no_key_here", failures.no_key_here),
            ("unusable_here", failures.unusable_here),
        ] {
            self.sample(name, &[("reason", reason)], count);
        }
    }

    fn left_out(&mut self, stores: &[LeftOut]) {
        let faulty = stores.iter().filter(|l| !l.closed).count();
        self.single("rmr_node_stores_left_out", "gauge", "Stores that are not served for a fault.", faulty);
        let name = "rmr_store_left_out_since_seconds";
        self.family(name, "gauge", "Since when a store is left out or closed, Unix time.");
        for store in stores {
            let pool = store.pool.map(|id| id.to_string()).unwrap_or_default();
            let member = store.member.map(|id| id.to_string()).unwrap_or_default();
            let path = store.path.display().to_string();
            let labels = [
                ("path", path.as_str()),
                ("pool", &pool),
                ("name", store.name.as_deref().unwrap_or_default()),
                ("member", &member),
                ("closed", if store.closed { "true" } else { "false" }),
            ];
            self.sample(name, &labels, Seconds(store.since_unix_ms.0));
        }
    }

    fn stores(&mut self, pools: &[PoolStatus]) {
        type Value = fn(&PoolStatus) -> Option<u64>;
        let families: [(&str, &str, &str, Value); 28] = [
            (
                "rmr_store_regressed",
                "gauge",
                "1 while a store that went back in time is not copied over.",
                |p| Some(u64::from(p.is_regressed())),
            ),
            ("rmr_pool_size_bytes", "gauge", "Size of the pool.", |p| Some(p.spec.size)),
            ("rmr_store_serving", "gauge", "1 if the store serves, 0 if it waits or failed.", |p| {
                Some(u64::from(p.store_state == StoreState::Serving))
            }),
            ("rmr_store_view", "gauge", "Number of the newest view in the store.", |p| Some(p.view.number.0)),
            ("rmr_store_epoch", "gauge", "Epoch of the newest view in the store.", |p| Some(p.view.epoch.0)),
            ("rmr_store_clean_members", "gauge", "Clean members in that view.", |p| {
                Some(u64::from(p.view.clean().len()))
            }),
            ("rmr_store_members", "gauge", "Members in that view.", |p| {
                u64::try_from(p.view.members.len()).ok()
            }),
            ("rmr_store_client_attached", "gauge", "1 while a client is attached.", |p| {
                Some(u64::from(p.client.as_ref().is_some_and(|c| c.state == ClientState::Attached)))
            }),
            ("rmr_store_reads_total", "counter", "Reads answered.", |p| Some(p.io.reads)),
            ("rmr_store_read_bytes_total", "counter", "Bytes read.", |p| Some(p.io.read_bytes)),
            ("rmr_store_writes_total", "counter", "Writes answered.", |p| Some(p.io.writes)),
            ("rmr_store_written_bytes_total", "counter", "Bytes written.", |p| Some(p.io.written_bytes)),
            ("rmr_store_zeroes_total", "counter", "Discards and write-zeroes answered.", |p| {
                Some(p.io.zeroes)
            }),
            ("rmr_store_flushes_total", "counter", "Flushes answered.", |p| Some(p.io.flushes)),
            ("rmr_store_compared_bytes_total", "counter", "Bytes read to compare members.", |p| {
                Some(p.io.compared_bytes)
            }),
            ("rmr_store_errors_total", "counter", "Requests answered with an error.", |p| Some(p.io.errors)),
            ("rmr_store_resync_sent_bytes_total", "counter", "Bytes answered to stale members.", |p| {
                Some(p.io.resync_sent_bytes)
            }),
            ("rmr_store_resync_received_bytes_total", "counter", "Bytes received from sources.", |p| {
                Some(p.io.resync_received_bytes)
            }),
            ("rmr_store_resync_written_blocks_total", "counter", "Missed blocks written.", |p| {
                Some(p.io.resync_written_blocks)
            }),
            ("rmr_store_metadata_pages_total", "counter", "Metadata pages written.", |p| {
                Some(p.io.metadata_pages)
            }),
            ("rmr_store_read_errors_total", "counter", "Reads that the disk failed.", |p| {
                Some(p.io.read_errors)
            }),
            (
                "rmr_store_digest_mismatches_total",
                "counter",
                "Writes that arrived with another digest.",
                |p| Some(p.io.digest_mismatches),
            ),
            ("rmr_store_in_flight", "gauge", "Requests taken and not answered.", |p| Some(p.io.in_flight)),
            ("rmr_store_read_p99_microseconds", "gauge", "99th percentile of read latency.", |p| {
                p.latency.map(|l| l.read_p99_us)
            }),
            ("rmr_store_write_p99_microseconds", "gauge", "99th percentile of write latency.", |p| {
                p.latency.map(|l| l.write_p99_us)
            }),
            ("rmr_resync_blocks_left", "gauge", "Stale 4 KiB blocks of this member.", |p| {
                p.resync.as_ref().map(|r| r.blocks_left)
            }),
            ("rmr_resync_bytes_per_second", "gauge", "Speed of the resync.", |p| {
                p.resync.as_ref().map(|r| r.bytes_per_s)
            }),
            ("rmr_resync_since_seconds", "gauge", "Since when a resync is needed, Unix time.", |p| {
                p.resync.as_ref().map(|r| r.since_unix_ms.0 / 1000)
            }),
        ];
        for (name, kind, help, value) in families {
            self.family(name, kind, help);
            for pool in pools {
                let (id, member) = (pool.spec.id.to_string(), pool.member.to_string());
                let labels = [("pool", id.as_str()), ("name", &pool.spec.name), ("member", &member)];
                if let Some(value) = value(pool) {
                    self.sample(name, &labels, value);
                }
            }
        }
    }

    fn peers(&mut self, pools: &[PoolStatus]) {
        self.family("rmr_member_state", "gauge", "1 for the state of the member in this store's view.");
        for pool in pools {
            for member in &pool.view.members {
                for state in [MemberState::Clean, MemberState::Syncing, MemberState::Out] {
                    let (id, of, by) =
                        (pool.spec.id.to_string(), member.id.to_string(), pool.member.to_string());
                    let state_name = state.to_string().to_lowercase();
                    let labels = [
                        ("pool", id.as_str()),
                        ("name", &pool.spec.name),
                        ("member", &by),
                        ("of", &of),
                        ("state", &state_name),
                    ];
                    self.sample("rmr_member_state", &labels, u8::from(member.state == state));
                }
            }
        }
        self.conditions(pools);
        self.family("rmr_member_missed_bytes", "gauge", "What another member misses, by this store's maps.");
        for pool in pools {
            for peer in &pool.peers {
                let (id, of, by) =
                    (pool.spec.id.to_string(), peer.member.to_string(), pool.member.to_string());
                let labels = [("pool", id.as_str()), ("name", &pool.spec.name), ("member", &by), ("of", &of)];
                let missed = peer.missed.bytes(pool.spec.chunk_size.bytes());
                self.sample("rmr_member_missed_bytes", &labels, missed);
            }
        }
    }

    /// Why members are not current, and what disks fail.
    fn conditions(&mut self, pools: &[PoolStatus]) {
        type Value = fn(&PeerCondition) -> Option<u64>;
        let families: [(&str, &str, Value); 4] = [
            ("rmr_member_condition", "1 for the reason why another member is not current.", |_| Some(1)),
            ("rmr_member_failures", "Losses and failed rejoins of the member in a row.", |c| {
                Some(c.failures.into())
            }),
            ("rmr_member_failing_since_seconds", "When the first of them was, Unix time.", |c| {
                c.since_unix_ms.map(|since| since.0 / 1000)
            }),
            ("rmr_member_next_rejoin_seconds", "When the next rejoin is tried, Unix time.", |c| {
                c.retry_unix_ms.map(|retry| retry.0 / 1000)
            }),
        ];
        for (name, help, value) in families {
            self.family(name, "gauge", help);
            for pool in pools {
                for (peer, condition) in pool.peers.iter().filter_map(|p| Some((p, p.condition.as_ref()?))) {
                    let (id, of, by) =
                        (pool.spec.id.to_string(), peer.member.to_string(), pool.member.to_string());
                    let labels = [
                        ("pool", id.as_str()),
                        ("name", &pool.spec.name),
                        ("member", &by),
                        ("of", &of),
                        ("cause", condition.cause.name()),
                    ];
                    if let Some(value) = value(condition) {
                        self.sample(name, &labels, value);
                    }
                }
            }
        }
        self.family("rmr_store_disk_errors", "gauge", "Errors of the store's disk of late, by their kind.");
        for (pool, disk) in pools.iter().filter_map(|p| Some((p, p.disk.as_ref()?))) {
            let (id, member) = (pool.spec.id.to_string(), pool.member.to_string());
            let labels = [
                ("pool", id.as_str()),
                ("name", &pool.spec.name),
                ("member", &member),
                ("cause", disk.cause.name()),
            ];
            self.sample("rmr_store_disk_errors", &labels, disk.errors);
        }
    }

    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn single(&mut self, name: &str, kind: &str, help: &str, value: impl Display) {
        self.family(name, kind, help);
        self.sample(name, &[], value);
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        self.text.push_str(name);
        for (i, (label, text)) in labels.iter().enumerate() {
            self.text.push(if i == 0 { '{' } else { ',' });
            let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(self.text, "{label}=\"{text}\"");
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        let _ = writeln!(self.text, " {value}");
    }
}

/// Milliseconds, printed as seconds.
struct Seconds(u64);

impl Display for Seconds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{:03}", self.0 / 1000, self.0 % 1000)
    }
}

#[cfg(test)]
mod tests {
    use rmr_common::pool::Cause;

    use crate::admin::api::UnixMs;
    use crate::admin::fake;

    use super::*;

    #[test]
    fn the_page_has_one_sample_per_store_and_escapes_labels() {
        let mut status = fake::pool_status("vm-1", 2, 1);
        status.io.writes = 42;
        status.peers[0].missed.blocks = Some(3);
        status.peers[0].condition = Some(PeerCondition {
            cause: Cause::DiskFull,
            text: String::new(),
            failures: 3,
            since_unix_ms: None,
            retry_unix_ms: Some(UnixMs(9_000)),
        });
        let mut node = fake::node_info("a\"b\\");
        node.started_unix_ms.0 = 1_500;
        let text = page(&node, &[status.clone()], &[]);
        let labels = format!("{{pool=\"{}\",name=\"vm-1\",member=\"1\"", status.spec.id);
        for line in [
            format!("rmr_store_writes_total{labels}}} 42"),
            format!("rmr_member_missed_bytes{labels},of=\"0\"}} 12288"),
            format!("rmr_member_state{labels},of=\"0\",state=\"clean\"}} 1"),
            format!("rmr_member_state{labels},of=\"0\",state=\"out\"}} 0"),
            format!("rmr_member_failures{labels},of=\"0\",cause=\"disk_full\"}} 3"),
            format!("rmr_member_next_rejoin_seconds{labels},of=\"0\",cause=\"disk_full\"}} 9"),
            "rmr_node_start_time_seconds 1.500".to_owned(),
        ] {
            assert!(text.lines().any(|l| l == line), "no line {line} in\n{text}");
        }
        assert!(text.contains("name=\"a\\\"b\\\\\""), "{text}");
        assert!(!text.contains("rmr_resync_blocks_left{"), "{text}");
    }

    #[test]
    fn every_sample_belongs_to_the_family_above_it() {
        let text = page(
            &fake::node_info("n"),
            &[fake::pool_status("vm-1", 3, 0)],
            &[fake::left_out("/dev/vdb", "vm-2", 1)],
        );
        let mut family = "";
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                family = rest.split(' ').next().unwrap();
            } else if !line.starts_with('#') {
                assert_eq!(line.split(['{', ' ']).next().unwrap(), family, "{line}");
            }
        }
    }
}
