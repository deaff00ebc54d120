//! What the API says when it refuses, or does not answer, as a text that says what to do.

use std::error::Error;

use kube::core::Status;
use kube::runtime::watcher;

/// A call's error.
pub(crate) fn of_call(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => of_status(status),
        other => chain(other),
    }
}

/// A watch's error. `None`: the API has forgotten the history that we ask for, and the watch starts anew, as usual.
pub(crate) fn of_watch(error: &watcher::Error) -> Option<String> {
    match error {
        watcher::Error::WatchError(status) => (status.code != 410).then(|| of_status(status)),
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => Some(of_call(error)),
        other @ watcher::Error::NoResourceVersion => Some(other.to_string()),
    }
}

fn of_status(status: &Status) -> String {
    let hint = match status.code {
        401 => "; invalid credentials",
        403 => "; `servicekeel-controller --help` lists the RBAC rules it needs",
        _ => "",
    };
    let message = if status.message.is_empty() { &status.reason } else { &status.message };
    format!("the API answers {}: {message}{hint}", status.code)
}

/// The error and its causes. Many repeat the cause in their own text.
fn chain(error: &kube::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}
