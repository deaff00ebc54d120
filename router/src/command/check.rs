//! `check`: what is wrong with a config, an annotation or a manifest.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, ValueEnum};
use servicekeel_core::annotation::{Defaults, Finding, Parsed, parse_exports, parse_imports};
use servicekeel_core::name::ClusterName;
use servicekeel_runtime::file::read_bounded;

use super::{manifest, print};
use crate::settings::{self, problem::Problem};

/// The most bytes of a file that is checked: more than any of them may have.
const MAX_FILE: usize = 4 << 20;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Files to check.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// What they are; told by their content and name where this is not given.
    #[arg(long)]
    kind: Option<Kind>,
}

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Kind {
    /// A router's config, with the certificates that it names.
    Config,
    /// The text of the annotation servicekeel.io/imported-services.
    Imports,
    /// The text of the annotation servicekeel.io/exported-services.
    Exports,
    /// A manifest of Kubernetes (a Pod, or what has a Pod's template) with either annotation.
    Manifest,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Config => "a router's config",
            Self::Imports => "imported-services",
            Self::Exports => "exported-services",
            Self::Manifest => "a manifest",
        }
    }
}

impl Arguments {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        let mut good = true;
        for file in &self.files {
            let checked = Checked::of(file, self.kind);
            for problem in &checked.errors {
                print(format_args!("{problem}\n"))?;
            }
            for problem in &checked.warnings {
                print(format_args!(
                    "{}\n",
                    Problem { text: format!("warning: {}", problem.text), ..problem.clone() }
                ))?;
            }
            if checked.errors.is_empty() {
                print(format_args!("{}: ok, {}\n", file.display(), checked.summary))?;
            }
            good &= checked.errors.is_empty();
        }
        Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Checked {
    pub(super) errors: Vec<Problem>,
    pub(super) warnings: Vec<Problem>,
    /// What is fine, for the line that says so.
    pub(super) summary: String,
}

impl Checked {
    fn of(file: &Path, kind: Option<Kind>) -> Self {
        match text(file) {
            Err(error) => {
                Self { errors: vec![Problem::of_file(file, format!("{error:#}"))], ..Self::default() }
            }
            Ok(text) => match kind.unwrap_or_else(|| guess(file, &text)) {
                Kind::Config => config(file),
                Kind::Manifest => manifest::check(file, &text),
                kind => annotation(file, &text, kind),
            },
        }
    }
}

fn text(file: &Path) -> anyhow::Result<String> {
    let bytes = read_bounded(file, MAX_FILE).context("can't be read")?;
    String::from_utf8(bytes).context("not UTF-8 text")
}

/// What a file is, by its top level, and for the two annotations by its name.
fn guess(file: &Path, text: &str) -> Kind {
    let has = |key: &str| text.lines().any(|line| line.starts_with(key));
    if has("apiVersion:") || has("kind:") {
        return Kind::Manifest;
    }
    if !has("services:") {
        return Kind::Config;
    }
    let name = file.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
    let only_exports_have = text.lines().any(|line| line.trim_start().starts_with("allow:"));
    if name.contains("export") || (only_exports_have && !name.contains("import")) {
        Kind::Exports
    } else {
        Kind::Imports
    }
}

fn config(file: &Path) -> Checked {
    let reading = settings::read(file, &settings::host());
    let mut checked = Checked { warnings: reading.warnings, ..Checked::default() };
    match reading.outcome {
        Err(bad) => checked.errors = bad.problems.0,
        Ok(good) => {
            let config = &good.settings.config;
            let identity = good.settings.identity.as_ref().map_or("no identity".into(), |identity| {
                format!("certificate valid until {}", crate::identity::Date::from(identity.not_after()))
            });
            checked.summary =
                format!("{} of {}/{}, {identity}", Kind::Config.name(), config.cluster, config.node);
        }
    }
    checked
}

fn annotation(file: &Path, text: &str, kind: Kind) -> Checked {
    let at = |finding: Finding| Problem {
        file: file.to_owned(),
        place: Some((finding.line, finding.column)),
        text: words(&finding),
    };
    findings(text, kind, at)
}

/// What is wrong with the text of an annotation; `at` says where a finding is.
pub(super) fn findings(text: &str, kind: Kind, at: impl Fn(Finding) -> Problem) -> Checked {
    // Neither is checked here: what is left out is the pod's own.
    let defaults =
        Defaults { namespace: "default".parse().expect("a label"), cluster: ClusterName::fallback() };
    let parsed = match kind {
        Kind::Exports => parse_exports(text, &defaults).map(all),
        _ => parse_imports(text, &defaults).map(all),
    };
    match parsed {
        Err(finding) => Checked { errors: vec![at(finding)], ..Checked::default() },
        Ok((entries, refused, warnings)) => Checked {
            errors: refused.into_iter().map(&at).collect(),
            warnings: warnings.into_iter().map(&at).collect(),
            summary: format!(
                "{} with {entries} {}",
                kind.name(),
                if entries == 1 { "entry" } else { "entries" }
            ),
        },
    }
}

fn all<T>(parsed: Parsed<T>) -> (usize, Vec<Finding>, Vec<Finding>) {
    (parsed.entries.len(), parsed.refused, parsed.warnings)
}

/// A finding without its place.
pub(super) fn words(finding: &Finding) -> String {
    if finding.path.is_empty() {
        finding.reason.clone()
    } else {
        format!("{}: {}", finding.path, finding.reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(name: &str, text: &str, kind: Option<Kind>) -> (Vec<String>, Vec<String>, String) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(name);
        std::fs::write(&file, text).unwrap();
        let checked = Checked::of(&file, kind);
        let shown = |problems: &[Problem]| {
            let prefix = format!("{}/", dir.path().display());
            problems.iter().map(|p| p.to_string().replace(&prefix, "")).collect()
        };
        (shown(&checked.errors), shown(&checked.warnings), checked.summary)
    }

    #[test]
    fn kinds_are_told_by_content_and_name() {
        let config = "cluster: a.local\nnode: n\n";
        assert_eq!(checked("x.yaml", config, None).2, "a router's config of a.local/n, no identity");
        let services = "services:\n- name: a\n  ports: [{port: 1}]\n";
        assert_eq!(checked("x.yaml", services, None).2, "imported-services with 1 entry");
        assert_eq!(
            checked("exported-services-config.yaml", services, None).2,
            "exported-services with 1 entry"
        );
        let allow = format!("{services}  allow: [b.local]\n");
        assert_eq!(checked("x.yaml", &allow, None).2, "exported-services with 1 entry");
        assert_eq!(checked("x.yaml", services, Some(Kind::Exports)).2, "exported-services with 1 entry");
    }

    #[test]
    fn every_finding_has_its_place() {
        let (errors, warnings, _) = checked(
            "i.yaml",
            "services:\n- name: a\n  colour: red\n  ports: [{port: 99999}]\n- name: b\n  ports:\n  - port: 1\n    protocol: SCTP\n",
            None,
        );
        assert_eq!(errors.len(), 2, "{errors:?}");
        assert!(
            errors[0].starts_with("i.yaml:4:") && errors[0].contains("services[0].ports[0].port"),
            "{errors:?}"
        );
        assert!(errors[1].starts_with("i.yaml:8:") && errors[1].contains("SCTP"), "{errors:?}");
        assert!(warnings[0].starts_with("i.yaml:3:3: services[0].colour"), "{warnings:?}");
        let (errors, ..) = checked(
            "r.yaml",
            "cluster: a.local\nlisten: { admin: nowhere }\npeers: [ { address: x } ]\n",
            None,
        );
        assert_eq!(errors.len(), 2, "{errors:?}");
        assert!(errors[0].starts_with("r.yaml:2:18: listen.admin"), "{errors:?}");
    }

    #[test]
    fn what_cannot_be_read_is_told() {
        let (errors, ..) = checked("x.yaml", "services: [", None);
        assert!(errors[0].starts_with("x.yaml:1:") && errors[0].contains("not YAML"), "{errors:?}");
        let missing = Checked::of(Path::new("/nowhere/x.yaml"), None);
        assert!(missing.errors[0].to_string().contains("/nowhere/x.yaml: can't be read"), "{missing:?}");
    }
}
