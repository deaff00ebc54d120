//! `status`: what a router that runs says of itself.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, anyhow, bail};
use clap::Args;
use servicekeel_runtime::admin;

use super::print;
use crate::identity::Date;
use crate::settings::{self, AdminOf, DEFAULT_ADMIN, DEFAULT_PATH};
use crate::status::{FailureStatus, PeerStatus, Status};

/// The words of the tables that do not explain themselves.
pub(super) const WORDS: &str = "\
Flows are counted since the start: \"failed\" ones had no endpoint, \"lost\" ones lost the path to theirs; both were reset. A \
peer is \"up\" while it is linked, else \"down\"; \"expired\" if it is linked and new flows fail because a certificate has \
expired, \"rejected\" if they fail because one of the two routers rejects the other. IDLE CONNS are connections to a peer \
that are ready for the next flow. The exit code is 1 if there is a PROBLEM: something that needs an operator, such as a \
certificate that has expired or that a peer rejects, two routers of one name, or an address of `peers` not reached for 30 s.";

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The router's config file, for its listen.admin. Without one, and if the default file does not exist:
    /// 127.0.0.1:7480.
    #[arg(long, value_name = "FILE", conflicts_with = "admin")]
    config: Option<PathBuf>,
    /// Address of the router's admin endpoint.
    #[arg(long, value_name = "IP:PORT", value_parser = address)]
    admin: Option<SocketAddr>,
    /// Print the JSON of /status.
    #[arg(long)]
    json: bool,
}

impl Arguments {
    pub(super) fn run(self, config: &Path) -> anyhow::Result<ExitCode> {
        let (addr, invalid) = match self.admin {
            Some(addr) => (addr, false),
            None => match &self.config {
                // Nobody named a config, and there is none where they usually are.
                None if config == Path::new(DEFAULT_PATH) && !config.exists() => {
                    (DEFAULT_ADMIN.parse()?, false)
                }
                named => admin_of(named.as_deref().unwrap_or(config))?,
            },
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (code, text) = match runtime.block_on(admin::get(addr, "/status")) {
            Err(error) => bail!(
                "no router responded at {addr}: {error}. Is it running, and was this its listen.admin when it started? Use --config or --admin to ask another"
            ),
            Ok(answer) => answer,
        };
        if code != 200 {
            bail!("{addr} answered with HTTP {code}: is this a router's listen.admin?");
        }
        if self.json {
            print(format_args!("{}\n", text.trim_end()))?;
        }
        let status: Status = serde_json::from_str(&text)
            .with_context(|| format!("the answer of {addr} is not the status of a router of this version"))?;
        if !self.json {
            print(format_args!("{}", render(&status, SystemTime::now())))?;
        }
        Ok(if invalid { ExitCode::FAILURE } else { exit_code(&status) })
    }
}

/// 1 where something is wrong that does not heal by itself.
fn exit_code(status: &Status) -> ExitCode {
    if status.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| format!("not an address such as {DEFAULT_ADMIN}"))
}

/// The admin endpoint that a config names, and whether the config is invalid. That is told: what a router says that runs
/// by an earlier one is asked for then more than ever.
fn admin_of(path: &Path) -> anyhow::Result<(SocketAddr, bool)> {
    let AdminOf { addr, problems, guessed } = settings::admin_of(path)
        .map_err(|problems| anyhow!("{problems}; use --admin to ask a router that runs"))?;
    let Some(mut addr) = addr else {
        bail!("listen.admin is off in {}: the router has no admin endpoint to ask", path.display());
    };
    if addr.ip().is_unspecified() {
        addr.set_ip(IpAddr::V4(Ipv4Addr::LOCALHOST));
    }
    if let Some(problems) = &problems {
        let whose = if guessed {
            format!(
                "{addr}, the default, since its listen.admin cannot be read: the answer may be another router's"
            )
        } else {
            format!("{addr} for the router that runs")
        };
        writeln!(io::stderr(), "{problems}\nThe config is invalid; asking {whose}:")?;
    }
    Ok((addr, problems.is_some()))
}

