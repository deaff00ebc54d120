//! The README and the manifests against the programs: what they name exists, and what they show is accepted.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by a panic")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The root of the workspace.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn read(path: &str) -> String {
    let path = root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Runs a program of the project: it lies beside the test's own directory.
fn run(program: &str, arguments: &[&str]) -> Output {
    let test = std::env::current_exe().unwrap();
    let path = test.parent().unwrap().parent().unwrap().join(program);
    let done = Command::new(&path).args(arguments).output();
    done.unwrap_or_else(|error| panic!("{}: {error}; cargo build first", path.display()))
}

fn succeeds(program: &str, arguments: &[&str]) -> String {
    let done = run(program, arguments);
    let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{program} {arguments:?}: {out}{err}");
    out.into_owned()
}

/// The text below a heading, up to the next one.
fn section<'a>(text: &'a str, heading: &str) -> &'a str {
    let start =
        text.find(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("no {heading:?} in the README"));
    let body = &text[start + heading.len() + 2..];
    &body[..body.find("\n#").unwrap_or(body.len())]
}

/// The first block of a language in a text.
fn block<'a>(text: &'a str, language: &str) -> &'a str {
    let fence = format!("```{language}\n");
    let start = text.find(&fence).unwrap_or_else(|| panic!("no block of {language}")) + fence.len();
    &text[start..start + text[start..].find("```").unwrap()]
}

/// What stands in backticks at the beginning of each row of the tables.
fn first_column(text: &str) -> BTreeSet<String> {
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
    rows.map(|(name, _)| name.to_owned()).collect()
}

#[test]
fn the_table_of_the_sidecars_settings_is_its_help() {
    let help = succeeds("servicekeel-sidecar", &["--help"]);
    let readme = read("README.md");
    let table = section(&readme, "### Sidecar");
    let variables: BTreeSet<String> =
        help.split("[env: ").skip(1).map(|rest| rest.split(['=', ']']).next().unwrap().to_owned()).collect();
    assert!(variables.len() >= 10, "{help}");
    assert_eq!(first_column(table), variables);
    for row in table.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = row.split(" | ").collect();
        let variable = cells[0].trim_start_matches("| `").trim_end_matches('`');
        let default = cells[1].trim();
        // A default in backticks alone is one that the help names; all others are words.
        let Some(default) = default.strip_prefix('`').and_then(|d| d.strip_suffix('`')) else { continue };
        if !variables.contains(default) {
            let flag = help.split("--").find(|part| part.contains(&format!("[env: {variable}=")));
            let shown = flag.unwrap_or_else(|| panic!("{variable} in {help}"));
            assert!(shown.contains(&format!("[default: {default}]")), "{variable}: {default} in {shown}");
        }
    }
}

/// What the sidecar's help shows to copy makes, copied as it is, what it says.
#[test]
fn the_example_of_the_sidecars_help_can_be_copied() {
    let help = succeeds("servicekeel-sidecar", &["--help"]);
    let example = &help[help.find("\nExample").unwrap()..];
    let lines: Vec<&str> = example.lines().skip_while(|line| !line.starts_with("  ")).collect();
    let block =
        lines.iter().take_while(|line| line.starts_with("  ")).copied().collect::<Vec<_>>().join("\n");
    let dir = tempfile::tempdir().unwrap();
    let block = block.replace("/tmp/pod", dir.path().to_str().unwrap());
    let sh = |script: &str, flags: &[&str]| {
        let done = Command::new("sh").args(flags).args(["-c", script]).output().unwrap();
        assert!(done.status.success() && done.stderr.is_empty(), "{script}: {done:?}");
    };
    sh(&block, &["-n"]);
    let (before, program) = block.split_once("servicekeel-sidecar ").unwrap();
    sh(before, &["-e"]);
    let file = dir.path().join("imported-services-config.yaml");
    let said = succeeds("servicekeel-router", &["check", file.to_str().unwrap()]);
    assert!(said.contains("1 entry") && !said.contains("warning"), "{said}");
    let (command, after) = program.split_once('&').unwrap();
    for flag in command.split_whitespace().filter(|word| word.starts_with("--")) {
        assert!(help.contains(&format!("\n      {flag} <")), "{flag} in {help}");
    }
    let address = command.split_whitespace().skip_while(|word| *word != "--sidecar-dns-addr").nth(1).unwrap();
    let (ip, port) = address.split_once(':').unwrap();
    assert!(after.contains(&format!("dig @{ip} -p {port} simple-server.default")), "{after}");
}

#[test]
fn the_table_of_the_controllers_flags_is_its_help() {
    let help = succeeds("servicekeel-controller", &["--help"]);
    let options = &help[help.find("\nOptions:").unwrap()..];
    let flags: BTreeSet<String> = options
        .lines()
        .filter(|line| line.starts_with("      --"))
        .map(|line| line.split_whitespace().next().unwrap().to_owned())
        .collect();
    assert!(!flags.is_empty(), "{help}");
    let readme = read("README.md");
    assert_eq!(first_column(section(&readme, "### Controller")), flags);
}

