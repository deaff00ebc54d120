//! Any bytes, and any query.

use std::sync::OnceLock;

use proptest::prelude::*;
use tokio::runtime::{Builder, Runtime};

use super::*;

fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap())
}

fn transport() -> impl Strategy<Value = Transport> {
    prop_oneof![Just(Transport::Udp), Just(Transport::Tcp)]
}

/// Names around ours, and others.
fn any_name() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let label = prop_oneof![
        4 => prop::sample::select(vec![
            "simple-server", "default", "svc", "cluster-b", "local", "_http", "_tcp", "2", "66", "0", "127",
            "in-addr", "arpa", "corp", "example",
        ]).prop_map(|label| label.as_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 1..63),
    ];
    prop::collection::vec(label, 0..6)
}

proptest! {
    #[test]
    fn noise_gets_at_most_an_error(packet: Vec<u8>, transport in transport()) {
        let dns = dns(&[]);
        let answer = runtime().block_on(dns.answer(&packet, CLIENT, transport));
        match answer {
            None => prop_assert!(packet.len() < 12 || packet[2] & 0x80 != 0),
            Some(answer) => {
                prop_assert_eq!(&answer[..2], &packet[..2]);
                prop_assert!(Message::from_vec(&answer).is_ok());
            }
        }
    }

    #[test]
    fn spoilt_queries_get_an_answer(
        labels in any_name(), qtype: u16, at: prop::sample::Index, byte: u8, cut: prop::sample::Index, transport in transport(),
    ) {
        let mut message = Message::query();
        let name = Name::from_labels(labels.iter().map(Vec::as_slice)).unwrap();
        message.add_query(Query::query(name, qtype.into()));
        let mut packet = with_edns(message, 1232).to_vec().unwrap();
        let at = at.index(packet.len());
        packet[at] = byte;
        packet.truncate(cut.index(packet.len() + 1));
        let answer = runtime().block_on(dns(&[]).answer(&packet, CLIENT, transport));
        prop_assert_eq!(answer.is_some(), packet.len() >= 12 && packet[2] & 0x80 == 0);
        if let Some(answer) = answer {
            prop_assert_eq!(&answer[..2], &packet[..2]);
            prop_assert!(answer[2] & 0x80 != 0);
        }
    }

    #[test]
    fn each_query_gets_one_answer(
        labels in any_name(), qtype: u16, class: u16, opcode in 0..16u8, edns: Option<(u16, bool)>, flags: [bool; 3], transport in transport(),
    ) {
        let mut message = Message::query();
        message.metadata.op_code = hickory_proto::op::OpCode::from_u8(opcode);
        message.metadata.recursion_desired = flags[0];
        message.metadata.checking_disabled = flags[1];
        message.metadata.authentic_data = flags[2];
        let mut query = Query::query(Name::from_labels(labels.iter().map(Vec::as_slice)).unwrap(), qtype.into());
        query.set_query_class(class.into());
        message.add_query(query);
        if let Some((payload, signatures)) = edns {
            message = with_edns(message, payload);
            message.edns.as_mut().unwrap().set_dnssec_ok(signatures);
        }
        runtime().block_on(ask_over(&dns(&[]), &message, transport));
    }
}
