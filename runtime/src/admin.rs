//! stub
use prometheus_client::registry::Registry;
pub struct Admin;
impl Admin { pub fn new(_: crate::ready::Readiness, _: Registry, _: impl Fn() -> String + Send + Sync + 'static) -> Self { Self } }
pub struct Serving;
impl Serving { pub async fn run(self) -> std::io::Result<()> { Ok(()) } }
pub async fn bind(_: std::net::SocketAddr, _: Admin) -> std::io::Result<Serving> { Ok(Serving) }
