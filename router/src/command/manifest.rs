//! Annotations inside of a manifest of Kubernetes: of pods, which the sidecar reads, and of Services and namespaces,
//! which the controller reads.

mod block;
mod shape;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::path::Path;

use serde_yaml::budget::BudgetBreach;
use serde_yaml::{Error, Options, Spanned};
use servicekeel_core::annotation;
use servicekeel_core::plan::{self, ALLOW, EXPORT, EXPORTED_SERVICES, IMPORTED_SERVICES, SIDECAR};

use self::block::Lines;
use self::shape::{Documents, Object, Value};
use super::check::{Checked, Kind, Mesh, findings, words};
use crate::settings::problem::Problem;
use crate::settings::{explain, options};

const KEYS: [&str; 5] = [IMPORTED_SERVICES, EXPORTED_SERVICES, SIDECAR, EXPORT, ALLOW];
const PREFIX: &str = "servicekeel.io/";
/// The most problems that are told of one manifest.
const MAX_TOLD: usize = 4096;
/// The most summaries of annotations that are told one by one.
const MAX_SUMMARIES: usize = 8;
/// The most values that the aliases of all annotations of a manifest may unfold to: about a second.
const MAX_UNFOLDED: usize = 1 << 20;
/// The deepest nesting. A List of Deployments as JSON, with the fields that each manager owns, has about 20.
const MAX_DEPTH: usize = 64;

/// Checks the annotations of every document.
pub(super) fn check(file: &Path, text: &str, mesh: Option<&Mesh>) -> Checked {
    check_within(file, text, mesh, MAX_UNFOLDED)
}

/// As [`check`], with another bound for [`MAX_UNFOLDED`].
fn check_within(file: &Path, text: &str, mesh: Option<&Mesh>, unfold: usize) -> Checked {
    let read =
        serde_yaml::from_str_multiple_with_options::<Option<Object>, Documents>(text, limits(text.len()));
    let documents = match read {
        Ok(documents) => documents.0,
        Err(error) => {
            let place = error.location().map(|at| (at.line().max(1), at.column().max(1)));
            let text = match error.without_snippet() {
                Error::Budget { breach: BudgetBreach::Depth { .. }, .. } => {
                    format!("nested too deeply: the limit is {MAX_DEPTH} levels")
                }
                Error::Budget { .. } => "too many aliases: write the values out".to_owned(),
                error => explain(error),
            };
            let error = Problem { file: file.to_owned(), place, text };
            return Checked { errors: vec![error], ..Checked::default() };
        }
    };
    let mut reader = Reader {
        file,
        mesh,
        lines: Lines::new(text),
        of: None,
        unfold,
        aliased: BTreeSet::new(),
        more: 0,
        unchecked: 0,
        checked: Checked::default(),
        seen: false,
        summaries: Vec::new(),
        further: 0,
    };
    documents.iter().for_each(|document| reader.walk(document, None));
    let Reader { mut checked, seen, mut summaries, further, more, unchecked, .. } = reader;
    if unchecked > 1 {
        let text = format!(
            "{} in all were not checked because of their aliases",
            count(unchecked, "annotation", "annotations")
        );
        checked.errors.push(Problem::of_file(file, text));
    }
    if more > 0 {
        let text = format!("{} after these", count(more, "more problem", "more problems"));
        checked.errors.push(Problem::of_file(file, text));
    }
    if further > 0 {
        summaries.push(format!("and {further} more"));
    }
    if !seen {
        let warning = format!("no {IMPORTED_SERVICES} or {EXPORTED_SERVICES} annotation found");
        checked.warnings.push(Problem::of_file(file, warning));
    }
    if summaries.is_empty() {
        summaries.push("nothing to check".into());
    }
    checked.summary = summaries.join(", ");
    checked
}

/// The text's own length bounds the work, beside what aliases unfold to, which is bounded for all documents together.
fn limits(bytes: usize) -> Options {
    let mut options = options();
    if let Some(budget) = &mut options.budget {
        (budget.max_documents, budget.max_total_scalar_bytes) = (bytes.max(1), bytes.max(1) * 2);
        (budget.max_nodes, budget.max_events) = (2 * bytes + MAX_DEPTH, 4 * bytes + MAX_DEPTH);
        (budget.max_depth, budget.flow_nesting_limit) = (MAX_DEPTH, MAX_DEPTH);
    }
    options
}

