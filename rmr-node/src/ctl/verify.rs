//! `rmrctl pool verify`: starts a verify at the attached client, or attaches for as long as it takes; follows it and reports.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use clap::Args;
use rmr_common::pool::{
    Chunk, Command, CommandReply, MemberId, VerifyDifference, VerifyOptions, VerifyOutcome, VerifyReport,
    VerifyState,
};
use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;

use super::assess::Picture;
use super::change_args::MemberNumber;
use super::coordinate::{Answered, Hold, NotDone, ask, ask_nodes};
use super::{Context, CtlError, Outcome, Survey, format};
use crate::admin::api::{PoolKey, UnixMs};
use crate::store::ByteSize;

/// Exit code of a verify that found something which it did not repair.
pub(super) const EXIT_DIFFERENT: u8 = 5;
/// A verify begins, and tells how it stands, within this.
const COMMAND_LIMIT: Duration = Duration::from_secs(30);
/// How often progress is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// Where nobody watches, a line is enough this often.
const LINE_EVERY: Duration = Duration::from_secs(10);
/// A client that does not answer for so long, in the middle of a verify, is gone.
const SILENCE: Duration = Duration::from_secs(30);
/// Ranges that are printed for people; programs get all that the report has.
const MOST_RANGES: usize = 40;

/// Arguments of `pool verify`.
#[derive(Clone, Debug, Args)]
pub struct VerifyArgs {
    /// Name or uuid of the pool
    #[arg(value_name = "NAME|UUID")]
    pub pool: PoolKey,
    /// Bring members in line whose blocks differ. With three or more copies the majority is right
    #[arg(long)]
    pub repair: bool,
    /// The member that is right wherever copies differ: its content is copied over that of the others
    #[arg(long, value_name = "MEMBER", requires = "repair")]
    pub trust: Option<MemberNumber>,
    /// Most of the pool that is compared per second, e.g. 100M; without it as fast as the guest leaves room
    #[arg(long, value_name = "SIZE")]
    pub rate: Option<ByteSize>,
    /// Begin at this chunk: where an earlier verify was interrupted
    #[arg(long, value_name = "CHUNK", default_value_t = 0)]
    pub from_chunk: u64,
    /// Wait for the end, and show how far it is. Without a guest, rmrctl always waits, and holds the pool meanwhile
    #[arg(long)]
    pub wait: bool,
}

impl VerifyArgs {
    fn options(&self) -> VerifyOptions {
        VerifyOptions {
            repair: self.repair,
            trust: self.trust.map(|m| m.0),
            bytes_per_s: self.rate.map(|r| r.0),
            from_chunk: Chunk(self.from_chunk),
        }
    }
}

pub(super) async fn verify(context: &Context, args: &VerifyArgs) -> Result<Outcome, CtlError> {
    let interrupts =
        |kind| signal(kind).map_err(|e| CtlError::failed(format!("interrupts cannot be watched: {e}")));
    let mut stop = (interrupts(SignalKind::interrupt())?, interrupts(SignalKind::terminate())?);
    let (survey, picture) = look(context, &args.pool).await?;
    let command = Command::Verify { options: args.options() };
    match ask(context, &survey, &picture, &command, COMMAND_LIMIT).await? {
        Answered::Reply(reply) => {
            let report = report_of(reply)?;
            if !args.wait {
                let (status, cancel) = (picture.advice.verify_status(), picture.advice.verify_cancel());
                let more = format!("see how it goes with\n  {status}\nor stop it with\n  {cancel}\n");
                return Ok(outcome(&survey, &picture, report, &more));
            }
            let report = follow(context, &Place::Client(&survey, &picture), &mut stop).await?;
            Ok(outcome(&survey, &picture, Some(report), ""))
        }
        Answered::Hold(hold) => {
            let result = hold_and_verify(context, &hold, command, &mut stop).await;
            // Whatever happened: a pool that is left in good order can be attached to at once.
            hold.release().await;
            Ok(outcome(&survey, &picture, Some(result?), ""))
        }
    }
}

