//! What a client tells operators about itself.

use serde::Serialize;

use super::{Client, Counters, LinkState, State};
use crate::pool::{Address, Condition, MemberId, MemberState, PoolId};

/// State of a connection, apart from the state of the data behind it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LinkSummary {
    /// Messages flow.
    Up,
    /// The connection is being made.
    Connecting,
    /// There is no connection; why.
    Down(String),
}

/// One leg of a pool.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct LegStatus {
    /// The member.
    pub member: MemberId,
    /// Where its node listens.
    pub address: Address,
    /// The connection.
    pub link: LinkSummary,
    /// The data, by the committed view; `None` before the client attached.
    pub data: Option<MemberState>,
    /// Reads that its disk failed.
    pub read_errors: u64,
    /// Why it is not brought back in, if it is left out.
    pub excluded: Option<String>,
    /// Why it is not current, how often it has failed, and when it is tried again.
    pub condition: Option<Condition>,
}

/// One pool as its client sees it.
#[derive(Clone, Debug, Serialize)]
pub struct PoolStatus {
    /// Identity, once known.
    pub pool: Option<PoolId>,
    /// What the client is doing, in a word.
    pub state: &'static str,
    /// Number of the committed view.
    pub view: u64,
    /// The attachment.
    pub epoch: u64,
    /// The legs, by member.
    pub legs: Vec<LegStatus>,
    /// Completed writes were lost, and every request fails until that is acknowledged.
    pub lost_writes: bool,
    /// The operator's command that is being carried out, and how far it has come.
    pub command: Option<String>,
    /// Requests that are not finished.
    pub in_flight: usize,
    /// Requests so far.
    pub counters: Counters,
}

impl Client {
    /// What the client is doing and what it knows of its legs.
    #[must_use]
    pub fn status(&self) -> PoolStatus {
        let state = match &self.state {
            State::Gathering { .. } if self.epoch.0 == 0 => "connecting",
            State::Gathering { .. } => "suspended",
            State::Attaching { .. } => "attaching",
            State::Changing { .. } => "changing view",
            State::Active if self.detach_requested => "detaching",
            State::Active => "active",
            State::Detaching { .. } => "detaching",
            State::Over(_) => "over",
        };
        let conditions = self.conditions();
        let members = self.spec.iter().flat_map(|s| &s.members);
        let legs = members.map(|m| {
            let link = self.legs[m.id.index()].and_then(|id| self.links.get(usize::from(id.0)));
            let link = match link.map(|l| (&l.state, &l.last_error)) {
                Some((LinkState::Ready(_), _)) => LinkSummary::Up,
                Some((LinkState::Connecting | LinkState::Greeting { .. }, _)) => LinkSummary::Connecting,
                Some((LinkState::Down { .. }, error)) => LinkSummary::Down(error.clone()),
                None => LinkSummary::Down("never connected".into()),
            };
            let data = self.view.as_ref().and_then(|v| v.state(m.id));
            let (read_errors, excluded) = (self.faults.errors(m.id), self.faults.excluded(m.id));
            LegStatus {
                member: m.id,
                address: m.address.clone(),
                link,
                data,
                read_errors,
                excluded: excluded.map(str::to_owned),
                condition: conditions.iter().find(|c| c.member == m.id).cloned(),
            }
        });
        PoolStatus {
            pool: self.spec.as_ref().map(|s| s.id),
            state,
            view: self.view.as_ref().map_or(0, |v| v.number.0),
            epoch: self.epoch.0,
            legs: legs.collect(),
            lost_writes: self.lost_writes,
            command: self.command_phase().map(|(command, phase)| format!("{command}: {phase}")),
            in_flight: self.in_flight(),
            counters: self.counters,
        }
    }
}
