//! Values of settings that are checked where they are read, so that the error shows the line or flag.

use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize};

/// A whole number from `MIN` to `MAX`; anything else is refused where it is read, so the error shows the line or flag.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(transparent)]
pub struct Bounded<const MIN: u64, const MAX: u64>(u64);

impl<const MIN: u64, const MAX: u64> Bounded<MIN, MAX> {
    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// A number that is known to be within the limits.
    pub(super) const fn of<const NUMBER: u64>() -> Self {
        const { assert!(MIN <= NUMBER && NUMBER <= MAX) };
        Self(NUMBER)
    }

    /// The number as an index or a count; the limits of all settings fit.
    pub(super) const fn as_usize(self) -> usize {
        const { assert!(MAX <= u32::MAX as u64, "limits of counts are below 2^32") };
        #[expect(
            clippy::cast_possible_truncation,
            reason = "MAX is below 2^32, and a usize has 64 bits here"
        )]
        let count = self.0 as usize;
        count
    }

    /// Three quarters of the number, and at least 1.
    pub(super) const fn three_quarters(self) -> Self {
        let part = self.0 - self.0 / 4;
        Self(if part < MIN { MIN } else { part })
    }

    pub(super) const fn seconds(self) -> Duration {
        Duration::from_secs(self.0)
    }

    fn check(number: i128) -> Result<Self, String> {
        u64::try_from(number)
            .ok()
            .filter(|n| (MIN..=MAX).contains(n))
            .map(Self)
            .ok_or_else(|| format!("{number}: expected a whole number from {MIN} to {MAX}"))
    }
}

impl<const MIN: u64, const MAX: u64> FromStr for Bounded<MIN, MAX> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text
            .parse::<i128>()
            .map_err(|_| format!("'{text}': expected a whole number from {MIN} to {MAX}"))?;
        Self::check(number)
    }
}

impl<'de, const MIN: u64, const MAX: u64> Deserialize<'de> for Bounded<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = i64::deserialize(deserializer)?;
        Self::check(number.into()).map_err(serde::de::Error::custom)
    }
}

/// Which disk engine to use.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum EngineChoice {
    /// io_uring where the kernel has it, else inline, with a warning.
    #[default]
    Auto,
    /// io_uring, or refuse to start.
    Uring,
    /// System calls on the I/O thread; slow disks delay everything on that shard.
    Inline,
}

/// Form of the log.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// A line for people.
    #[default]
    Text,
    /// A JSON object per line.
    Json,
}

/// Which events the log has: a level, or `tracing` directives such as `info,rmr_node::service=debug`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LogLevel(String);

impl Default for LogLevel {
    fn default() -> Self {
        Self("info".to_owned())
    }
}

impl LogLevel {
    /// The directives, known to be well-formed.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for LogLevel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fail = |reason: &str| {
            format!(
                "log level '{text}': {reason}; expected error, warn, info, debug, trace, \
                 or directives such as info,rmr_node=debug"
            )
        };
        // A lone word that is no level would be taken as the name of a module, and nothing would be logged.
        for directive in text.split(',').map(str::trim).filter(|d| !d.contains(['=', '['])) {
            directive
                .parse::<tracing_subscriber::filter::LevelFilter>()
                .map_err(|_| fail("no such level"))?;
        }
        text.parse::<tracing_subscriber::filter::targets::Targets>().map_err(|e| fail(&e.to_string()))?;
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for LogLevel {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<LogLevel> for String {
    fn from(level: LogLevel) -> Self {
        level.0
    }
}
