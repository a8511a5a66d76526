//! Text that somebody else has written.

/// Longest text for a person that is taken from a peer or sent to one, in bytes.
pub(crate) const MAX_TEXT_LEN: usize = 1024;

/// Cuts text from a peer for an error message that quotes it (`{:?}`).
pub(crate) fn clip(text: &str) -> String {
    cut(text, 256).to_owned()
}

/// Text from a peer or a file as it may stand in a log, on a terminal or in an
/// error: what moves the cursor, ends the line or turns the direction of writing is
/// escaped, and what is longer than `max_len` bytes is cut.
pub fn printable(text: &str, max_len: usize) -> String {
    let mut out = String::with_capacity(text.len().min(max_len));
    for c in text.chars() {
        let before = out.len();
        if is_odd(c) {
            out.extend(c.escape_unicode());
        } else {
            out.push(c);
        }
        if out.len() > max_len {
            out.truncate(before);
            let end = cut(&out, max_len.saturating_sub('…'.len_utf8())).len();
            out.truncate(end);
            out.push('…');
            break;
        }
    }
    out
}

/// Control characters, and what has no shape of its own but changes how the text
/// around it is shown.
pub fn is_odd(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e007f}')
}

fn cut(text: &str, max_len: usize) -> &str {
    let mut end = text.len().min(max_len);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_moves_the_cursor_or_turns_the_line() {
        let bad = "a\u{1b}[2J\r\nb\u{9b}31m\u{202e}txt.\u{2066}\u{200f}\u{7f}\u{0}";
        let shown = printable(bad, 256);
        assert!(shown.chars().all(|c| (' '..='~').contains(&c)), "{shown}");
        assert!(shown.starts_with("a\\u{1b}[2J\\u{d}\\u{a}b\\u{9b}"));
        assert_eq!(printable("Gewichte é 日本 ✓", 256), "Gewichte é 日本 ✓");
    }

    #[test]
    fn long_text_is_cut_between_characters() {
        for (text, max_len) in [("é".repeat(300), 256), ("\u{1b}".repeat(300), 256)] {
            let shown = printable(&text, max_len);
            assert!(shown.len() <= max_len && shown.ends_with('…'), "{shown}");
        }
        assert_eq!(printable("abc", 3), "abc");
        assert_eq!(clip(&"é".repeat(300)).len(), 256);
    }
}
