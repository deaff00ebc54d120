//! A queried name, on the stack.

use std::fmt;
use std::str::FromStr;

/// The most bytes of a name as text without its final dot (RFC 1035 §2.3.4: 255 on the wire).
pub const MAX_NAME: usize = 253;

/// Why a name cannot be one of ours. It may be a good name for another server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The root, or an empty label.
    #[error("has an empty label")]
    Empty,
    /// Over 63 bytes a label, or over [`MAX_NAME`] in all.
    #[error("is longer than DNS allows")]
    TooLong,
    /// A byte outside of a-z, 0-9, `-` and `_`.
    #[error("has the byte {0:#04x}; letters, digits, '-' and '_' are allowed")]
    Byte(u8),
}

/// A DNS name: lower case, without final dot, labels of a-z, 0-9, `-` and `_`, 1 to [`MAX_NAME`] bytes. It
/// lives on the stack: a query for our own names costs no allocation.
#[derive(Clone, Copy)]
pub struct Name {
    len: u8,
    bytes: [u8; MAX_NAME],
}

impl Name {
    /// From the labels of a packet, folding upper case (RFC 4343).
    ///
    /// # Errors
    /// Where the labels cannot be a name of ours.
    pub fn from_labels<'a>(labels: impl IntoIterator<Item = &'a [u8]>) -> Result<Self, NameError> {
        let mut name = Self { len: 0, bytes: [0; MAX_NAME] };
        let mut len = 0;
        for label in labels {
            let start = if len == 0 { 0 } else { len + 1 };
            let end = start + label.len();
            if label.is_empty() {
                return Err(NameError::Empty);
            }
            if label.len() > 63 || end > MAX_NAME {
                return Err(NameError::TooLong);
            }
            if start > 0 {
                name.bytes[len] = b'.';
            }
            for (to, from) in name.bytes[start..end].iter_mut().zip(label) {
                *to = match from.to_ascii_lowercase() {
                    byte @ (b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_') => byte,
                    byte => return Err(NameError::Byte(byte)),
                };
            }
            len = end;
        }
        if len == 0 {
            return Err(NameError::Empty);
        }
        name.len = len as u8;
        Ok(name)
    }

    /// The name's text.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// The name's text.
    pub fn as_str(&self) -> &str {
        str::from_utf8(self.as_bytes()).unwrap_or_default()
    }
}

impl FromStr for Name {
    type Err = NameError;
    /// Accepts upper case and a final dot.
    fn from_str(text: &str) -> Result<Self, NameError> {
        let text = text.strip_suffix('.').unwrap_or(text);
        Self::from_labels(text.as_bytes().split(|byte| *byte == b'.'))
    }
}

impl PartialEq for Name {
    fn eq(&self, other: &Self) -> bool {
        self.as_bytes() == other.as_bytes()
    }
}

impl Eq for Name {}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folds_and_bounds() {
        assert_eq!("_HTTP._tcp.Web.Default.".parse::<Name>().unwrap().as_str(), "_http._tcp.web.default");
        assert_eq!("".parse::<Name>(), Err(NameError::Empty));
        assert_eq!(".".parse::<Name>(), Err(NameError::Empty));
        assert_eq!("a..b".parse::<Name>(), Err(NameError::Empty));
        assert_eq!("a b".parse::<Name>(), Err(NameError::Byte(b' ')));
        assert_eq!("a".repeat(64).parse::<Name>(), Err(NameError::TooLong));
        let longest = format!("{}{}", "a.".repeat(126), "b");
        assert_eq!(longest.parse::<Name>().unwrap().as_str(), longest);
        assert_eq!(format!("{longest}c").parse::<Name>(), Err(NameError::TooLong));
        assert_eq!(format!("{longest}.c").parse::<Name>(), Err(NameError::TooLong));
        assert_eq!(Name::from_labels([b"a.b".as_slice()]), Err(NameError::Byte(b'.')));
    }
}
