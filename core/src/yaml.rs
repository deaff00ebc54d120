//! What every YAML text of ServiceKeel's own has in common: it is one document.

use std::borrow::Cow;

/// The text with every document that has nothing in it turned into a comment, as the `---` at the end of what a
/// template or `kubectl` has written. Lines and columns stay what they are. A line that begins with `---` begins a
/// document wherever it stands, in a block of text too (YAML 1.2.2, rule 206, `c-forbidden`).
pub fn without_empty_documents(text: &str) -> Cow<'_, str> {
    let mut empty = Vec::new();
    // The last marker behind which nothing has come yet.
    let mut open = None;
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        if line.strip_prefix("---").is_some_and(|rest| is_blank(rest) && !rest.starts_with('#')) {
            empty.extend(open.replace(at));
        } else if !is_blank(line) && line.trim_end() != "..." {
            open = None;
        }
        at += line.len();
    }
    empty.extend(open);
    if empty.is_empty() {
        return Cow::Borrowed(text);
    }
    let mut text = text.to_owned();
    for at in empty {
        text.replace_range(at..=at, "#");
    }
    Cow::Owned(text)
}

/// Whether there is nothing in a line but white space and a comment.
fn is_blank(line: &str) -> bool {
    let line = line.trim_start_matches([' ', '\t', '\u{feff}']).trim_end();
    line.is_empty() || line.starts_with('#')
}

#[cfg(test)]
mod tests {
    use super::without_empty_documents;

    #[test]
    fn only_documents_with_nothing_in_them_become_comments() {
        for (text, expected) in [
            ("a: 1\n", "a: 1\n"),
            ("---\na: 1\n", "---\na: 1\n"),
            ("a: 1\n---\n", "a: 1\n#--\n"),
            ("a: 1\r\n---\r\n", "a: 1\r\n#--\r\n"),
            ("a: 1\n---", "a: 1\n#--"),
            ("---\na: 1\n--- # over\n\n# so\n---\n...\n", "---\na: 1\n#-- # over\n\n# so\n#--\n...\n"),
            ("---\n---\na: 1\n", "#--\n---\na: 1\n"),
            ("---\n# a template\n---\na: 1\n", "#--\n# a template\n---\na: 1\n"),
            ("a: 1\n---\nb: 1\n", "a: 1\n---\nb: 1\n"),
            ("a: |\n  x\n---\n", "a: |\n  x\n#--\n"),
            ("a: 1\n---b\n", "a: 1\n---b\n"),
            ("a: 1\n---#b\n", "a: 1\n---#b\n"),
            ("a: 1\n--- {b: 1}\n", "a: 1\n--- {b: 1}\n"),
            ("%YAML 1.2\n---\na: 1\n", "%YAML 1.2\n---\na: 1\n"),
        ] {
            assert_eq!(without_empty_documents(text), expected, "{text:?}");
        }
    }
}
