use servicekeel_core::handoff::MAX_SOCKETS;
use servicekeel_core::mesh::table::Table;
use servicekeel_core::name::{Protocol, RouterId, ServiceName};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::*;

const POD: Owner = Owner::Namespace(1);
const OTHER: Owner = Owner::Namespace(2);

fn all(bound: &Arc<Bound>, owner: &Owner) -> Vec<Held> {
    std::iter::repeat_with(|| bound.take(owner)).map_while(|held| held).collect()
}

#[test]
fn one_owner_cannot_take_every_descriptor_whatever_the_limit() {
    for files in [256, 1024, 20_000, 1 << 20] {
        let limits = Limits::new(Some(files), None);
        let most = |shares: Shares| all(&Bound::new(shares), &POD).len() as u64;
        let (flows, sidecars, threads, sockets) =
            (most(limits.flows), most(limits.sidecars), most(limits.threads), most(limits.sockets));
        let taken = flows * PER_FLOW + (sidecars + threads) * 4 + sockets;
        assert!(
            taken < files,
            "{taken} of {files}: {flows} flows, {sidecars} sidecars, {threads} threads, {sockets} sockets"
        );
    }
}

#[test]
fn neither_one_owner_nor_as_many_as_somebody_likes_can_take_every_thread() {
    for threads in [64, 256, 1024, 4915, 20_000] {
        let limits = Limits::new(None, Some(threads));
        let alone = |shares| all(&Bound::new(shares), &POD).len() as u64;
        let taken = alone(limits.sidecars) + alone(limits.threads);
        assert!(taken <= threads / 2, "{taken} of {threads} by one");
        let many = |bound: Arc<Bound>| {
            let taken: Vec<_> = (0..threads).map(|owner| all(&bound, &Owner::Namespace(owner))).collect();
            taken.iter().map(|held| held.len() as u64).sum::<u64>()
        };
        let taken = many(Bound::of_sidecars(&limits)) + many(Bound::new(limits.threads));
        assert!(taken <= threads / 4 * 3, "{taken} of {threads} by many");
        // What one has taken leaves others theirs.
        let bound = Bound::of_sidecars(&limits);
        let _hostile = all(&bound, &Owner::Namespace(0));
        let others = (1..=threads / 64).flat_map(|pod| [pod; 4]);
        let others: Vec<_> = others.map(|pod| bound.take(&Owner::Namespace(pod))).collect();
        assert!(others.iter().all(Option::is_some), "of {threads} threads");
    }
}

#[test]
fn a_node_full_of_pods_comes_back_at_once_beside_one_that_takes_all_it_can() {
    for (files, pods) in [(1024, 10), (20_000, 250), (1 << 20, 250)] {
        let limits = Limits::new(Some(files), None);
        let sidecars = (Bound::of_sidecars(&limits), 2);
        let sockets = (Bound::of_sockets(&limits), 14);
        for (bound, each) in [sidecars, sockets, (Bound::new(limits.flows), 4)] {
            let _hostile = all(&bound, &Owner::Namespace(0));
            let pods: Vec<_> = (1..=pods)
                .flat_map(|pod| vec![Owner::Namespace(pod); each])
                .map(|pod| bound.take(&pod))
                .collect();
            assert!(pods.iter().all(Option::is_some), "of {files} files, {bound:?}");
        }
    }
}

#[test]
fn a_sidecar_may_export_as_much_as_it_can_name_and_all_of_them_what_a_link_carries() {
    let exports = Bound::of_exports();
    let alone = all(&exports, &POD);
    assert!(alone.len() >= MAX_SOCKETS, "{}", alone.len());
    let others: Vec<_> = (100..300).flat_map(|owner| all(&exports, &Owner::Namespace(owner))).collect();
    assert!(exports.total() <= MOST_EXPORTS && others.len() >= 100 * 64, "{}", others.len());
    let long = |length: usize| "a".repeat(length);
    let labels = [63, 63, 63, 61].map(long).join(".");
    let wanted = ServicePort {
        service: ServiceName {
            name: long(63).parse().unwrap(),
            namespace: long(63).parse().unwrap(),
            cluster: labels.parse().unwrap(),
        },
        port: std::num::NonZeroU16::MAX,
        protocol: Protocol::Tcp,
    };
    let mut table = Table::new("home.local".parse().unwrap());
    let from = RouterId { cluster: wanted.service.cluster.clone(), node: "n".parse().unwrap() };
    for number in 0..MOST_EXPORTS {
        let mut port = wanted.clone();
        port.port = u16::try_from(number + 1).unwrap().try_into().unwrap();
        assert_eq!(table.offer(&from, 1, port), Ok(()), "{number}");
    }
}

#[test]
fn as_many_owners_as_somebody_likes_leave_descriptors_to_those_who_are_there() {
    for files in [256, 1024, 20_000, 1 << 20] {
        let limits = Limits::new(Some(files), None);
        let many = |bound: Arc<Bound>| {
            let taken = (0..files.min(20_000)).map(|owner| all(&bound, &Owner::Namespace(owner)));
            taken.collect::<Vec<_>>().iter().map(|held| held.len() as u64).sum::<u64>()
        };
        let sidecars = many(Bound::of_sidecars(&limits));
        let threads = many(Bound::new(limits.threads));
        let taken = (sidecars + threads) * 4 + many(Bound::of_sockets(&limits));
        assert!(taken <= files / 8 * 7, "{taken} of {files}");
    }
}

