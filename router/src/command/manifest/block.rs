//! Literal blocks (`|`) of a manifest: the lines of such a text are lines of the manifest, those of a quoted one are not.

use std::collections::BTreeMap;

/// The lines of a manifest.
pub(super) struct Lines<'m> {
    lines: Vec<&'m str>,
    /// What is known of a line: one of JSON may hold the values of a whole cluster.
    known: BTreeMap<usize, Option<Block>>,
}

/// A literal block to which a line belongs.
#[derive(Clone, Copy)]
struct Block {
    /// The line of the `|`, from 1.
    head: u64,
    /// How far the text is indented.
    indent: u64,
    /// The column of the text, where the line is the first one of it; every column of a head is the block's.
    column: Option<u64>,
}

impl<'m> Lines<'m> {
    pub(super) fn new(text: &'m str) -> Self {
        Self { lines: text.lines().collect(), known: BTreeMap::new() }
    }

    /// The line that heads a literal block, and how far its text is indented, where the value at this place, which is that
    /// of the text or of its head, is one.
    pub(super) fn block(&mut self, line: u64, column: u64) -> Option<(u64, u64)> {
        let at = usize::try_from(line).ok()?.checked_sub(1)?;
        let lines = &self.lines;
        let block = *self.known.entry(at).or_insert_with(|| read(lines, at));
        let block = block.filter(|block| block.column.is_none_or(|only| only == column))?;
        Some((block.head, block.indent))
    }
}

fn read(lines: &[&str], at: usize) -> Option<Block> {
    let blank = |line: &&str| line.trim().is_empty();
    let indent = |line: &str| (line.len() - line.trim_start_matches(' ').len()) as u64;
    let line = lines.get(at)?;
    if heads_block(line) {
        let first = lines.get(at + 1..)?.iter().find(|line| !blank(line))?;
        return Some(Block { head: at as u64 + 1, indent: indent(first), column: None });
    }
    let head = lines.get(..at)?.iter().rposition(|line| !blank(line))?;
    let indent = indent(line);
    heads_block(lines[head]).then_some(Block { head: head as u64 + 1, indent, column: Some(indent + 1) })
}

fn heads_block(line: &str) -> bool {
    let line = line.split(" #").next().unwrap_or(line).trim_end();
    let style = line.rsplit([' ', ':']).next().unwrap_or("");
    style.strip_prefix('|').is_some_and(|rest| rest.chars().all(|c| matches!(c, '+' | '-' | '0'..='9')))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    /// As `kubectl get pods -A -o json | jq -c` prints a cluster.
    #[test]
    fn a_line_with_many_values_is_read_once() {
        let text = "x".repeat(1 << 20) + ": 1";
        let mut lines = Lines::new(&text);
        let begun = Instant::now();
        for column in 1..2_000 {
            assert_eq!(lines.block(1, column), None);
        }
        // A scan of the line for each value is 2 GB.
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    }
}
