//! The rules of one `allow` in a message: no more are read than one may have.

use minicbor::data::Type;
use minicbor::{Decoder, decode};

use crate::name::AllowRule;

/// The most rules of one `allow` in a message.
pub const MAX_RULES: usize = 1024;

/// Where a message has no `allow` at all.
pub(crate) fn none() -> Option<Option<Vec<AllowRule>>> {
    Some(None)
}

/// Reads rules, and no more than there may be: what they take in memory is many times what they take in a message.
pub(crate) fn read<C>(d: &mut Decoder<'_>, ctx: &mut C) -> Result<Option<Vec<AllowRule>>, decode::Error> {
    if d.datatype()? == Type::Null {
        d.null()?;
        return Ok(None);
    }
    let mut rules = Vec::new();
    for rule in d.array_iter_with(ctx)? {
        if rules.len() == MAX_RULES {
            return Err(decode::Error::message("more than 1024 rules in one allow"));
        }
        rules.push(rule?);
    }
    rules.shrink_to_fit();
    Ok(Some(rules))
}
