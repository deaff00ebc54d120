//! What holds of every annotation: of those that are written, of changes between them, and of noise.

use proptest::prelude::*;

use super::super::diff::{ExportChange, ImportChange, Offer, offered, wanted};
use super::*;

fn label() -> impl Strategy<Value = Label> {
    let hard =
        prop::sample::select(vec!["no", "null", "true", "y", "0", "0123", "1e3", "0x1f", "0o7", "on", "n"]);
    prop_oneof![
        1 => hard.prop_map(|text| text.parse().unwrap()),
        4 => "[a-z0-9]([a-z0-9-]{0,6}[a-z0-9])?".prop_map(|text| text.parse().unwrap()),
    ]
}

fn cluster() -> impl Strategy<Value = ClusterName> {
    prop_oneof![
        2 => Just("cluster-a.local".parse().unwrap()),
        2 => "[a-c]\\.local".prop_map(|text| text.parse().unwrap()),
        1 => "[0-9]{1,2}(\\.[0-9]{1,2}){0,2}".prop_map(|text| text.parse().unwrap()),
    ]
}

fn ports() -> impl Strategy<Value = Vec<Port>> {
    let key = (1u16.., any::<bool>());
    (prop::collection::btree_map(key, (label(), 1u16..), 1..5), any::<bool>())
        .prop_map(|(ports, named)| {
            let several = ports.len() > 1;
            ports
                .into_iter()
                .map(|((port, udp), (name, target))| Port {
                    name: (several || named).then_some(name),
                    port: NonZeroU16::new(port).unwrap(),
                    protocol: if udp { Protocol::Udp } else { Protocol::Tcp },
                    target: NonZeroU16::new(target).unwrap(),
                })
                .collect()
        })
        .prop_shuffle()
}

fn allow() -> impl Strategy<Value = Option<Vec<AllowRule>>> {
    let rule = (cluster(), prop::option::of(label()))
        .prop_map(|(cluster, namespace)| AllowRule { cluster, namespace });
    prop::option::of(prop::collection::vec(rule, 0..4))
}

fn some_exports() -> impl Strategy<Value = Vec<Export>> {
    // Few names, so that the old and the new list have services in common.
    let service =
        (prop_oneof![label(), "[ab]".prop_map(|t| t.parse().unwrap())], "[ab]", cluster()).prop_map(
            |(name, namespace, cluster)| ServiceName { name, namespace: namespace.parse().unwrap(), cluster },
        );
    prop::collection::btree_map(service, (ports(), allow()), 0..6)
        .prop_map(|entries| {
            entries
                .into_iter()
                .map(|(service, (ports, allow))| Export { service, ports, allow })
                .collect::<Vec<_>>()
        })
        .prop_shuffle()
}

fn as_imports(exports: &[Export]) -> Vec<Import> {
    // Where a container listens is nothing to its clients.
    let clients = |port: &Port| Port { target: port.port, ..port.clone() };
    let ports = |export: &Export| export.ports.iter().map(clients).collect();
    exports.iter().map(|e| Import { service: e.service.clone(), ports: ports(e) }).collect()
}

/// The same exports in another order, with other port names and repeated rules.
fn disguise(exports: &[Export]) -> Vec<Export> {
    let mut exports = exports.to_vec();
    exports.reverse();
    for export in &mut exports {
        export.ports.reverse();
        for (i, port) in export.ports.iter_mut().enumerate() {
            port.name = Some(format!("renamed-{i}").parse().unwrap());
        }
        if let Some(rules) = &mut export.allow {
            rules.reverse();
            rules.extend(rules.clone());
        }
    }
    exports
}

proptest! {
    #[test]
    fn what_is_rendered_is_read_back(exports in some_exports()) {
        let text = render::exports(&exports, &defaults());
        let parsed = parse_exports(&text, &defaults()).unwrap();
        prop_assert_eq!(&parsed.refused, &[], "{}", text);
        prop_assert_eq!(&parsed.entries, &exports, "{}", text);
        let imports = as_imports(&exports);
        let parsed = parse_imports(&render::imports(&imports, &defaults()), &defaults()).unwrap();
        prop_assert_eq!(parsed.entries, imports);
        prop_assert!(parsed.warnings.iter().all(|warning| warning.path.ends_with(".name")), "{:?}", parsed.warnings);
    }

    #[test]
    fn changes_lead_from_the_old_to_the_new(old in some_exports(), new in some_exports()) {
        let mut state = offered(&old);
        let changes = diff::exports(&old, &new);
        // The fewest: no port is touched twice, and each step is of the kind that it says.
        let mut touched = std::collections::BTreeSet::new();
        for change in &changes {
            let (port, before, after) = match change.clone() {
                ExportChange::Withdraw(port) => (port.clone(), state.remove(&port), None),
                ExportChange::Alter(port, offer) => (port.clone(), state.insert(port, offer.clone()), Some(offer)),
                ExportChange::Offer(port, offer) => {
                    let before: Option<Offer> = state.insert(port.clone(), offer.clone());
                    prop_assert!(before.is_none());
                    (port, None, Some(offer))
                }
            };
            prop_assert!(touched.insert(port));
            prop_assert_ne!(before, after);
        }
        prop_assert_eq!(state, offered(&new));

        let (old, new) = (as_imports(&old), as_imports(&new));
        let mut state = wanted(&old);
        for change in diff::imports(&old, &new) {
            let changed = match change {
                ImportChange::Close(port) => state.remove(&port),
                ImportChange::Open(port) => state.insert(port),
            };
            prop_assert!(changed);
        }
        prop_assert_eq!(state, wanted(&new));
    }

    #[test]
    fn a_new_name_or_another_order_changes_nothing(exports in some_exports()) {
        let disguised = disguise(&exports);
        prop_assert_eq!(diff::exports(&exports, &disguised), []);
        prop_assert_eq!(diff::imports(&as_imports(&exports), &as_imports(&disguised)), []);
    }

    #[test]
    fn noise_never_panics(text in "\\PC{0,200}") {
        let _ = parse_exports(&text, &defaults());
    }

    #[test]
    fn noise_of_yaml_never_panics(bytes in prop::collection::vec(prop::sample::select(b" \n-:[]{}&*!|>'\"%@`#?,~<0ab\t\r".to_vec()), 0..120)) {
        let _ = parse_exports(std::str::from_utf8(&bytes).unwrap(), &defaults());
    }

    #[test]
    fn a_damaged_annotation_never_panics_and_points_into_itself(
        at in 0..CONTRACT.len(), with in prop::sample::select(b" \n-:[]{}&*'\"#0a".to_vec())
    ) {
        let mut text = CONTRACT.as_bytes().to_vec();
        text[at] = with;
        let text = String::from_utf8(text).unwrap();
        let lines = text.lines().count() as u64;
        let (findings, _) = match parse_exports(&text, &defaults()) {
            Ok(parsed) => ([parsed.refused, parsed.warnings].concat(), ()),
            Err(finding) => (vec![finding], ()),
        };
        for finding in findings {
            prop_assert!((1..=lines + 1).contains(&finding.line), "{}", finding);
            prop_assert!(!finding.reason.is_empty());
        }
    }
}