#[test]
fn the_routers_config_of_the_readme_is_a_good_one() {
    let readme = read("README.md");
    let config = block(section(&readme, "### Router"), "yaml");
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    for cluster in ["cluster-a.local", "cluster-b.local"] {
        succeeds("servicekeel-router", &["pki", "init", "--cluster", cluster, "--dir", &path(cluster)]);
    }
    let (own, here) = (path("cluster-a.local"), path("."));
    succeeds("servicekeel-router", &["pki", "issue", "--dir", &own, "--node", "node-1", "--out", &here]);
    let bundle = succeeds("servicekeel-router", &["pki", "bundle", "--dir", &path("cluster-b.local")]);
    std::fs::write(path("cluster-b-ca.crt"), bundle).unwrap();

    std::fs::write(path("router.yaml"), config).unwrap();
    let said = succeeds("servicekeel-router", &["check", &path("router.yaml")]);
    assert!(said.contains("ok") && !said.contains("warning"), "{said}");
    // The check is one that can fail.
    std::fs::write(path("wrong.yaml"), format!("{config}colour: red\n")).unwrap();
    let refused = run("servicekeel-router", &["check", &path("wrong.yaml")]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stdout).contains("colour"), "{refused:?}");
}

#[test]
fn the_annotations_of_the_readme_and_the_manifests_are_good_ones() {
    let dir = tempfile::tempdir().unwrap();
    let example = dir.path().join("exported-services-config.yaml");
    let readme = read("README.md");
    std::fs::write(&example, block(section(&readme, "### Annotations"), "yaml")).unwrap();
    let simple = root().join("examples/simple");
    for file in [example, simple.join("server-pod.yaml"), simple.join("client-pod.yaml")] {
        let said = succeeds("servicekeel-router", &["check", file.to_str().unwrap()]);
        assert!(said.contains("1 entry") && !said.contains("warning"), "{said}");
    }
}

#[test]
fn the_annotations_of_the_readme_are_those_that_check_knows() {
    let dir = tempfile::tempdir().unwrap();
    let pod = dir.path().join("pod.yaml");
    std::fs::write(&pod, "kind: Pod\nmetadata: { annotations: { servicekeel.io/unknown-to-all: x } }\n")
        .unwrap();
    let said = succeeds("servicekeel-router", &["check", pod.to_str().unwrap()]);
    let known = said.lines().next().unwrap().split_once("known annotations: ").unwrap().1;
    let known: BTreeSet<String> = known.split(", ").map(str::to_owned).collect();
    assert_eq!(first_column(section(&read("README.md"), "### Annotations")), known);
}

#[test]
fn the_subcommands_of_the_readme_are_there() {
    let readme = read("README.md");
    let named = first_column(section(&readme, "### Router"));
    assert!(named.len() >= 5, "{named:?}");
    for name in named {
        let mut words: Vec<&str> =
            name.split(' ').filter(|word| word.starts_with(char::is_lowercase)).collect();
        words.push("--help");
        succeeds("servicekeel-router", &words);
    }
}

#[test]
fn the_make_targets_of_the_readme_are_there() {
    let (readme, makefile) = (read("README.md"), read("Makefile"));
    let mut named = 0;
    for part in readme.split(['`', '\n']).filter_map(|part| part.strip_prefix("make ")) {
        for target in part.split(['#', '=']).next().unwrap().split_whitespace() {
            if target.starts_with(char::is_lowercase) {
                assert!(makefile.contains(&format!("\n{target}: ")), "make {target} is in the README only");
                named += 1;
            }
        }
    }
    assert!(named >= 5);
}

#[test]
fn links_lead_somewhere() {
    for page in ["README.md", "docs/architecture.md", "docs/yaml.md"] {
        let text = read(page);
        let dir = root().join(page).parent().unwrap().to_owned();
        for link in text.split("](").skip(1).map(|rest| rest.split(')').next().unwrap()) {
            if link.contains("://") {
                continue;
            }
            let (path, anchor) = link.split_once('#').map_or((link, None), |(path, at)| (path, Some(at)));
            assert!(dir.join(path).exists(), "{page}: {link}");
            let Some(anchor) = anchor else { continue };
            let target =
                if path.is_empty() { text.clone() } else { std::fs::read_to_string(dir.join(path)).unwrap() };
            let heading = |line: &str| {
                let kept = line.trim_start_matches('#').trim().to_lowercase();
                let kept = kept.chars().filter(|c| c.is_alphanumeric() || *c == ' ' || *c == '-');
                kept.collect::<String>().replace(' ', "-")
            };
            let there = target.lines().any(|line| line.starts_with('#') && heading(line) == anchor);
            assert!(there, "{page}: {link}");
        }
    }
}

/// The programs register their metrics under a prefix of each, so that a name stands in the source without it.
#[test]
fn the_metrics_of_the_readme_are_there() {
    fn sources(dir: &Path) -> String {
        let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        let read = |path: PathBuf| {
            if path.is_dir() { sources(&path) } else { std::fs::read_to_string(path).unwrap() }
        };
        entries.map(read).collect()
    }
    let readme = read("README.md");
    let watch = section(&readme, "### What to watch");
    let named: Vec<&str> = watch.split("`servicekeel_").skip(1).collect();
    assert!(named.len() >= 8, "{watch}");
    for metric in named {
        let metric = metric.split(['`', '{']).next().unwrap();
        let (program, name) = metric.split_once('_').unwrap();
        // A counter and a unit have an ending of their own in the text.
        let name = name.trim_end_matches("_total").trim_end_matches("_seconds").trim_start_matches("dns_");
        let there = sources(&root().join(program).join("src")).contains(&format!("\"{name}\""));
        assert!(there, "servicekeel_{metric}");
    }
}
