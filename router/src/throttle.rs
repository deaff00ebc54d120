//! Keeps a stranger who is refused again and again from filling the log.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// So many lines at once ...
const BURST: u32 = 10;
/// ... and one more for each of these.
const INTERVAL: Duration = Duration::from_secs(1);

/// Lines of one kind in the log.
#[derive(Debug)]
pub(crate) struct Throttle(Mutex<State>);

#[derive(Debug)]
struct State {
    left: u32,
    since: Instant,
    untold: u64,
}

impl Default for Throttle {
    fn default() -> Self {
        Self(Mutex::new(State { left: BURST, since: Instant::now(), untold: 0 }))
    }
}

impl Throttle {
    /// Whether a line may be written, and how many were not since the last one.
    pub(crate) fn permit(&self) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let earned = ((now - state.since).as_millis() / INTERVAL.as_millis()) as u32;
        if earned > 0 {
            state.left = state.left.saturating_add(earned).min(BURST);
            state.since = now;
        }
        if state.left == 0 {
            state.untold += 1;
            return None;
        }
        state.left -= 1;
        Some(std::mem::take(&mut state.untold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_burst_and_then_one_a_second() {
        let throttle = Throttle::default();
        let told = |n| (0..n).filter_map(|_| throttle.permit()).collect::<Vec<_>>();
        assert_eq!(told(25), [0; 10]);
        tokio::time::advance(INTERVAL).await;
        assert_eq!(told(3), [15]);
        tokio::time::advance(INTERVAL * 100).await;
        assert_eq!(told(25), [&[2][..], &[0; 9]].concat());
    }
}
