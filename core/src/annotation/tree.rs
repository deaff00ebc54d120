//! YAML as a tree in which every node knows where it stands.
//!
//! The contract refuses one wrong entry and serves the others, so the text can't go straight into typed structs:
//! the first mistake would end the whole document. It is read into this tree, and the rules are ours.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_yaml::budget::BudgetBreach;
use serde_yaml::options::{DuplicateKeyPolicy, NonFiniteFloatPolicy};
use serde_yaml::{Error, MessageFormatter, Options, Spanned, UserMessageFormatter};

use super::fields::quoted;
use super::{Finding, MAX_TEXT};
use crate::yaml::without_empty_documents;

/// The most scalars, lists and mappings in one annotation, with aliases expanded. Those of an entry and its ports take
/// more than three bytes each, so that a text full of them fits.
const MAX_NODES: usize = MAX_TEXT / 3;
/// The deepest nesting; the contract's own is 5.
const MAX_DEPTH: usize = 32;
/// The most aliases.
const MAX_ALIASES: usize = 1024;
/// What aliases may add to the work of a short text ...
const MIN_UNFOLDED: usize = 4096;
/// ... and to that of a longer one, for each of its bytes: reading stays linear in what somebody wrote.
const UNFOLDED_PER_BYTE: usize = 8;

/// One node of the tree.
#[derive(Debug)]
pub(super) struct Node {
    /// Line where it stands, from 1.
    pub(super) line: u64,
    /// Column where it starts, from 1.
    pub(super) column: u64,
    pub(super) value: Value,
    span: Span,
}

/// What a node is.
#[derive(Debug)]
pub(super) enum Value {
    /// Nothing, `~` or `null`.
    Null,
    /// A string, or an integer or boolean that is written as YAML itself would write it (`80`, `true`): the rules know
    /// better than YAML which one they want.
    Text(String),
    /// What YAML reads as something else than what is written there: 0x10 is 16, 1.10 is 1.1, 8e3 is 8000, `True` is
    /// `true`. It is neither served as the one nor as the other.
    Converted(Converted),
    /// A sequence.
    List(Vec<Node>),
    /// A mapping, in its order, repeated keys included.
    Map(Vec<(Node, Node)>),
}

/// A number or a boolean that is written in another way than YAML writes it.
#[derive(Debug)]
pub(super) struct Converted {
    /// As the author wrote it.
    pub(super) written: String,
    /// As YAML reads it.
    pub(super) read: String,
}

impl fmt::Display for Converted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { written, read } = self;
        match read.as_str() {
            "true" | "false" => write!(f, "{}, which YAML reads as the boolean {read}", quoted(written)),
            _ => write!(f, "{}, which YAML reads as the number {read}", quoted(written)),
        }
    }
}

impl Value {
    /// What it is, for a sentence.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "empty",
            Self::Text(_) | Self::Converted(_) => "a single value",
            Self::List(_) => "a list",
            Self::Map(_) => "a mapping",
        }
    }

    /// The author's own text where it is one, else its kind.
    pub(super) fn shown(&self) -> String {
        match self {
            Self::Text(text) => quoted(text),
            Self::Converted(converted) => converted.to_string(),
            other => other.kind().to_owned(),
        }
    }
}

impl Node {
    /// Reads a text. A text with no document in it is [`Value::Null`].
    ///
    /// # Errors
    /// A [`Finding`] where the text is not one YAML document, or is over a limit.
    pub(super) fn read(text: &str) -> Result<Self, Finding> {
        if text.len() > MAX_TEXT {
            return Err(Finding {
                path: String::new(),
                line: 1,
                column: 1,
                reason: format!("the annotation has {} bytes; the limit is {MAX_TEXT}", text.len()),
            });
        }
        let text = without_empty_documents(text);
        let read: Result<Self, _> = serde_yaml::from_str_with_options(&text, options(text.len()));
        let mut root = read.map_err(|error| {
            let (line, column) = error.location().map_or((1, 1), |at| (at.line().max(1), at.column().max(1)));
            let reason = reason(&error, text.len());
            Finding { path: String::new(), line, column, reason }
        })?;
        root.compare_with(&text);
        Ok(root)
    }

    /// Tells what YAML has converted from what stands there. The recursion is as deep as [`MAX_DEPTH`].
    fn compare_with(&mut self, text: &str) {
        match &mut self.value {
            Value::Null | Value::Text(_) => {}
            Value::Converted(converted) => {
                let written = self.span.written(text).unwrap_or_default();
                if written == converted.read {
                    self.value = Value::Text(written.to_owned());
                } else {
                    written.clone_into(&mut converted.written);
                }
            }
            Value::List(nodes) => nodes.iter_mut().for_each(|node| node.compare_with(text)),
            Value::Map(pairs) => {
                for (key, value) in pairs {
                    key.compare_with(text);
                    value.compare_with(text);
                }
            }
        }
    }
}

