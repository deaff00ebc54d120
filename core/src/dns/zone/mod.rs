//! What is answered for the names of a pod's imports.
//!
//! - A name that an import gives has an A record, its lease. Every other type of it is [`Answer::NoData`]: a
//!   client that asks AAAA beside A must never hear that the name does not exist (RFC 8020).
//! - Each named port has an SRV record at `_port._protocol.` before any form of the name. A port without a
//!   name has none, as in Kubernetes: there is no label to ask for. What else begins with `_tcp.` or `_udp.`
//!   before one of our names does not exist, and we say so.
//! - Each leased address has a PTR record; an address of our range without a lease does not exist.
//! - All else is [`Answer::NotOurs`]. A search domain makes a name ours only where the whole rest is one of
//!   the forms; the names beside, above and below ours belong to others.
//! - Under the cluster's own search domains our answer comes first. Another search domain, such as `example.com`, has
//!   names of its own: there [`Zone::fallback`] answers, for want of an answer by the upstreams.
//!
//! Where two imports claim one name, a long name (one that holds the cluster) goes before a short one, and
//! after that the first declared wins.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::num::NonZeroU16;

use ipnet::Ipv4Net;

use super::{MAX_NAME, Name, record_type};
use crate::annotation::{Defaults, Import, Port};
use crate::name::{ClusterName, Protocol, ServiceName};

const REVERSE: &[u8] = b".in-addr.arpa";

/// What to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer<'z> {
    /// NOERROR with this record.
    Record(Record<'z>),
    /// The name exists, a record of this type does not: NOERROR with a SOA.
    NoData {
        /// Of how many last labels of the queried name the SOA's owner consists.
        apex: u8,
    },
    /// The name would be ours and does not exist: NXDOMAIN with a SOA.
    NoName {
        /// As in [`Answer::NoData`].
        apex: u8,
    },
    /// Another server's.
    NotOurs,
}

impl Answer<'_> {
    /// `None` for [`Answer::NotOurs`].
    pub fn found(self) -> Option<Self> {
        (self != Self::NotOurs).then_some(self)
    }
}

/// A record of ours. Its owner is the queried name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record<'z> {
    /// The address of a service.
    A(Ipv4Addr),
    /// A named port.
    Srv {
        /// Its number.
        port: NonZeroU16,
        /// The service's long name, without final dot.
        target: &'z str,
        /// The address of that name, to send along.
        address: Ipv4Addr,
    },
    /// The service's long name, without final dot.
    Ptr(&'z str),
}

/// The names of a pod's imports. Immutable: a change of imports makes a new one.
#[derive(Debug)]
pub struct Zone {
    services: Vec<Service>,
    /// Every form of every service's name, to its index.
    forms: BTreeMap<Box<[u8]>, usize>,
    /// The names above our forms: they have something below, so they exist (RFC 8020).
    above: BTreeSet<Box<[u8]>>,
    /// The cluster's own search domains as `.domain`, the shortest first: the longer form before it says more of what
    /// is meant.
    own_search: Vec<Box<[u8]>>,
    /// The others.
    other_search: Vec<Box<[u8]>>,
    by_address: BTreeMap<Ipv4Addr, usize>,
    range: Ipv4Net,
}

#[derive(Debug)]
struct Service {
    name: ServiceName,
    address: Ipv4Addr,
    target: Box<str>,
    ports: Vec<Port>,
}

impl Zone {
    /// The zone of a pod: its namespace and cluster, the search domains of its resolver, the range of the
    /// leases, and its imports with their leases in the order of their declaration.
    pub fn new(
        pod: &Defaults,
        search: &[ClusterName],
        range: Ipv4Net,
        imports: &[(Import, Ipv4Addr)],
    ) -> Self {
        let mut zone = Self {
            services: Vec::with_capacity(imports.len()),
            forms: BTreeMap::new(),
            above: BTreeSet::new(),
            own_search: Vec::new(),
            other_search: Vec::new(),
            by_address: BTreeMap::new(),
            range,
        };
        for domain in search {
            let own = is_of_the_cluster(domain, pod, search);
            let domains = if own { &mut zone.own_search } else { &mut zone.other_search };
            domains.push(format!(".{domain}").into_bytes().into());
        }
        for domains in [&mut zone.own_search, &mut zone.other_search] {
            domains.sort_by(|a, b| (a.len(), a).cmp(&(b.len(), b)));
            domains.dedup();
        }
        let mut known: BTreeMap<&ServiceName, usize> = BTreeMap::new();
        for (import, address) in imports {
            let at = *known.entry(&import.service).or_insert_with(|| {
                zone.services.push(Service {
                    name: import.service.clone(),
                    address: *address,
                    target: target(&import.service).into(),
                    ports: Vec::new(),
                });
                zone.services.len() - 1
            });
            zone.by_address.entry(zone.services[at].address).or_insert(at);
            zone.services[at].ports.extend(import.ports.iter().filter(|port| port.name.is_some()).cloned());
        }
        for forms in [long_forms, short_forms] {
            for at in 0..zone.services.len() {
                for form in forms(&zone.services[at].name, pod) {
                    zone.add_form(form, at);
                }
            }
        }
        if !zone.services.is_empty() {
            for domain in search {
                let mut rest = Some(domain.as_str());
                while let Some(name) = rest {
                    zone.above.insert(name.as_bytes().into());
                    rest = name.split_once('.').map(|(_, above)| above);
                }
            }
        }
        zone
    }

