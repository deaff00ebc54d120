//! Flags, and the settings that they make.

use std::net::SocketAddr;

use clap::Parser;
use servicekeel_core::name::Label;

use crate::run::Settings;

const ABOUT: &str = "Writes what each pod exports to other clusters, from the Services that select it";
const LONG_ABOUT: &str = "\
Writes what each pod exports to other clusters, from the Services that select it.

It watches Services, namespaces and pods. For each pod with a sidecar that is selected by a Service, it writes the pod \
annotation servicekeel.io/exported-services, which the sidecar reads, and updates it when a Service, a selector or a \
label changes. It writes nothing else, and nothing while nothing changes.

A pod has a sidecar if one of its containers or init containers is named servicekeel-sidecar, or if it has the \
annotation servicekeel.io/sidecar: \"true\".

The annotation is written by server-side apply under the field manager servicekeel-controller. An annotation owned by \
another manager (written by hand, or from a Deployment's template) is left unchanged, and this is logged once.

TCP and UDP ports are exported, also those of headless Services; a named targetPort is resolved in each pod. Services of \
type ExternalName, Services without a selector and other protocols are skipped with a reason in the log. On a Service:

  servicekeel.io/export: \"false\"
      do not export it; on a namespace: do not export any of its Services
  servicekeel.io/allow: \"cluster-b.local,cluster-c.local\"
      only these clusters may use it (name the own cluster too if it may); without it, every member of the mesh may";
const EXAMPLES: &str = "\
It connects to the API server by KUBECONFIG or ~/.kube/config, or else with the pod's service account, which needs:

  apiVersion: rbac.authorization.k8s.io/v1
  kind: ClusterRole
  metadata:
    name: servicekeel-controller
  rules:
    - apiGroups: [\"\"]
      resources: [services, namespaces]
      verbs: [list, watch]
    - apiGroups: [\"\"]
      resources: [pods]
      verbs: [list, watch, patch]

`patch` is not needed with --dry-run, nor `watch` with --once. With --namespace the rules for services and pods may be in \
a Role of that namespace; the one for namespaces must be in a ClusterRole, which `resourceNames` may restrict to it.

Run one controller per namespace: a second one would only repeat its work.

Examples:

  servicekeel-controller --once --dry-run                   print what would be written now
  servicekeel-controller --namespace shop --admin off       watch one namespace, without an admin endpoint

SERVICEKEEL_LOG sets the log level (error, warn, info, debug; default info), SERVICEKEEL_LOG_FORMAT the format (text, json).
Exit code 1: a write failed (--once), the API server was unreachable (--once), or the program could not start.";

/// The flags.
#[derive(Debug, Parser)]
#[command(name = "servicekeel-controller", version, about = ABOUT, long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
pub struct Args {
    /// Watch this namespace only. Default: all
    #[arg(long, value_name = "NAME", value_parser = label)]
    namespace: Option<Label>,

    /// Make one pass over all pods and end, with no admin endpoint
    #[arg(long)]
    once: bool,

    /// Print to stdout what would be written, and write nothing
    #[arg(long)]
    dry_run: bool,

    /// Address of /livez, /readyz, /metrics and /status (JSON); `off` disables them
    #[arg(long, value_name = "IP:PORT", default_value = "0.0.0.0:15021", value_parser = admin)]
    admin: Admin,
}

/// An admin address, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Admin(Option<SocketAddr>);

impl Args {
    /// The settings, for the API at this address.
    pub fn settings(self, server: String) -> Settings {
        Settings {
            server,
            namespace: self.namespace,
            once: self.once,
            dry_run: self.dry_run,
            admin: self.admin.0.filter(|_| !self.once),
        }
    }
}

fn label(text: &str) -> Result<Label, String> {
    text.parse().map_err(|error| format!("it {error}"))
}

fn admin(text: &str) -> Result<Admin, String> {
    if text == "off" {
        return Ok(Admin(None));
    }
    text.parse()
        .map(|addr| Admin(Some(addr)))
        .map_err(|_| "not an address such as 0.0.0.0:15021, nor `off`".into())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(words: &[&str]) -> Result<Settings, clap::Error> {
        Args::try_parse_from([&["servicekeel-controller"], words].concat())
            .map(|args| args.settings(String::new()))
    }

    #[test]
    fn defaults_work() {
        Args::command().debug_assert();
        let settings = parse(&[]).unwrap();
        assert_eq!((settings.once, settings.dry_run, settings.namespace), (false, false, None));
        assert_eq!(settings.admin, Some("0.0.0.0:15021".parse().unwrap()));
        assert_eq!(parse(&["--once"]).unwrap().admin, None);
        assert_eq!(parse(&["--admin", "off"]).unwrap().admin, None);
    }

    #[test]
    fn bad_values_say_what_is_wrong() {
        let error = parse(&["--namespace", "a_b"]).unwrap_err().to_string();
        assert!(error.contains("it has the character '_'"), "{error}");
        let error = parse(&["--admin", "15021"]).unwrap_err().to_string();
        assert!(error.contains("not an address such as 0.0.0.0:15021"), "{error}");
    }
}
