//! The pod that the benches have in mind, and what it imports.
#![allow(dead_code, reason = "each bench uses a part of it")]

use std::time::Duration;

use criterion::Criterion;
use servicekeel_core::annotation::{Defaults, Import, Port};
use servicekeel_core::name::{Protocol, ServiceName};

/// Short: medians of functions that take micro- to milliseconds settle soon.
pub(crate) fn criterion() -> Criterion {
    Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(1))
}

pub(crate) fn defaults() -> Defaults {
    Defaults { namespace: "default".parse().unwrap(), cluster: "b.local".parse().unwrap() }
}

/// Imports of `n` Services of two clusters, with a TCP and a UDP port each.
pub(crate) fn imports(n: usize) -> Vec<Import> {
    let port = |name: &str, port: u16, protocol| Port {
        name: Some(name.parse().unwrap()),
        port: port.try_into().unwrap(),
        protocol,
        target: 8080.try_into().unwrap(),
    };
    let import = |i: usize| Import {
        service: ServiceName {
            name: format!("service-{i}").parse().unwrap(),
            namespace: format!("team-{}", i % 7).parse().unwrap(),
            cluster: if i.is_multiple_of(2) { "a.local" } else { "c.example" }.parse().unwrap(),
        },
        ports: vec![port("web", 80, Protocol::Tcp), port("game", 7777, Protocol::Udp)],
    };
    (0..n).map(import).collect()
}
