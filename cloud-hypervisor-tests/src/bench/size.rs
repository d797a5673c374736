//! Sizes in bytes as people write them on a command line: `4096`, `4k`, `1G`.

/// Reads a number of bytes with an optional suffix k, M, G or T, each 1024 times the one before.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("expected bytes with an optional suffix k, M, G or T, found \"{text}\"");
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let power = match &text[digits.len()..] {
        "" => 0,
        "k" | "K" => 1,
        "M" => 2,
        "G" => 3,
        "T" => 4,
        _ => return Err(wrong()),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1024_u64.pow(power)).ok_or_else(wrong)
}

/// The same for sizes of a request.
pub fn parse_size_u32(text: &str) -> Result<u32, String> {
    u32::try_from(parse_size(text)?).map_err(|_| format!("expected less than 4 GiB, found \"{text}\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_their_suffix() {
        assert_eq!(parse_size("512"), Ok(512));
        assert_eq!(parse_size("4k"), Ok(4096));
        assert_eq!(parse_size("1G"), Ok(1 << 30));
        assert_eq!(parse_size_u32("128K"), Ok(128 << 10));
    }

    #[test]
    fn anything_else_is_refused_with_the_text_that_was_found() {
        for text in ["", "k", "4kk", "-1", "4 k", "99999999999T", "é"] {
            assert!(parse_size(text).unwrap_err().contains(text), "{text}");
        }
        assert!(parse_size_u32("4G").is_err());
    }
}
