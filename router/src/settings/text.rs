//! The config file's text: YAML into the shape of the file, with the place of every value.

use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_yaml::budget::BudgetBreach;
use serde_yaml::{Error, MessageFormatter, Options, Spanned, UserMessageFormatter};

use servicekeel_core::near::nearest;
use servicekeel_core::yaml::without_empty_documents;

use super::problem::Problem;

/// The most bytes of a config file.
pub const MAX_CONFIG: usize = 256 * 1024;
/// The most values in it.
const MAX_NODES: usize = 1 << 15;
/// The deepest nesting; the file's own is 3.
const MAX_DEPTH: usize = 16;

/// A value and where it stands.
pub(super) type Placed = Spanned<String>;

/// The file as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    pub(super) cluster: Option<Placed>,
    pub(super) node: Option<Placed>,
    pub(super) listen: Option<ListenText>,
    pub(super) peers: Option<Vec<PeerText>>,
    pub(super) identity: Option<IdentityText>,
    pub(super) trust: Option<Vec<TrustText>>,
    pub(super) revoked: Option<Vec<Placed>>,
    /// Reserved: a router keeps nothing on disk yet.
    #[serde(rename = "state")]
    pub(super) _state: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ListenText {
    pub(super) sidecars: Option<Placed>,
    pub(super) peers: Option<Placed>,
    pub(super) admin: Option<Placed>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PeerText {
    pub(super) address: Placed,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct IdentityText {
    pub(super) ca: Placed,
    pub(super) cert: Placed,
    pub(super) key: Placed,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TrustText {
    pub(super) cluster: Placed,
    pub(super) ca: Placed,
}

impl File {
    /// Reads it.
    ///
    /// # Errors
    /// The first thing for which the text has not this shape.
    pub(super) fn read(text: &str, file: &Path) -> Result<Self, Problem> {
        if text.len() > MAX_CONFIG {
            let text = format!("{} bytes; the limit is {MAX_CONFIG} for a config", text.len());
            return Err(Problem::of_file(file, text));
        }
        // An empty text is an empty mapping: what is missing is said then.
        let read: Option<Self> = yaml(text, file)?;
        read.map_or_else(|| yaml("{}", file), Ok)
    }
}

/// Reads one YAML document, within limits.
///
/// # Errors
/// The first thing for which the text has not the shape of `T`.
pub(crate) fn yaml<T: DeserializeOwned>(text: &str, file: &Path) -> Result<T, Problem> {
    let text = &without_empty_documents(text);
    let mut field = None;
    let read = serde_yaml::with_deserializer_from_str_with_options(text, options(), |deserializer| {
        let mut track = serde_path_to_error::Track::new();
        T::deserialize(serde_path_to_error::Deserializer::new(deserializer, &mut track))
            .inspect_err(|_| field = Some(track.path().to_string()))
    });
    read.map_err(|error| {
        let place = error.location().map(|at| (at.line().max(1), at.column().max(1)));
        let error = error.without_snippet();
        let reason = explain(error);
        let named = field.as_deref().and_then(named);
        // The reason names an unknown key itself: what is left to say is where it stands.
        let named = match error {
            Error::SerdeUnknownField { .. } => {
                named.and_then(|path| path.rsplit_once('.')).map(|(path, _)| path)
            }
            _ => named,
        };
        let text = match named {
            Some(field) => format!("{field}: {reason}"),
            None => reason,
        };
        Problem { file: file.to_owned(), place, text }
    })
}

/// A field as its file's reader would name it: a [`Spanned`] has fields of its own, and the whole file has no name, nor
/// has what is no YAML.
fn named(path: &str) -> Option<&str> {
    let field = [".value", ".?"].iter().find_map(|end| path.strip_suffix(end)).unwrap_or(path);
    (![".", "?"].contains(&field)).then_some(field)
}

pub(crate) fn options() -> Options {
    serde_yaml::options! {
        budget: serde_yaml::budget! {
            max_nodes: MAX_NODES,
            max_events: 3 * MAX_NODES,
            max_depth: MAX_DEPTH,
            flow_nesting_limit: MAX_DEPTH,
            max_documents: 1,
            max_aliases: 64,
            max_anchors: 64,
            max_recorded_anchor_events: MAX_NODES,
            max_recorded_anchor_bytes: MAX_CONFIG,
            max_merge_keys: 64,
        },
        alias_limits: serde_yaml::alias_limits! {
            max_total_replayed_events: MAX_NODES,
            max_replay_stack_depth: MAX_DEPTH,
            max_alias_expansions_per_anchor: 64,
        },
        strict_booleans: true,
        with_snippet: false,
    }
}

/// The reason in the words of this file's reader, who knows neither serde nor Rust.
pub(crate) fn explain(error: &Error) -> String {
    match error {
        Error::SerdeUnknownField { field, expected, .. } => unknown_key(field, expected),
        Error::SerdeMissingField { field, .. } => format!("the key \"{field}\" is missing here"),
        Error::DuplicateMappingKey { key: Some(key), .. } => {
            format!("duplicate key {key}; remove one of them")
        }
        Error::MultipleDocuments { .. } | Error::Budget { breach: BudgetBreach::Documents { .. }, .. } => {
            "a second YAML document starts here; only one is allowed".into()
        }
        Error::Budget { .. } => format!(
            "too large or nested too deeply: the limit is {MAX_NODES} values and {MAX_DEPTH} levels ({})",
            UserMessageFormatter.format_message(error)
        ),
        Error::AliasError { error, .. } => explain(error),
        Error::Unexpected { expected, .. } => match *expected {
            "mapping start" => "expected a mapping: lines of the form key: value".into(),
            "sequence start" => "expected a list: entries starting with -".into(),
            "string scalar" => "expected a single value".into(),
            other => format!("expected {other}"),
        },
        Error::NullIntoString { .. } => "a value is missing here".into(),
        Error::SerdeInvalidType { .. } | Error::SerdeInvalidValue { .. } | Error::InvalidScalar { .. } => {
            UserMessageFormatter.format_message(error).into_owned()
        }
        other => format!("not YAML: {}", UserMessageFormatter.format_message(other)),
    }
}

fn unknown_key(key: &str, known: &[&'static str]) -> String {
    let shown: String = key.chars().take(80).flat_map(char::escape_debug).collect();
    match nearest(key, known.iter().copied()) {
        Some(meant) => format!("unknown key \"{shown}\"; did you mean \"{meant}\"?"),
        None => format!("unknown key \"{shown}\"; known keys: {}", known.join(", ")),
    }
}
