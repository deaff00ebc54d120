//! Keeps what happens again and again from filling the log.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Lines of one kind in the log: each is asked for before it is written.
#[derive(Debug)]
pub struct Throttle {
    burst: u32,
    interval: Duration,
    whole: Option<Arc<Self>>,
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
        Self { burst, interval, whole: None, state: Mutex::new(state) }
    }

    /// The same, where a line is one of the `whole`'s too: of many that share one, each has its own, and those that come
    /// and go write no more than the whole has.
    #[must_use]
    pub fn under(mut self, whole: &Arc<Self>) -> Self {
        self.whole = Some(whole.clone());
        self
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
        if state.left == 0 || self.whole.as_ref().is_some_and(|whole| whole.permit().is_none()) {
            state.suppressed += 1;
            return None;
        }
        state.left -= 1;
        Some(NonZeroU64::new(std::mem::take(&mut state.suppressed)))
    }
}

/// The reasons that a [`ByReason`] tells apart at a time.
const MAX_REASONS: usize = 8;

/// Lines of one kind of which each has a reason: one for each reason in an interval, so that none hides another. Of more
/// than eight reasons within an interval the further ones are not told.
#[derive(Debug)]
pub struct ByReason {
    interval: Duration,
    whole: Arc<Throttle>,
    told: Mutex<Vec<Told>>,
}

#[derive(Debug)]
struct Told {
    /// The reason's hash.
    reason: u64,
    /// When it was told last, or could have been.
    last: Option<Instant>,
    suppressed: u64,
}

impl ByReason {
    /// One line in an interval for each reason; all are lines of the `whole`'s too.
    pub fn new(interval: Duration, whole: &Arc<Throttle>) -> Self {
        Self { interval, whole: whole.clone(), told: Mutex::default() }
    }

    /// Whether a line of this reason may be written, with how many of it were not since the last one.
    pub fn permit(&self, reason: &(impl Hash + ?Sized)) -> Option<Option<NonZeroU64>> {
        let mut hasher = DefaultHasher::new();
        reason.hash(&mut hasher);
        let reason = hasher.finish();
        let now = Instant::now();
        let is_over = |told: &Told| told.last.is_none_or(|last| now - last >= self.interval);
        let mut all = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let at = match all.iter().position(|told| told.reason == reason) {
            Some(at) => at,
            None => {
                if all.len() >= MAX_REASONS {
                    let oldest = (0..all.len()).min_by_key(|at| all[*at].last)?;
                    if !is_over(&all[oldest]) {
                        return None;
                    }
                    all.swap_remove(oldest);
                }
                all.push(Told { reason, last: None, suppressed: 0 });
                all.len() - 1
            }
        };
        let told = &mut all[at];
        if !is_over(told) || self.whole.permit().is_none() {
            told.suppressed += 1;
            return None;
        }
        told.last = Some(now);
        Some(NonZeroU64::new(std::mem::take(&mut told.suppressed)))
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

    #[tokio::test(start_paused = true)]
    async fn those_that_come_and_go_have_no_more_than_the_whole() {
        let interval = Duration::from_secs(1);
        let whole = Arc::new(Throttle::new(5, interval));
        let renewed = || Throttle::new(2, interval).under(&whole);
        let told = (0..100).filter(|_| renewed().permit().is_some()).count();
        assert_eq!(told, 5);
        // What the whole had no room for is told by whose it was.
        let one = renewed();
        assert_eq!((one.permit(), one.permit()), (None, None));
        tokio::time::advance(interval).await;
        assert_eq!(one.permit(), Some(NonZeroU64::new(2)));
    }

    #[tokio::test(start_paused = true)]
    async fn one_reason_does_not_hide_another_and_counts_its_own() {
        let interval = Duration::from_secs(10);
        let whole = Arc::new(Throttle::new(100, interval));
        let throttle = ByReason::new(interval, &whole);
        assert_eq!(throttle.permit("refused"), Some(None));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(throttle.permit("reset"), Some(None));
        for reason in ["refused", "reset", "refused"] {
            assert_eq!(throttle.permit(reason), None);
        }
        tokio::time::advance(interval).await;
        assert_eq!(throttle.permit("refused"), Some(NonZeroU64::new(2)));
        assert_eq!(throttle.permit("reset"), Some(NonZeroU64::new(1)));
        // Many reasons, in turns and for ever: what they take is bounded, and so is what they write.
        let told = (0..1000).filter(|reason| throttle.permit(reason).is_some()).count();
        assert_eq!((told, throttle.told.lock().unwrap().len()), (MAX_REASONS - 2, MAX_REASONS));
        tokio::time::advance(interval).await;
        assert_eq!(throttle.permit("another"), Some(None));
        let whole = Arc::new(Throttle::new(2, interval));
        let throttle = ByReason::new(interval, &whole);
        assert_eq!((0..1000).filter(|reason| throttle.permit(reason).is_some()).count(), 2);
    }
}
