//! `pki`: authorities and certificates as files.

use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use servicekeel_core::name::ClusterName;
use servicekeel_runtime::file::{read_bounded, replace};

use super::print;
use crate::identity::Date;
use crate::pki::{AUTHORITY_DAYS, Authority, NODE_DAYS};

/// A certificate's file may be read by all.
const PUBLIC: u32 = 0o644;
const SECRET: u32 = 0o600;
/// The most bytes of a file of an authority.
const MAX_PEM: usize = 64 * 1024;

/// What comes when.
pub(super) const EXAMPLES: &str = "\
Once per cluster. Keep the directory safe; nodes do not need it:
  servicekeel-router pki init --cluster cluster-a.local --dir pki

Once per node. Put the three files next to the node's config, and the printed lines into it:
  servicekeel-router pki issue --dir pki --node node-1 --out node-1

Before the certificate expires (after one year), issue a new one. A running router picks up the new files:
  servicekeel-router pki issue --dir pki --node node-1 --out node-1 --force

For the routers of other clusters, to be added to their `trust`:
  servicekeel-router pki bundle --dir pki > cluster-a.local.crt";

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Create a cluster's certificate authority: DIR/ca.crt and DIR/ca.key. Keep the key secret: it can impersonate every
    /// router of the cluster.
    Init(Init),
    /// Issue the certificate of a node's router: OUT/node.crt, OUT/node.key (secret) and the authority's certificate,
    /// OUT/ca.crt.
    Issue(Issue),
    /// Print the authority's certificate, for the `trust` of other clusters.
    Bundle(Bundle),
}

#[derive(Debug, Args)]
pub(super) struct Init {
    /// The cluster's name, such as cluster-a.local; unique in the mesh.
    #[arg(long)]
    cluster: ClusterName,
    /// The authority's directory; created if it does not exist.
    #[arg(long)]
    dir: PathBuf,
    /// Validity in days.
    #[arg(long, default_value_t = AUTHORITY_DAYS)]
    days: u32,
    /// Replace an existing authority. This invalidates every certificate it has issued.
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args)]
pub(super) struct Issue {
    /// The authority's directory.
    #[arg(long)]
    dir: PathBuf,
    /// The node's name, as in the router's config.
    #[arg(long)]
    node: ClusterName,
    /// Directory for the files; created if it does not exist.
    #[arg(long)]
    out: PathBuf,
    /// Validity in days, at most that of the authority.
    #[arg(long, default_value_t = NODE_DAYS)]
    days: u32,
    /// A DNS name to add to the certificate, for other software that checks it. May be repeated.
    #[arg(long)]
    dns: Vec<ClusterName>,
    /// Replace an existing certificate and key. A running router picks up the new ones.
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args)]
pub(super) struct Bundle {
    /// The authority's directory.
    #[arg(long)]
    dir: PathBuf,
}

impl Command {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Init(init) => init.run(),
            Self::Issue(issue) => issue.run(),
            Self::Bundle(bundle) => bundle.run(),
        }?;
        Ok(ExitCode::SUCCESS)
    }
}

impl Init {
    fn run(self) -> anyhow::Result<()> {
        let authority = Authority::generate(&self.cluster, self.days, SystemTime::now())?;
        let (certificate, key) = (self.dir.join("ca.crt"), self.dir.join("ca.key"));
        let secret = authority.key();
        let files =
            [(&*key, secret.as_bytes(), SECRET), (&certificate, authority.certificate().as_bytes(), PUBLIC)];
        put(&files, self.force, "invalidates every certificate it has issued")?;
        print(format_args!(
            "created the authority of {cluster}, valid until {until}:\n  {}\n  {} (a secret)\n\
             Next, for each node:  servicekeel-router pki issue --dir {dir} --node NODE --out OUT\n",
            certificate.display(),
            key.display(),
            cluster = self.cluster,
            until = Date::from(authority.not_after()),
            dir = self.dir.display(),
        ))
    }
}

