//! Waiting for copies to become current: how far they are, and `rmrctl` as the coordinator where no client is attached, since
//! without one nothing is brought up to date. Also the operator's override of the recovery rule.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use rmr_common::pool::{Command, MemberId, MemberSet, MemberState, PoolSpec, Refusal};
use rmr_common::words;
use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;

use super::assess::{self, Assessment, Level, MemberLine, Picture};
use super::change_args::{ForceFromArgs, ResyncArgs};
use super::coordinate::{Hold, NotDone, NotHeld, deliver, lost_client};
use super::status::{client_words, members_table};
use super::{Context, CtlError, Outcome, Survey, format};
use crate::admin::api::{ClientState, ClientStatus, PoolKey, UnixMs};
use crate::admin::words::condition_words;

/// A command that begins something is answered within this.
const COMMAND_LIMIT: Duration = Duration::from_secs(20);
/// How often progress is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// So long members have to hear that the pool goes on with another one.
const TELL_LIMIT: Duration = Duration::from_secs(20);
/// Where nobody watches, a line is enough this often.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Waits until the copies of a pool are current: that of `member`, or all that are to be.
pub(super) async fn wait_until_current(
    context: &Context,
    pool: &PoolKey,
    member: Option<MemberId>,
    limit: Option<Duration>,
) -> Result<(Survey, Picture), CtlError> {
    let interrupts =
        |kind| signal(kind).map_err(|e| CtlError::failed(format!("interrupts cannot be watched: {e}")));
    let mut stop = (interrupts(SignalKind::interrupt())?, interrupts(SignalKind::terminate())?);
    let mut hold = None;
    let result = follow(context, pool, member, limit, &mut hold, &mut stop).await;
    // Whatever happened: a pool that is left in good order can be attached to at once.
    if let Some(hold) = hold {
        hold.release().await;
    }
    result
}

async fn follow(
    context: &Context,
    pool: &PoolKey,
    member: Option<MemberId>,
    limit: Option<Duration>,
    hold: &mut Option<Hold>,
    stop: &mut (Signal, Signal),
) -> Result<(Survey, Picture), CtlError> {
    let (start, mut progress) = (Instant::now(), Progress::new(context.json));
    loop {
        let survey = context.survey().await;
        let picture = survey.picture(pool)?;
        let assessment = assess::assess(&picture, survey.all_answered(), UnixMs::now());
        let left = wanted(&assessment, member)?;
        // Where not all current copies were seen, a later view may be known elsewhere, unless a coordinator is at work.
        let is_certain = assessment.level != Level::Unknown || hold.is_some() || is_attached(&picture);
        if left.is_empty() && is_certain && picture.contradiction.is_none() {
            progress.end();
            return Ok((survey, picture));
        }
        if hold.as_ref().is_some_and(|hold| !hold.is_held()) {
            *hold = None;
        }
        let mut obstacle = None;
        if hold.is_none() && !is_attached(&picture) {
            match Hold::attach(context, &picture, None).await {
                Ok(held) => *hold = Some(held),
                Err(NotHeld::HeldBy(_)) => {}
                Err(NotHeld::Failed(reason)) => obstacle = Some(reason),
            }
        }
        progress.tell(&picture.spec, &left, obstacle.as_deref());
        if let Some(limit) = limit.filter(|limit| start.elapsed() >= *limit) {
            progress.end();
            let limit = words::time(limit);
            let names: Vec<_> = left.iter().map(line_words).collect();
            let why = obstacle.map(|reason| format!(" ({reason})")).unwrap_or_default();
            return Err(CtlError::failed(format!(
                "not done within {limit}: {}{why}; it goes on while a client is attached, and when this command is run again",
                names.join("; ")
            )));
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            _ = stop.0.recv() => return Err(interrupted(&mut progress)),
            _ = stop.1.recv() => return Err(interrupted(&mut progress)),
        }
    }
}

fn interrupted(progress: &mut Progress) -> CtlError {
    progress.end();
    CtlError::failed("interrupted; it goes on while a client is attached, and when this command is run again")
}

/// The members that are waited for and not Clean yet.
fn wanted(assessment: &Assessment, member: Option<MemberId>) -> Result<Vec<MemberLine>, CtlError> {
    let lines = assessment.members.iter();
    let Some(member) = member else {
        return Ok(lines.filter(|l| l.state != MemberState::Clean && !l.maintenance).cloned().collect());
    };
    let line = lines.clone().find(|l| l.member == member).ok_or_else(|| {
        CtlError::failed(format!("member {member} is no longer in the pool: somebody else has removed it"))
    })?;
    if line.maintenance {
        let text = format!("member {member} is in maintenance, and stays out until that is switched off");
        return Err(CtlError::failed(text));
    }
    Ok(if line.state == MemberState::Clean { Vec::new() } else { vec![line.clone()] })
}

