//! Reads the config and every file that it names.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use servicekeel_core::name::RouterId;
use servicekeel_runtime::file::read_bounded;

use super::config::{self, Config, IdentityFiles, Named, Parsed};
use super::problem::{Problem, Problems};
use super::{DEFAULT_ADMIN, MAX_CONFIG, Pending, Settings};
use crate::identity::{Identity, IdentityError, Material, Part, TrustBundle, Untimely, has_private_key};

/// The most bytes of a certificate or key file: 16 certificates are a tenth of that.
const MAX_PEM: usize = 256 * 1024;

/// What the files say.
#[derive(Debug)]
pub struct Reading {
    /// Every file that was read, or looked for.
    pub files: Vec<PathBuf>,
    /// What works and is hardly meant.
    pub warnings: Vec<Problem>,
    /// Where the router runs by it.
    pub outcome: Result<Good, Bad>,
}

/// Files that can be used.
#[derive(Debug, Clone)]
pub struct Good {
    /// What they make.
    pub settings: Settings,
    /// What the identity was made of.
    pub(super) material: Option<Material>,
}

/// Files that can't.
#[derive(Debug)]
pub struct Bad {
    /// Why.
    pub problems: Problems,
    /// The config itself, where only the own certificate is outside of its validity: time may heal that, and the own
    /// node can be served without an identity.
    pub without_identity: Option<(Box<Config>, Untimely)>,
}

impl From<Problems> for Bad {
    fn from(problems: Problems) -> Self {
        Self { problems, without_identity: None }
    }
}

/// Reads the config at `path`. `host` is the node's name where the config says none.
pub fn read(path: &Path, host: &str) -> Reading {
    match text(path) {
        Ok(text) => read_text(&text, path, host),
        Err(problems) => {
            Reading { files: vec![path.to_owned()], warnings: Vec::new(), outcome: Err(problems.into()) }
        }
    }
}

/// As [`read`], of a text that is known already. Paths in it are relative to `path`.
pub(crate) fn read_text(text: &str, path: &Path, host: &str) -> Reading {
    let mut files = vec![path.to_owned()];
    match config::parse(text, path, host) {
        Err(problems) => Reading { files, warnings: Vec::new(), outcome: Err(problems.into()) },
        Ok(mut parsed) => {
            files.extend(parsed.files().map(|named| named.path.clone()));
            let mut warnings = std::mem::take(&mut parsed.warnings);
            let outcome = identity(path, parsed, &mut warnings);
            Reading { files, warnings, outcome }
        }
    }
}

/// The node's name where the config says none: the host's, which Kubernetes takes too.
pub(crate) fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Where the admin endpoint of a router is, by its config.
pub(crate) struct AdminOf {
    /// `None`: off.
    pub(crate) addr: Option<SocketAddr>,
    /// All that is wrong with the config. The address is what the text seems to say then ...
    pub(crate) problems: Option<Problems>,
    /// ... or the default, where it says none that can be read: that may be another router's.
    pub(crate) guessed: bool,
}

/// Where the admin endpoint is by a config, whatever the files are that it names.
///
/// # Errors
/// The file can't be read.
pub(crate) fn admin_of(path: &Path) -> Result<AdminOf, Problems> {
    let text = text(path)?;
    Ok(match config::parse(&text, path, &host()) {
        Ok(parsed) => AdminOf { addr: parsed.config.listen.admin, problems: None, guessed: false },
        Err(problems) => {
            let said = seeming_admin(&text);
            let guessed = said.is_none();
            let addr = said.unwrap_or_else(|| DEFAULT_ADMIN.parse().ok());
            AdminOf { addr, problems: Some(problems), guessed }
        }
    })
}

/// What follows on the first `admin:` of a text that may be no YAML; `Some(None)`: off.
fn seeming_admin(text: &str) -> Option<Option<SocketAddr>> {
    let lines = text.lines().map(|line| line.split(" #").next().unwrap_or(line));
    let lines = lines.filter(|line| !line.trim_start().starts_with('#'));
    let said = lines.filter_map(|line| line.split_once("admin:")).map(|(_, said)| said).next();
    let said = said.map(|said| said.trim_start().trim_matches(['"', '\'']));
    let word = said.and_then(|said| said.split([',', '}', '"', '\'', ' ']).next());
    match word {
        Some("off") => Some(None),
        word => word?.parse().ok().map(Some),
    }
}