    fn add_form(&mut self, form: String, at: usize) {
        // A cluster may have so long a name that some forms cannot be asked for.
        if form.len() > MAX_NAME {
            return;
        }
        let mut rest = form.as_str();
        while let Some((_, above)) = rest.split_once('.') {
            self.above.insert(above.as_bytes().into());
            rest = above;
        }
        self.forms.entry(form.into_bytes().into()).or_insert(at);
    }

    /// What to answer to a question of class IN, without asking anybody else.
    pub fn answer(&self, name: &Name, qtype: u16) -> Answer<'_> {
        let name = name.as_bytes();
        match self.answer_under(&self.own_search, name, qtype) {
            Answer::NotOurs => {}
            answer => return answer,
        }
        match name.strip_suffix(REVERSE) {
            Some(reversed) => self.answer_reverse(reversed, qtype),
            None => Answer::NotOurs,
        }
    }

    /// What to answer where the upstreams say that the name does not exist, or nothing at all: it stands under a search
    /// domain that is not the cluster's.
    pub fn fallback(&self, name: &Name, qtype: u16) -> Answer<'_> {
        self.answer_under(&self.other_search, name.as_bytes(), qtype)
    }

    fn answer_under(&self, search: &[Box<[u8]>], name: &[u8], qtype: u16) -> Answer<'_> {
        if let Some(service) = self.find(search, name) {
            return match qtype {
                record_type::A | record_type::ANY => Answer::Record(Record::A(service.address)),
                _ => Answer::NoData { apex: labels(name) },
            };
        }
        let port = if name[0] == b'_' { self.answer_port(search, name, qtype) } else { None };
        port.unwrap_or(Answer::NotOurs)
    }

    /// Whether one of our names lies below this one. Such a name exists, whatever its own server says of it
    /// (RFC 8020): an NXDOMAIN of an upstream for it must not reach a client that draws conclusions.
    pub fn is_above_ours(&self, name: &Name) -> bool {
        let name = name.as_bytes();
        self.above.contains(name)
            || self
                .own_search
                .iter()
                .chain(&self.other_search)
                .any(|domain| name.strip_suffix(&**domain).is_some_and(|rest| self.above.contains(rest)))
            || name
                .strip_suffix(REVERSE)
                .is_some_and(|reversed| octets(reversed).is_some_and(|net| net.contains(&self.range)))
            || (name == &REVERSE[1..] || name == b"arpa")
    }

    fn find(&self, search: &[Box<[u8]>], name: &[u8]) -> Option<&Service> {
        let at = self
            .forms
            .get(name)
            .or_else(|| search.iter().find_map(|domain| self.forms.get(name.strip_suffix(&**domain)?)))?;
        Some(&self.services[*at])
    }

    /// Names of RFC 2782: `_port._protocol.<form>` and `_protocol.<form>`.
    fn answer_port(&self, search: &[Box<[u8]>], name: &[u8], qtype: u16) -> Option<Answer<'_>> {
        let (first, rest) = split_label(name)?;
        // A port may be named `tcp` or `udp` too: then this label is not the last before the form.
        if let Some(protocol) = protocol(first)
            && let Some(service) = self.find(search, rest)
        {
            let apex = labels(rest);
            let exists = service.ports.iter().any(|port| port.protocol == protocol);
            return Some(if exists { Answer::NoData { apex } } else { Answer::NoName { apex } });
        }
        let (second, rest) = split_label(rest)?;
        let protocol = protocol(second)?;
        let service = self.find(search, rest)?;
        let apex = labels(rest);
        let port = service.ports.iter().find(|port| {
            port.protocol == protocol
                && port.name.as_ref().is_some_and(|label| label.as_str().as_bytes() == &first[1..])
        });
        Some(match (port, qtype) {
            (None, _) => Answer::NoName { apex },
            (Some(port), record_type::SRV | record_type::ANY) => Answer::Record(Record::Srv {
                port: port.port,
                target: &service.target,
                address: service.address,
            }),
            (Some(_), _) => Answer::NoData { apex },
        })
    }

    /// `reversed` is what stands before `.in-addr.arpa` (RFC 1035 §3.5).
    fn answer_reverse(&self, reversed: &[u8], qtype: u16) -> Answer<'_> {
        let Some(net) = octets(reversed) else { return Answer::NotOurs };
        if !self.range.contains(&net) {
            return Answer::NotOurs;
        }
        // The SOA stands at the range where that ends at a dot, else at each address.
        let apex = self.range.prefix_len().div_ceil(8) + 2;
        if reversed.split(|byte| *byte == b'.').count() > 4 {
            return Answer::NoName { apex };
        }
        if net.prefix_len() < 32 {
            return Answer::NoData { apex };
        }
        match self.by_address.get(&net.addr()) {
            None => Answer::NoName { apex },
            Some(at) if matches!(qtype, record_type::PTR | record_type::ANY) => {
                Answer::Record(Record::Ptr(&self.services[*at].target))
            }
            Some(_) => Answer::NoData { apex },
        }
    }
}

