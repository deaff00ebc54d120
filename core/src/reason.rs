//! Words that come from elsewhere, such as why a peer refused a flow: made fit to be shown where they are decoded, so that
//! neither a log nor a status nor a terminal has to ask who wrote them.

use minicbor::{Decoder, decode};

/// The most bytes of such words that are kept.
pub const MAX_REASON: usize = 256;

/// The words with [`MAX_REASON`] bytes at most, and whatever has no shape of its own on a terminal escaped: control
/// characters, those that turn the direction of a text, and those that join another.
///
/// ```
/// use servicekeel_core::reason::shown;
/// assert_eq!(shown("no endpoint: \"web\""), "no endpoint: \"web\"");
/// assert_eq!(shown("a\nb\u{1b}[31m\u{202e}"), "a\\nb\\u{1b}[31m\\u{202e}");
/// ```
pub fn shown(text: &str) -> String {
    let mut shown = String::with_capacity(text.len().min(MAX_REASON));
    for c in text.chars() {
        let before = shown.len();
        push_shown(&mut shown, c);
        if shown.len() > MAX_REASON - '…'.len_utf8() {
            shown.truncate(before);
            shown.push('…');
            break;
        }
    }
    shown
}

/// Whether a text is shown as it is, whatever its length.
pub fn is_plain(text: &str) -> bool {
    text.chars().all(is_plain_char)
}

fn is_plain_char(c: char) -> bool {
    matches!(c, '"' | '\'' | '\\') || c.escape_debug().len() == 1
}

fn push_shown(to: &mut String, c: char) {
    if is_plain_char(c) { to.push(c) } else { to.extend(c.escape_debug()) }
}

/// A whole output of lines, with what a terminal would obey escaped.
pub fn shown_lines(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if c == '\n' { shown.push(c) } else { push_shown(&mut shown, c) }
    }
    shown
}

pub(crate) fn read<C>(d: &mut Decoder<'_>, _: &mut C) -> Result<String, decode::Error> {
    Ok(shown(d.str()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_short_and_plain() {
        let hostile = "x\n2026-11-30T00:00:00Z ERROR forged\u{1b}[31mRED\u{7}\u{9b}2J\u{202e}\u{2066}\u{200b}\u{feff}\u{301}\r\0";
        for text in [hostile.to_owned(), hostile.repeat(2000), "é".repeat(60_000), "\u{202e}".repeat(99)] {
            let shown = shown(&text);
            assert!(is_plain(&shown) && shown.len() <= MAX_REASON, "{shown:?}");
            assert!(shown.chars().all(|c| !c.is_control()), "{shown:?}");
            assert!(!shown.contains(['\u{202e}', '\u{2066}', '\u{200b}', '\u{feff}']), "{shown:?}");
        }
        assert_eq!(shown(&"é".repeat(60_000)).len(), 255);
        assert_eq!(shown("née \\ 'quoted'"), "née \\ 'quoted'");
        assert_eq!(shown_lines("a\nb\u{1b}c\n"), "a\nb\\u{1b}c\n");
    }
}