/// What annotations stand on.
#[derive(Clone, Copy)]
enum Holder<'o> {
    /// A pod, or the template of pods.
    Pod,
    Service,
    Namespace,
    /// A Deployment and its like, by its kind: its pods get the annotations of its template.
    Workload(&'o str),
    Other(&'o str),
}

impl<'o> Holder<'o> {
    fn of(object: &'o Object) -> Self {
        let holds_template =
            object.spec.as_ref().is_some_and(|spec| spec.template.is_some() || spec.job_template.is_some());
        match object.kind.as_deref() {
            Some("Service") => Self::Service,
            Some("Namespace") => Self::Namespace,
            kind if holds_template => Self::Workload(kind.unwrap_or("object")),
            None | Some("Pod") => Self::Pod,
            Some(kind) => Self::Other(kind),
        }
    }

    /// Why nothing reads this annotation here; `None` where it is read.
    fn ignores(self, key: &str) -> Option<String> {
        let of_pods = [IMPORTED_SERVICES, EXPORTED_SERVICES, SIDECAR].contains(&key);
        let (kind, read) = match self {
            Self::Pod => ("pod", of_pods),
            Self::Service => ("Service", key == EXPORT || key == ALLOW),
            Self::Namespace => ("Namespace", key == EXPORT),
            Self::Workload(kind) if of_pods => {
                return Some(format!(
                    "is set on the {kind}, not in its pod template: no pod gets it; \
                     move it to spec.template.metadata.annotations"
                ));
            }
            Self::Workload(kind) | Self::Other(kind) => (kind, false),
        };
        let belongs = match key {
            EXPORT => "a Service or a Namespace",
            ALLOW => "a Service",
            _ => "a pod",
        };
        (!read).then(|| format!("is set on the {kind}, where it has no effect; it belongs on {belongs}"))
    }
}

struct Reader<'m> {
    file: &'m Path,
    /// The clusters that rules may name, where they are known.
    mesh: Option<&'m Mesh>,
    lines: Lines<'m>,
    /// The object of a List that is read: its place in the output of kubectl finds nobody.
    of: Option<String>,
    /// How much the aliases of further annotations may unfold to.
    unfold: usize,
    /// The texts with aliases so far: those of a Deployment's pods are all the same.
    aliased: BTreeSet<String>,
    /// Problems beyond [`MAX_TOLD`].
    more: usize,
    /// Annotations whose aliases were too many together.
    unchecked: usize,
    checked: Checked,
    /// Whether any annotation of ours, or one that was meant to be, is there.
    seen: bool,
    summaries: Vec<String>,
    /// Summaries beyond [`MAX_SUMMARIES`].
    further: usize,
}

impl Reader<'_> {
    fn walk(&mut self, object: &Object, template: Option<Holder<'_>>) {
        let holder = template.unwrap_or_else(|| Holder::of(object));
        let annotations = object.metadata.as_ref().and_then(|metadata| metadata.annotations.as_ref());
        for (key, value) in annotations.iter().flat_map(|annotations| &annotations.0) {
            self.annotation(holder, key, value);
        }
        if let Some(spec) = &object.spec {
            spec.template.iter().for_each(|template| self.walk(template, Some(Holder::Pod)));
            spec.job_template
                .iter()
                .for_each(|template| self.walk(template, Some(Holder::Workload("jobTemplate"))));
        }
        for item in object.items.iter().flat_map(|items| &items.0) {
            self.of = named(item);
            self.walk(item, None);
            self.of = None;
        }
    }

    fn sum_up(&mut self, summary: String) {
        if self.summaries.len() < MAX_SUMMARIES {
            self.summaries.push(summary);
        } else {
            self.further += 1;
        }
    }

    /// Whether the aliases of a text may be unfolded: the work of one check is bounded, whoever's they are.
    fn may_unfold(&mut self, text: &str) -> bool {
        // Without an anchor there is nothing to unfold.
        if !(text.contains('*') && text.contains('&')) || self.aliased.contains(text) {
            return true;
        }
        let Some(left) = self.unfold.checked_sub(annotation::most_unfolded(text.len())) else { return false };
        self.unfold = left;
        self.aliased.insert(text.to_owned());
        true
    }

    fn annotation(&mut self, holder: Holder<'_>, key: &Spanned<String>, value: &Spanned<Value>) {
        let name = key.value.as_str();
        if !KEYS.contains(&name) {
            if let Some(reason) = unknown(name) {
                self.seen = true;
                self.warn(key, reason);
            }
            return;
        }
        self.seen = true;
        if let Some(reason) = holder.ignores(name) {
            return self.warn(key, format!("{name} {reason}"));
        }
        let value_text = match &value.value {
            Value::Empty => return,
            Value::Text(text) => text,
            Value::Bare => {
                return self
                    .refuse(value, format!("{name}: annotation values are strings: put it in quotes"));
            }
            Value::Tree => {
                let reason =
                    "annotation values are strings: put `|` after the colon and indent the lines below it";
                return self.refuse(key, format!("{name}: {reason}"));
            }
        };
        match name {
            IMPORTED_SERVICES => self.services(name, Kind::Imports, value, value_text),
            EXPORTED_SERVICES => self.services(name, Kind::Exports, value, value_text),
            EXPORT => match plan::opt_out(value_text) {
                Ok(out) => self.sum_up(format!("{name} is \"{}\"", !out)),
                Err(other) => self.refuse(
                    value,
                    format!(
                        "{name} is {other:?}; use \"true\" or \"false\"; any other value exports nothing"
                    ),
                ),
            },
            ALLOW => match plan::allow(value_text) {
                Ok(rules) => {
                    if rules.iter().any(|rule| rule.namespace.is_some()) {
                        let reason = "a rule with a namespace lets nobody in yet; name the whole cluster";
                        self.warn(value, format!("{name}: {reason}"));
                    }
                    for rule in &rules {
                        if let Some(reason) =
                            self.mesh.and_then(|mesh| annotation::stranger(&rule.cluster, mesh))
                        {
                            self.warn(value, format!("{name}: {reason}"));
                        }
                    }
                    self.sum_up(format!("{name} with {}", count(rules.len(), "rule", "rules")));
                }
                Err(reason) => self.refuse(value, reason.to_string()),
            },
            SIDECAR => match value_text.as_str() {
                "true" => self.sum_up(format!("{name} is \"true\"")),
                "false" => {}
                other => self.warn(value, format!("{name} is {other:?}; only \"true\" has an effect")),
            },
            _ => {}
        }
    }

    fn services(&mut self, key: &str, kind: Kind, value: &Spanned<Value>, text: &str) {
        if !self.may_unfold(text) {
            self.unchecked += 1;
            if self.unchecked == 1 {
                let reason = format!(
                    "{key}: not checked: the aliases of the annotations before it reached the limit of one check; \
                     check it by itself"
                );
                self.refuse(value, reason);
            }
            return;
        }
        let block = self.lines.block(place(value).0, place(value).1);
        let checked = services((self.file, block), self.mesh, key, kind, place(value), text);
        for (problem, refused) in checked
            .errors
            .into_iter()
            .map(|problem| (problem, true))
            .chain(checked.warnings.into_iter().map(|problem| (problem, false)))
        {
            self.tell(problem, refused);
        }
        if !checked.summary.is_empty() {
            self.sum_up(checked.summary);
        }
    }

    fn warn<T>(&mut self, at: &Spanned<T>, text: String) {
        self.tell(Problem { file: self.file.to_owned(), place: Some(place(at)), text }, false);
    }

    fn refuse<T>(&mut self, at: &Spanned<T>, text: String) {
        self.tell(Problem { file: self.file.to_owned(), place: Some(place(at)), text }, true);
    }

    fn tell(&mut self, mut problem: Problem, refused: bool) {
        if let Some(of) = &self.of {
            problem.text = format!("{of}: {}", problem.text);
        }
        if self.checked.errors.len() + self.checked.warnings.len() >= MAX_TOLD {
            self.more += 1;
        } else if refused {
            self.checked.errors.push(problem);
        } else {
            self.checked.warnings.push(problem);
        }
    }
}

