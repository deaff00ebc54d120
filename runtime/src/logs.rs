//! Logs: to stderr, as text or as JSON, filtered by the environment.

use std::env::{self, VarError};
use std::fmt;
use std::io::{self, IsTerminal, Write};

use servicekeel_core::reason::{is_plain, shown_lines};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::debug_fn;

/// What is logged: a level (`off`, `error`, `warn`, `info`, `debug`, `trace`) or directives of tracing's `EnvFilter`,
/// such as `info,servicekeel_router=debug`. Default: [`DEFAULT`].
pub const FILTER: &str = "SERVICEKEEL_LOG";
/// What is logged where nobody says: the changes of state that the project's own programs tell, and the warnings of the
/// libraries below them. Of kube's client nothing: what a call came to is for its caller to tell.
pub const DEFAULT: &str = "warn,servicekeel=info,kube_client=off";
/// How it is written: `text` (default) or `json`, an object a line.
pub const FORMAT: &str = "SERVICEKEEL_LOG_FORMAT";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Text,
    Json,
}

/// Starts logging by [`FILTER`] and [`FORMAT`]. Text has colours on a terminal only, and none where `NO_COLOR` is set.
///
/// # Errors
/// A variable with a value that means nothing, or logging that has started before. The text says what to write.
pub fn init() -> Result<(), String> {
    let filter = filter(variable(FILTER)?.as_deref())?;
    let format = format(variable(FORMAT)?.as_deref())?;
    // A line that can't be written is lost. To tell that on stderr too, which is the default, ends in a panic where
    // stderr is what can't be written: a full disk, or a pipe that nobody reads any more.
    let logs =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).log_internal_errors(false);
    match format {
        Format::Text => {
            let plain = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
            let fields = debug_fn(|to, field, value| field_text(to, field.name(), value)).delimited(" ");
            logs.with_ansi(io::stderr().is_terminal() && !plain).fmt_fields(fields).try_init()
        }
        Format::Json => logs.json().flatten_event(true).try_init(),
    }
    .map_err(|error| format!("cannot start logging: {error}"))
}

/// A field as `key=value`, the value in quotes where it has a space, a quote or an equals sign in it, or nothing, as
/// logfmt has it: whatever type the value has, the same text looks the same. What a terminal would obey is escaped.
fn field_text(to: &mut impl fmt::Write, name: &str, value: &dyn fmt::Debug) -> fmt::Result {
    let shown = format!("{value:?}");
    if name == "message" {
        return to.write_str(&shown_lines(&shown));
    }
    // What was a string is in quotes already.
    let inner = shown.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
    let bare = |text: &str| {
        let quoted = |c: char| c.is_whitespace() || "\"=\\".contains(c);
        !text.is_empty() && !text.contains(quoted) && is_plain(text)
    };
    match inner {
        Some(inner) if bare(inner) => write!(to, "{name}={inner}"),
        Some(_) => write!(to, "{name}={shown}"),
        None if bare(&shown) => write!(to, "{name}={shown}"),
        None => write!(to, "{name}={shown:?}"),
    }
}

/// Tells why a program ends, by its name: in the log, a line each, or where errors are not logged on stderr as it is, so
/// that no filter leaves the exit code alone to say it.
#[macro_export]
macro_rules! fatal {
    ($program:literal, $text:expr) => {
        $crate::logs::tell_end(
            $program,
            $text,
            $crate::logs::tracing::enabled!(target: $program, $crate::logs::tracing::Level::ERROR),
            |line| $crate::logs::tracing::error!(target: $program, "{line}"),
        )
    };
}

#[doc(hidden)]
pub use tracing;

/// What [`fatal!`](crate::fatal) does; `log` logs a line under the program's name.
#[doc(hidden)]
pub fn tell_end(program: &str, text: &str, is_logged: bool, log: impl Fn(&str)) {
    if is_logged {
        text.lines().for_each(log);
    } else {
        // The last resort is gone where stderr is.
        let _ = writeln!(io::stderr(), "{program}: {text}");
    }
}

fn variable(name: &str) -> Result<Option<String>, String> {
    match env::var(name) {
        Ok(value) => Ok(Some(value)),
        Err(VarError::NotPresent) => Ok(None),
        Err(VarError::NotUnicode(value)) => Err(format!("{name}: {} is not UTF-8", value.display())),
    }
}

