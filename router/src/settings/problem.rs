//! What is wrong with a file, said so that an editor and a reader find the place.

use std::fmt;
use std::path::{Path, PathBuf};

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The file.
    pub file: PathBuf,
    /// Line and column, from 1, where it has a place in the file.
    pub place: Option<(u64, u64)>,
    /// What is wrong, and what to do.
    pub text: String,
}

impl Problem {
    /// Something wrong with a file as a whole.
    pub fn of_file(file: &Path, text: impl Into<String>) -> Self {
        Self { file: file.to_owned(), place: None, text: text.into() }
    }
}

impl fmt::Display for Problem {
    /// `FILE:LINE:COLUMN: text`, as compilers do.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file.display())?;
        if let Some((line, column)) = self.place {
            write!(f, "{line}:{column}:")?;
        }
        write!(f, " {}", self.text)
    }
}

/// All that is wrong, in the order of the text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            fmt::Display::fmt(problem, f)?;
        }
        Ok(())
    }
}

impl From<Problem> for Problems {
    fn from(problem: Problem) -> Self {
        Self(vec![problem])
    }
}
