//! Scenarios that do not care what carries the data, on this machine's own processors and network; `membership`, `digests`,
//! `verify`, `failures` and `migration` have more of them. `verbs.rs` runs the same ones in a guest over verbs.

use anyhow::Result;
use cloud_hypervisor_tests::scenario;

#[test]
fn requests_of_all_shapes_are_carried_whole_and_counted_once_for_each_leg() -> Result<()> {
    ["io", "counts", "segments", "exhaustion"].into_iter().try_for_each(scenario::test)
}

#[test]
fn a_member_that_was_away_is_brought_up_to_date_by_exactly_what_it_missed() -> Result<()> {
    scenario::test("resync")
}

#[test]
fn who_has_the_key_of_a_pool_is_let_in_nobody_else_is_and_the_key_is_changed_under_a_running_disk()
-> Result<()> {
    scenario::test("pool-key")
}

#[test]
fn nodes_killed_one_after_the_other_under_load_come_back_and_no_promise_is_broken() -> Result<()> {
    scenario::test("killed-nodes")
}

#[test]
fn a_daemon_killed_under_load_again_and_again_leaves_copies_that_agree() -> Result<()> {
    scenario::test("killed-daemon")
}

#[test]
fn everything_killed_at_once_comes_back_with_all_that_was_promised() -> Result<()> {
    scenario::test("killed-everything")
}

#[test]
fn a_daemon_that_stood_still_loses_no_leg_by_that_and_a_node_that_did_so_comes_back() -> Result<()> {
    scenario::test("standstill")
}
