//! How a command reaches the coordinator of a pool: through any node to the client that is attached, and where none is,
//! `rmrctl` attaches itself for as long as the command takes. It never displaces anybody.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rmr_common::client::{Config, Force, LegStatus, OverReason, PoolSelector};
use rmr_common::driver::{Pool, PoolError};
use rmr_common::pool::{
    Address, ClientId, Command, CommandReply, MemberId, MemberSet, MemberState, PoolSpec, Refusal,
};
use thiserror::Error;

use super::assess::Picture;
use super::http::{CallError, Client, NodeAddress};
use super::{Context, CtlError, Survey};
use crate::admin::api::{ClientState, ClientStatus};

/// How often a coordinator is looked for, where clients come and go meanwhile. Repeating a command is harmless.
const ATTEMPTS: usize = 5;
/// Pause before the next look.
const PAUSE: Duration = Duration::from_millis(300);

/// Why a command was not carried out, or is not known to be.
#[derive(Clone, Debug, Error)]
pub(super) enum NotDone {
    /// The coordinator refuses it.
    #[error("{text}")]
    Refused { reason: Refusal, text: String },
    /// The answer is to something else.
    #[error("the coordinator answered with the report of a verify, which nobody asked for")]
    Unexpected,
    /// It is not known what became of it.
    #[error("{0}; it may have been carried out or not: run the same command again")]
    Unknown(CallError),
    /// No coordinator could be had.
    #[error("no client is attached, and rmrctl could not attach itself: {0}")]
    NotAttached(String),
}

impl NotDone {
    /// Whether it will be refused again, so that what was prepared for it is of no use.
    pub(super) const fn is_for_good(&self) -> bool {
        match self {
            Self::Refused { reason, .. } => !matches!(
                reason,
                Refusal::NoCoordinator | Refusal::CoordinatorLost | Refusal::Suspended | Refusal::Busy
            ),
            Self::Unexpected | Self::Unknown(_) | Self::NotAttached(_) => false,
        }
    }
}

impl From<NotDone> for CtlError {
    fn from(error: NotDone) -> Self {
        Self::failed(error.to_string())
    }
}

/// Gives a command to the coordinator of the pool, waits for its answer for at most `limit`, and gives the pool as it is then.
/// A command that got lost with its coordinator, or with the node that passed it on, is given again.
pub(super) async fn deliver(
    context: &Context,
    survey: &Survey,
    picture: &Picture,
    command: &Command,
    limit: Duration,
) -> Result<PoolSpec, NotDone> {
    let mut why = String::new();
    for _ in 0..ATTEMPTS {
        let (reply, is_here) = match ask(context, survey, picture, command, limit).await? {
            Answered::Reply(reply) => (reply, false),
            Answered::Hold(hold) => {
                let reply = hold.command(command.clone()).await;
                hold.release().await;
                (reply?, true)
            }
        };
        match reply {
            CommandReply::Done { spec, .. } => return Ok(spec),
            // A guest's client came meanwhile.
            CommandReply::Refused { reason: Refusal::CoordinatorLost | Refusal::NoCoordinator, text }
                if is_here =>
            {
                why = text
            }
            CommandReply::Refused { reason, text } => return Err(NotDone::Refused { reason, text }),
            CommandReply::Verify { .. } => return Err(NotDone::Unexpected),
        }
        tokio::time::sleep(PAUSE).await;
    }
    Err(NotDone::NotAttached(why))
}

/// Who is to carry a command out.
pub(super) enum Answered {
    /// The client that is attached has answered.
    Reply(CommandReply),
    /// Nobody was attached. Now `rmrctl` is, and has not been asked.
    Hold(Hold),
}

/// Gives a command to the client that is attached, or attaches.
pub(super) async fn ask(
    context: &Context,
    survey: &Survey,
    picture: &Picture,
    command: &Command,
    limit: Duration,
) -> Result<Answered, NotDone> {
    let nodes: Vec<_> = picture.reports.iter().filter_map(|r| survey.holder(r.store)).collect();
    let client = Client { timeout: limit.max(context.client.timeout) };
    let mut why = String::new();
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            tokio::time::sleep(PAUSE).await;
        }
        match ask_nodes(client, &nodes, &picture.spec, command).await? {
            Some(CommandReply::Refused { reason: Refusal::CoordinatorLost, text })
                if attempt + 1 < ATTEMPTS =>
            {
                why = text;
            }
            Some(reply) => return Ok(Answered::Reply(reply)),
            None => match Hold::attach(context, picture, None).await {
                Ok(hold) => return Ok(Answered::Hold(hold)),
                // Somebody was faster: it is the one to ask.
                Err(NotHeld::HeldBy(holder)) => why = format!("the pool is held by {holder}"),
                Err(NotHeld::Failed(reason)) => return Err(NotDone::NotAttached(reason)),
            },
        }
    }
    Err(NotDone::NotAttached(why))
}

