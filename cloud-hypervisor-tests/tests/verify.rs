//! A byte of a store is changed behind the back of everybody: scenarios of `verify`, over TCP.

use anyhow::Result;
use cloud_hypervisor_tests::scenario;

#[test]
fn without_a_guest_rmrctl_finds_the_block_and_repairs_it_by_the_member_that_is_trusted() -> Result<()> {
    scenario::test("verify-trust")
}

#[test]
fn under_load_a_verify_finds_the_block_and_no_other_and_the_majority_mends_it() -> Result<()> {
    scenario::test("verify-majority")
}