/// Whether a client is attached as the active members see it.
pub(super) fn is_attached(picture: &Picture) -> bool {
    let active = picture.view.active();
    let told = picture.reports.iter().filter(|r| active.contains(r.member));
    told.filter_map(|r| r.client.as_ref()).any(|c| c.state == ClientState::Attached)
}

/// What is told of copies that are not current yet.
struct Progress {
    json: bool,
    terminal: bool,
    told: Option<(Instant, Vec<(MemberId, MemberState)>)>,
}

impl Progress {
    fn new(json: bool) -> Self {
        Self { json, terminal: std::io::stderr().is_terminal(), told: None }
    }

    fn tell(&mut self, spec: &PoolSpec, left: &[MemberLine], obstacle: Option<&str>) {
        let states: Vec<_> = left.iter().map(|l| (l.member, l.state)).collect();
        let is_due = match &self.told {
            None => true,
            Some((at, before)) => {
                self.json || self.terminal || *before != states || at.elapsed() >= LINE_EVERY
            }
        };
        if !is_due {
            return;
        }
        self.told = Some((Instant::now(), states));
        if self.json {
            let members: Vec<_> = left.iter().map(|l| json!(l)).collect();
            let line = json!({"progress": {"pool": spec.id, "members": members, "obstacle": obstacle}});
            // Whoever reads may be gone; the work goes on.
            let _ = writeln!(std::io::stdout(), "{line}");
            return;
        }
        let words: Vec<_> = left.iter().map(line_words).chain(obstacle.map(str::to_owned)).collect();
        let text = format::plain(&words.join("; "));
        // As above.
        let _ = if self.terminal {
            write!(std::io::stderr(), "\r\x1b[K{text}")
        } else {
            writeln!(std::io::stderr(), "{text}")
        };
    }

    fn end(&mut self) {
        if self.terminal && !self.json && self.told.take().is_some() {
            let _ = writeln!(std::io::stderr());
        }
    }
}

/// How far one member is.
fn line_words(line: &MemberLine) -> String {
    let name = line.node.as_ref().unwrap_or(&line.address);
    let about = if line.missed_exact { "" } else { "up to " };
    let missed = format::bytes(line.missed_bytes);
    let words = match (&line.resync, line.state) {
        (Some(resync), MemberState::Syncing) => assess::resync_words(resync),
        (None, MemberState::Syncing) => format!("{about}{missed} left"),
        (_, MemberState::Out) => {
            let why = line.condition.as_ref().map(|c| condition_words(c, UnixMs::now()));
            let why = why.map(|why| format!("; {why}")).unwrap_or_default();
            format!("waits to be brought in, missed {about}{missed}{why}")
        }
        (_, MemberState::Clean) => "current".to_owned(),
    };
    format!("member {} ({name}) {}: {words}", line.member, line.state)
}

/// Both tables of a pool after a change, below a headline of the command's.
pub(super) fn outcome(
    survey: &Survey,
    picture: &Picture,
    headline: &str,
    mut json: serde_json::Value,
) -> Outcome {
    let now = UnixMs::now();
    let a = assess::assess(picture, survey.all_answered(), now);
    let text = format!("{headline}\n  {}\n{}", a.headline, members_table(&a.members));
    json["pool"] = json!(picture.spec.id);
    json["spec"] = json!(picture.spec);
    json["view"] = json!(picture.view);
    json["assessment"] = json!(a);
    Outcome { text, json, warnings: survey.errors(), exit: 0 }
}

pub(super) async fn resync(context: &Context, args: &ResyncArgs) -> Result<Outcome, CtlError> {
    bring_in_now(context, &args.pool).await?;
    let (survey, picture) = wait_until_current(context, &args.pool, None, args.wait_timeout).await?;
    let headline = format!("pool {}: every copy that is to be current is", picture.spec.name);
    Ok(outcome(&survey, &picture, &headline, json!({})))
}

