//! Takes OPT records out of a message: they are between two hops and not for the next one (RFC 6891 §6.1.1).

use super::name::{Step, step};
use super::{Header, Record, Records, rtype, u16_at};

/// The message without its OPT records and without what stands behind the last whole record, its counts corrected.
/// Names of later records that point behind an OPT record are led to where their targets have moved.
pub(super) fn strip(packet: &[u8], questions_end: usize) -> Vec<u8> {
    let mut kept = packet.get(..questions_end).unwrap_or_default().to_vec();
    let mut counts = [0u16; 3];
    // Where an OPT record ended, and how much is gone up to there.
    let mut gone: Vec<(usize, usize)> = Vec::new();
    let mut records = Records::new(packet, questions_end);
    for record in records.by_ref() {
        if record.rtype == rtype::OPT {
            gone.push((record.data.end, record.data.end - kept.len()));
            continue;
        }
        let from = kept.len();
        kept.extend_from_slice(&packet[record.at..record.data.end]);
        counts[record.section as usize] += 1;
        if !gone.is_empty() {
            for name in names(packet, &record) {
                lead(&mut kept, packet, name, from + (name - record.at), &gone);
            }
        }
    }
    if let Some(mut header) = Header::read(packet) {
        header.counts = [header.counts[0], counts[0], counts[1], counts[2]];
        header.write(&mut kept);
    }
    kept
}

/// Corrects the pointer that ends the name at `at`, which is at `to` now.
fn lead(kept: &mut [u8], packet: &[u8], mut at: usize, mut to: usize, gone: &[(usize, usize)]) {
    while let Some(Step::Label { len, .. }) = step(packet, at) {
        at += 1 + len;
        to += 1 + len;
    }
    let Some(Step::Pointer(target)) = step(packet, at) else { return };
    let before = gone.partition_point(|(end, _)| *end <= target);
    let moved = before.checked_sub(1).map_or(0, |last| gone[last].1);
    let pointer = 0xc000 | (target - moved) as u16;
    if let Some(place) = kept.get_mut(to..to + 2) {
        place.copy_from_slice(&pointer.to_be_bytes());
    }
}

/// Where the names of a record begin that may be compressed: its owner's, and those in the data of the types whose
/// names a receiver must decompress (RFC 3597 §4).
fn names(packet: &[u8], record: &Record) -> Vec<usize> {
    let mut found = vec![record.at];
    let data = &record.data;
    let (before, count) = match record.rtype {
        2..=5 | 7..=9 | 12 | 30 | 39 => (0, 1),
        rtype::SOA | 14 | 17 => (0, 2),
        15 | 18 | 21 | 36 => (2, 1),
        26 => (2, 2),
        33 => (6, 1),
        24 => (18, 1),
        // NAPTR: order, preference and three texts.
        35 => {
            let mut at = data.start + 4;
            for _ in 0..3 {
                at += 1 + usize::from(packet.get(at).copied().unwrap_or_default());
            }
            (at - data.start, 1)
        }
        _ => return found,
    };
    let mut at = data.start + before;
    for _ in 0..count {
        let Some(end) = super::name::skip(packet, at).filter(|end| *end <= data.end) else { break };
        found.push(at);
        at = end;
    }
    found
}

/// The extended part of the response code that the first OPT record of the additional section has, and whether there
/// is one.
pub(super) fn extended(packet: &[u8], questions_end: usize) -> Option<u16> {
    let mut records = Records::new(packet, questions_end);
    let opt = records.find(|record| record.rtype == rtype::OPT)?;
    Some(u16_at(packet, opt.ttl_at)? >> 8 << 4)
}
