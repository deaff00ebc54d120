use servicekeel_core::name::{Protocol, ServiceName};

use super::*;
use crate::peers::tests::node;

fn offered(cluster: &str, router: &str, n: usize) -> (RouterId, ServicePort) {
    let from = RouterId { cluster: cluster.parse().unwrap(), node: router.parse().unwrap() };
    let service = ServiceName {
        name: format!("web-{n}").parse().unwrap(),
        namespace: "default".parse().unwrap(),
        cluster: from.cluster.clone(),
    };
    (from, ServicePort { service, port: 80.try_into().unwrap(), protocol: Protocol::Tcp })
}

#[tokio::test]
async fn what_another_cluster_offers_makes_no_endless_answer() {
    let node = node();
    for (cluster, routers, each) in [("m.local", 40, 1500), ("z.local", 1, 10)] {
        for router in 0..routers {
            let link = node.next_id();
            let name = format!("m-{router}");
            assert!(node.peer(&offered(cluster, &name, 0).0).is_some());
            for n in 0..each {
                let (from, port) = offered(cluster, &name, n);
                node.change(|table| table.offer(&from, link, port)).unwrap();
            }
        }
    }
    let status = read(&node).await;
    let of = |router: &str| status.offers.iter().filter(|offer| offer.router == router).count();
    assert_eq!((of("m.local/m-0"), of("z.local/m-0")), (MAX_LISTED, 10));
    assert_eq!(status.offers.len(), MAX_LISTED_OF_CLUSTER + 10);
    let counted: Vec<_> = status.peers.iter().map(|peer| peer.offers).collect();
    assert_eq!(counted, [vec![1500; 40], vec![10]].concat());
    let note = "56000 offers of other routers are not listed";
    assert!(status.notes.iter().any(|text| text.starts_with(note)), "{:?}", status.notes);
    assert!(serde_json::to_string(&status).unwrap().len() < 1 << 20);
}
