//! Guests that change buffers while they are written, and whose writes race for the same places: scenarios over TCP.

use anyhow::Result;
use cloud_hypervisor_tests::scenario;

#[test]
fn buffers_that_change_in_flight_leave_equal_stores_with_digests_and_different_ones_without() -> Result<()> {
    scenario::test("changing-buffers")
}

#[test]
fn overlapping_writes_that_race_on_four_queues_leave_equal_stores() -> Result<()> {
    scenario::test("racing-writes")
}