/// Tells the client that is attached not to wait any longer with members that failed. Without one, whoever attaches next begins
/// with them at once.
async fn bring_in_now(context: &Context, pool: &PoolKey) -> Result<(), CtlError> {
    let survey = context.survey().await;
    let picture = survey.picture(pool)?;
    if picture.view.out().is_empty() || !is_attached(&picture) {
        return Ok(());
    }
    let command = Command::Resync { member: None };
    match deliver(context, &survey, &picture, &command, COMMAND_LIMIT).await {
        // It may have left meanwhile, or wait for a member: what follows says more.
        Ok(_) | Err(NotDone::NotAttached(_)) => Ok(()),
        Err(NotDone::Refused { reason: Refusal::Suspended | Refusal::Busy, .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

pub(super) async fn force_from(context: &Context, args: &ForceFromArgs) -> Result<Outcome, CtlError> {
    let survey = context.survey().await;
    let picture = survey.picture(&args.pool)?;
    let member = args.member.0;
    let now = UnixMs::now();
    let a = assess::assess(&picture, survey.all_answered(), now);
    let name = &picture.spec.name;
    let Some(line) = a.members.iter().find(|l| l.member == member) else {
        return Err(CtlError::failed(format!("nothing was done: pool '{name}' has no member {member}")));
    };
    if is_attached(&picture) {
        let who = client_words(a.client.as_ref(), now);
        return Err(CtlError::failed(format!("nothing was done: {who}; stop it first")));
    }
    if !args.yes_lose_what_others_have {
        return Err(CtlError::failed(format!(
            "nothing was done. This would go on with member {member} alone:\n{}add --yes-lose-what-others-have if you mean it",
            what_is_lost(line, &a, lost_client(&picture))
        )));
    }
    let unreachable = unreachable(&a, member);
    if !unreachable.is_empty() && !args.unreachable_are_gone {
        return Err(CtlError::failed(format!(
            "nothing was done. {} was not seen, and would not hear of this: a client that finds it there and member {member} \
             away may go on with what it has, and what was written to member {member} since is lost. Bring its node up \
             first, or name it with --node; or see to it that it never comes back as it is, and add --unreachable-are-gone",
            unreachable.join(", ")
        )));
    }
    let hold = match Hold::attach(context, &picture, Some(member)).await {
        Ok(hold) => hold,
        Err(NotHeld::HeldBy(who)) => {
            return Err(CtlError::failed(format!("nothing was done: {who} is attached; stop it first")));
        }
        Err(NotHeld::Failed(reason)) => return Err(CtlError::failed(format!("not done: {reason}"))),
    };
    let seen = a.members.iter().filter(|l| l.node.is_some() && l.member != member).map(|l| l.member);
    let untold = tell(&hold, seen.collect()).await;
    hold.release().await;
    let survey = context.survey().await;
    let picture = survey.picture(&args.pool)?;
    let headline = format!(
        "pool {name} goes on with member {member}; the others are copied over in full when a client is attached, or with\n  \
         {}",
        picture.advice.resync()
    );
    let mut outcome = outcome(
        &survey,
        &picture,
        &headline,
        json!({"forced_from": member, "untold": untold.iter().collect::<Vec<_>>()}),
    );
    if !untold.is_empty() {
        outcome.warnings.push(format!(
            "{untold} could not be told of this; before a guest is started, run with all nodes up: {}",
            picture.advice.resync()
        ));
    }
    Ok(outcome)
}

/// The members, in words, whose nodes were not seen.
fn unreachable(assessment: &Assessment, forced: MemberId) -> Vec<String> {
    let others = assessment.members.iter().filter(|l| l.member != forced && l.node.is_none());
    others.map(|l| format!("member {} ({})", l.member, l.address)).collect()
}

/// Waits until these members have a view in which the pool goes on with another one: by themselves they could go on without it.
/// Gives those that have not after a while.
async fn tell(hold: &Hold, members: MemberSet) -> MemberSet {
    let start = Instant::now();
    loop {
        let active = hold.active();
        let untold: MemberSet = members.iter().filter(|m| !active.contains(*m)).collect();
        if untold.is_empty() || start.elapsed() > TELL_LIMIT || !hold.is_held() {
            return untold;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// In words, what an override costs.
fn what_is_lost(line: &MemberLine, assessment: &Assessment, client: Option<&ClientStatus>) -> String {
    let text = client.map(|c| {
        format!("  {} left without a goodbye. If it still runs, it is fenced.\n", format::plain(&c.text))
    });
    let mut text = text.unwrap_or_default();
    text += &match line.state {
        MemberState::Clean => format!(
            "  member {} is Clean in the newest view that was seen. What was written since then to members that were not seen is lost.\n",
            line.member
        ),
        MemberState::Syncing | MemberState::Out => format!(
            "  member {} is {}: {}{} of it are known to be old, AND WOULD BE SERVED AS CURRENT. File systems on it may be damaged.\n",
            line.member,
            line.state,
            if line.missed_exact { "" } else { "up to " },
            format::bytes(line.missed_bytes)
        ),
    };
    for other in assessment.members.iter().filter(|l| l.member != line.member) {
        let seen =
            if other.node.is_some() { "seen" } else { "not seen: it may have newer data than is known" };
        let node = other.node.as_ref().unwrap_or(&other.address);
        text += &format!(
            "  member {} ({node}, {}, {seen}) counts as wholly old and will be overwritten.\n",
            other.member, other.state
        );
    }
    text
}
