//! How `rmrctl` prints for people: sizes in IEC units, times as UTC with their age, aligned tables.

use rmr_common::text::printable;
use std::fmt::Write;

use rmr_common::words;
pub use rmr_common::words::duration;

use crate::admin::api::UnixMs;

/// Bytes with one decimal in the largest unit that gives at least 1: `512 B`, `12.5 MiB`, `10 GiB`.
#[must_use]
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    // Tenths of the unit, in integers: exact for every u64.
    let mut power = 0;
    while power + 1 < UNITS.len() && count >> (10 * (power + 2)) > 0 {
        power += 1;
    }
    let unit = 1u128 << (10 * (power + 1));
    let tenths = (u128::from(count) * 10 + unit / 2) / unit;
    if tenths.is_multiple_of(10) {
        format!("{} {}", tenths / 10, UNITS[power])
    } else {
        format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[power])
    }
}

/// A moment as `2026-11-20T12:03:04Z`.
#[must_use]
pub fn utc(moment: UnixMs) -> String {
    words::utc(moment.0 / 1000)
}

/// A moment with its age: `2026-11-20T12:03:04Z (5 min ago)`.
#[must_use]
pub fn utc_with_age(moment: UnixMs, now: UnixMs) -> String {
    // A moment ahead of our clock is another machine's clock; it is printed as it is, without a guess at its age.
    match now.0.checked_sub(moment.0) {
        Some(age_ms) => format!("{} ({} ago)", utc(moment), duration(age_ms / 1000)),
        None => utc(moment),
    }
}

/// A text of unknown origin without anything that a terminal would obey or that would look like another line.
#[must_use]
pub fn plain(text: &str) -> String {
    printable(text).into_owned()
}

/// Several lines of which parts are of unknown origin: as [`plain`], but line breaks stay.
#[must_use]
pub fn plain_lines(text: &str) -> String {
    text.split('\n').map(printable).collect::<Vec<_>>().join("\n")
}

/// A table with aligned columns.
#[derive(Clone, Debug)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with this heading.
    #[must_use]
    pub fn new(heading: &[&str]) -> Self {
        Self { rows: vec![heading.iter().map(|&h| h.to_owned()).collect()] }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// The lines, each indented by `indent` spaces, without blanks at their ends.
    #[must_use]
    pub fn print(&self, indent: usize) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or_default();
        let width = |column: usize| {
            self.rows
                .iter()
                .filter_map(|r| r.get(column))
                .map(|c| c.chars().count())
                .max()
                .unwrap_or_default()
        };
        let widths: Vec<_> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = " ".repeat(indent);
            for (cell, width) in row.iter().zip(&widths) {
                // Writing to a string cannot fail.
                let _ = write!(line, "{cell:width$}  ");
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_print_in_iec_units() {
        for (count, printed) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (13_107_200, "12.5 MiB"),
            (10 << 30, "10 GiB"),
            ((1 << 40) - 1, "1024 GiB"),
            (1 << 40, "1 TiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(bytes(count), printed, "{count}");
        }
    }

    #[test]
    fn moments_print_as_utc() {
        for (seconds, printed) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_200, "2024-03-01T00:00:00Z"),
            (1_795_215_784, "2026-11-20T23:03:04Z"),
            (4_102_444_799, "2099-12-31T23:59:59Z"),
        ] {
            assert_eq!(utc(UnixMs(seconds * 1000)), printed, "{seconds}");
        }
    }

    #[test]
    fn ages_are_in_words_and_never_negative() {
        assert_eq!(utc_with_age(UnixMs(0), UnixMs(302_000)), "1970-01-01T00:00:00Z (5 min 2 s ago)");
        assert_eq!(utc_with_age(UnixMs(5_000), UnixMs(1_000)), "1970-01-01T00:00:05Z");
        assert_eq!(duration(59), "59 s");
        assert_eq!(duration(3_600), "1 h");
        assert_eq!(duration(90_000), "1 d 1 h");
    }

    #[test]
    fn foreign_text_cannot_command_the_terminal() {
        assert_eq!(plain("a\x1b[2Jb\nc\u{9b}"), r"a\u{1b}[2Jb\nc\u{9b}");
        assert_eq!(plain_lines("a\x1b\nb µ"), "a\\u{1b}\nb µ");
    }

    #[test]
    fn tables_are_aligned_without_trailing_blanks() {
        let mut table = Table::new(&["NAME", "SIZE"]);
        table.row(vec!["a".into(), "1".into()]);
        table.row(vec!["longer".into(), String::new()]);
        assert_eq!(table.print(1), " NAME    SIZE\n a       1\n longer\n");
    }
}
