//! Flags, and the settings that they make.

use std::net::SocketAddr;

use clap::Parser;
use servicekeel_core::name::Label;

use crate::run::Settings;

const ABOUT: &str = "Writes what each pod exports to other clusters, from the Services that select it";
const LONG_ABOUT: &str = "\
Writes what each pod exports to other clusters, from the Services that select it.

It follows Services, namespaces and pods. Where Services select a pod that runs a sidecar, it writes the pod's annotation \
servicekeel.io/exported-services, which the sidecar reads; when a Service, a selector or a label changes, the annotation \
follows. It writes nothing else, no other object, and nothing at all where nothing changed.

A pod runs a sidecar if a container or init container of it has the name servicekeel-sidecar, or if the pod has the \
annotation servicekeel.io/sidecar: \"true\".

The annotation is written by server-side apply under the field manager servicekeel-controller. One that another manager \
owns (written by hand, or in a Deployment's template) is left alone, and the log says so once.

Ports of TCP and UDP are exported, headless Services too; a named targetPort is looked up in each pod. ExternalName, \
Services without a selector and other protocols are left out, and the log says why. On a Service:

  servicekeel.io/export: \"false\"
      not exported; on a namespace: none of its Services
  servicekeel.io/allow: \"cluster-b.local,cluster-c.local\"
      the clusters that may use it, and no other, the own one neither; absent: every member of the mesh";
const EXAMPLES: &str = "\
It finds the API by KUBECONFIG or ~/.kube/config, else by the pod's service account, which needs:

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

With --dry-run no `patch`, with --once no `watch`. With --namespace the rules on services and pods may stand in a Role \
of that namespace; the one on namespaces stays in a ClusterRole, and `resourceNames` may narrow it to that one.

Run one controller for a namespace: a second one would do the same work again.

Examples:

  servicekeel-controller --once --dry-run                   what would be written now, as text on stdout
  servicekeel-controller --namespace shop --admin off       one namespace, no admin endpoint

SERVICEKEEL_LOG sets what is logged (error, warn, info, debug; default info), SERVICEKEEL_LOG_FORMAT how (text, json).
Exit code 1: a write failed (--once), the API could not be asked (--once), or the program could not start.";

/// The flags.
#[derive(Debug, Parser)]
#[command(name = "servicekeel-controller", version, about = ABOUT, long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
pub struct Args {
    /// Follow this namespace only. Default: all
    #[arg(long, value_name = "NAME", value_parser = label)]
    namespace: Option<Label>,

    /// Make one pass over all pods and end, with no admin endpoint
    #[arg(long)]
    once: bool,

    /// Print to stdout what would be written, and write nothing
    #[arg(long)]
    dry_run: bool,

    /// Where /livez, /readyz, /metrics and /status (JSON) are served; `off`: nowhere
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
