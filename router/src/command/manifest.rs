//! Annotations inside of a manifest of Kubernetes.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_yaml::Spanned;

use super::check::{Checked, Kind, findings, words};
use crate::settings::problem::Problem;
use crate::settings::{explain, options};

const IMPORTS: &str = "servicekeel.io/imported-services";
const EXPORTS: &str = "servicekeel.io/exported-services";

/// What is read of a manifest; the rest is Kubernetes' own matter.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Manifest {
    metadata: Option<Metadata>,
    spec: Option<Spec>,
    /// Of a List.
    items: Option<Vec<Manifest>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Metadata {
    annotations: Option<BTreeMap<String, Option<Spanned<String>>>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Spec {
    /// Of a Deployment and its like.
    template: Option<Box<Manifest>>,
    /// Of a CronJob.
    job_template: Option<Box<Manifest>>,
}

/// Checks the annotations of every document.
pub(super) fn check(file: &Path, text: &str) -> Checked {
    let documents: Vec<Option<Manifest>> = match serde_yaml::from_multiple_with_options(text, options()) {
        Ok(documents) => documents,
        Err(error) => {
            let place = error.location().map(|at| (at.line().max(1), at.column().max(1)));
            let text = explain(error.without_snippet());
            let error = Problem { file: file.to_owned(), place, text };
            return Checked { errors: vec![error], ..Checked::default() };
        }
    };
    let mut all = Checked::default();
    let mut summaries = Vec::new();
    for document in documents.iter().flatten() {
        walk(document, &mut |key, kind, value| {
            let checked = annotation(file, text, key, kind, value);
            all.errors.extend(checked.errors);
            all.warnings.extend(checked.warnings);
            summaries.push(checked.summary);
        });
    }
    if summaries.is_empty() {
        let warning = format!("no annotation {IMPORTS} or {EXPORTS} in it");
        all.warnings.push(Problem::of_file(file, warning));
        summaries.push("nothing to check".into());
    }
    all.summary = summaries.join(", ");
    all
}

fn walk(manifest: &Manifest, found: &mut impl FnMut(&str, Kind, &Spanned<String>)) {
    let annotations = manifest.metadata.as_ref().and_then(|metadata| metadata.annotations.as_ref());
    for (key, value) in annotations.into_iter().flatten() {
        match (key.as_str(), value) {
            (IMPORTS, Some(value)) => found(key, Kind::Imports, value),
            (EXPORTS, Some(value)) => found(key, Kind::Exports, value),
            _ => {}
        }
    }
    let templates = manifest.spec.iter().flat_map(|spec| [&spec.template, &spec.job_template]);
    templates.flatten().for_each(|template| walk(template, found));
    manifest.items.iter().flatten().for_each(|item| walk(item, found));
}

fn annotation(file: &Path, manifest: &str, key: &str, kind: Kind, value: &Spanned<String>) -> Checked {
    let (line, column) = (value.referenced.line().max(1), value.referenced.column().max(1));
    let block = block(manifest, line, column);
    findings(&value.value, kind, |finding| {
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

/// The line that heads a literal block scalar (`|`), and how far its text is indented, where the value at this place,
/// which is that of the text or of its head, is one.
fn block(manifest: &str, line: u64, column: u64) -> Option<(u64, u64)> {
    let lines: Vec<&str> = manifest.lines().collect();
    let at = usize::try_from(line).ok()?.checked_sub(1)?;
    let blank = |line: &&str| line.trim().is_empty();
    let indent = |line: &str| (line.len() - line.trim_start_matches(' ').len()) as u64;
    if heads_block(lines.get(at)?) {
        let first = lines.get(at + 1..)?.iter().find(|line| !blank(line))?;
        return Some((line, indent(first)));
    }
    let text = indent(lines.get(at)?);
    let head = lines.get(..at)?.iter().rposition(|line| !blank(line))?;
    (text + 1 == column && heads_block(lines[head])).then_some((head as u64 + 1, text))
}

fn heads_block(line: &str) -> bool {
    let line = line.split(" #").next().unwrap_or(line).trim_end();
    let style = line.rsplit([' ', ':']).next().unwrap_or("");
    style.strip_prefix('|').is_some_and(|rest| rest.chars().all(|c| matches!(c, '+' | '-' | '0'..='9')))
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "\
apiVersion: v1
kind: Pod
metadata:
  name: client
  annotations:
    other: {}
    servicekeel.io/imported-services: | # by hand
      services:
        - name: web
          ports:
            - port: 99999
spec:
  containers: [ { name: app, image: x } ]
";

    #[test]
    fn findings_stand_where_the_manifest_has_them() {
        let text = POD.replace("{}", "\"1\"");
        let checked = check(Path::new("pod.yaml"), &text);
        assert_eq!(checked.errors.len(), 1, "{checked:?}");
        let (line, column) = checked.errors[0].place.unwrap();
        let line = text.lines().nth(line as usize - 1).unwrap();
        assert_eq!(&line[column as usize - 1..], "99999");
        assert!(
            checked.errors[0].text.starts_with("servicekeel.io/imported-services: services[0].ports[0].port")
        );
    }

    #[test]
    fn templates_lists_and_several_documents() {
        let deployment = "kind: Deployment\nspec:\n  template:\n    metadata:\n      annotations:\n        servicekeel.io/exported-services: \"services: [{name: a, ports: [{port: 1}]}]\"\n";
        let checked = check(Path::new("d.yaml"), &format!("---\nkind: Service\n---\n{deployment}"));
        assert!(checked.errors.is_empty() && checked.warnings.is_empty(), "{checked:?}");
        assert_eq!(checked.summary, "exported-services with 1 entry");
        let wrong = deployment.replace("port: 1", "port: x");
        let checked = check(Path::new("d.yaml"), &wrong);
        assert_eq!(checked.errors[0].place, Some((6, 43)), "{checked:?}");
        let checked = check(Path::new("s.yaml"), "kind: Service\n");
        assert!(checked.errors.is_empty() && checked.warnings.len() == 1, "{checked:?}");
    }
}
