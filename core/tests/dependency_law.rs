//! The law of the house: which room may use which, and what the pure core must never reach.
//!
//! It is read from `cargo metadata`, so it holds for the graph as resolved, features included, and not only for what
//! the manifests say.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// Each room and the rooms that it may use, in normal, dev and build dependencies alike.
const ROOMS: &[(&str, &[&str])] = &[
    ("servicekeel-core", &[]),
    ("servicekeel-runtime", &["servicekeel-core"]),
    ("servicekeel-sidecar", &["servicekeel-core", "servicekeel-runtime"]),
    ("servicekeel-router", &["servicekeel-core", "servicekeel-runtime"]),
    ("servicekeel-controller", &["servicekeel-core", "servicekeel-runtime"]),
    (
        "sim",
        &[
            "servicekeel-core",
            "servicekeel-runtime",
            "servicekeel-sidecar",
            "servicekeel-router",
            "servicekeel-controller",
        ],
    ),
    (
        "benches",
        &["servicekeel-core", "servicekeel-runtime", "servicekeel-sidecar", "servicekeel-router", "e2e"],
    ),
    ("e2e", &["servicekeel-core"]),
    ("examples", &["servicekeel-core", "e2e"]),
];

/// What does I/O, reads a clock, asks the OS for randomness, or does cryptography: not for the core, at any depth.
/// `*` stands for any ending.
const IMPURE: &[&str] = &[
    "async-*",
    "aws-lc-*",
    "chrono",
    "fastrand",
    "futures-timer",
    "getrandom",
    "hickory-*",
    "hyper*",
    "k8s-openapi",
    "kube*",
    "libc",
    "mio",
    "nix",
    "notify",
    "openssl*",
    "quinn*",
    "rand",
    "rand_*",
    "rcgen",
    "ring",
    "rustix",
    "rustls*",
    "smol",
    "socket2",
    "time",
    "tokio*",
    "tracing-subscriber",
    "turmoil",
    "windows*",
];

#[derive(Clone, Copy, PartialEq)]
enum Kinds {
    Normal,
    All,
}

struct Graph {
    /// Package id to its name.
    names: BTreeMap<String, String>,
    /// Package id to what it uses, and whether one of the uses is a normal dependency.
    uses: BTreeMap<String, Vec<(String, bool)>>,
    members: BTreeSet<String>,
}

impl Graph {
    fn of_workspace() -> Self {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
        // The programs run on Linux; without the filter, cargo would fetch the crates of every platform.
        let output = Command::new(env!("CARGO"))
            .args([
                "metadata",
                "--format-version=1",
                "--locked",
                "--filter-platform=x86_64-unknown-linux-gnu",
            ])
            .arg("--manifest-path")
            .arg(manifest)
            .output()
            .expect("cargo runs, since it runs this test");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self::parse(&serde_json::from_slice(&output.stdout).expect("cargo metadata writes JSON"))
    }

    fn parse(metadata: &Value) -> Self {
        let text = |v: &Value| v.as_str().expect("a string").to_owned();
        fn list(v: &Value) -> &[Value] {
            v.as_array().expect("an array")
        }
        Self {
            names: list(&metadata["packages"]).iter().map(|p| (text(&p["id"]), text(&p["name"]))).collect(),
            uses: list(&metadata["resolve"]["nodes"])
                .iter()
                .map(|node| {
                    let used = list(&node["deps"]).iter().map(|dep| {
                        let normal = list(&dep["dep_kinds"]).iter().any(|kind| kind["kind"].is_null());
                        (text(&dep["pkg"]), normal)
                    });
                    (text(&node["id"]), used.collect())
                })
                .collect(),
            members: list(&metadata["workspace_members"]).iter().map(text).collect(),
        }
    }

    fn id(&self, name: &str) -> &String {
        self.members.iter().find(|id| self.names[*id] == name).expect("a room of this name")
    }

    /// A way from the room to a package that `forbidden` knows, as `room -> a -> b`. The room's own dependencies are
    /// of these kinds; below them only normal ones count.
    fn path(&self, room: &str, kinds: Kinds, forbidden: impl Fn(&str) -> bool) -> Option<String> {
        let root = self.id(room);
        let mut seen = BTreeSet::from([root]);
        let mut queue = vec![(root, room.to_owned())];
        while let Some((id, path)) = queue.pop() {
            for (used, normal) in &self.uses[id] {
                if !(*normal || (id == root && kinds == Kinds::All)) || !seen.insert(used) {
                    continue;
                }
                let path = format!("{path} -> {}", self.names[used]);
                if forbidden(&self.names[used]) {
                    return Some(path);
                }
                queue.push((used, path));
            }
        }
        None
    }
}

fn is_impure(name: &str) -> bool {
    IMPURE.iter().any(|pattern| match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => name == *pattern,
    })
}

#[test]
fn each_room_uses_only_the_rooms_below_it() {
    let graph = Graph::of_workspace();
    let known: BTreeSet<&str> = ROOMS.iter().map(|(room, _)| *room).collect();
    let members: BTreeSet<&str> = graph.members.iter().map(|id| graph.names[id].as_str()).collect();
    assert_eq!(members, known, "a new room gets its place in this table, and in design §2");

    for (room, allowed) in ROOMS {
        for (used, _) in &graph.uses[graph.id(room)] {
            let name = graph.names[used].as_str();
            assert!(!graph.members.contains(used) || allowed.contains(&name), "{room} must not use {name}");
        }
    }
}

#[test]
fn the_core_is_pure() {
    let found = Graph::of_workspace().path("servicekeel-core", Kinds::Normal, is_impure);
    assert_eq!(found, None, "the core does no I/O, reads no clock and no randomness");
}

#[test]
fn only_the_simulation_knows_that_it_is_one() {
    let graph = Graph::of_workspace();
    for (room, _) in ROOMS.iter().filter(|(room, _)| *room != "sim") {
        assert_eq!(graph.path(room, Kinds::All, |name| name == "turmoil"), None);
    }
    let sim = graph.path("sim", Kinds::All, |name| name == "turmoil");
    assert_eq!(sim.as_deref(), Some("sim -> turmoil"), "else the three tests here read the graph wrongly");
}

#[test]
fn the_router_needs_no_api_server() {
    let graph = Graph::of_workspace();
    for room in ["servicekeel-runtime", "servicekeel-router"] {
        assert_eq!(graph.path(room, Kinds::Normal, |name| name.starts_with("kube")), None);
    }
}
