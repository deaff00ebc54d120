//! Which of the known words a misspelt one was meant to be.

use crate::name::ClusterName;

/// The known word that is within two slips of the finger (an insertion, a deletion, a substitution, a swap of
/// neighbours), one in a word of three letters; upper and lower case are the same. The nearest, and of equals the
/// first.
///
/// ```
/// use servicekeel_core::near::nearest;
/// assert_eq!(nearest("serivces", ["services", "service"]), Some("services"));
/// assert_eq!(nearest("version", ["services"]), None);
/// ```
pub fn nearest<'k>(word: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    let word = word.to_lowercase();
    let near = known.into_iter().map(|known| (slips(&word, &known.to_lowercase()), known));
    let (distance, meant) = near.min_by_key(|(distance, _)| *distance)?;
    (distance <= bearable(meant)).then_some(meant)
}

/// The known cluster that was meant by a name: by [`nearest`], or since one is the other with more labels at its end.
pub fn nearest_cluster<'k>(
    named: &ClusterName,
    known: impl IntoIterator<Item = &'k ClusterName>,
) -> Option<&'k str> {
    let known: Vec<&str> = known.into_iter().map(ClusterName::as_str).collect();
    let named = named.as_str();
    let goes_on =
        |long: &str, short: &str| long.strip_prefix(short).is_some_and(|rest| rest.starts_with('.'));
    let longer = known.iter().copied().find(|known| goes_on(known, named) || goes_on(named, known));
    longer.or_else(|| nearest(named, known))
}

/// Whether one word is the other after [`nearest`]'s few slips, or begins or ends with it.
pub fn is_near(word: &str, other: &str) -> bool {
    let parted = |long: &str, short: &str| {
        short.len() >= 3
            && [
                long.strip_prefix(short).map(|rest| rest.starts_with('-')),
                long.strip_suffix(short).map(|rest| rest.ends_with('-')),
            ]
            .contains(&Some(true))
    };
    slips(word, other) <= bearable(other) || parted(word, other) || parted(other, word)
}

/// How many slips lead from one word to the other. Words that differ in length by more than any bound here are not
/// compared: the work is the product of the lengths, and a word may come from a stranger.
fn slips(word: &str, other: &str) -> usize {
    let apart = word.len().abs_diff(other.len());
    if apart > 2 { apart } else { strsim::damerau_levenshtein(word, other) }
}

fn bearable(word: &str) -> usize {
    2.min(word.len() / 2)
}
