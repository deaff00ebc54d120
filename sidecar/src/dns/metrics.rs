//! What the DNS server counts.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// How a query ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// A record of ours.
    Own,
    /// A name of ours that has no such record, or would be ours and does not exist.
    OwnNegative,
    /// What an upstream said just now.
    Forwarded,
    /// What an upstream said some time ago.
    Cached,
    /// What an upstream said too long ago, since none answers now.
    Stale,
    /// SERVFAIL, or the error that an upstream gave.
    Failed,
    /// Malformed, or nothing that we do.
    Refused,
}

impl Outcome {
    /// Each of them, for a counter that is there before it counts: what grows from nothing can't be alerted on.
    const ALL: [Self; 7] = [
        Self::Own,
        Self::OwnNegative,
        Self::Forwarded,
        Self::Cached,
        Self::Stale,
        Self::Failed,
        Self::Refused,
    ];

    fn label(self) -> &'static str {
        match self {
            Self::Own => "own",
            Self::OwnNegative => "own_negative",
            Self::Forwarded => "forwarded",
            Self::Cached => "cached",
            Self::Stale => "stale",
            Self::Failed => "failed",
            Self::Refused => "refused",
        }
    }
}

/// The counters; a clone counts into the same.
#[derive(Debug, Clone, Default)]
pub(super) struct Metrics {
    queries: Family<[(&'static str, &'static str); 1], Counter>,
    /// Queries that an upstream did not answer, or answered with what is no answer to the question.
    pub(super) upstream_failures: Counter,
    /// Queries answered from the cache, stale answers too.
    cache_hits: Counter,
    /// Foreign answers that are kept.
    pub(super) cache_entries: Gauge,
}

impl Metrics {
    pub(super) fn count(&self, outcome: Outcome) {
        self.queries.get_or_create(&[("outcome", outcome.label())]).inc();
        if matches!(outcome, Outcome::Cached | Outcome::Stale) {
            self.cache_hits.inc();
        }
    }

    #[cfg(test)]
    pub(super) fn counted(&self, outcome: Outcome) -> u64 {
        self.queries.get_or_create(&[("outcome", outcome.label())]).get()
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("servicekeel_sidecar_dns");
        for outcome in Outcome::ALL {
            drop(self.queries.get_or_create(&[("outcome", outcome.label())]));
        }
        registry.register("queries", "Queries by outcome", self.queries.clone());
        registry.register(
            "upstream_failures",
            "Queries that an upstream did not answer",
            self.upstream_failures.clone(),
        );
        registry.register("cache_hits", "Queries answered from the cache", self.cache_hits.clone());
        registry.register("cache_entries", "Upstream answers in the cache", self.cache_entries.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_is_there_before_it_is_counted() {
        let (metrics, mut registry) = (Metrics::default(), Registry::default());
        metrics.register(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for outcome in ["own", "own_negative", "forwarded", "cached", "stale", "failed", "refused"] {
            let line = format!("servicekeel_sidecar_dns_queries_total{{outcome=\"{outcome}\"}} 0\n");
            assert!(text.contains(&line), "{line} in {text}");
        }
    }
}
