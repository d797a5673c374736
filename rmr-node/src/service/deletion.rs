//! Stores that are being closed or deleted: what is known of each until it is closed, or nothing of it is left. The work
//! itself waits for the device, so it is done on a thread of its own.

use std::io::ErrorKind;
use std::path::PathBuf;

use rmr_common::pool::{PoolId, StoreId};
use rmr_common::time::Time;

use crate::admin::Responder;
use crate::admin::api::{ControlError, ErrorCode, LeftOut, StoreChanged};
use crate::store::{Store, StoreError};

/// What there is of a store that is to go.
#[derive(Clone, Debug)]
pub(super) struct Remains {
    pub(super) store: StoreId,
    pub(super) pool: PoolId,
    pub(super) name: String,
    pub(super) path: PathBuf,
    /// The node made the file, so it goes too.
    pub(super) own: bool,
    /// An earlier attempt may have wiped the superblocks.
    pub(super) tried: bool,
}

impl Remains {
    /// Leaves nothing that could be opened as a store. Can be called again when it failed, at whatever step.
    pub(super) fn destroy(&self) -> Result<(), String> {
        let done = match self.own {
            true => Store::remove(&self.path, Some(self.pool)),
            false => Store::destroy(&self.path, Some(self.pool)),
        };
        match done {
            Ok(_) => Ok(()),
            Err(StoreError::NoSuperblock { .. }) if self.tried && self.own => {
                std::fs::remove_file(&self.path).map_err(|e| format!("{}: {e}", self.path.display()))
            }
            Err(StoreError::NoSuperblock { .. }) if self.tried => Ok(()),
            Err(StoreError::Io { source, .. }) if self.tried && source.kind() == ErrorKind::NotFound => {
                Ok(())
            }
            Err(error) => Err(error.to_string()),
        }
    }
}

/// A store that is being closed, and stays as it is.
///
/// ```text
/// clients leave ──► nothing under way ──► marked as closed in order ──► left out, with its reason
/// ```
/// A store whose metadata cannot be written is not marked.
pub(super) struct Closure {
    /// The member with this index.
    pub(super) index: usize,
    pub(super) entry: LeftOut,
    /// Until when clients are given the time to leave by themselves.
    pub(super) deadline: Time,
    pub(super) marked: bool,
    pub(super) responder: Option<Responder<StoreChanged>>,
}

/// One deletion.
///
/// ```text
/// Closing ── nothing under way ──► Destroying ──► (gone)
///                                    ▲    │ failed
///                        asked again │    ▼
///                                    Failed
/// ```
pub(super) struct Deletion {
    pub(super) remains: Remains,
    pub(super) stage: Stage,
}

/// How far a deletion is.
pub(super) enum Stage {
    /// The member with this index still has requests or metadata under way.
    Closing(usize, Responder<()>),
    /// A thread is at it.
    Destroying(Responder<()>),
    /// It did not succeed: the store would be there again after the node's next start.
    Failed,
}

impl Deletion {
    /// The thread has ended, and has answered so. True when nothing is left of the store.
    pub(super) fn ended(&mut self, result: Result<(), String>) -> bool {
        let Remains { name, path, .. } = &self.remains;
        let (is_gone, answer) = match result {
            Ok(()) => {
                tracing::info!(pool = %name, path = %path.display(), "store deleted");
                (true, Ok(()))
            }
            Err(error) => {
                tracing::error!(pool = %name, path = %path.display(), "store not deleted: {error}");
                let text = format!(
                    "the store of pool '{name}' at {} is closed, and could not be destroyed: {error}. Delete it again: as \
                     it is, it may be served again when the node starts",
                    path.display()
                );
                (false, Err(ControlError::new(ErrorCode::Internal, text)))
            }
        };
        self.remains.tried = true;
        if let Stage::Destroying(responder) = std::mem::replace(&mut self.stage, Stage::Failed) {
            responder.send(answer);
        }
        is_gone
    }

    /// What is answered to somebody who wants the same while it is under way.
    pub(super) fn is_under_way(&self) -> Option<ControlError> {
        let text = format!("the store of pool '{}' is being deleted already", self.remains.name);
        (!matches!(self.stage, Stage::Failed)).then(|| ControlError::new(ErrorCode::Busy, text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::reply;

    #[test]
    fn a_deletion_that_failed_can_be_asked_for_again_and_succeeds_whatever_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store");
        let spec = crate::store::tests::make(&path);
        let member = &spec.members[0];
        let mut remains = Remains {
            store: member.store,
            pool: PoolId::random(),
            name: "p".into(),
            path: path.clone(),
            own: true,
            tried: false,
        };
        assert!(remains.destroy().is_err(), "the store of another pool");
        remains.pool = spec.id;
        // The superblocks are gone, and the file stayed.
        Store::destroy(&path, Some(spec.id)).unwrap();
        assert!(remains.destroy().is_err(), "a first attempt finds a store, or says that there is none");
        let (responder, _reply) = reply();
        let mut deletion = Deletion { remains, stage: Stage::Destroying(responder) };
        assert!(deletion.is_under_way().is_some());
        assert!(!deletion.ended(Err("no".into())));
        assert!(deletion.is_under_way().is_none());
        deletion.remains.destroy().unwrap();
        assert!(!path.exists());
        deletion.remains.destroy().unwrap();
    }
}
