//! `check`: what is wrong with a config, an annotation or a manifest.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, ValueEnum};
use servicekeel_core::annotation::{Defaults, Finding, Parsed, parse_exports_of_mesh, parse_imports_of_mesh};
use servicekeel_core::name::ClusterName;
use servicekeel_runtime::file::{bounded, read_bounded};

use super::{manifest, print};
use crate::settings::{self, problem::Problem};

/// The most bytes of what is checked: `kubectl get pods -A -o json` has about 10 KB a pod. What is kept of it is the
/// text and our annotations.
const MAX_FILE: usize = 256 << 20;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Files to check; `-` is stdin. A router's config says which clusters there are: imports, and rules of `allow`, in the
    /// files after it that name another are warned of.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// What the files are. Default: guessed from their names and content.
    #[arg(long)]
    kind: Option<Kind>,
}

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Kind {
    /// A router's config, with the certificates it refers to.
    Config,
    /// The text of the annotation servicekeel.io/imported-services.
    Imports,
    /// The text of the annotation servicekeel.io/exported-services.
    Exports,
    /// Kubernetes manifests, YAML or JSON: Pods, workloads with a Pod template, Services and Namespaces.
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
        let mut mesh = None;
        for file in &self.files {
            let checked = Checked::of(file, self.kind, mesh.as_ref());
            for problem in checked.told() {
                print(format_args!("{problem}\n"))?;
            }
            if checked.errors.is_empty() {
                print(format_args!("{}: ok, {}\n", file.display(), checked.summary))?;
            }
            good &= checked.errors.is_empty();
            mesh = checked.mesh.or(mesh);
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
    /// The clusters that a good config trusts, its own among them.
    pub(super) mesh: Option<Mesh>,
}

/// The clusters that imports and rules of `allow` may name.
pub(super) type Mesh = BTreeSet<ClusterName>;

impl Checked {
    /// `mesh`: what is known of the clusters so far.
    fn of(file: &Path, kind: Option<Kind>, mesh: Option<&Mesh>) -> Self {
        let (name, text) = match read(file) {
            Ok(read) => read,
            Err(error) => {
                return Self {
                    errors: vec![Problem::of_file(file, format!("{error:#}"))],
                    ..Self::default()
                };
            }
        };
        match kind.unwrap_or_else(|| guess(file, &text)) {
            Kind::Config => {
                let mut checked = config(&name, &text);
                if kind.is_none() && !has(&text, "cluster:") {
                    for error in &mut checked.errors {
                        error.text.push_str(" (read as a router config; use --kind to override)");
                    }
                }
                checked
            }
            Kind::Manifest => manifest::check(&name, &text, mesh),
            kind => annotation(&name, &text, kind, mesh),
        }
    }

    /// Errors and warnings in the order of the text.
    fn told(&self) -> Vec<Problem> {
        let warnings = self.warnings.iter().cloned();
        let warnings = warnings.map(|it| Problem { text: format!("warning: {}", it.text), ..it });
        let mut told: Vec<_> = self.errors.iter().cloned().chain(warnings).collect();
        told.sort_by_key(|problem| problem.place);
        told
    }
}

/// A file's text, and the name under which its problems are told. What comes by a pipe belongs to the directory where
/// the check runs, as do paths in it.
fn read(file: &Path) -> anyhow::Result<(PathBuf, String)> {
    let (name, bytes) = if ["-", "/dev/stdin"].iter().any(|stdin| file == Path::new(stdin)) {
        ("stdin".into(), bounded(io::stdin().lock(), MAX_FILE))
    } else {
        let opened = File::open(file).context("cannot be read")?;
        match opened.metadata().context("cannot be read")?.file_type() {
            kind if kind.is_fifo() || kind.is_char_device() || kind.is_socket() => {
                ("pipe".into(), bounded(opened, MAX_FILE))
            }
            _ => (file.to_owned(), read_bounded(file, MAX_FILE)),
        }
    };
    let text = String::from_utf8(bytes.context("cannot be read")?).context("not UTF-8 text")?;
    Ok((name, text))
}

/// Whether a line of the top level begins so.
fn has(text: &str, key: &str) -> bool {
    text.lines().any(|line| line.starts_with(key))
}

/// What a file is: by its name where it is one that the sidecar reads, else by its top level, and which of the
/// annotations by its name again.
fn guess(file: &Path, text: &str) -> Kind {
    let name = file.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
    match name.as_str() {
        "exported-services-config.yaml" => return Kind::Exports,
        "imported-services-config.yaml" => return Kind::Imports,
        _ => {}
    }
    let json = text.trim_start().starts_with('{');
    let has = |key: &str| has(text, &format!("{key}:")) || (json && text.contains(&format!("\"{key}\"")));
    if has("apiVersion") || has("kind") {
        return Kind::Manifest;
    }
    let named = |direction: &str| name.contains(&format!("{direction}ed-services"));
    if !(has("services") || named("export") || named("import")) {
        return Kind::Config;
    }
    let only_exports_have = text.lines().any(|line| line.trim_start().starts_with("allow:"));
    if name.contains("export") || (only_exports_have && !name.contains("import")) {
        Kind::Exports
    } else {
        Kind::Imports
    }
}

fn config(file: &Path, text: &str) -> Checked {
    let reading = settings::read_text(text, file, &settings::host());
    let mut checked = Checked { warnings: reading.warnings, ..Checked::default() };
    match reading.outcome {
        Err(bad) => checked.errors = bad.problems.0,
        Ok(good) => {
            let config = &good.settings.config;
            checked.mesh = good.settings.mesh();
            let identity = good.settings.identity.as_ref().map_or("no identity".into(), |identity| {
                format!("certificate valid until {}", crate::identity::Date::from(identity.not_after()))
            });
            checked.summary =
                format!("{} of {}/{}, {identity}", Kind::Config.name(), config.cluster, config.node);
        }
    }
    checked
}

fn annotation(file: &Path, text: &str, kind: Kind, mesh: Option<&Mesh>) -> Checked {
    let at = |finding: Finding| Problem {
        file: file.to_owned(),
        place: Some((finding.line, finding.column)),
        text: words(&finding),
    };
    findings(text, kind, mesh, at)
}

/// What is wrong with the text of an annotation; `at` says where a finding is.
pub(super) fn findings(
    text: &str,
    kind: Kind,
    mesh: Option<&Mesh>,
    at: impl Fn(Finding) -> Problem,
) -> Checked {
    // Neither is checked here: what is left out is the pod's own.
    let defaults =
        Defaults { namespace: "default".parse().expect("a label"), cluster: ClusterName::fallback() };
    let parsed = match kind {
        Kind::Exports => parse_exports_of_mesh(text, &defaults, mesh).map(all),
        _ => parse_imports_of_mesh(text, &defaults, mesh).map(all),
    };
    match parsed {
        Err(finding) => Checked { errors: vec![at(finding)], ..Checked::default() },
        Ok((entries, refused, warnings)) => Checked {
            errors: refused.into_iter().map(&at).collect(),
            warnings: warnings.into_iter().map(&at).collect(),
            summary: format!("{} with {}", kind.name(), manifest::count(entries, "entry", "entries")),
            mesh: None,
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
        let checked = Checked::of(&file, kind, None);
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
    fn names_come_before_content_and_json_is_told() {
        let wrong = "service:\n- name: a\n";
        let (errors, ..) = checked("imported-services-config.yaml", wrong, None);
        assert!(errors[0].contains("did you mean `services`?"), "{errors:?}");
        assert_eq!(checked("exported-services-config.yaml", "", None).2, "exported-services with 0 entries");
        let (errors, ..) = checked("x.yaml", wrong, None);
        assert!(errors[0].ends_with("(read as a router config; use --kind to override)"), "{errors:?}");
        let (errors, ..) = checked("x.yaml", wrong, Some(Kind::Config));
        assert!(!errors[0].contains("read as"), "{errors:?}");
        let pod = r#"{"apiVersion": "v1", "kind": "Pod", "metadata": {"annotations":
            {"servicekeel.io/imported-services": "services: [{name: a, ports: [{port: 1}]}]"}}}"#;
        let (errors, _, summary) = checked("pod.json", pod, None);
        assert_eq!((errors, summary.as_str()), (vec![], "imported-services with 1 entry"));
    }

    #[test]
    fn pipes_are_read_to_their_end() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)
            .unwrap();
        let check = |text: String| {
            let to = fifo.clone();
            let writer = std::thread::spawn(move || std::fs::write(to, text));
            let checked = Checked::of(&fifo, None, None);
            let _ = writer.join();
            checked
        };
        let checked = check("services: []\nservice: 1\n".into());
        assert!(checked.told()[0].to_string().starts_with("pipe:2:1: warning: "), "{checked:?}");
    }

    #[test]
    fn what_is_told_is_in_the_order_of_the_text() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("i.yaml");
        let text = "services:\n- name: a\n  colour: red\n  ports: [{port: 0}]\n  size: 1\n- name: b\n";
        std::fs::write(&file, text).unwrap();
        let lines: Vec<_> =
            Checked::of(&file, None, None).told().iter().map(|it| it.place.unwrap().0).collect();
        assert_eq!(lines, [3, 4, 5, 6]);
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
        let missing = Checked::of(Path::new("/nowhere/x.yaml"), None, None);
        assert!(missing.errors[0].to_string().contains("/nowhere/x.yaml: cannot be read"), "{missing:?}");
    }

    #[test]
    fn rules_are_held_against_the_clusters_of_a_config_before_them() {
        let mesh = ["a.local", "b.local"].map(|name| name.parse().unwrap()).into();
        let exports = "services:\n- name: a\n  ports: [{port: 1}]\n  allow: [b.local, b]\n";
        let service = "kind: Service\nmetadata:\n  annotations:\n    servicekeel.io/allow: b.local,b\n";
        let pod = format!(
            "kind: Pod\nmetadata:\n  annotations:\n    servicekeel.io/exported-services: |\n{}",
            exports.lines().map(|line| format!("      {line}\n")).collect::<String>()
        );
        let dir = tempfile::tempdir().unwrap();
        for (text, place) in [(exports, (4, 20)), (service, (4, 27)), (&pod, (8, 26))] {
            let file = dir.path().join("exports.yaml");
            std::fs::write(&file, text).unwrap();
            assert_eq!(Checked::of(&file, None, None).warnings, [], "{text}");
            let told = Checked::of(&file, None, Some(&mesh)).warnings;
            assert_eq!((told.len(), told[0].place), (1, Some(place)), "{told:?}");
            assert!(told[0].text.ends_with("did you mean b.local?"), "{told:?}");
        }
        let file = dir.path().join("imports.yaml");
        std::fs::write(&file, "services:\n- {name: a, cluster: b.locl, ports: [{port: 1}]}\n- {name: b}\n")
            .unwrap();
        let told = Checked::of(&file, Some(Kind::Imports), Some(&mesh)).warnings;
        assert_eq!((told.len(), told[0].place), (1, Some((2, 22))), "{told:?}");
        assert!(told[0].text.contains("nothing of it is reached; did you mean b.local?"), "{told:?}");
    }
}
