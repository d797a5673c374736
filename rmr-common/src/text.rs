//! Words of strangers on their way to a log or a terminal.
//!
//! Names, descriptions, paths and the words of refusals come from whoever opens a connection. A line end among them would
//! forge a line of the log; an escape character would give orders to the terminal of whoever reads it.

use std::borrow::Cow;
use std::fmt::{self, Write};

/// Whether a character does more than to stand there: control characters, separators of lines, and those that change the
/// direction of what follows or are not seen.
fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// The text with every such character as an escape sequence of Rust: `\n`, `\u{1b}`.
#[must_use]
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(is_hidden) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    // A string takes everything.
    let _ = Printable(&mut escaped).write_str(text);
    Cow::Owned(escaped)
}

/// Passes text on to a writer as [`printable`] has it.
pub struct Printable<W>(pub W);

impl<W: Write> Write for Printable<W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut rest = text;
        while let Some(at) = rest.find(is_hidden) {
            let (plain, hidden) = rest.split_at(at);
            self.0.write_str(plain)?;
            let mut chars = hidden.chars();
            if let Some(c) = chars.next() {
                write!(self.0, "{}", c.escape_default())?;
            }
            rest = chars.as_str();
        }
        self.0.write_str(rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_would_forge_a_line_or_order_a_terminal_about_is_escaped_and_all_else_stays() {
        for (text, shown) in [
            ("vhost-brmr on hv-1, pid 7", "vhost-brmr on hv-1, pid 7"),
            ("Größe 大 \\ \"x\"", "Größe 大 \\ \"x\""),
            ("a\nINFO forged", "a\\nINFO forged"),
            ("\x1b[2J\x07\x7f", "\\u{1b}[2J\\u{7}\\u{7f}"),
            ("\u{9b}31m\r\u{202e}x", "\\u{9b}31m\\r\\u{202e}x"),
        ] {
            assert_eq!(printable(text), shown);
        }
    }

    proptest! {
        #[test]
        fn nothing_hidden_is_left(text in any::<String>()) {
            prop_assert!(!printable(&text).contains(is_hidden));
        }
    }
}