/// An item of a List as kubectl names it.
fn named(item: &Object) -> Option<String> {
    let metadata = item.metadata.as_ref()?;
    let name = metadata.name.as_deref()?;
    let kind = item.kind.as_deref().unwrap_or("Pod");
    let shown = match &metadata.namespace {
        Some(namespace) => format!("{kind} {namespace}/{name}"),
        None => format!("{kind} {name}"),
    };
    Some(shown.chars().take(600).flat_map(char::escape_debug).collect())
}

/// Whether a key is one of ours, or was meant to be.
fn is_ours(key: &str) -> bool {
    KEYS.contains(&key) || unknown(key).is_some()
}

fn place<T>(value: &Spanned<T>) -> (u64, u64) {
    (value.referenced.line().max(1), value.referenced.column().max(1))
}

pub(super) fn count(number: usize, one: &str, several: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { several })
}

/// What to say of an annotation that nothing reads and whose author meant one of ours.
fn unknown(key: &str) -> Option<String> {
    let ours = key.starts_with(PREFIX);
    let shown: String = key.chars().take(80).flat_map(char::escape_debug).collect();
    if key.len() > 2 * PREFIX.len() + IMPORTED_SERVICES.len() {
        return ours.then(|| format!("{shown}… is unknown; known annotations: {}", KEYS.join(", ")));
    }
    let near = KEYS.map(|known| (strsim::damerau_levenshtein(known, key), known)).into_iter().min()?;
    // A short word is another one after two letters.
    let slips = |known: &str| if ours { ((known.len() - PREFIX.len()) / 4).max(1) } else { 2 };
    match near {
        (distance, known) if distance <= slips(known) => {
            Some(format!("{shown} is unknown; did you mean {known}?"))
        }
        _ => ours.then(|| format!("{shown} is unknown; known annotations: {}", KEYS.join(", "))),
    }
}

/// Checks a text of `imported-services` or `exported-services` that stands at this place of the manifest, or in this block
/// of it.
fn services(
    (file, block): (&Path, Option<(u64, u64)>),
    mesh: Option<&Mesh>,
    key: &str,
    kind: Kind,
    (line, column): (u64, u64),
    text: &str,
) -> Checked {
    findings(text, kind, mesh, |finding| {
        let (place, text) = match block {
            Some((head, indent)) => {
                ((head + finding.line, indent + finding.column), format!("{key}: {}", words(&finding)))
            }
            // Of a quoted text the lines are not those of the manifest.
            None => ((line, column), format!("{key}: {finding}")),
        };
        Problem { file: file.to_owned(), place: Some(place), text }
    })
}
