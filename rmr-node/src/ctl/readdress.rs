//! `rmrctl member address`: tells a pool where the nodes of its members are now.

use rmr_common::pool::{Command, MemberAddress};
use serde_json::json;

use super::assess::Picture;
use super::change::{COMMAND_LIMIT, look};
use super::coordinate::deliver;
use super::sync::outcome;
use super::{Context, CtlError, Outcome, Survey};
use crate::admin::api::PoolKey;

pub(super) async fn address(context: &Context, pool: &PoolKey) -> Result<Outcome, CtlError> {
    let (survey, picture) = look(context, pool).await?;
    let moved = picture.moved.clone();
    let name = picture.spec.name.clone();
    tell(context, &survey, &picture, &moved).await?;
    let mut headline = match moved[..] {
        [] => format!("pool {name}: every node that was asked is where the pool knows it"),
        _ => format!("pool {name}: new addresses"),
    };
    for new in &moved {
        let old = picture.spec.member(new.member).map(|m| m.address.to_string()).unwrap_or_default();
        headline += &format!("\n  member {}: {old} is now {}", new.member, new.address);
    }
    let seen = |m: &&rmr_common::pool::MemberSpec| picture.reports.iter().all(|r| r.store != m.store);
    for line in picture.spec.members.iter().filter(seen) {
        headline +=
            &format!("\n  member {}: not seen on the nodes asked, stays at {}", line.id, line.address);
    }
    let (survey, picture) = look(context, pool).await?;
    Ok(outcome(&survey, &picture, &headline, json!({ "moved": moved })))
}

/// Tells the pool the addresses of members whose nodes moved, all at once.
pub(super) async fn tell(
    context: &Context,
    survey: &Survey,
    picture: &Picture,
    moved: &[MemberAddress],
) -> Result<(), CtlError> {
    if moved.is_empty() {
        return Ok(());
    }
    // Where nobody is attached, rmrctl attaches, and finds the nodes where they are.
    let mut there = picture.clone();
    for new in moved {
        for line in there.spec.members.iter_mut().filter(|m| m.id == new.member) {
            line.address = new.address.clone();
        }
    }
    let command = Command::Readdress { members: moved.to_vec() };
    deliver(context, survey, &there, &command, COMMAND_LIMIT).await?;
    Ok(())
}
