//! What is the matter with members and disks, in words for people. `rmrctl status` and `/v1/health` say the same.

use super::api::{DiskTrouble, PeerCondition, UnixMs};

/// What a disk has failed of late: what, how often, the last error, and what to do.
#[must_use]
pub fn disk_words(disk: &DiskTrouble) -> String {
    let times = if disk.errors == 1 { "once".to_owned() } else { format!("{} times", disk.errors) };
    let mut words = format!("{} ({times}, last: {})", disk.cause, disk.text);
    if let Some(step) = disk.cause.next_step() {
        words += &format!("; {step}");
    }
    words
}

/// Why a member is not current: the reason, how often it failed, when it is tried again, and what to do.
#[must_use]
pub fn condition_words(condition: &PeerCondition, now: UnixMs) -> String {
    let cause = condition.cause.to_string();
    // The client's words may say the same, and more.
    let mut words = match condition.text.as_str() {
        "" => cause,
        text if text.starts_with(&cause) => text.to_owned(),
        text => format!("{cause} ({text})"),
    };
    if condition.failures > 1 {
        words += &format!(", failed {} times in a row", condition.failures);
    }
    if let Some(retry) = condition.retry_unix_ms.filter(|retry| *retry > now && condition.failures > 0) {
        words += &format!(", next try in {} s", (retry.0 - now.0).div_ceil(1000));
    }
    if let Some(step) = condition.cause.next_step() {
        words += &format!("; {step}");
    }
    words
}

#[cfg(test)]
mod tests {
    use rmr_common::pool::Cause;

    use super::*;

    #[test]
    fn a_condition_says_why_how_often_when_again_and_what_to_do() {
        let mut condition = PeerCondition {
            cause: Cause::DiskFull,
            text: "Write at 0+4096 answered NoSpace".into(),
            failures: 7,
            since_unix_ms: Some(UnixMs(0)),
            retry_unix_ms: Some(UnixMs(64_500)),
        };
        assert_eq!(
            condition_words(&condition, UnixMs(1000)),
            "its disk is full (Write at 0+4096 answered NoSpace), failed 7 times in a row, next try in 64 s; free space on its \
             file system, or replace its store"
        );
        condition = PeerCondition {
            cause: Cause::ReadErrors,
            text: "its disk failed reads that another copy served (6 so far)".into(),
            failures: 1,
            since_unix_ms: None,
            retry_unix_ms: None,
        };
        let words = condition_words(&condition, UnixMs(1000));
        assert!(words.starts_with("its disk failed reads that another copy served (6 so far); "), "{words}");
        condition = PeerCondition {
            cause: Cause::NodeStopped,
            text: String::new(),
            failures: 0,
            since_unix_ms: None,
            retry_unix_ms: Some(UnixMs(2000)),
        };
        assert_eq!(condition_words(&condition, UnixMs(1000)), "its node was stopped");
    }
}
