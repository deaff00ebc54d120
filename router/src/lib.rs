//! The router of a node: carries flows between pods and to other routers.

pub mod identity;
pub mod pki;
