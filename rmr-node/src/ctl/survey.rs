//! Asking nodes: which, how, and what all of them together say of pools.

use rmr_common::auth::KeyRing;
use rmr_common::pool::{Address, MemberAddress, StoreId};
use rmr_common::transport::tls::ClientTls;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::advice::Advice;
use super::http::{CallError, Client, NodeAddress};
use super::{CtlError, assess};
use crate::admin::api::{LeftOut, PoolKey, PoolList, PoolStatus};

/// Which nodes to ask, and how.
pub(super) struct Context {
    pub(super) client: Client,
    /// Nodes named on the command line or in the environment; may be empty.
    pub(super) given: Vec<NodeAddress>,
    /// Print JSON for programs.
    pub(super) json: bool,
    /// The key of the pool.
    pub(super) keys: KeyRing,
    /// How `tls://` addresses are reached.
    pub(super) tls: Option<ClientTls>,
    /// A client that left without a goodbye will not come back.
    pub(super) client_is_gone: bool,
    /// How this program was called.
    pub(super) advice: Advice,
}

impl Context {
    /// The nodes to ask: those given, each once, or the one on this machine.
    pub(super) fn nodes(&self) -> Vec<NodeAddress> {
        if self.given.is_empty() { vec![NodeAddress::local()] } else { once_each(&self.given) }
    }

    /// Asks all nodes for their pools.
    pub(super) async fn survey(&self) -> Survey {
        let lists: Vec<(_, Result<PoolList, _>)> = self.get_all(self.nodes(), "/v1/pools").await;
        let mut asides = Vec::new();
        let mut take = |node: &NodeAddress, list: PoolList| {
            let name = if list.node.is_empty() { node.to_string() } else { list.node };
            asides.push(Aside {
                node: node.clone(),
                name,
                left_out: list.left_out,
                data_addresses: list.data_addresses,
            });
            list.pools
        };
        let answers = lists.into_iter().map(|(node, list)| {
            let pools = list.map(|list| take(&node, list));
            (node, pools)
        });
        let answers = answers.collect();
        Survey { answers, asides, advice: self.advice.clone() }
    }

    /// Asks nodes at the same time; the answers come in the order of `nodes`.
    pub(super) async fn get_all<T: serde::de::DeserializeOwned + Send + 'static>(
        &self,
        nodes: Vec<NodeAddress>,
        path: &'static str,
    ) -> Vec<(NodeAddress, Result<T, CallError>)> {
        let client = self.client;
        let mut tasks = JoinSet::new();
        for (i, node) in nodes.into_iter().enumerate() {
            tasks.spawn(async move {
                let answer = client.get(&node, path).await;
                (i, node, answer)
            });
        }
        let mut answers = tasks.join_all().await;
        answers.sort_by_key(|(i, ..)| *i);
        answers.into_iter().map(|(_, node, answer)| (node, answer)).collect()
    }
}

/// What the nodes said when asked for their pools.
pub(super) struct Survey {
    pub(super) answers: Vec<(NodeAddress, Result<Vec<PoolStatus>, CallError>)>,
    /// What those that answered said besides.
    pub(super) asides: Vec<Aside>,
    advice: Advice,
}

/// What a node says beside its pools.
pub(super) struct Aside {
    node: NodeAddress,
    /// Name of the node.
    pub(super) name: String,
    pub(super) left_out: Vec<LeftOut>,
    pub(super) data_addresses: Vec<Address>,
}

impl Survey {
    pub(super) fn all_answered(&self) -> bool {
        self.answers.iter().all(|(_, answer)| answer.is_ok())
    }

    pub(super) fn any_answered(&self) -> bool {
        self.answers.iter().any(|(_, answer)| answer.is_ok())
    }

    /// The nodes that did not answer.
    pub(super) fn silent(&self) -> String {
        let silent = self.answers.iter().filter(|(_, answer)| answer.is_err());
        silent.map(|(node, _)| node.to_string()).collect::<Vec<_>>().join(", ")
    }

    /// What went wrong, one line for each node that did not answer.
    pub(super) fn errors(&self) -> Vec<String> {
        self.answers.iter().filter_map(|(_, answer)| answer.as_ref().err().map(ToString::to_string)).collect()
    }

    /// The node that holds this store.
    pub(super) fn holder(&self, store: StoreId) -> Option<&NodeAddress> {
        let holds = |pools: &Vec<PoolStatus>| pools.iter().any(|p| p.store == store);
        self.answers.iter().find(|(_, answer)| answer.as_ref().is_ok_and(holds)).map(|(node, _)| node)
    }

