//! Words for operators: durations, errors with their causes, text of unknown origin.

use std::error::Error;
use std::time::Duration;

/// Seconds in the two largest units: `42 s`, `5 min 2 s`, `3 h 10 min`, `2 d 4 h`.
#[must_use]
pub fn duration(seconds: u64) -> String {
    let two = |large: u64, large_unit: &str, small: u64, small_unit: &str| match small {
        0 => format!("{large} {large_unit}"),
        _ => format!("{large} {large_unit} {small} {small_unit}"),
    };
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3_600 => two(seconds / 60, "min", seconds % 60, "s"),
        3_600..86_400 => two(seconds / 3_600, "h", seconds / 60 % 60, "min"),
        _ => two(seconds / 86_400, "d", seconds / 3_600 % 24, "h"),
    }
}

/// As [`duration`], with `850 ms` below a second and tenths below a minute: `1.5 s`.
#[must_use]
pub fn time(length: Duration) -> String {
    let ms = length.as_millis();
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..60_000 if ms % 1_000 >= 100 => format!("{}.{} s", ms / 1_000, ms % 1_000 / 100),
        _ => duration(length.as_secs()),
    }
}

/// An error with its causes, each said once: many errors say in their own words what caused them, and name the cause besides.
#[must_use]
pub fn error(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(found) = cause {
        let words = found.to_string();
        if !text.contains(&words) {
            text += &format!(": {words}");
        }
        cause = found.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_in_the_units_of_people() {
        for (ms, printed) in [
            (0, "0 ms"),
            (850, "850 ms"),
            (1_000, "1 s"),
            (1_049, "1 s"),
            (1_500, "1.5 s"),
            (59_999, "59.9 s"),
            (60_000, "1 min"),
            (90_500, "1 min 30 s"),
            (3_600_000, "1 h"),
            (90_000_000, "1 d 1 h"),
        ] {
            assert_eq!(time(Duration::from_millis(ms)), printed, "{ms}");
        }
    }

    #[test]
    fn causes_are_said_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("{what}: {source}")]
        struct Both {
            what: &'static str,
            source: std::io::Error,
        }
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] Both);
        let both = || Both { what: "opening", source: std::io::Error::from_raw_os_error(2) };
        let once = "opening: No such file or directory (os error 2)";
        assert_eq!(error(&both()), once);
        assert_eq!(error(&Outer(both())), format!("outer: {once}"));
    }
}
