//! The case of names, which an upstream is to give back as it was asked (draft-vixie-dnsext-dns0x20).

use super::name::{Step, step};
use super::{HEADER, WireName};

/// Gives each letter of the question's name the case that a random bit says. A forger has to guess these, too.
pub(super) fn mix(packet: &mut [u8], len: usize, bits: &[u8; 32]) {
    let name = packet.iter_mut().skip(HEADER).take(len);
    for (at, byte) in name.enumerate().filter(|(_, byte)| byte.is_ascii_alphabetic()) {
        // A length is never a letter: it is under 64.
        let upper = bits[at / 8 % 32] >> (at % 8) & 1 == 1;
        *byte = if upper { byte.to_ascii_uppercase() } else { byte.to_ascii_lowercase() };
    }
}

/// Where the name at `at` is the one asked for, its letters get the case in which the client asked.
pub(super) fn restore(packet: &mut [u8], mut at: usize, asked: &WireName) {
    // Nearly every owner is a pointer to the question, which has the client's case already.
    if packet.get(at..at + 2) == Some(&[0xc0, HEADER as u8]) {
        return;
    }
    if !WireName::read(packet, at).is_some_and(|(name, _)| name.is(asked)) {
        return;
    }
    // What is spelled out here; what a pointer leads to stands elsewhere.
    let mut done = 0;
    while let Some(Step::Label { len, .. }) = step(packet, at) {
        let (Some(to), Some(from)) = (packet.get_mut(at..=at + len), asked.as_bytes().get(done..=done + len))
        else {
            return;
        };
        to.copy_from_slice(from);
        at += 1 + len;
        done += 1 + len;
    }
}
