//! `rmrctl status`: a headline in words for each pool, then data, link and sync of each member, apart.

use serde_json::json;

use super::assess::{self, Assessment, Leg, Level, MemberLine, Picture};
use super::{Context, CtlError, Outcome, Survey, format};
use crate::admin::api::{Authentication, ClientState, ClientStatus, PoolKey, StoreState, UnixMs};
use rmr_common::pool::MemberState;

/// Exit code when every pool that was seen is safe, and a node that was asked did not answer.
const EXIT_SILENT: u8 = 6;

pub(super) async fn status(context: &Context, key: Option<&PoolKey>) -> Result<Outcome, CtlError> {
    let survey = context.survey().await;
    let now = UnixMs::now();
    if !survey.any_answered() {
        return Ok(nobody(&survey));
    }
    let pictures = match key {
        Some(key) => vec![survey.picture(key)?],
        None => survey.pictures(),
    };
    let pools: Vec<_> = pictures.iter().map(|p| (p, assess::assess(p, survey.all_answered(), now))).collect();
    let mut texts: Vec<_> = pools.iter().map(|(p, a)| pool_text(p, a, now)).collect();
    // Nothing is known of a pool all of whose stores are left out, but that.
    let beside = if key.is_none() { survey.left_out_beside(&pictures) } else { Vec::new() };
    texts.extend(beside.iter().map(|(node, l)| format!("{node}: {}\n", format::plain(&l.words()))));
    let json = pools
        .iter()
        .map(|(p, a)| {
            json!({
                "pool": p.spec.id,
                "name": p.spec.name,
                "size_bytes": p.spec.size,
                "view": p.view.number,
                "epoch": p.view.epoch,
                "assessment": a,
            })
        })
        .collect::<Vec<_>>();
    // What is left out may be all that there is of a pool.
    let floor = if beside.iter().any(|(_, l)| !l.closed) { Level::Unknown.exit_code() } else { 0 };
    let worst = pools.iter().map(|(_, a)| a.level.exit_code()).fold(floor, u8::max);
    // What was seen is safe, and that is not all that was asked for.
    let exit = if worst == 0 && !survey.all_answered() { EXIT_SILENT } else { worst };
    let mut text = if texts.is_empty() { "no pools\n".to_owned() } else { texts.join("\n") };
    if key.is_none() && !survey.all_answered() {
        text += &format!(
            "note: {} did not answer; a pool that only such nodes have is not shown\n",
            survey.silent()
        );
    }
    Ok(Outcome {
        text,
        json: json!({"pools": json, "nodes": survey.json(), "left_out": beside}),
        warnings: survey.errors(),
        exit,
    })
}

fn nobody(survey: &Survey) -> Outcome {
    Outcome {
        text: "UNKNOWN: no node answered\n".into(),
        json: json!({"pools": [], "nodes": survey.json()}),
        warnings: survey.errors(),
        exit: Level::Unknown.exit_code(),
    }
}

fn pool_text(picture: &Picture, assessment: &Assessment, now: UnixMs) -> String {
    let mut text = format!(
        "pool {}  {}  {}, view {}, epoch {}\n  {}\n",
        picture.spec.name,
        picture.spec.id,
        format::bytes(picture.spec.size),
        picture.view.number,
        picture.view.epoch,
        assessment.headline
    );
    text += &format!("  client: {}\n", client_words(assessment.client.as_ref(), now));
    text += &format!("  authentication: {}\n", authentication_words(picture));
    text += &members_table(&assessment.members);
    for note in &assessment.notes {
        text += &format!("  note: {note}\n");
    }
    text
}

/// The holder of a pool in words.
pub(super) fn client_words(client: Option<&ClientStatus>, now: UnixMs) -> String {
    client.map_or_else(
        || "none attached".to_owned(),
        |c| {
            let state = match c.state {
                ClientState::Attached => "attached",
                ClientState::Crashed => "lost without a detach, was attached",
            };
            let since = c.attached_unix_ms.map_or_else(
                || "before its node was started".to_owned(),
                |since| format!("since {}", format::utc_with_age(since, now)),
            );
            let (text, address) = (format::plain(&c.text), format::plain(&c.address));
            format!("{text} ({}, from {address}) {state} {since}", c.id)
        },
    )
}

/// What whoever connects has to prove, in words; of each node, where they differ.
fn authentication_words(picture: &Picture) -> String {
    let words = |state: &Authentication| match state {
        Authentication::None => "no authentication, whoever reaches a data address may attach".to_owned(),
        Authentication::Key => "pool key".to_owned(),
        Authentication::Rotating => "pool key, new and old".to_owned(),
        Authentication::Unusable { reason } => format!("NOBODY IS LET IN: {}", format::plain(reason)),
    };
    let Some(first) = picture.reports.first() else { return "not seen".to_owned() };
    if picture.reports.iter().all(|r| r.authentication == first.authentication) {
        return words(&first.authentication);
    }
    let each =
        picture.reports.iter().map(|r| format!("{}: {}", format::plain(&r.node), words(&r.authentication)));
    each.collect::<Vec<_>>().join("; ")
}

/// The members with data, link and sync apart.
pub(super) fn members_table(members: &[MemberLine]) -> String {
    let mut table =
        format::Table::new(&["MEMBER", "NODE", "ADDRESS", "DATA", "MISSED", "STORE", "LINK", "SYNC"]);
    for line in members {
        table.row(vec![
            line.member.to_string(),
            line.node.clone().unwrap_or_else(|| "?".into()),
            line.address.clone(),
            match (line.state, line.maintenance) {
                (MemberState::Out, true) => "Out by plan".into(),
                (state, _) => state.to_string(),
            },
            match (line.state, line.missed_exact) {
                (MemberState::Clean, _) => "-".into(),
                (_, true) => format::bytes(line.missed_bytes),
                (_, false) => format!("<= {}", format::bytes(line.missed_bytes)),
            },
            match &line.store_state {
                None if line.left_out.is_some() => "left out".into(),
                None => "not seen".into(),
                Some(StoreState::Serving) => "serving".into(),
                Some(StoreState::Waiting { .. }) => "waiting".into(),
                Some(StoreState::Failed { .. }) => "failed".into(),
            },
            match line.leg {
                Leg::Up => "client up",
                Leg::Lost => "client lost",
                Leg::None => "no client",
                Leg::Unseen => "not seen",
            }
            .into(),
            line.resync.as_ref().map_or_else(|| "-".into(), assess::resync_words),
        ]);
    }
    table.print(2)
}