    pub(super) fn pictures(&self) -> Vec<assess::Picture> {
        let mut pictures = assess::merge(
            self.answers.iter().filter_map(|(_, a)| a.as_ref().ok()).flatten().cloned().collect(),
        );
        let names: Vec<_> = pictures.iter().map(|p| p.spec.name.clone()).collect();
        for picture in &mut pictures {
            let is_alone = names.iter().filter(|&name| *name == picture.spec.name).count() == 1;
            let pool = if is_alone { picture.spec.name.clone() } else { picture.spec.id.to_string() };
            picture.advice = self.advice.of(pool);
            let is_its = |l: &&LeftOut| l.pool == Some(picture.spec.id);
            let of_pool = self.asides.iter().flat_map(|aside| {
                aside.left_out.iter().filter(is_its).map(|l| (aside.name.clone(), l.clone()))
            });
            picture.left_out = of_pool.collect();
            picture.moved = self.moved(picture);
        }
        pictures
    }

    /// The members whose nodes are at other addresses than the pool knows, with those that it should know.
    pub(super) fn moved(&self, picture: &assess::Picture) -> Vec<MemberAddress> {
        let moved = picture.spec.members.iter().filter_map(|line| {
            let holder = self.holder(line.store)?;
            let aside = self.asides.iter().find(|aside| aside.node == *holder)?;
            let suits = |a: &&Address| a.transport() == line.address.transport();
            // A node that advertises another transport only is none of this command's concern.
            let own: Vec<&Address> = aside.data_addresses.iter().filter(suits).collect();
            let first = *own.first()?;
            let (member, store, address) = (line.id, line.store, first.clone());
            (!own.contains(&&line.address)).then_some(MemberAddress { member, store, address })
        });
        moved.collect()
    }

    /// The stores left out that belong to none of these pools, with the names of their nodes.
    pub(super) fn left_out_beside(&self, pictures: &[assess::Picture]) -> Vec<(String, LeftOut)> {
        let is_shown = |l: &LeftOut| l.pool.is_some_and(|id| pictures.iter().any(|p| p.spec.id == id));
        let beside = self.asides.iter().flat_map(|aside| {
            let others = aside.left_out.iter().filter(|l| !is_shown(l));
            others.map(|l| (aside.name.clone(), l.clone()))
        });
        beside.collect()
    }

    /// What nodes left out of the pool that a key names, in words.
    fn left_out_words(&self, key: &PoolKey) -> String {
        let is_its = |l: &&LeftOut| match key {
            PoolKey::Id(id) => l.pool == Some(*id),
            PoolKey::Name(name) => l.name.as_deref() == Some(name),
        };
        let words = self.asides.iter().flat_map(|aside| {
            aside.left_out.iter().filter(is_its).map(|l| format!("; {}: {}", aside.name, l.words()))
        });
        words.collect()
    }

    /// The one pool that the key names.
    pub(super) fn picture(&self, key: &PoolKey) -> Result<assess::Picture, CtlError> {
        let mut found: Vec<_> = self.pictures().into_iter().filter(|p| key.matches(&p.spec)).collect();
        match found.len() {
            0 if !self.any_answered() => {
                Err(CtlError::failed(format!("no node answered: {}", self.errors().join("; "))))
            }
            0 => {
                let asked: Vec<_> = self.answers.iter().map(|(node, _)| node.to_string()).collect();
                let unanswered = match self.errors() {
                    errors if errors.is_empty() => String::new(),
                    errors => format!("; not all answered: {}", errors.join("; ")),
                };
                let message = format!(
                    "there is no pool {key} on the nodes asked ({}){unanswered}{}",
                    asked.join(", "),
                    self.left_out_words(key)
                );
                Err(CtlError::failed(message))
            }
            1 => Ok(found.remove(0)),
            _ => {
                let ids: Vec<_> = found.iter().map(|p| p.spec.id.to_string()).collect();
                Err(CtlError::failed(format!("{key} names several pools, use the uuid: {}", ids.join(", "))))
            }
        }
    }

    /// The nodes as JSON: which were asked and which answered.
    pub(super) fn json(&self) -> Value {
        self.answers
            .iter()
            .map(|(node, answer)| {
                json!({
                    "address": node,
                    "answered": answer.is_ok(),
                    "error": answer.as_ref().err().map(ToString::to_string),
                })
            })
            .collect()
    }
}

pub(super) fn once_each(nodes: &[NodeAddress]) -> Vec<NodeAddress> {
    let mut once: Vec<NodeAddress> = Vec::new();
    for node in nodes {
        if !once.contains(node) {
            once.push(node.clone());
        }
    }
    once
}
