//! One annotation: its last good text, what that says, and why a newer text is not used.

use crate::annotation::{Finding, Parsed};

/// What is known of an annotation now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Given {
    /// Its text.
    Text(String),
    /// There is one that can't be read.
    Unusable(Finding),
    /// Nothing: the last good text counts, be it of an earlier run.
    Nothing,
}

/// What changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Taken {
    /// Another text is the last good one.
    pub(super) text: bool,
    /// Entries were read, anew or for the first time.
    pub(super) entries: bool,
    /// [`Document::error`] is another.
    pub(super) error: bool,
}

/// The state of one annotation.
#[derive(Debug)]
pub(super) struct Document<T> {
    text: Option<String>,
    parsed: Option<Parsed<T>>,
    error: Option<Finding>,
}

impl<T> Document<T> {
    /// With the last good text of an earlier run, which is read when it is needed.
    pub(super) fn new(text: Option<String>) -> Self {
        Self { text, parsed: None, error: None }
    }

    pub(super) fn take(&mut self, given: Given, parse: impl Fn(&str) -> Result<Parsed<T>, Finding>) -> Taken {
        let mut taken = Taken::default();
        let mut error = None;
        match given {
            Given::Text(text) if self.parsed.is_some() && self.text.as_ref() == Some(&text) => {}
            Given::Text(text) => match parse(&text) {
                Ok(parsed) => {
                    taken = Taken { text: self.text.as_ref() != Some(&text), entries: true, error: false };
                    self.text = Some(text);
                    self.parsed = Some(parsed);
                }
                Err(finding) => error = Some(finding),
            },
            Given::Unusable(finding) => error = Some(finding),
            Given::Nothing => {}
        }
        if self.parsed.is_none() {
            let (parsed, finding) = read(self.text.as_deref(), parse);
            self.parsed = Some(parsed);
            error = error.or(finding);
            taken.entries = true;
        }
        taken.error = self.error != error;
        self.error = error;
        taken
    }

    /// Reads the last good text anew where it was read, since what it leaves open means something else now. False
    /// where it was not.
    pub(super) fn parse_again(&mut self, parse: impl Fn(&str) -> Result<Parsed<T>, Finding>) -> bool {
        let was_read = self.parsed.is_some();
        if was_read {
            let (parsed, finding) = read(self.text.as_deref(), parse);
            self.parsed = Some(parsed);
            self.error = self.error.take().or(finding);
        }
        was_read
    }

    /// The last good text.
    pub(super) fn text(&self) -> Option<&str> {
        self.text.as_deref()
    }

    /// What it says; `None` before the first [`Self::take`].
    pub(super) fn parsed(&self) -> Option<&Parsed<T>> {
        self.parsed.as_ref()
    }

    /// Why a newer text is not used.
    pub(super) fn error(&self) -> Option<&Finding> {
        self.error.as_ref()
    }
}

/// What a text says. One that was good once and is not to this version has no entries.
fn read<T>(
    text: Option<&str>,
    parse: impl Fn(&str) -> Result<Parsed<T>, Finding>,
) -> (Parsed<T>, Option<Finding>) {
    let empty = Parsed { entries: Vec::new(), refused: Vec::new(), warnings: Vec::new() };
    match text.map(parse) {
        None => (empty, None),
        Some(Ok(parsed)) => (parsed, None),
        Some(Err(finding)) => (empty, Some(finding)),
    }
}