#[test]
fn one_other_cluster_leaves_descriptors_and_the_own_routers_their_connections() {
    for files in [256, 1024, 4096, 20_000, 1 << 20] {
        let limits = Limits::new(Some(files), None);
        let home = "a.local".parse().unwrap();
        let router = |cluster: &str, n: u64| {
            let node = format!("n{n}").parse().unwrap();
            Owner::peer(&RouterId { cluster: cluster.parse().unwrap(), node }, &home)
        };
        let (connections, flows) = (Bound::new(limits.connections), Bound::new(limits.flows));
        let names: Vec<_> = (0..100).map(|n| router("m.local", n)).collect();
        let held: Vec<_> = names.iter().map(|name| (all(&connections, name), all(&flows, name))).collect();
        let sum = |of: fn(&(Vec<Held>, Vec<Held>)) -> usize| held.iter().map(of).sum::<usize>() as u64;
        let (idle, busy) = (sum(|held| held.0.len()), sum(|held| held.1.len()));
        assert!(idle + busy * PER_FLOW <= files / 8 * 5, "{idle} and {busy} of {files}");
        assert!(connections.gives_back(&names[0]));
        // Its next name finds no more than the one before it.
        assert!(connections.take(&router("m.local", 100)).is_none());
        for n in 0..8 {
            let own = all(&connections, &router("a.local", n));
            assert!(own.len() >= 8, "{n}: {} of {files}", own.len());
        }
    }
}

#[test]
fn what_was_used_leaves_room_for_what_is_to_come() {
    let bound = Bound::new(Shares { budget: 32, least: 8, part: 1 });
    let used: Vec<_> = std::iter::repeat_with(|| bound.take_sparing(&POD)).map_while(|held| held).collect();
    let fresh = all(&bound, &POD);
    assert!(used.len() >= 8 && fresh.len() >= used.len(), "{} {}", used.len(), fresh.len());
}

#[test]
fn a_low_limit_lets_fewer_flows_in() {
    for (limit, flows, asked) in [
        (None, MAX_FLOWS, MAX_DESCRIPTORS),
        (Some(1 << 20), MAX_FLOWS, MAX_DESCRIPTORS),
        (Some(1024), 192, MAX_DESCRIPTORS),
        (Some(80), 15, 5),
        (Some(3), 1, 1),
    ] {
        let limits = Limits::new(limit, None);
        assert_eq!((limits.flows.budget, limits.asked), (flows, asked), "{limit:?}");
    }
}

#[tokio::test]
async fn who_waits_is_woken_by_what_anybody_gives_back() {
    let bound = Bound::new(Shares { budget: 8, least: 1, part: 1 });
    let mut held = all(&bound, &POD);
    let others = all(&bound, &OTHER);
    assert!(bound.take(&POD).is_none() && bound.take(&OTHER).is_none());
    let mut waiting = JoinSet::new();
    for owner in [POD, POD, OTHER] {
        let bound = bound.clone();
        waiting.spawn(async move { bound.taken(&owner).await.owner.clone() });
    }
    assert!(timeout(Duration::from_millis(50), waiting.join_next()).await.is_err());
    assert!(bound.waits(&POD) && bound.waits(&OTHER));
    // It has more than the other, so it gives more back before it may take one again.
    held.truncate(held.len() - 1);
    assert!(timeout(Duration::from_millis(50), waiting.join_next()).await.is_err());
    held.truncate(held.len() - 1);
    timeout(Duration::from_secs(5), waiting.join_next()).await.unwrap();
    drop(held);
    while let Some(woken) = timeout(Duration::from_secs(5), waiting.join_next()).await.unwrap() {
        woken.unwrap();
    }
    drop(others);
    assert_eq!(bound.total(), 0);
    assert!(bound.lock().waiting.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nobody_sleeps_while_there_is_room() {
    let bound = Bound::new(Shares { budget: 4, least: 1, part: 1 });
    let mut tasks = JoinSet::new();
    for number in 0..64 {
        let (bound, owner) = (bound.clone(), Owner::Namespace(number % 5));
        tasks.spawn(async move {
            for _ in 0..200 {
                let held = bound.taken(&owner).await;
                tokio::task::yield_now().await;
                drop(held);
            }
        });
    }
    let all = async { while tasks.join_next().await.is_some() {} };
    timeout(Duration::from_secs(30), all).await.expect("somebody sleeps for ever");
    assert_eq!(bound.total(), 0);
}

#[test]
fn udp_sessions_of_an_owner_leave_its_flows_room() {
    let peer = Owner::Foreign(crate::peers::tests::id("b.local"), Some(1));
    for (files, owner) in [(256, POD), (1024, POD), (1024, peer.clone()), (20_000, peer)] {
        let bound = Bound::new(Limits::new(Some(files), None).flows);
        let sessions = || std::iter::repeat_with(|| bound.take_session(&owner)).map_while(|held| held);
        // Also where others hold all that they may.
        let _others: Vec<_> = (100..110).flat_map(|other| all(&bound, &Owner::Namespace(other))).collect();
        let held: Vec<_> = sessions().collect();
        let flows = all(&bound, &owner);
        let (most, beside) = (held.len(), flows.len());
        assert!(beside > 0 && most >= 2 * beside, "{most} sessions, {beside} flows of {files}");
        assert_eq!(sessions().count(), 0, "what is left is for flows");
        drop((held, flows));
        assert_eq!(sessions().collect::<Vec<_>>().len(), most);
        assert!(bound.lock().sessions.is_empty());
    }
    // Also where a peer has many pods with a few each.
    let bound = Bound::new(Limits::new(Some(1024), None).flows);
    let peer = |pod| Owner::Foreign(crate::peers::tests::id("b.local"), Some(pod));
    let sessions: Vec<_> = (0..300).filter_map(|n| bound.take_session(&peer(n % 100))).collect();
    let (held, flows) = (sessions.len(), all(&bound, &peer(200)).len());
    assert!(flows > 0 && held >= 2 * flows, "{held} sessions, {flows} flows");
    drop(sessions);
    assert!(bound.lock().sessions.is_empty());
}