/// The status as tables for people.
fn render(status: &Status, now: SystemTime) -> String {
    let mut text = String::new();
    let state = if status.draining { ", draining" } else { "" };
    let _ = writeln!(text, "router {}/{}{state}", status.cluster, status.node);
    let certificate =
        status.certificate_ends.map_or("no certificate in use: serving this node only".into(), |ends| {
            let ends = UNIX_EPOCH + Duration::from_secs(ends);
            if ends < now {
                format!("certificate EXPIRED on {}", Date::from(ends))
            } else {
                format!("certificate valid until {}", Date::from(ends))
            }
        });
    for problem in &status.problems {
        let _ = writeln!(text, "PROBLEM: {problem}");
    }
    for note in &status.notes {
        let _ = writeln!(text, "note: {note}");
    }
    let f = &status.flows;
    let _ = writeln!(
        text,
        "{certificate}\nflows: {} now; so far {} local, {} outbound, {} inbound, {} failed, {} lost",
        f.active, f.local, f.outbound, f.inbound, f.failed, f.lost
    );
    table(
        &mut text,
        ["PEER", "STATE", "LINK", "FLOWS", "IDLE CONNS"],
        status.peers.iter().map(|peer| {
            let (flows, idle) = (peer.flows.to_string(), peer.idle_connections.to_string());
            // Where there is no link, what ended it.
            let reason = peer.reason.clone().filter(|_| peer.links.is_empty());
            let link = match (reason, peer.links.is_empty()) {
                (Some(reason), _) => format!("none: {reason}"),
                (None, true) => "none: it was never linked since this router started".to_owned(),
                (None, false) => links(peer),
            };
            [peer.router.clone(), peer.state.clone(), link, flows, idle]
        }),
    );
    table(
        &mut text,
        ["NOT REACHED", "REASON"],
        status.dials.iter().filter_map(|dial| Some([dial.address.clone(), dial.problem.clone()?])),
    );
    table(
        &mut text,
        ["POD", "NAMESPACE", "SIDECAR", "ADDRESSES", "PROCESS", "USER"],
        status.sidecars.iter().map(|s| {
            let (process, user) = (s.process.to_string(), s.user.to_string());
            [s.pod.clone(), s.namespace.clone(), s.state.clone(), s.addresses.join(" "), process, user]
        }),
    );
    table(
        &mut text,
        ["MISSING POD", "NAMESPACE", "USER", "ITS SIDECAR"],
        status.missing.iter().map(|m| {
            let sockets = match m.sockets_kept_seconds {
                0 => "its sockets are closed".to_owned(),
                left => format!("its sockets are kept for {left} s more"),
            };
            let gone = format!("disconnected unexpectedly {} ago; {sockets}", duration(m.gone_seconds));
            [m.pod.clone(), m.namespace.clone(), m.user.to_string(), gone]
        }),
    );
    table(
        &mut text,
        ["IMPORT", "POD", "ROUTE"],
        status.imports.iter().map(|i| {
            let reason = || format!("none: {}", i.reason.as_deref().unwrap_or("nobody offers it"));
            let route = i.route.clone().unwrap_or_else(reason) + &failing(i.failing.as_ref());
            [i.service.clone(), i.pod.clone(), route]
        }),
    );
    table(
        &mut text,
        ["EXPORT", "POD", "ALLOWED", "TARGET"],
        status.exports.iter().map(|e| {
            let allow = e.allow.as_ref().map_or("every member".into(), |rules| rules.join(" "));
            let target = e.target.to_string() + &failing(e.failing.as_ref());
            [e.service.clone(), e.pod.clone(), allow, target]
        }),
    );
    table(
        &mut text,
        ["OFFERED", "BY"],
        status.offers.iter().map(|offer| [offer.service.clone(), offer.router.clone()]),
    );
    text
}

fn failing(failing: Option<&FailureStatus>) -> String {
    failing.map_or(String::new(), |f| {
        let times = if f.times == 1 { "once".to_owned() } else { format!("{} times", f.times) };
        format!(" (FAILING {times}, last {} ago: {})", duration(f.last_seconds_ago), f.reason)
    })
}

fn links(peer: &PeerStatus) -> String {
    let one = |link: &crate::status::LinkStatus| {
        let how = link.dialled.as_ref().map_or("dialled by the peer".into(), |at| format!("dialled at {at}"));
        format!("{how}, for {}", duration(link.seconds))
    };
    let all: Vec<_> = peer.links.iter().map(one).collect();
    all.join("; ")
}

fn duration(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// A table with columns as wide as what stands in them; nothing where it has no rows.
fn table<const N: usize>(text: &mut String, head: [&str; N], rows: impl Iterator<Item = [String; N]>) {
    let rows: Vec<[String; N]> = rows.collect();
    if rows.is_empty() {
        return;
    }
    let mut widths = head.map(str::len);
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    text.push('\n');
    for row in std::iter::once(head.map(str::to_owned)).chain(rows) {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(&row) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_shown_where_one_is_wanted() {
        assert_eq!(address("127.0.0.1:7481"), Ok("127.0.0.1:7481".parse().unwrap()));
        for wrong in ["7480", "localhost:7480", "127.0.0.1"] {
            assert_eq!(address(wrong).unwrap_err(), "not an address such as 127.0.0.1:7480");
        }
    }

    #[test]
    fn what_the_router_says_is_what_the_table_shows() {
        let json = r#"{"cluster":"a.local","node":"n","draining":false,
            "peers":[{"router":"b.local/m","state":"up","links":[{"dialled":"hub:7443","seconds":7300}],"idle_connections":1,"flows":2}],
            "dials":[{"address":"hub:7443","problem":null},{"address":"gone:1","problem":"Connection refused"}],
            "sidecars":[],"imports":[{"service":"web.default.b.local:80/TCP","pod":"client","route":null}],
            "exports":[],"offers":[],
            "flows":{"active":2,"local":0,"outbound":3,"inbound":0,"failed":0,"lost":0},"certificate_ends":0}"#;
        let text = render(&serde_json::from_str(json).unwrap(), UNIX_EPOCH + Duration::from_secs(1));
        for line in [
            "router a.local/n",
            "certificate EXPIRED on 1970-01-01 00:00:00 UTC",
            "b.local/m  up     dialled at hub:7443, for 2 h  2      1",
            "gone:1       Connection refused",
            "web.default.b.local:80/TCP  client  none: nobody offers it",
        ] {
            assert!(text.lines().any(|l| l == line), "{line:?} in\n{text}");
        }
        assert!(!text.contains("SIDECAR") && text.matches("hub:7443").count() == 1, "{text}");
    }
}