fn filter(value: Option<&str>) -> Result<EnvFilter, String> {
    let value = match value.map(str::trim) {
        None | Some("") => DEFAULT,
        Some(value) => value,
    };
    for directive in value.split(',').map(str::trim) {
        // The parser takes a word that is no level for a target, and then `warning` silences the program.
        let bare = !directive.contains(['=', '[', ':', '_']);
        if bare && directive.parse::<LevelFilter>().is_err() {
            return Err(format!(
                "{FILTER}: {directive:?} is not a level; use off, error, warn, info, debug or trace, or target=level"
            ));
        }
    }
    EnvFilter::builder().parse(value).map_err(|error| {
        format!("{FILTER}: {value:?}: {error}; use a level (info) or target=level, separated by commas")
    })
}

fn format(value: Option<&str>) -> Result<Format, String> {
    match value.map(str::trim) {
        None | Some("" | "text") => Ok(Format::Text),
        Some("json") => Ok(Format::Json),
        Some(other) => Err(format!("{FORMAT}: {other:?} is not a format; use text or json")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_terminal_obeys_what_a_line_repeats() {
        for text in ["\u{1b}[31mred", "a\u{202e}b", "bell\u{7}", "two\nlines", "\u{9b}2J"] {
            for of_display in [true, false] {
                let mut line = String::new();
                let value = format_args!("{text}");
                let shown: &dyn fmt::Debug = if of_display { &value } else { &text };
                field_text(&mut line, "reason", shown).unwrap();
                assert!(is_plain(&line) && line.starts_with("reason=\""), "{line:?}");
                field_text(&mut line, "message", shown).unwrap();
                assert!(is_plain(&line.replace('\n', "")), "{line:?}");
            }
        }
    }

    #[test]
    fn takes_levels_and_directives() {
        for (value, read) in [
            (None, "servicekeel=info,kube_client=off,warn"),
            (Some(""), "servicekeel=info,kube_client=off,warn"),
            (Some(" debug "), "debug"),
            (Some("OFF"), "off"),
            (Some("info,servicekeel_router=trace"), "servicekeel_router=trace,info"),
            (Some("servicekeel_sidecar"), "servicekeel_sidecar=trace"),
        ] {
            assert_eq!(filter(value).unwrap().to_string(), read, "{value:?}");
        }
    }

    #[test]
    fn refuses_what_would_silence_the_program() {
        for value in ["warning", "verbose,servicekeel_router=info", "servicekeel_router=loud"] {
            let error = filter(Some(value)).unwrap_err();
            assert!(
                error.starts_with("SERVICEKEEL_LOG: ") && error.contains("target=level"),
                "{value}: {error}"
            );
        }
    }

    #[test]
    fn the_same_text_looks_the_same_whatever_its_type() {
        let shown = |name: &str, value: &dyn fmt::Debug| {
            let mut text = String::new();
            field_text(&mut text, name, value).unwrap();
            text
        };
        let display = |text: &'static str| tracing::field::display(text);
        for (text, expected) in [
            ("b.local/n", "peer=b.local/n"),
            ("no answer within 2 s", "peer=\"no answer within 2 s\""),
            ("", "peer=\"\""),
            ("a=b", "peer=\"a=b\""),
            ("say \"no\"", "peer=\"say \\\"no\\\"\""),
            ("a\nb", "peer=\"a\\nb\""),
        ] {
            assert_eq!(shown("peer", &text), expected);
            assert_eq!(shown("peer", &display(text)), expected);
        }
        assert_eq!(shown("suppressed", &3), "suppressed=3");
        assert_eq!(shown("message", &format_args!("a word")), "a word");
    }

    #[test]
    fn takes_two_formats() {
        assert_eq!(format(None), Ok(Format::Text));
        assert_eq!(format(Some("text")), Ok(Format::Text));
        assert_eq!(format(Some("json")), Ok(Format::Json));
        assert_eq!(
            format(Some("yaml")).unwrap_err(),
            "SERVICEKEEL_LOG_FORMAT: \"yaml\" is not a format; use text or json"
        );
    }
}
