//! Those who mean harm: a pod that has its router's socket, and a router of another cluster, or a stranger, that has an
//! address of one. Whatever they do hurts nobody but themselves, so the oracle is told of no change.
//!
//! What they do is drawn from the seed, and is over within [`LONGEST`].

use std::time::Duration;

mod peer;
mod pod;

/// No deed takes longer.
pub const LONGEST: Duration = Duration::from_secs(20);
/// How long one step of a deed may be held up.
const STEP: Duration = Duration::from_millis(500);
/// How long they stay at the most, and say nothing more.
const STAY: u64 = 5000;
