//! Names of Services and clusters, in the forms that DNS and Kubernetes allow (RFC 1123, RFC 1035 §2.3.4).

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use minicbor::{Decode, Decoder, Encode, Encoder};

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing stands there.
    #[error("is empty")]
    Empty,
    /// Longer than DNS allows: 63 bytes a label, 253 a whole name.
    #[error("has {0} characters; the limit is {1}")]
    TooLong(usize, usize),
    /// A character outside of a-z, 0-9 and `-`.
    #[error("has the character {0:?}; letters a-z, digits and '-' are allowed")]
    Character(char),
    /// A hyphen first or last.
    #[error("must start and end with a letter or a digit")]
    Edge,
}

fn check_label(text: &str) -> Result<(), NameError> {
    if text.is_empty() {
        return Err(NameError::Empty);
    }
    if text.len() > 63 {
        return Err(NameError::TooLong(text.len(), 63));
    }
    if let Some(c) = text.chars().find(|c| !(c.is_ascii_lowercase() || c.is_ascii_digit() || *c == '-')) {
        return Err(NameError::Character(c));
    }
    if text.starts_with('-') || text.ends_with('-') {
        return Err(NameError::Edge);
    }
    Ok(())
}

/// One DNS label, lower case: the name of a Service, namespace, port, node or pod. 1 to 63 bytes.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Label(Arc<str>);

/// The DNS domain that names a cluster, such as `cluster-a.local`: labels joined by dots, at most 253 bytes.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterName(Arc<str>);

impl FromStr for Label {
    type Err = NameError;
    /// Accepts upper case and folds it, as DNS does (RFC 4343).
    fn from_str(text: &str) -> Result<Self, NameError> {
        let text = text.to_ascii_lowercase();
        check_label(&text)?;
        Ok(Self(text.into()))
    }
}

impl FromStr for ClusterName {
    type Err = NameError;
    /// Accepts upper case and a final dot.
    fn from_str(text: &str) -> Result<Self, NameError> {
        let text = text.to_ascii_lowercase();
        let text = text.strip_suffix('.').unwrap_or(&text);
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        if text.len() > 253 {
            return Err(NameError::TooLong(text.len(), 253));
        }
        text.split('.').try_for_each(check_label)?;
        Ok(Self(text.into()))
    }
}

impl ClusterName {
    /// The name where nobody says another: `cluster.local`, the domain that Kubernetes itself takes.
    pub fn fallback() -> Self {
        Self("cluster.local".into())
    }
}

macro_rules! text_name {
    ($name:ident) => {
        impl $name {
            /// The name as text, lower case, without a final dot.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.serialize_str(&self.0)
            }
        }
        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = String::deserialize(d)?;
                text.parse().map_err(|e| serde::de::Error::custom(format!("{text:?} {e}")))
            }
        }
        impl<C> Encode<C> for $name {
            fn encode<W: minicbor::encode::Write>(
                &self,
                e: &mut Encoder<W>,
                _: &mut C,
            ) -> Result<(), minicbor::encode::Error<W::Error>> {
                e.str(&self.0)?.ok()
            }
        }
        impl<'b, C> Decode<'b, C> for $name {
            fn decode(d: &mut Decoder<'b>, _: &mut C) -> Result<Self, minicbor::decode::Error> {
                d.str()?.parse().map_err(|e: NameError| minicbor::decode::Error::message(e.to_string()))
            }
        }
    };
}
text_name!(Label);
text_name!(ClusterName);

/// A Service anywhere in the mesh.
#[derive(
    Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, serde::Serialize, serde::Deserialize,
)]
pub struct ServiceName {
    /// The Service's own name.
    #[n(0)]
    pub name: Label,
    /// Its namespace.
    #[n(1)]
    pub namespace: Label,
    /// The cluster where it lives.
    #[n(2)]
    pub cluster: ClusterName,
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.name, self.namespace, self.cluster)
    }
}