impl Issue {
    fn run(self) -> anyhow::Result<()> {
        let authority = authority(&self.dir)?;
        let issued = authority.issue(&self.node, &self.dns, self.days, SystemTime::now())?;
        let [ca, certificate, key] = ["ca.crt", "node.crt", "node.key"].map(|name| self.out.join(name));
        let mut files = vec![
            (&*key, issued.key.as_bytes(), SECRET),
            (&certificate, issued.certificate.as_bytes(), PUBLIC),
        ];
        // It may be there from the last time, among others, or be the authority's own.
        if !fs::read_to_string(&ca).is_ok_and(|text| text.contains(authority.certificate().trim())) {
            files.push((&ca, authority.certificate().as_bytes(), PUBLIC));
        }
        put(&files, self.force, "a running router picks up the new one")?;
        print(format_args!(
            "issued the certificate of {cluster}/{node}, valid until {until}:\n  {}\n  {}\n  {} (a secret)\n\
             Lines for a config in the same directory:\n  cluster: {cluster}\n  node: {node}\n  \
             identity: {{ ca: ca.crt, cert: node.crt, key: node.key }}\n",
            ca.display(),
            certificate.display(),
            key.display(),
            cluster = authority.cluster(),
            node = self.node,
            until = Date::from(issued.not_after),
        ))
    }
}

impl Bundle {
    fn run(self) -> anyhow::Result<()> {
        let path = self.dir.join("ca.crt");
        let certificate = read(&path)?;
        let cluster = crate::pki::cluster_of(&certificate).with_context(|| path.display().to_string())?;
        print(format_args!("{certificate}"))?;
        // Beside it, so that stdout can go into the file as it is.
        let mut hint = std::io::stderr().lock();
        writeln!(
            hint,
            "\nSave the above as {cluster}.crt next to the config of a router of another cluster, and add to that config:\n\
             trust:\n  - {{ cluster: {cluster}, ca: {cluster}.crt }}"
        )?;
        Ok(())
    }
}

fn authority(dir: &Path) -> anyhow::Result<Authority> {
    let certificate = read(&dir.join("ca.crt"))?;
    let key = read(&dir.join("ca.key"))?;
    Authority::from_pem(&certificate, &key).with_context(|| format!("the authority in {}", dir.display()))
}

fn read(path: &Path) -> anyhow::Result<String> {
    let bytes = match read_bounded(path, MAX_PEM) {
        Err(error) if error.kind() == ErrorKind::NotFound => bail!(
            "{} not found; create the authority first: servicekeel-router pki init --cluster CLUSTER --dir DIR",
            path.display()
        ),
        read => read.with_context(|| format!("cannot read {}", path.display()))?,
    };
    String::from_utf8(bytes).with_context(|| format!("{} is not PEM", path.display()))
}

/// Writes files, each with its mode. None may be there yet, unless by `force`; `replaced` says what comes of that.
/// Where one can't be written, those that were new before it are removed, so that the same command can be given again.
fn put(files: &[(&Path, &[u8], u32)], force: bool, replaced: &str) -> anyhow::Result<()> {
    for (path, ..) in files {
        if !force && path.symlink_metadata().is_ok() {
            bail!("{} already exists; --force replaces it: {replaced}", path.display());
        }
    }
    let dirs = files.iter().filter_map(|(path, ..)| path.parent());
    for dir in dirs.filter(|dir| !dir.as_os_str().is_empty()) {
        fs::create_dir_all(dir).with_context(|| format!("cannot create the directory {}", dir.display()))?;
    }
    let mut new = Vec::new();
    for (path, bytes, mode) in files {
        let written = if force { over(path, bytes, *mode) } else { create(path, bytes, *mode) };
        if let Err(error) = written {
            for path in new {
                drop(fs::remove_file(path));
            }
            return Err(error).with_context(|| format!("cannot write {}", path.display()));
        }
        if !force {
            new.push(path);
        }
    }
    Ok(())
}

fn over(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    replace(path, bytes)?;
    fs::set_permissions(path, Permissions::from_mode(mode))
}