/// Whether a search domain is the cluster's: its DNS domain, that before it `svc`, or before both a namespace. The
/// domain is the cluster's name, or what the kubelet writes behind the pod's namespace and `svc` (resolv.conf of a pod
/// with dnsPolicy ClusterFirst): the two need not be the same.
fn is_of_the_cluster(domain: &ClusterName, pod: &Defaults, search: &[ClusterName]) -> bool {
    let before = format!("{}.svc.", pod.namespace);
    let kubernetes = search.iter().filter_map(|domain| domain.as_str().strip_prefix(&before));
    kubernetes.chain([pod.cluster.as_str()]).any(|cluster| {
        let Some(rest) = domain.as_str().strip_suffix(cluster) else { return false };
        rest.is_empty()
            || rest.strip_suffix("svc.").is_some_and(|namespace| {
                // A namespace is one label.
                namespace.is_empty() || namespace.find('.') == Some(namespace.len() - 1)
            })
    })
}

/// The forms that hold the cluster.
fn long_forms(service: &ServiceName, _: &Defaults) -> Vec<String> {
    let ServiceName { name, namespace, cluster } = service;
    vec![format!("{name}.{namespace}.{cluster}"), format!("{name}.{namespace}.svc.{cluster}")]
}

/// The forms that leave the cluster open.
fn short_forms(service: &ServiceName, pod: &Defaults) -> Vec<String> {
    let ServiceName { name, namespace, .. } = service;
    let mut forms = vec![
        format!("{name}.{namespace}.svc.clusterset.local"),
        format!("{name}.{namespace}.svc"),
        format!("{name}.{namespace}"),
    ];
    if *namespace == pod.namespace {
        forms.push(name.to_string());
    }
    forms
}

/// The name that SRV and PTR records point to: as Kubernetes writes it, where that fits into a DNS name.
fn target(service: &ServiceName) -> String {
    let ServiceName { name, namespace, cluster } = service;
    let target = format!("{name}.{namespace}.svc.{cluster}");
    if target.len() <= MAX_NAME { target } else { format!("{name}.{namespace}.svc.clusterset.local") }
}

fn protocol(label: &[u8]) -> Option<Protocol> {
    match label {
        b"_tcp" => Some(Protocol::Tcp),
        b"_udp" => Some(Protocol::Udp),
        _ => None,
    }
}

/// The first label, and what follows its dot.
fn split_label(name: &[u8]) -> Option<(&[u8], &[u8])> {
    let dot = name.iter().position(|byte| *byte == b'.')?;
    Some((&name[..dot], &name[dot + 1..])).filter(|(label, _)| label[0] == b'_')
}

fn labels(name: &[u8]) -> u8 {
    // At most 127: a label and its dot are two bytes.
    name.iter().filter(|byte| **byte == b'.').count() as u8 + 1
}

/// The network that a reversed address or a part of it names: `2.66.0.127` is 127.0.66.2/32, `66.0.127` is
/// 127.0.66.0/24. Labels before the fourth octet are not looked at.
fn octets(reversed: &[u8]) -> Option<Ipv4Net> {
    let mut address = [0u8; 4];
    let mut count = 0;
    for (octet, label) in address.iter_mut().zip(reversed.rsplit(|byte| *byte == b'.')) {
        if label.len() > 1 && label[0] == b'0' {
            return None;
        }
        *octet = str::from_utf8(label).ok()?.parse().ok()?;
        count += 1;
    }
    Ipv4Net::new(address.into(), count * 8).ok()
}

#[cfg(test)]
mod tests;