/// Where a scalar stands in the text, in bytes.
#[derive(Debug, Clone, Copy)]
struct Span {
    start: usize,
    length: usize,
}

impl Span {
    fn written(self, text: &str) -> Option<&str> {
        text.get(self.start..self.start.checked_add(self.length)?)
    }
}

/// What is wrong with the text as a whole.
fn reason(error: &Error, bytes: usize) -> String {
    let mut inner = error;
    while let Error::AliasError { error, .. } | Error::WithSnippet { error, .. } = inner {
        inner = error;
    }
    match inner {
        Error::MultipleDocuments { .. } | Error::Budget { breach: BudgetBreach::Documents { .. }, .. } => {
            "a second YAML document starts here; only one is allowed: merge its services into the first"
                .to_owned()
        }
        Error::Budget { breach: BudgetBreach::Depth { .. }, .. } => {
            format!("nested too deeply: the limit is {MAX_DEPTH} levels")
        }
        Error::Budget { breach: BudgetBreach::Nodes { .. } | BudgetBreach::Events { .. }, .. } => {
            format!("too many values: the limit is {MAX_NODES}, with aliases expanded")
        }
        Error::Budget { .. }
        | Error::AliasReplayCounterOverflow { .. }
        | Error::AliasReplayLimitExceeded { .. }
        | Error::AliasExpansionLimitExceeded { .. }
        | Error::AliasReplayStackDepthExceeded { .. } => format!(
            "too many aliases: the limit is {MAX_ALIASES} aliases and {} values; write the entries out",
            unfolded(bytes)
        ),
        _ => format!("not YAML: {}", UserMessageFormatter.format_message(error.without_snippet())),
    }
}

/// How much the aliases of a text of so many bytes may unfold to.
pub(super) fn unfolded(bytes: usize) -> usize {
    bytes.saturating_mul(UNFOLDED_PER_BYTE).clamp(MIN_UNFOLDED, MAX_NODES)
}

fn options(bytes: usize) -> Options {
    serde_yaml::options! {
        budget: serde_yaml::budget! {
            max_nodes: MAX_NODES,
            max_events: 3 * MAX_NODES,
            max_depth: MAX_DEPTH,
            flow_nesting_limit: MAX_DEPTH,
            max_aliases: MAX_ALIASES,
            max_anchors: MAX_ALIASES,
            max_recorded_anchor_events: MAX_NODES,
            max_recorded_anchor_bytes: MAX_TEXT,
            max_merge_keys: MAX_ALIASES,
            max_documents: 1,
        },
        alias_limits: serde_yaml::alias_limits! {
            max_total_replayed_events: unfolded(bytes),
            max_replay_stack_depth: MAX_DEPTH,
            max_alias_expansions_per_anchor: MAX_ALIASES,
        },
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        non_finite_float_policy: NonFiniteFloatPolicy::PassThrough,
        ignore_binary_tag_for_string: true,
        reject_unsupported_tags: true,
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
        strict_booleans: true,
        with_snippet: false,
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Spanned { value, defined, .. } = Spanned::deserialize(deserializer)?;
        let at = |place: Option<u64>| place.and_then(|place| place.try_into().ok()).unwrap_or_default();
        let span = Span { start: at(defined.span().byte_offset()), length: at(defined.span().byte_len()) };
        Ok(Self { line: defined.line().max(1), column: defined.column().max(1), value, span })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AnyValue;
        impl<'de> Visitor<'de> for AnyValue {
            type Value = Value;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }
            fn visit_unit<E>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }
            fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
                Ok(read_as(&value))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
                Ok(read_as(&value))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
                Ok(read_as(&value))
            }
            fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
                Ok(read_as(&value))
            }
            fn visit_str<E>(self, value: &str) -> Result<Value, E> {
                Ok(Value::Text(value.to_owned()))
            }
            fn visit_string<E>(self, value: String) -> Result<Value, E> {
                Ok(Value::Text(value))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
                let mut nodes = Vec::new();
                while let Some(node) = list.next_element()? {
                    nodes.push(node);
                }
                Ok(Value::List(nodes))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
                let mut nodes = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    nodes.push(pair);
                }
                Ok(Value::Map(nodes))
            }
        }
        /// What YAML made of a scalar. [`Node::compare_with`] tells whether that is what is written there.
        fn read_as(value: &impl ToString) -> Value {
            Value::Converted(Converted { written: String::new(), read: value.to_string() })
        }
        deserializer.deserialize_any(AnyValue)
    }
}
