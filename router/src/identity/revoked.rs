//! Nodes and certificates that are cut off, whoever vouches for them: the config's `revoked`.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use ring::digest::{SHA256, digest};
use rustls::pki_types::CertificateDer;
use servicekeel_core::name::RouterId;

use super::error::PeerError;

/// The SHA-256 of a certificate's DER, as `openssl x509 -fingerprint -sha256` prints it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// Of a certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest(&SHA256, certificate).as_ref());
        Self(bytes)
    }

    /// Reads 64 hexadecimal digits of either case, with a colon between any two bytes or without.
    fn parse(text: &str) -> Result<Self, String> {
        let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b':').collect();
        let (pairs, rest) = digits.as_chunks::<2>();
        let mut bytes = [0; 32];
        if pairs.len() != bytes.len() || !rest.is_empty() {
            return Err(format!("has {} digits; a SHA-256 fingerprint has 64", digits.len()));
        }
        for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
            let digit = |digit: &u8| char::from(*digit).to_digit(16);
            let (Some(high), Some(low)) = (digit(high), digit(low)) else {
                return Err("has characters that are not hexadecimal digits".into());
            };
            *byte = (high << 4 | low) as u8;
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str(":")?;
            }
            write!(f, "{byte:02X}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One entry of `revoked`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Revocation {
    /// A node, by whatever certificate it shows. Written `cluster/node`.
    Node(RouterId),
    /// A certificate: a node's, or an intermediate one and with it all that it has issued.
    Certificate(Fingerprint),
}

impl FromStr for Revocation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some((cluster, node)) = text.split_once('/') {
            let cluster = cluster.parse().map_err(|e| format!("has a cluster that {e}"))?;
            let node = node.parse().map_err(|e| format!("has a node that {e}"))?;
            return Ok(Self::Node(RouterId { cluster, node }));
        }
        let digits = text.get(.."sha256:".len()).filter(|start| start.eq_ignore_ascii_case("sha256:"));
        let digits = digits.map_or(text, |start| &text[start.len()..]);
        match Fingerprint::parse(digits) {
            Ok(fingerprint) => Ok(Self::Certificate(fingerprint)),
            Err(reason) => Err(format!(
                "is neither a node, such as cluster-b.local/node-1, nor a certificate's SHA-256 fingerprint: it {reason}"
            )),
        }
    }
}

/// All that is cut off.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Revoked {
    nodes: BTreeSet<RouterId>,
    certificates: BTreeSet<Fingerprint>,
}

impl FromIterator<Revocation> for Revoked {
    fn from_iter<I: IntoIterator<Item = Revocation>>(entries: I) -> Self {
        let mut revoked = Self::default();
        for entry in entries {
            match entry {
                Revocation::Node(id) => drop(revoked.nodes.insert(id)),
                Revocation::Certificate(fingerprint) => drop(revoked.certificates.insert(fingerprint)),
            }
        }
        revoked
    }
}

impl Revoked {
    /// Whether a certificate is named.
    pub(super) fn contains(&self, fingerprint: &Fingerprint) -> bool {
        self.certificates.contains(fingerprint)
    }

    fn named_in(&self, chain: &[CertificateDer<'_>]) -> Option<Fingerprint> {
        if self.certificates.is_empty() {
            return None;
        }
        chain.iter().map(Fingerprint::of).find(|fingerprint| self.contains(fingerprint))
    }

    /// Refuses a router that is named, or that shows a certificate which is.
    pub(super) fn judge(&self, id: &RouterId, chain: &[CertificateDer<'_>]) -> Result<(), PeerError> {
        let by = if self.nodes.contains(id) {
            "its name".into()
        } else if let Some(fingerprint) = self.named_in(chain) {
            format!("a certificate that it presents, {fingerprint}")
        } else {
            return Ok(());
        };
        Err(PeerError::Revoked { id: id.clone(), by })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries() {
        let digits: String = (0..32).map(|byte| format!("{byte:02x}")).collect();
        let fingerprint = Fingerprint(std::array::from_fn(|i| i as u8));
        let shown = fingerprint.to_string();
        assert!(shown.starts_with("00:01:02:") && shown.ends_with(":1E:1F"), "{shown}");
        for text in [
            digits.clone(),
            digits.to_uppercase(),
            shown.clone(),
            shown.to_lowercase(),
            format!("sha256:{digits}"),
            format!("SHA256:{shown}"),
        ] {
            assert_eq!(text.parse(), Ok(Revocation::Certificate(fingerprint)), "{text}");
        }
        let node = RouterId { cluster: "b.local".parse().unwrap(), node: "edge-7".parse().unwrap() };
        assert_eq!("b.local/edge-7".parse(), Ok(Revocation::Node(node)));
        for (text, says) in [
            ("", "neither a node"),
            ("edge-7", "neither a node"),
            ("b.local/", "a node that is empty"),
            ("/edge-7", "a cluster that is empty"),
            ("b.local/edge_7", "the character '_'"),
            (&digits[1..], "has 63 digits; a SHA-256 fingerprint has 64"),
            (&digits.replace('f', "g"), "not hexadecimal digits"),
            (&"ä".repeat(32), "not hexadecimal digits"),
            ("sha256", "neither a node"),
        ] {
            let error = text.parse::<Revocation>().unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