fn text(path: &Path) -> Result<String, Problems> {
    let bytes = read_bounded(path, MAX_CONFIG)
        .map_err(|error| Problem::of_file(path, format!("cannot be read: {error}")))?;
    Ok(String::from_utf8(bytes).map_err(|error| {
        let place = error.utf8_error().valid_up_to();
        Problem::of_file(path, format!("not UTF-8 text (the byte at {place})"))
    })?)
}

fn identity(file: &Path, parsed: Parsed, warnings: &mut Vec<Problem>) -> Result<Good, Bad> {
    let Parsed { config, identity, trust, .. } = parsed;
    let Some(files) = identity else {
        return Ok(Good {
            settings: Settings {
                config: Arc::new(config),
                identity: None,
                untimely: None,
                pending: Pending::default(),
            },
            material: None,
        });
    };
    let mut problems = Vec::new();
    let mut pem = |named: &Named, part: &Part| {
        read_bounded(&named.path, MAX_PEM).unwrap_or_else(|error| {
            problems.push(problem(file, named, format!("{part}: cannot be read: {error}")));
            Vec::new()
        })
    };
    let material = Material {
        ca: pem(&files.ca, &Part::Ca),
        certificate: pem(&files.cert, &Part::Certificate),
        key: pem(&files.key, &Part::Key),
        trust: trust
            .iter()
            .map(|(cluster, named)| (cluster.clone(), pem(named, &Part::Trust(cluster.clone()))))
            .collect(),
        revoked: config.revoked.iter().cloned().collect(),
    };
    let bundles = material.trust.iter().map(|(cluster, pem)| (Part::Trust(cluster.clone()), pem));
    let bundles = std::iter::once((Part::Ca, &material.ca)).chain(bundles);
    let named = std::iter::once(&files.ca).chain(trust.iter().map(|(_, named)| named));
    for ((part, _), named) in bundles.zip(named).filter(|((_, pem), _)| has_private_key(pem)) {
        let text = format!(
            "{part}: there is a private key beside the certificates; whoever can read it can speak for them, so take it out and keep it where they are issued"
        );
        warnings.push(problem(file, named, text));
    }
    if problems.is_empty() {
        // Each bundle by itself first, so that all of them are told at once.
        for ((cluster, pem), (_, named)) in material.trust.iter().zip(&trust) {
            let part = Part::Trust(cluster.clone());
            if let Err(error) = TrustBundle::from_pem(cluster, pem, &part) {
                problems.push(problem(file, named, error.to_string()));
            }
        }
    }
    if !problems.is_empty() {
        return Err(Problems(problems).into());
    }
    let id = RouterId { cluster: config.cluster.clone(), node: config.node.clone() };
    match Identity::from_pem(id, &material) {
        Ok(identity) => Ok(Good {
            settings: Settings {
                config: Arc::new(config),
                identity: Some(Arc::new(identity)),
                untimely: None,
                pending: Pending::default(),
            },
            material: Some(material),
        }),
        Err(error) => {
            let named = whose(&error, &files, &trust);
            Err(Bad {
                problems: problem(file, named, error.to_string()).into(),
                without_identity: error.untimely().map(|untimely| (Box::new(config), untimely)),
            })
        }
    }
}

/// The file that an error speaks of.
fn whose<'a>(
    error: &IdentityError,
    files: &'a IdentityFiles,
    trust: &'a [(servicekeel_core::name::ClusterName, Named)],
) -> &'a Named {
    let of = |cluster| trust.iter().rfind(|(name, _)| name == cluster).map_or(&files.ca, |(_, named)| named);
    match error {
        IdentityError::Pem { part, .. }
        | IdentityError::NotAnAuthority { part, .. }
        | IdentityError::OtherAuthority { part, .. }
        | IdentityError::RevokedAuthority { part, .. } => match part {
            Part::Ca => &files.ca,
            Part::Certificate => &files.cert,
            Part::Key => &files.key,
            Part::Trust(cluster) => of(cluster),
        },
        IdentityError::SharedAuthority(_, cluster)
        | IdentityError::TrustTwice(cluster)
        | IdentityError::TrustOwn(cluster) => of(cluster),
        IdentityError::Certificate(_) | IdentityError::OtherRouter { .. } => &files.cert,
        IdentityError::KeyMismatch => &files.key,
    }
}

/// A problem of a file that the config names, told at the place where it does.
fn problem(config: &Path, named: &Named, text: String) -> Problem {
    let text = format!("{text} (file {})", named.path.display());
    Problem { file: config.to_owned(), place: Some(named.place), text }
}

#[cfg(test)]
mod tests;
