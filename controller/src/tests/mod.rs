//! The controller against an API server in memory. A real one comes with the tests of a real cluster.

mod api;
mod convert;
mod follow;
mod once;
mod watch;

use std::io;
use std::sync::{Arc, Mutex};

use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::{RunError, Settings, run};
use api::FakeApi;

const EXPORTS: &str = "\
services:
- name: web
  namespace: shop
  ports:
  - name: http
    port: 80
    protocol: TCP
    targetport: 8080
";

fn settings() -> Settings {
    Settings {
        server: "https://api.example".into(),
        namespace: None,
        once: false,
        dry_run: false,
        admin: None,
    }
}

/// What a dry run prints.
#[derive(Clone, Default)]
struct Printed(Arc<Mutex<Vec<u8>>>);

impl Printed {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl io::Write for Printed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A controller that runs until it is told to end.
struct Running {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), RunError>>,
    printed: Printed,
}

#[allow(clippy::disallowed_methods, reason = "the test ends it, and its runtime does where the test fails")]
fn start(api: &FakeApi, settings: Settings) -> Running {
    let (stop, stopped) = oneshot::channel();
    let printed = Printed::default();
    let shutdown = async move {
        let _ = stopped.await;
        "SIGTERM"
    };
    let task = tokio::spawn(run(settings, api.client(), Box::new(printed.clone()), shutdown));
    Running { stop, task, printed }
}

impl Running {
    async fn end(self) {
        self.stop.send(()).unwrap();
        self.task.await.unwrap().unwrap();
    }
}

async fn once(api: &FakeApi, settings: Settings) -> (Result<(), RunError>, String) {
    let running = start(api, Settings { once: true, ..settings });
    let result = running.task.await.unwrap();
    drop(running.stop);
    (result, running.printed.text())
}