/// Asks one node after the other to pass the command on; `None` when none knows of a client that is attached.
pub(super) async fn ask_nodes(
    client: Client,
    nodes: &[&NodeAddress],
    spec: &PoolSpec,
    command: &Command,
) -> Result<Option<CommandReply>, NotDone> {
    for node in nodes {
        let path = format!("/v1/pools/{}/commands", spec.id);
        match client.post::<CommandReply>(node, &path, command).await {
            Ok(CommandReply::Refused { reason: Refusal::NoCoordinator, .. }) => {}
            Ok(reply) => return Ok(Some(reply)),
            Err(error) if error.never_arrived() => {}
            Err(error) => return Err(NotDone::Unknown(error)),
        }
    }
    Ok(None)
}

/// The client that left without a goodbye, as active members know it.
pub(super) fn lost_client(picture: &Picture) -> Option<&ClientStatus> {
    let active = picture.view.active();
    let told = picture.reports.iter().filter(|r| active.contains(r.member));
    told.filter_map(|r| r.client.as_ref()).find(|c| c.state == ClientState::Crashed)
}

/// Why `rmrctl` does not hold a pool.
#[derive(Clone, Debug)]
pub(super) enum NotHeld {
    /// A client is attached.
    HeldBy(String),
    /// It could not attach.
    Failed(String),
}

/// A pool that `rmrctl` is attached to.
pub(super) struct Hold(Arc<Pool>);

impl Hold {
    /// Attaches, with the operator's override of the recovery rule where `force_from` names a member. A client that left
    /// without a goodbye is not taken for gone: it may be on its way back from a node that was started anew, and would be fenced.
    pub(super) async fn attach(
        context: &Context,
        picture: &Picture,
        force_from: Option<MemberId>,
    ) -> Result<Self, NotHeld> {
        let spec = &picture.spec;
        if let Some(client) = lost_client(picture).filter(|_| !context.client_is_gone && force_from.is_none())
        {
            return Err(NotHeld::Failed(format!(
                "{} left without a goodbye and may come back; if it is gone for good, say so with --client-is-gone",
                super::format::plain(&client.text)
            )));
        }
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let who = format!("rmrctl on {}, process {}", host.trim(), std::process::id());
        let mut config = Config::new(ClientId::random(), who);
        config.force_from = force_from.map(|member| Force { member, decided: SystemTime::now() });
        // A guest that starts now gets its disk.
        config.yields = true;
        config.keys.clone_from(&context.keys);
        config.tls.clone_from(&context.tls);
        let selector = PoolSelector::Id(spec.id);
        let seeds: Vec<Address> = spec.members.iter().map(|m| m.address.clone()).collect();
        let patience = context.client.timeout;
        match blocking(move || Pool::connect(config, selector, &seeds, patience)).await {
            Ok(Ok(pool)) => Ok(Self(Arc::new(pool))),
            Ok(Err(PoolError::Over(OverReason::Held(holder)))) => Err(NotHeld::HeldBy(holder)),
            // The words may be those of whoever answers at the address.
            Ok(Err(error)) => Err(NotHeld::Failed(super::format::plain(&error.to_string()))),
            Err(reason) => Err(NotHeld::Failed(reason)),
        }
    }

    /// Carries a command out.
    pub(super) async fn command(&self, command: Command) -> Result<CommandReply, NotDone> {
        let pool = Arc::clone(&self.0);
        let done = blocking(move || pool.blocking().command(command)).await;
        done.map_err(NotDone::NotAttached)
    }

    /// The members that have the committed view.
    pub(super) fn active(&self) -> MemberSet {
        let legs = self.0.status().map(|status| status.legs).unwrap_or_default();
        let is_active =
            |leg: &&LegStatus| matches!(leg.data, Some(MemberState::Clean | MemberState::Syncing));
        legs.iter().filter(is_active).map(|leg| leg.member).collect()
    }

    /// Whether it still holds the pool.
    pub(super) fn is_held(&self) -> bool {
        self.0.status().is_some_and(|status| status.state != "over")
    }

    /// Detaches in good order.
    pub(super) async fn release(self) {
        // A panic there was reported by its own hook.
        let _ = blocking(move || drop(self.0)).await;
    }
}

/// Runs what waits on a thread where it may.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.map_err(|error| error.to_string())
}
