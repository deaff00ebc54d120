//! The project's targets, and whether a run meets them.

use std::fmt;

use crate::load::{AllSamples, Samples, median};
use crate::memory::{FLOWS, Memory};
use crate::paths::{Kind, Role};

/// How much a sidecar's memory may differ with open connections: a few pages for log lines and the stock of sockets.
const NO_CHANGE: f64 = 64e3;

/// What the measured value must be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Wanted {
    /// This, or more.
    AtLeast(f64),
    /// Less than this.
    Below(f64),
}

/// One target.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Target {
    pub(crate) what: String,
    pub(crate) wanted: Wanted,
    /// `None`: not measured, which is not met.
    pub(crate) measured: Option<f64>,
    /// The lowest and the highest of the rounds, where there are rounds.
    pub(crate) range: Option<(f64, f64)>,
}

impl Target {
    /// Whether the run meets it.
    pub(crate) fn is_met(&self) -> bool {
        self.measured.is_some_and(|measured| match self.wanted {
            Wanted::AtLeast(least) => measured >= least,
            Wanted::Below(bound) => measured < bound,
        })
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(least) => write!(f, "at least {least}"),
            Self::Below(bound) => write!(f, "below {bound}"),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, wanted, measured, .. } = self;
        match measured {
            Some(measured) => write!(f, "{what}: {measured:.2}, wanted {wanted}"),
            None => write!(f, "{what}: not measured, wanted {wanted}"),
        }
    }
}

/// Judges a run. An empty `memory` was left out on purpose and has no targets.
pub(crate) fn judge(samples: &AllSamples, memory: &[Memory]) -> Vec<Target> {
    let one_flow = |samples: &Samples| samples.one_flow.clone();
    let new_flows = |samples: &Samples| samples.new_flows.clone();
    let mut targets = vec![
        ratio(samples, "one flow: same node / direct", [Kind::SameNode, Kind::Direct], one_flow, 0.4),
        ratio(
            samples,
            "one flow: across (TLS) / rathole (plain)",
            [Kind::Across, Kind::Rathole],
            one_flow,
            1.0,
        ),
        ratio(
            samples,
            "new flows: across (TLS) / rathole (plain)",
            [Kind::Across, Kind::Rathole],
            new_flows,
            0.8,
        ),
    ];
    for program in memory {
        let Memory { name, role, idle, busy } = *program;
        let mut bound = |what: String, measured: f64, bound: f64| {
            targets.push(Target {
                what,
                wanted: Wanted::Below(bound),
                measured: Some(measured),
                range: None,
            });
        };
        match role {
            Role::Router => bound(format!("{name}: KB for each idle flow"), program.each_flow() / 1e3, 40.0),
            Role::Sidecar => {
                bound(format!("{name}: MB idle"), idle as f64 / 1e6, 8.0);
                let change = busy.abs_diff(idle) as f64 / 1e3;
                bound(format!("{name}: KB of change with {FLOWS} open flows"), change, NO_CHANGE / 1e3);
            }
            Role::Rathole => {}
        }
    }
    targets
}

/// The median of the rounds' ratios: what makes a whole round slow is no one's advantage.
fn ratio(
    samples: &AllSamples,
    what: &str,
    [above, below]: [Kind; 2],
    figure: impl Fn(&Samples) -> Vec<f64>,
    least: f64,
) -> Target {
    let ratios: Vec<f64> = match (samples.get(&above), samples.get(&below)) {
        (Some(above), Some(below)) => figure(above).iter().zip(figure(below)).map(|(a, b)| a / b).collect(),
        _ => Vec::new(),
    };
    let range = ratios.iter().copied().reduce(f64::min).zip(ratios.iter().copied().reduce(f64::max));
    Target {
        what: what.to_owned(),
        wanted: Wanted::AtLeast(least),
        measured: Some(median(&ratios)).filter(|median| !median.is_nan()),
        range,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(direct: &[f64], same_node: &[f64]) -> AllSamples {
        let of = |values: &[f64]| Samples { one_flow: values.to_vec(), ..Samples::default() };
        AllSamples::from([(Kind::Direct, of(direct)), (Kind::SameNode, of(same_node))])
    }

    #[test]
    fn ratios_are_of_the_same_round() {
        // The medians of both are 10 and 5, but two rounds of three are below the target.
        let targets = judge(&samples(&[10.0, 20.0, 10.0], &[3.0, 6.0, 5.0]), &[]);
        assert_eq!((targets[0].measured, targets[0].range), (Some(0.3), Some((0.3, 0.5))));
        assert!(!targets[0].is_met());
        assert!(judge(&samples(&[10.0], &[4.0]), &[])[0].is_met());
    }

    #[test]
    fn what_was_not_measured_is_not_met() {
        let targets = judge(&samples(&[10.0], &[5.0]), &[]);
        let unmet: Vec<String> = targets.iter().filter(|t| !t.is_met()).map(ToString::to_string).collect();
        assert_eq!(unmet.len(), 2);
        assert!(
            unmet.iter().all(|text| text.contains("rathole") && text.contains("not measured")),
            "{unmet:?}"
        );
    }

    #[test]
    fn memory_has_its_bounds() {
        let program = |role, idle, busy| Memory { name: "x", role, idle, busy };
        let met = |memory| {
            let targets = judge(&AllSamples::new(), &[memory]);
            targets[3..].iter().map(Target::is_met).collect::<Vec<_>>()
        };
        let router =
            |each_flow| met(program(Role::Router, 10_000_000, 10_000_000 + FLOWS as u64 * each_flow));
        assert_eq!(router(39_900), [true]);
        assert_eq!(router(40_000), [false]);
        assert_eq!(met(program(Role::Sidecar, 7_900_000, 7_950_000)), [true, true]);
        assert_eq!(met(program(Role::Sidecar, 8_000_000, 8_100_000)), [false, false]);
        assert!(met(program(Role::Rathole, 0, u64::MAX)).is_empty());
    }
}
