//! Text from guests and programs, for terminals.

/// `text` with control characters replaced, so that it cannot change a terminal; line ends and tabs stay.
#[must_use]
pub fn printable(text: &str) -> String {
    let shown = |c: char| match c {
        '\n' | '\t' => c.to_string(),
        c if c.is_control() => c.escape_default().to_string(),
        c => c.to_string(),
    };
    text.chars().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_sequences_are_shown_and_lines_stay() {
        assert_eq!(printable("a\tb\né \u{1b}[2J\u{9b}31m\r"), "a\tb\né \\u{1b}[2J\\u{9b}31m\\r");
    }
}
