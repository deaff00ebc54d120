//! A mapping's fields, sorted into those that the contract knows; and the findings on the way.

use super::tree::{Node, Value};
use super::{Finding, MAX_FINDINGS};
use crate::near::nearest;

/// What is wrong so far. Keeps the first [`MAX_FINDINGS`] of each kind and says how many more there were.
#[derive(Debug, Default)]
pub(super) struct Findings {
    refused: Bounded,
    warnings: Bounded,
}

#[derive(Debug, Default)]
struct Bounded {
    kept: Vec<Finding>,
    more: usize,
}

impl Bounded {
    fn push(&mut self, finding: Finding) {
        if self.kept.len() < MAX_FINDINGS {
            self.kept.push(finding);
        } else {
            self.more += 1;
        }
    }

    fn into_vec(mut self) -> Vec<Finding> {
        if let (more @ 1.., Some(last)) = (self.more, self.kept.last_mut()) {
            last.reason.push_str(&format!(" (and {more} more findings after this one)"));
        }
        self.kept
    }
}

impl Findings {
    /// Something for which an entry is not served.
    pub(super) fn refuse(&mut self, at: &Node, path: &str, reason: impl Into<String>) {
        self.refused.push(finding(at, path, reason.into()));
    }

    /// Something that is served and looks wrong.
    pub(super) fn warn(&mut self, at: &Node, path: &str, reason: impl Into<String>) {
        self.warnings.push(finding(at, path, reason.into()));
    }

    /// The refusals and the warnings, each in the order of the text.
    pub(super) fn into_parts(self) -> (Vec<Finding>, Vec<Finding>) {
        (self.refused.into_vec(), self.warnings.into_vec())
    }
}

pub(super) fn finding(at: &Node, path: &str, reason: String) -> Finding {
    Finding { path: path.to_owned(), line: at.line, column: at.column, reason }
}

/// A text of the author's, cut and escaped so that it fits a line of a log.
pub(super) fn quoted(text: &str) -> String {
    const MOST: usize = 80;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

/// Sorts a mapping's values into `known` names: the value of `known[i]` is the result's `[i]`. A name may have
/// a second spelling, written `name|other`. Unknown fields become warnings.
/// `None`, after a refusal, where the node is no mapping or a known field stands twice.
pub(super) fn fields<'n, const N: usize>(
    node: &'n Node,
    path: &str,
    known: [&str; N],
    findings: &mut Findings,
) -> Option<[Option<&'n Node>; N]> {
    let Value::Map(pairs) = &node.value else {
        let names = list(known);
        findings.refuse(
            node,
            path,
            format!("is {}; expected a mapping with the fields {names}", node.value.kind()),
        );
        return None;
    };
    let mut slots = [None; N];
    let mut whole = true;
    for (key, value) in pairs {
        let Value::Text(name) = &key.value else {
            findings.warn(key, path, format!("field name is {}; ignored", key.value.shown()));
            continue;
        };
        match known.iter().position(|known| known.split('|').any(|spelling| spelling == name)) {
            None => {
                let shown = quoted(name);
                let reason = match nearest(name, known.iter().flat_map(|known| known.split('|'))) {
                    Some(meant @ "allow") => format!(
                        "unknown field, ignored; did you mean `{meant}`? An export without it is open to every member of the mesh"
                    ),
                    Some(meant) => format!("unknown field, ignored; did you mean `{meant}`?"),
                    None => format!("unknown field, ignored (known fields: {})", list(known)),
                };
                findings.warn(key, &join(path, shown.trim_matches('"')), reason);
            }
            Some(i) if slots[i].is_some() => {
                findings.refuse(key, &join(path, name), "is given twice; remove one of them");
                whole = false;
            }
            Some(i) => slots[i] = Some(value),
        }
    }
    whole.then_some(slots)
}

/// A field of a path.
pub(super) fn join(path: &str, field: &str) -> String {
    if path.is_empty() { field.to_owned() } else { format!("{path}.{field}") }
}

fn list<const N: usize>(known: [&str; N]) -> String {
    known.map(|name| name.split('|').next().unwrap_or(name)).join(", ")
}