async fn hold_and_verify(
    context: &Context,
    hold: &Hold,
    command: Command,
    stop: &mut (Signal, Signal),
) -> Result<VerifyReport, CtlError> {
    report_of(hold.command(command).await?)?;
    follow(context, &Place::Hold(hold), stop).await
}

pub(super) async fn status(context: &Context, pool: &PoolKey) -> Result<Outcome, CtlError> {
    told(context, pool, &Command::VerifyStatus).await
}

pub(super) async fn cancel(context: &Context, pool: &PoolKey) -> Result<Outcome, CtlError> {
    told(context, pool, &Command::VerifyCancel).await
}

/// What the attached client says of its verify.
async fn told(context: &Context, pool: &PoolKey, command: &Command) -> Result<Outcome, CtlError> {
    let (survey, picture) = look(context, pool).await?;
    let place = Place::Client(&survey, &picture);
    let Some(reply) = place.ask(context, command).await? else {
        let text = format!(
            "pool {}: no client is attached, so no verify is under way, and none is remembered",
            picture.spec.name
        );
        return Err(CtlError::failed(text));
    };
    Ok(outcome(&survey, &picture, report_of(reply)?, ""))
}

async fn look(context: &Context, pool: &PoolKey) -> Result<(Survey, Picture), CtlError> {
    let survey = context.survey().await;
    let picture = survey.picture(pool)?;
    Ok((survey, picture))
}

fn report_of(reply: CommandReply) -> Result<Option<VerifyReport>, CtlError> {
    match reply {
        CommandReply::Verify { report } => Ok(report.map(|report| *report)),
        CommandReply::Refused { text, .. } => Err(CtlError::failed(format!("not done: {text}"))),
        CommandReply::Done { .. } => {
            Err(CtlError::failed("the client answered with a view where the report of a verify was expected"))
        }
    }
}

/// Where the verify is under way.
enum Place<'a> {
    /// At the client that is attached, reached through the nodes of the pool.
    Client(&'a Survey, &'a Picture),
    /// Here.
    Hold(&'a Hold),
}

impl Place<'_> {
    /// `None` when no client is attached.
    async fn ask(&self, context: &Context, command: &Command) -> Result<Option<CommandReply>, NotDone> {
        match self {
            Self::Client(survey, picture) => {
                let nodes: Vec<_> = picture.reports.iter().filter_map(|r| survey.holder(r.store)).collect();
                ask_nodes(context.client, &nodes, &picture.spec, command).await
            }
            Self::Hold(hold) => hold.command(command.clone()).await.map(Some),
        }
    }

    const fn is_here(&self) -> bool {
        matches!(self, Self::Hold(_))
    }
}

/// Shows how far a verify is until it is over.
async fn follow(
    context: &Context,
    place: &Place<'_>,
    stop: &mut (Signal, Signal),
) -> Result<VerifyReport, CtlError> {
    let mut progress = Progress::new(context.json);
    let mut heard = Instant::now();
    let mut last: Option<VerifyReport> = None;
    loop {
        let reply = place.ask(context, &Command::VerifyStatus).await;
        let report = match reply {
            Ok(Some(reply @ CommandReply::Verify { .. })) => report_of(reply)?,
            // It is attaching again, or its node is asked again soon.
            Ok(_) | Err(_) => None,
        };
        let is_known = report.is_some();
        if let Some(report) = report {
            heard = Instant::now();
            progress.tell(&report);
            if report.state.is_over() {
                progress.end();
                return Ok(report);
            }
            last = Some(report);
        }
        if !is_known && heard.elapsed() > SILENCE {
            progress.end();
            let chunk = last.map_or(0, |r| r.next_chunk.0);
            return Err(CtlError::failed(format!(
                "the client that verified the pool is gone; go on with --from-chunk {chunk}"
            )));
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            _ = stop.0.recv() => return stopped(context, place, progress, last).await,
            _ = stop.1.recv() => return stopped(context, place, progress, last).await,
        }
    }
}

