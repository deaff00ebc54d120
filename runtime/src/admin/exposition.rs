//! The text of the metrics: OpenMetrics 1.0 for who asks for it, else what Prometheus read before it (version 0.0.4).

use std::fmt;

use hyper::HeaderMap;
use hyper::header::ACCEPT;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    OpenMetrics,
    Prometheus,
}

impl Format {
    /// What a request accepts.
    pub(super) fn of(headers: &HeaderMap) -> Self {
        let accepted = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
        let accepts = accepted.flat_map(|value| value.split(',')).any(|range| {
            let mut parts = range.split(';').map(str::trim);
            let named =
                parts.next().is_some_and(|kind| kind.eq_ignore_ascii_case("application/openmetrics-text"));
            // `q=0` is a refusal (RFC 9110 §12.4.2).
            let weight = parts.find_map(|part| part.strip_prefix("q="));
            named && weight.is_none_or(|weight| weight.parse().is_ok_and(|weight: f32| weight > 0.0))
        });
        if accepts { Self::OpenMetrics } else { Self::Prometheus }
    }

    pub(super) fn kind(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }

    /// # Errors
    /// Those of a metric that can't be written.
    pub(super) fn text(self, registry: &Registry) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, registry)?;
        Ok(match self {
            Self::OpenMetrics => text,
            Self::Prometheus => as_prometheus(&text),
        })
    }
}

/// The older format names a counter in its comments as in its samples, with `_total`, and knows neither units nor an end.
fn as_prometheus(open: &str) -> String {
    let mut text = String::with_capacity(open.len());
    let mut lines = open.lines().peekable();
    while let Some(line) = lines.next() {
        if line == "# EOF" || line.starts_with("# UNIT ") {
            continue;
        }
        let help = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' '));
        let counter = |line: &str, name: &str| {
            line.strip_prefix("# TYPE ").and_then(|rest| rest.strip_suffix(" counter")) == Some(name)
        };
        match (help, line.strip_prefix("# TYPE ").and_then(|rest| rest.strip_suffix(" counter"))) {
            (Some((name, said)), _) if lines.peek().is_some_and(|next| counter(next, name)) => {
                text.extend(["# HELP ", name, "_total ", said]);
            }
            (_, Some(name)) => text.extend(["# TYPE ", name, "_total counter"]),
            _ => text.push_str(line),
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;
    use prometheus_client::metrics::counter::Counter;
    use prometheus_client::metrics::gauge::Gauge;
    use prometheus_client::registry::Unit;

    use super::*;

    #[test]
    fn who_does_not_ask_for_openmetrics_does_not_get_it() {
        let of = |accept: &[&'static str]| {
            let values = accept.iter().map(|value| (ACCEPT, HeaderValue::from_static(value)));
            Format::of(&values.collect())
        };
        for accept in [
            &[][..],
            &["*/*"],
            &["text/plain;version=0.0.4"],
            &["application/openmetrics-text;q=0", "text/plain"],
        ] {
            assert_eq!(of(accept), Format::Prometheus, "{accept:?}");
        }
        for accept in [
            &["application/openmetrics-text"][..],
            &["text/plain", "application/openmetrics-text; version=1.0.0"],
            &[
                "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,*/*;q=0.1",
            ],
        ] {
            assert_eq!(of(accept), Format::OpenMetrics, "{accept:?}");
        }
    }

    #[test]
    fn a_counter_has_the_name_of_its_samples() {
        let mut registry = Registry::default();
        let flows: Counter = Counter::default();
        flows.inc_by(7);
        registry.register("flows", "Flows, a counter", flows);
        registry.register_with_unit("age", "Since the start", Unit::Seconds, Gauge::<i64>::default());
        assert_eq!(
            Format::Prometheus.text(&registry).unwrap(),
            "# HELP flows_total Flows, a counter.\n# TYPE flows_total counter\nflows_total 7\n\
             # HELP age_seconds Since the start.\n# TYPE age_seconds gauge\nage_seconds 0\n"
        );
        assert!(Format::OpenMetrics.text(&registry).unwrap().ends_with("\n# EOF\n"));
    }
}
