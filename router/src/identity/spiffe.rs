//! The name in a router's certificate: `spiffe://<cluster>/router/<node>`
//! (SPIFFE-ID §2; X.509-SVID §2: exactly one URI among the subject alternative names).

use servicekeel_core::name::RouterId;

use super::error::PeerError;

/// The URI of a router.
pub fn uri(id: &RouterId) -> String {
    format!("spiffe://{}/router/{}", id.cluster, id.node)
}

/// The URI of a cluster's authority.
pub fn authority_uri(cluster: &servicekeel_core::name::ClusterName) -> String {
    format!("spiffe://{cluster}")
}

/// Reads the URI of a router. Only the canonical spelling is a name: lower case, no final dot, nothing more.
///
/// # Errors
/// [`PeerError::NotARouter`] with the reason.
pub fn parse(text: &str) -> Result<RouterId, PeerError> {
    let refuse = |reason: &str| PeerError::NotARouter { uri: shown(text), reason: reason.to_owned() };
    let rest = text.strip_prefix("spiffe://").ok_or_else(|| refuse("it does not start with spiffe://"))?;
    let (cluster, path) = rest.split_once('/').ok_or_else(|| refuse("it has no path"))?;
    let node = path.strip_prefix("router/").ok_or_else(|| refuse("its path does not start with /router/"))?;
    let id = RouterId {
        cluster: cluster.parse().map_err(|e| refuse(&format!("its cluster {e}")))?,
        node: node.parse().map_err(|e| refuse(&format!("its node {e}")))?,
    };
    if uri(&id) != text {
        return Err(refuse(&format!("it must be written {}", uri(&id))));
    }
    Ok(id)
}

/// A foreign text, fit for a log line.
fn shown(text: &str) -> String {
    text.chars().take(300).flat_map(char::escape_default).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_canonical_name_of_a_router() {
        let id = parse("spiffe://cluster-a.local/router/node-1.example").unwrap();
        assert_eq!((id.cluster.as_str(), id.node.as_str()), ("cluster-a.local", "node-1.example"));
        for wrong in [
            "",
            "https://cluster-a.local/router/n",
            "spiffe://cluster-a.local",
            "spiffe://cluster-a.local/",
            "spiffe://cluster-a.local/router/",
            "spiffe://cluster-a.local/router/n/",
            "spiffe://cluster-a.local/router/n?x",
            "spiffe://cluster-a.local/router/n#x",
            "spiffe://cluster-a.local/routers/n",
            "spiffe://Cluster-A.local/router/n",
            "spiffe://cluster-a.local./router/n",
            "spiffe://u@cluster-a.local/router/n",
            "spiffe://cluster-a.local:443/router/n",
            "spiffe:///router/n",
            "SPIFFE://cluster-a.local/router/n",
            "spiffe://cluster-a.local/router/n\0",
        ] {
            assert!(matches!(parse(wrong), Err(PeerError::NotARouter { .. })), "{wrong:?}");
        }
    }
}
