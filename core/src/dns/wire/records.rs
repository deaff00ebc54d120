//! Where the records of a message are.

use std::ops::Range;

use super::{Header, name, u16_at, u32_at};

/// A section of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Section {
    /// The answer.
    Answer,
    /// The authority for it.
    Authority,
    /// What may help.
    Additional,
}

impl Section {
    const ALL: [Self; 3] = [Self::Answer, Self::Authority, Self::Additional];

    /// Its place among a header's counts.
    pub(super) fn count(self) -> usize {
        self as usize + 1
    }
}

/// A record, by where its parts are in the message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The section.
    pub section: Section,
    /// Where its owner's name begins.
    pub at: usize,
    /// Its type.
    pub rtype: u16,
    /// Where its TTL is.
    pub ttl_at: usize,
    /// Its TTL, in seconds.
    pub ttl: u32,
    /// Where its data is; it ends with it.
    pub data: Range<usize>,
}

/// The records of a message in their order. It ends where the counts say so, or before a record that is not whole.
#[derive(Debug, Clone)]
pub struct Records<'p> {
    packet: &'p [u8],
    at: usize,
    left: [u16; 3],
}

impl<'p> Records<'p> {
    /// Of a message whose questions end at `at`.
    pub fn new(packet: &'p [u8], at: usize) -> Self {
        let left = Header::read(packet)
            .map_or([0; 3], |header| [header.counts[1], header.counts[2], header.counts[3]]);
        Self { packet, at, left }
    }

    /// Where the next record begins, or the last one ended.
    pub fn position(&self) -> usize {
        self.at
    }

    /// Whether the records that are counted have all come.
    pub fn is_whole(&self) -> bool {
        self.left == [0; 3]
    }
}

impl Iterator for Records<'_> {
    type Item = Record;

    fn next(&mut self) -> Option<Record> {
        let section = *Section::ALL.iter().find(|section| self.left[**section as usize] > 0)?;
        let fixed = name::skip(self.packet, self.at)?;
        let data = fixed + 10;
        let end = data + usize::from(u16_at(self.packet, fixed + 8)?);
        let record = Record {
            section,
            at: self.at,
            rtype: u16_at(self.packet, fixed)?,
            ttl_at: fixed + 4,
            ttl: u32_at(self.packet, fixed + 4)?,
            data: data..end,
        };
        if end > self.packet.len() {
            return None;
        }
        self.left[section as usize] -= 1;
        self.at = end;
        Some(record)
    }
}
