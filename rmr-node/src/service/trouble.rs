//! What the disk under a store has failed of late, for those who look at the node.

use std::time::{Duration, Instant};

use rmr_common::pool::Cause;

use crate::admin::api::{DiskTrouble, UnixMs};

/// An error that did not come again for so long, while requests of its kind succeeded, is history.
const HISTORY: Duration = Duration::from_secs(60);

/// One kind of error.
#[derive(Debug)]
struct Kind {
    cause: Cause,
    text: String,
    since: UnixMs,
    last: (UnixMs, Instant),
    errors: u64,
    /// A request of the kind has succeeded since the last error.
    has_succeeded: bool,
}

/// The errors of one disk, by kind.
#[derive(Debug, Default)]
pub(super) struct Troubles {
    kinds: Vec<Kind>,
}

impl Troubles {
    /// A request failed.
    pub(super) fn failed(&mut self, cause: Cause, text: String) {
        let last = (UnixMs::now(), Instant::now());
        if let Some(kind) = self.kinds.iter_mut().find(|k| k.cause == cause) {
            (kind.text, kind.last, kind.has_succeeded) = (text, last, false);
            kind.errors += 1;
        } else {
            self.kinds.push(Kind { cause, text, since: last.0, last, errors: 1, has_succeeded: false });
        }
    }

    /// A request succeeded, after which these errors are of the past if they do not come again.
    pub(super) fn succeeded(&mut self, causes: &[Cause]) {
        for kind in self.kinds.iter_mut().filter(|k| causes.contains(&k.cause)) {
            kind.has_succeeded = true;
        }
    }

    /// Lets go of what is history.
    pub(super) fn tick(&mut self) {
        self.kinds.retain(|k| !k.has_succeeded || k.last.1.elapsed() < HISTORY);
    }

    /// What is the matter, the worst first.
    pub(super) fn worst(&self) -> Option<DiskTrouble> {
        let rank = |cause| match cause {
            Cause::MetadataErrors => 0,
            Cause::DiskFull => 1,
            Cause::FlushErrors => 2,
            Cause::WriteErrors => 3,
            _ => 4,
        };
        let kind = self.kinds.iter().min_by_key(|k| rank(k.cause))?;
        Some(DiskTrouble {
            cause: kind.cause,
            text: kind.text.clone(),
            since_unix_ms: kind.since,
            last_unix_ms: kind.last.0,
            errors: kind.errors,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_error_is_told_from_its_first_time_on_until_it_is_history() {
        let mut troubles = Troubles::default();
        troubles.failed(Cause::ReadErrors, "read of 4096 bytes at 0: Input/output error".into());
        troubles.failed(Cause::DiskFull, "no space".into());
        troubles.failed(Cause::DiskFull, "no space left".into());
        let worst = troubles.worst().unwrap();
        assert_eq!((worst.cause, worst.errors, worst.text.as_str()), (Cause::DiskFull, 2, "no space left"));
        troubles.succeeded(&[Cause::DiskFull, Cause::WriteErrors]);
        troubles.tick();
        assert_eq!(troubles.worst().unwrap().cause, Cause::DiskFull, "it may come again");
        troubles.kinds[1].last.1 = Instant::now().checked_sub(HISTORY).unwrap();
        troubles.tick();
        assert_eq!(troubles.worst().unwrap().cause, Cause::ReadErrors);
    }
}