/// The operator does not want to wait any longer.
async fn stopped(
    context: &Context,
    place: &Place<'_>,
    mut progress: Progress,
    last: Option<VerifyReport>,
) -> Result<VerifyReport, CtlError> {
    progress.end();
    if !place.is_here() {
        return Err(CtlError::failed(
            "interrupted; the verify goes on at the attached client: see verify-status and verify-cancel",
        ));
    }
    let reply = place.ask(context, &Command::VerifyCancel).await?;
    let report = reply.map(report_of).transpose()?.flatten().or(last);
    report.ok_or_else(|| CtlError::failed("interrupted"))
}

/// What is told while a verify is under way.
struct Progress {
    json: bool,
    terminal: bool,
    told: Option<(Instant, VerifyState)>,
}

impl Progress {
    fn new(json: bool) -> Self {
        Self { json, terminal: std::io::stderr().is_terminal(), told: None }
    }

    fn tell(&mut self, report: &VerifyReport) {
        let is_due = match &self.told {
            None => true,
            Some((at, state)) => {
                self.json || self.terminal || *state != report.state || at.elapsed() >= LINE_EVERY
            }
        };
        if !is_due {
            return;
        }
        self.told = Some((Instant::now(), report.state.clone()));
        // Whoever reads may be gone; the work goes on.
        let _ = if self.json {
            writeln!(std::io::stdout(), "{}", json!({"progress": report}))
        } else if self.terminal {
            write!(std::io::stderr(), "\r\x1b[K{}", progress_words(report))
        } else {
            writeln!(std::io::stderr(), "{}", progress_words(report))
        };
    }

    fn end(&mut self) {
        if self.terminal && !self.json && self.told.take().is_some() {
            let _ = writeln!(std::io::stderr());
        }
    }
}

/// One line about a verify that is under way.
fn progress_words(report: &VerifyReport) -> String {
    let mut text =
        format!("{}: chunk {} of {}", state_words(&report.state), report.next_chunk, report.chunks);
    if report.bytes_per_s > 0 {
        text += &format!(", {}/s", format::bytes(report.bytes_per_s));
    }
    if report.yielding {
        text += ", yielding to the guest";
    }
    if let Some(seconds) = report.seconds_left {
        text += &format!(", {} to go", format::duration(seconds));
    }
    text += &format!(", {} differ", blocks(report.blocks_differing));
    if let Some(error) = &report.last_error {
        text += &format!("; {}", format::plain(error));
    }
    text
}

fn state_words(state: &VerifyState) -> String {
    match state {
        VerifyState::Running => "verifying".into(),
        VerifyState::Waiting(reason) => format!("waiting, {}", format::plain(reason)),
        VerifyState::Repairing => "repairing".into(),
        VerifyState::Done => "verified".into(),
        VerifyState::Cancelled => "cancelled".into(),
        VerifyState::Interrupted(reason) => format!("interrupted, {}", format::plain(reason)),
    }
}

fn blocks(count: u64) -> String {
    if count == 1 { "1 block".into() } else { format!("{count} blocks") }
}

/// The report, for people and programs, with its exit code.
fn outcome(survey: &Survey, picture: &Picture, report: Option<VerifyReport>, more: &str) -> Outcome {
    let name = &picture.spec.name;
    let json = json!({"pool": picture.spec.id, "report": report});
    let (text, exit) = match &report {
        None => (format!("pool {name}: no verify under the client that is attached\n"), 0),
        Some(report) => {
            (format!("pool {name}: {}{more}", report_words(report, UnixMs::now())), exit_of(report))
        }
    };
    Outcome { text, json, warnings: survey.errors(), exit }
}

fn exit_of(report: &VerifyReport) -> u8 {
    match report.state {
        _ if report.blocks_left_differing() > 0 || report.blocks_unsettled > 0 => EXIT_DIFFERENT,
        VerifyState::Cancelled | VerifyState::Interrupted(_) => super::EXIT_FAILED,
        VerifyState::Running | VerifyState::Waiting(_) | VerifyState::Repairing | VerifyState::Done => 0,
    }
}

