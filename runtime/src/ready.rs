//! stub
pub struct Readiness; impl Readiness { pub fn new() -> Self { Self } }