impl fmt::Debug for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The transport protocol of a port.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Default,
    Encode,
    Decode,
    serde::Serialize,
    serde::Deserialize,
)]
#[cbor(index_only)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// Streams.
    #[default]
    #[n(0)]
    Tcp,
    /// Datagrams.
    #[n(1)]
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        })
    }
}

/// One port of one Service: what a client connects to, and the key by which the mesh routes.
#[derive(
    Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, serde::Serialize, serde::Deserialize,
)]
pub struct ServicePort {
    /// The Service.
    #[n(0)]
    pub service: ServiceName,
    /// The port that clients connect to, 1 to 65535.
    #[n(1)]
    pub port: std::num::NonZeroU16,
    /// TCP or UDP.
    #[n(2)]
    pub protocol: Protocol,
}

impl fmt::Display for ServicePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", self.service, self.port, self.protocol)
    }
}

impl fmt::Debug for ServicePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A router: the node that it serves, and its cluster. Its certificate says the same
/// (`spiffe://<cluster>/router/<node>`).
#[derive(
    Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, serde::Serialize, serde::Deserialize,
)]
pub struct RouterId {
    /// The cluster whose authority vouches for it.
    #[n(0)]
    pub cluster: ClusterName,
    /// The node's name: a DNS name (Kubernetes node names may hold dots).
    #[n(1)]
    pub node: ClusterName,
}

impl fmt::Display for RouterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.cluster, self.node)
    }
}

impl fmt::Debug for RouterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Who may use an export: a whole cluster, or one namespace of it. Written `cluster` or `cluster/namespace`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct AllowRule {
    /// The consumer's cluster, as its router's certificate proves it.
    #[n(0)]
    pub cluster: ClusterName,
    /// The consumer's namespace; `None` allows all of the cluster.
    #[n(1)]
    pub namespace: Option<Label>,
}

impl FromStr for AllowRule {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        Ok(match text.split_once('/') {
            Some((cluster, namespace)) => {
                Self { cluster: cluster.parse()?, namespace: Some(namespace.parse()?) }
            }
            None => Self { cluster: text.parse()?, namespace: None },
        })
    }
}

impl fmt::Display for AllowRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{}/{namespace}", self.cluster),
            None => fmt::Display::fmt(&self.cluster, f),
        }
    }
}

/// Whether `rules` let a consumer in. No rules (`None`): every member of the mesh. A rule that names a
/// namespace refuses a consumer whose namespace nobody attests.
pub fn allows(rules: Option<&[AllowRule]>, cluster: &ClusterName, namespace: Option<&Label>) -> bool {
    rules.is_none_or(|rules| {
        rules.iter().any(|rule| {
            rule.cluster == *cluster && rule.namespace.as_ref().is_none_or(|wanted| Some(wanted) == namespace)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_and_domains() {
        assert_eq!("Web-1".parse::<Label>().unwrap().as_str(), "web-1");
        assert_eq!("".parse::<Label>(), Err(NameError::Empty));
        assert_eq!("-a".parse::<Label>(), Err(NameError::Edge));
        assert_eq!("a_b".parse::<Label>(), Err(NameError::Character('_')));
        assert_eq!("a".repeat(64).parse::<Label>(), Err(NameError::TooLong(64, 63)));
        assert_eq!("Cluster-A.local.".parse::<ClusterName>().unwrap().as_str(), "cluster-a.local");
        assert_eq!("a..b".parse::<ClusterName>(), Err(NameError::Empty));
    }

    #[test]
    fn allow_rules() {
        let rules: Vec<AllowRule> = ["b.local", "c.local/prod"].iter().map(|r| r.parse().unwrap()).collect();
        let (b, c, d) = ("b.local".parse().unwrap(), "c.local".parse().unwrap(), "d.local".parse().unwrap());
        let prod: Label = "prod".parse().unwrap();
        assert!(allows(None, &d, None));
        assert!(allows(Some(&rules), &b, None));
        assert!(!allows(Some(&rules), &c, None));
        assert!(allows(Some(&rules), &c, Some(&prod)));
        assert!(!allows(Some(&rules), &d, Some(&prod)));
        assert!(!allows(Some(&[]), &b, None));
    }
}