fn report_words(report: &VerifyReport, now: UnixMs) -> String {
    let mut text = if report.state.is_over() {
        format!("{} {}\n", state_words(&report.state), found_words(report))
    } else {
        format!("{}\n", progress_words(report))
    };
    let ended = report.ended_ms_ago.map_or(now.0, |ago| now.0.saturating_sub(ago));
    let began = UnixMs(ended.saturating_sub(report.elapsed_ms));
    text += &format!(
        "  began {}, {} compared in {}\n",
        format::utc_with_age(began, now),
        format::bytes(report.bytes_compared),
        format::duration(report.elapsed_ms / 1000)
    );
    if report.state.is_over() && report.state != VerifyState::Done {
        text += &format!("  go on with --from-chunk {}\n", report.next_chunk);
    }
    for member in &report.members {
        text += &format!("  member {}: {} compared", member.member, blocks(member.blocks_compared));
        for (count, what) in [
            (member.blocks_differing, "differ"),
            (member.blocks_unreadable, "cannot be read"),
            (member.blocks_not_compared, "not compared while it was not Clean"),
        ] {
            if count > 0 {
                text += &format!(", {} {what}", blocks(count));
            }
        }
        text.push('\n');
    }
    for difference in report.differences.iter().take(MOST_RANGES) {
        text += &format!("  {}\n", difference_words(difference));
    }
    if report.more_differences || report.differences.len() > MOST_RANGES {
        text += "  and more\n";
    }
    for (offset, length) in report.unsettled.iter().take(MOST_RANGES) {
        text += &format!(
            "  {} at {offset}: differed, and could not be looked at again without holding the guest for too long\n",
            format::bytes(*length)
        );
    }
    if report.blocks_undecided > 0 && !report.options.repair {
        text +=
            "  where it is not said which member is wrong, name the one to trust: --repair --trust MEMBER\n";
    }
    text
}

/// What was found, in half a sentence.
fn found_words(report: &VerifyReport) -> String {
    let mut text = match report.blocks_differing {
        0 => "no block differs".to_owned(),
        count => {
            let verb = if count == 1 { "differs" } else { "differ" };
            let mut text = format!("{} {verb}", blocks(count));
            for (count, what) in
                [(report.blocks_repaired, "repaired"), (report.blocks_undecided, "without a majority")]
            {
                if count > 0 {
                    text += &format!(", {count} {what}");
                }
            }
            text
        }
    };
    if report.blocks_unsettled > 0 {
        text += &format!(", {} unsettled", blocks(report.blocks_unsettled));
    }
    format!("({text})")
}

fn members(list: &[MemberId]) -> String {
    let list: Vec<_> = list.iter().map(ToString::to_string).collect();
    list.join(", ")
}

fn difference_words(difference: &VerifyDifference) -> String {
    let mut text = format!("{} at {}: ", format::bytes(difference.length), difference.offset);
    let same: Vec<_> = difference.same.iter().map(|list| members(list)).collect();
    if same.len() > 1 {
        text += &format!("members {} differ", same.join(" | "));
    }
    if !difference.unreadable.is_empty() {
        let comma = if same.len() > 1 { "; " } else { "" };
        text += &format!("{comma}member {} cannot read it", members(&difference.unreadable));
    }
    match difference.wrong.len() {
        0 => text += "; it is not known which is wrong",
        1 => text += &format!("; member {} is wrong", members(&difference.wrong)),
        _ => text += &format!("; members {} are wrong", members(&difference.wrong)),
    }
    match difference.outcome {
        VerifyOutcome::Reported | VerifyOutcome::Undecided => {}
        VerifyOutcome::Pending => text += ", to be repaired",
        VerifyOutcome::Repaired => text += ", repaired",
        VerifyOutcome::RepairFailed => text += ", and again after it was repaired",
    }
    text
}
