//! Keeps what happens again and again from filling the log.

use std::num::NonZeroU64;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Lines of one kind in the log: each is asked for before it is written.
#[derive(Debug)]
pub struct Throttle {
    burst: u32,
    interval: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    left: u32,
    since: Instant,
    suppressed: u64,
}

impl Throttle {
    /// So many lines at once, and one more for each interval; a millisecond is the shortest.
    pub fn new(burst: u32, interval: Duration) -> Self {
        let state = State { left: burst, since: Instant::now(), suppressed: 0 };
        Self { burst, interval, state: Mutex::new(state) }
    }

    /// Whether a line may be written, with how many were not since the last one: a field that is left out where all
    /// were.
    pub fn permit(&self) -> Option<Option<NonZeroU64>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let earned = ((now - state.since).as_millis() / self.interval.as_millis().max(1)) as u32;
        if earned > 0 {
            state.left = state.left.saturating_add(earned).min(self.burst);
            state.since = now;
        }
        if state.left == 0 {
            state.suppressed += 1;
            return None;
        }
        state.left -= 1;
        Some(NonZeroU64::new(std::mem::take(&mut state.suppressed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_burst_and_then_one_a_second() {
        let interval = Duration::from_secs(1);
        let throttle = Throttle::new(10, interval);
        let told = |n| (0..n).filter_map(|_| throttle.permit()).collect::<Vec<_>>();
        assert_eq!(told(25), [None; 10]);
        tokio::time::advance(interval).await;
        assert_eq!(told(3), [NonZeroU64::new(15)]);
        tokio::time::advance(interval * 100).await;
        assert_eq!(told(25), [&[NonZeroU64::new(2)][..], &[None; 9]].concat());
    }
}
