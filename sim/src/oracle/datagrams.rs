//! What must hold of datagrams and their answers.

use tracing::debug;

use super::{Oracle, Service};
use crate::content::Content;

/// Number, Service and length before the content of a datagram.
const DATAGRAM_HEADER: usize = 16;

pub(super) struct Datagram {
    client: u64,
    service: Service,
    len: usize,
    received: bool,
    answered: bool,
}

impl Oracle {
    /// A number for a client of datagrams.
    pub(crate) fn begin_client(&self) -> u64 {
        let mut state = self.lock();
        state.next += 1;
        state.next
    }

    /// A datagram for a Service, `len` bytes long: its number and its bytes.
    pub(crate) fn send_datagram(&self, client: u64, service: Service, len: usize) -> (u64, Vec<u8>) {
        let mut state = self.lock();
        state.tally.datagrams += 1;
        state.next += 1;
        let number = state.next;
        if len < DATAGRAM_HEADER {
            state.short.entry((service, len)).or_default().0 += 1;
            return (number, short(len));
        }
        state.datagrams.insert(number, Datagram { client, service, len, received: false, answered: false });
        let mut bytes = Vec::with_capacity(len);
        bytes.extend(number.to_be_bytes());
        bytes.extend(service.0.to_be_bytes());
        bytes.extend((len as u32).to_be_bytes());
        let content = Content::new(number, 0);
        while bytes.len() < len {
            bytes.extend(content.at((bytes.len() - DATAGRAM_HEADER) as u64, len - bytes.len()));
        }
        (number, bytes)
    }

    /// A service received a datagram.
    pub(crate) fn receive_datagram(&self, own: Service, bytes: &[u8]) {
        if let Err(wrong) = self.received(own, bytes) {
            self.violate(format_args!("a datagram of {} bytes at {own:?}: {wrong}", bytes.len()));
        }
    }

    fn received(&self, own: Service, bytes: &[u8]) -> Result<(), String> {
        let mut state = self.lock();
        state.tally.datagrams_received += 1;
        if bytes.len() < DATAGRAM_HEADER {
            if bytes != short(bytes.len()) {
                return Err("not what was sent".into());
            }
            let (sent, received) = state.short.entry((own, bytes.len())).or_default();
            *received += 1;
            return if received > sent { Err("more of them than were sent".into()) } else { Ok(()) };
        }
        let number = whole(bytes)?;
        let datagram = state.datagrams.get_mut(&number).ok_or("nobody sent it")?;
        if datagram.len != bytes.len() {
            return Err(format!("number {number} was sent with {} bytes", datagram.len));
        }
        if datagram.service != own {
            return Err(format!("number {number} was sent to {:?}", datagram.service));
        }
        if std::mem::replace(&mut datagram.received, true) {
            return Err(format!("number {number} comes twice"));
        }
        debug!(number, len = bytes.len(), "a datagram is received");
        Ok(())
    }

    /// The sender of a datagram received an answer: the number of what it answers.
    pub(crate) fn receive_answer(&self, client: u64, service: Service, bytes: &[u8]) -> Option<u64> {
        let answered = self.answered(client, service, bytes);
        match answered {
            Ok(number) => Some(number),
            Err(wrong) => {
                self.violate(format_args!("an answer of {} bytes from {service:?}: {wrong}", bytes.len()));
                None
            }
        }
    }

    fn answered(&self, client: u64, service: Service, bytes: &[u8]) -> Result<u64, String> {
        let mut state = self.lock();
        state.tally.datagrams_answered += 1;
        if bytes.len() < DATAGRAM_HEADER {
            return if bytes == short(bytes.len()) { Ok(0) } else { Err("not what was sent".into()) };
        }
        let number = whole(bytes)?;
        let datagram = state.datagrams.get_mut(&number).ok_or("nobody sent it")?;
        if datagram.service != service || datagram.len != bytes.len() || !datagram.received {
            return Err(format!("number {number} was sent to {:?}", datagram.service));
        }
        if datagram.client != client {
            return Err(format!("number {number} was sent by another client"));
        }
        if std::mem::replace(&mut datagram.answered, true) {
            return Err(format!("number {number} is answered twice"));
        }
        Ok(number)
    }
}

/// What a datagram says of itself, where its content is whole.
fn whole(bytes: &[u8]) -> Result<u64, String> {
    let (header, content) = bytes.split_at(DATAGRAM_HEADER);
    let number = u64::from_be_bytes(header[..8].try_into().map_err(|_| "no number")?);
    let len = u32::from_be_bytes(header[12..].try_into().map_err(|_| "no length")?) as usize;
    if len != bytes.len() {
        return Err(format!("number {number} was sent with {len} bytes"));
    }
    match Content::new(number, 0).differs(0, content) {
        Some(at) => Err(format!("number {number} differs at byte {at}")),
        None => Ok(number),
    }
}

fn short(len: usize) -> Vec<u8> {
    Content::new(len as u64, 1).at(0, len).into()
}
