//! The wait before a socket is asked again that says that it is ready, and is not.
//!
//! Readiness that is never cleared is a pod's to bring about: a listener that was shut down and listens again stays
//! readable, and a socket with something in its error queue (SO_TIMESTAMPING, which what a listener accepts inherits;
//! socket(7)) is writable for epoll however full it is (EPOLLERR). Whoever asks at once each time never lets others run.

use std::time::Duration;

use tokio::task::yield_now;
use tokio::time::sleep;

/// A socket that says so often in a row that it is ready, and is not ...
const SPURIOUS: u32 = 32;
/// ... is asked again after this time each time ...
const PAUSE: Duration = Duration::from_millis(10);
/// ... and after twice of it the next, up to this: a pod may have thousands.
const MOST: Duration = Duration::from_millis(500);

/// Counts for one socket.
#[derive(Debug, Default)]
pub(super) struct Lull {
    in_a_row: u32,
    pause: Duration,
}

impl Lull {
    /// It was ready indeed.
    pub(super) fn end(&mut self) {
        *self = Self::default();
    }

    /// It was not. Resolves when it may be asked again: at once after the first time, which is what a wait looks like that
    /// came to its end. Others have had their turn after any further one.
    pub(super) async fn pause(&mut self) {
        self.in_a_row += 1;
        if self.in_a_row == 1 {
            return;
        }
        if self.in_a_row < SPURIOUS {
            return yield_now().await;
        }
        self.pause = (self.pause * 2).clamp(PAUSE, MOST);
        sleep(self.pause).await;
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_pauses_grow_and_end_with_the_lull() {
        let mut lull = Lull::default();
        let start = Instant::now();
        for _ in 1..SPURIOUS {
            lull.pause().await;
        }
        assert_eq!(start.elapsed(), Duration::ZERO);
        for _ in 0..100 {
            lull.pause().await;
        }
        let slept = start.elapsed();
        assert!((90 * MOST..100 * MOST).contains(&slept), "{slept:?}");
        lull.end();
        lull.pause().await;
        assert_eq!(start.elapsed(), slept);
    }
}