/// Whoever was faster keeps what is his.
fn create(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).inspect_err(|_| drop(fs::remove_file(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn init(dir: &Path, cluster: &str, force: bool) -> anyhow::Result<()> {
        Init { cluster: cluster.parse().unwrap(), dir: dir.to_owned(), days: 30, force }.run()
    }

    fn issue(dir: &Path, out: &Path, force: bool) -> anyhow::Result<()> {
        let node = "n".parse().unwrap();
        Issue { dir: dir.to_owned(), node, out: out.to_owned(), days: 10, dns: vec![], force }.run()
    }

    #[test]
    fn keys_are_secret_and_never_overwritten_without_force() {
        let dir = tempfile::tempdir().unwrap();
        let (pki, out) = (dir.path().join("a/pki"), dir.path().join("b/out"));
        init(&pki, "a.local", false).unwrap();
        issue(&pki, &out, false).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        for (path, wanted) in [
            (pki.join("ca.key"), 0o600),
            (out.join("node.key"), 0o600),
            (pki.join("ca.crt"), 0o644),
            (out.join("node.crt"), 0o644),
        ] {
            assert_eq!(mode(&path), wanted, "{}", path.display());
        }
        let keys = || (fs::read(pki.join("ca.key")).unwrap(), fs::read(out.join("node.key")).unwrap());
        let before = keys();
        let refused = init(&pki, "b.local", false).unwrap_err().to_string();
        assert!(refused.contains("ca.key") && refused.contains("--force"), "{refused}");
        let refused = issue(&pki, &out, false).unwrap_err().to_string();
        assert!(refused.contains("node.key") && refused.contains("--force"), "{refused}");
        // Not by halves either: a certificate without its key.
        fs::remove_file(out.join("node.key")).unwrap();
        assert!(issue(&pki, &out, false).is_err());
        assert!(!out.join("node.key").exists());
        issue(&pki, &out, true).unwrap();
        init(&pki, "b.local", true).unwrap();
        let after = keys();
        assert!(before.0 != after.0 && before.1 != after.1);
        assert_eq!((mode(&out.join("node.key")), mode(&out.join("node.crt"))), (0o600, 0o644));
    }

    #[test]
    fn what_a_node_needs_is_in_one_directory() {
        let dir = tempfile::tempdir().unwrap();
        let (pki, out) = (dir.path().join("pki"), dir.path().join("node"));
        init(&pki, "a.local", false).unwrap();
        issue(&pki, &out, false).unwrap();
        let ca = fs::read_to_string(pki.join("ca.crt")).unwrap();
        assert_eq!(fs::read_to_string(out.join("ca.crt")).unwrap(), ca);
        // While authorities change, the file has others, too.
        let both = format!("{ca}another\n");
        fs::write(out.join("ca.crt"), &both).unwrap();
        issue(&pki, &out, true).unwrap();
        assert_eq!(fs::read_to_string(out.join("ca.crt")).unwrap(), both);
        // The authority's own directory will do.
        issue(&pki, &pki, false).unwrap();
        assert_eq!(fs::read_to_string(pki.join("ca.crt")).unwrap(), ca);
        // Another cluster's authority is not taken for it.
        fs::remove_file(out.join("node.key")).unwrap();
        fs::remove_file(out.join("node.crt")).unwrap();
        fs::write(out.join("ca.crt"), "another").unwrap();
        assert!(issue(&pki, &out, false).unwrap_err().to_string().contains("ca.crt already exists"));
        assert!(!out.join("node.key").exists());
        issue(&pki, &out, true).unwrap();
        assert_eq!(fs::read_to_string(out.join("ca.crt")).unwrap(), ca);
    }

    #[test]
    fn what_fails_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("first"), dir.path().join("x".repeat(300)));
        let files: [(&Path, &[u8], u32); 2] = [(&first, b"1", SECRET), (&second, b"2", PUBLIC)];
        assert!(format!("{:#}", put(&files, false, "").unwrap_err()).contains("cannot write"));
        assert!(!first.exists());
    }

    #[test]
    fn says_what_comes_first() {
        let dir = tempfile::tempdir().unwrap();
        let refused = issue(dir.path(), dir.path(), false).unwrap_err().to_string();
        assert!(refused.contains("pki init"), "{refused}");
        init(dir.path(), "a.local", false).unwrap();
        fs::copy(dir.path().join("ca.crt"), dir.path().join("ca.key")).unwrap();
        let refused = format!("{:#}", issue(dir.path(), dir.path(), false).unwrap_err());
        assert!(refused.contains("its key cannot be read"), "{refused}");
    }
}
