//! Names on the wire, with and without compression (RFC 1035 §4.1.4).

use super::super::Name;

/// The most bytes of a name on the wire (RFC 1035 §2.3.4).
const MAX: usize = 255;
/// The most pointers of a name; every label may be behind one, and no server makes so many.
const MAX_POINTERS: usize = 32;

/// A name as it is on the wire, spelled out: each label behind its length, the root at the end. 1 to 255 bytes.
#[derive(Clone, Copy)]
pub struct WireName {
    len: u8,
    bytes: [u8; MAX],
}

/// One step along a name.
pub(super) enum Step {
    /// A label of so many bytes, behind this offset.
    Label { at: usize, len: usize },
    /// A pointer to an offset.
    Pointer(usize),
    /// The end.
    Root,
}

/// What stands at an offset where a name goes on.
pub(super) fn step(packet: &[u8], at: usize) -> Option<Step> {
    let first = *packet.get(at)?;
    match first >> 6 {
        0 if first == 0 => Some(Step::Root),
        0 => Some(Step::Label { at, len: first.into() }),
        3 => Some(Step::Pointer(usize::from(first & 0x3f) << 8 | usize::from(*packet.get(at + 1)?))),
        // Label types that were withdrawn (RFC 6891 §5).
        _ => None,
    }
}

/// Where what stands behind a name begins; pointers are not followed.
pub(super) fn skip(packet: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match step(packet, at)? {
            Step::Label { len, .. } => at += 1 + len,
            Step::Pointer(_) => return Some(at + 2),
            Step::Root => return Some(at + 1),
        }
    }
}

impl WireName {
    /// The name at an offset, and where what stands behind it begins. Pointers lead
    /// backwards only, and 32 are the most.
    pub fn read(packet: &[u8], start: usize) -> Option<(Self, usize)> {
        let mut name = Self { len: 0, bytes: [0; MAX] };
        let (mut at, mut len, mut end, mut before) = (start, 0, None, start);
        let mut pointers = 0;
        loop {
            match step(packet, at)? {
                Step::Label { at: from, len: label } => {
                    let bytes = packet.get(from..=from + label)?;
                    // One byte stays free for the root.
                    name.bytes[..MAX - 1].get_mut(len..=len + label)?.copy_from_slice(bytes);
                    len += 1 + label;
                    at += 1 + label;
                }
                Step::Pointer(target) => {
                    end.get_or_insert(at + 2);
                    pointers += 1;
                    if target >= before || pointers > MAX_POINTERS {
                        return None;
                    }
                    (at, before) = (target, target);
                }
                Step::Root => {
                    name.len = len as u8 + 1;
                    return Some((name, end.unwrap_or(at + 1)));
                }
            }
        }
    }

    /// The bytes, with the root's.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// The labels, without the root.
    pub fn labels(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = self.as_bytes();
        std::iter::from_fn(move || {
            let (len, behind) = rest.split_first().filter(|(len, _)| **len > 0)?;
            let (label, behind) = behind.split_at_checked((*len).into())?;
            rest = behind;
            Some(label)
        })
    }

    /// Whether it is the same name, in whatever case (RFC 4343). A length is never a letter: it is under 64.
    pub fn is(&self, other: &Self) -> bool {
        self.as_bytes().eq_ignore_ascii_case(other.as_bytes())
    }

    /// As a name that can be one of ours.
    pub fn to_name(&self) -> Option<Name> {
        Name::from_labels(self.labels()).ok()
    }

    /// From a text of labels and dots, without final dot; for names that we made.
    pub(super) fn of_text(text: &str) -> Option<Self> {
        let mut name = Self { len: 0, bytes: [0; MAX] };
        let mut len = 0;
        for label in text.split('.') {
            let label = label.as_bytes();
            if label.is_empty() || label.len() > 63 {
                return None;
            }
            let place = name.bytes[..MAX - 1].get_mut(len..=len + label.len())?;
            place[0] = label.len() as u8;
            place[1..].copy_from_slice(label);
            len += 1 + label.len();
        }
        name.len = len as u8 + 1;
        Some(name)
    }
}

impl std::fmt::Debug for WireName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for label in self.labels() {
            write!(f, "{}.", label.escape_ascii())?;
        }
        if self.len == 1 { f.write_str(".") } else { Ok(()) }
    }
}
