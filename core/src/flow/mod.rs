//! Flows between two routers: frames, and the machine of one TCP flow on one connection.

pub mod frame;
pub mod machine;
