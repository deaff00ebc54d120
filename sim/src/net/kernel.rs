//! The kernel of one simulated node: what it counts, and where its Unix sockets are.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use servicekeel_runtime::net::{NamespaceCookie, PeerCredentials};

use super::handoff::Waiting;

/// Bytes that a direction of a connection inside the node holds.
pub(super) const BUFFERS: std::ops::RangeInclusive<usize> = 2 << 10..=256 << 10;

/// A node's kernel. Clones are the same one.
#[derive(Clone)]
pub struct Kernel(Arc<Inner>);

struct Inner {
    buffer: usize,
    pids: AtomicI32,
    namespaces: AtomicU64,
    silent: AtomicBool,
    open: Mutex<BTreeMap<&'static str, usize>>,
    paths: Mutex<BTreeMap<PathBuf, Weak<Waiting>>>,
}

impl Kernel {
    /// A kernel whose connections hold `buffer` bytes each way, 2 KiB to 256 KiB.
    pub fn new(buffer: usize) -> Self {
        Self(Arc::new(Inner {
            buffer: buffer.clamp(*BUFFERS.start(), *BUFFERS.end()),
            pids: AtomicI32::new(1),
            namespaces: AtomicU64::new(1),
            silent: AtomicBool::new(false),
            open: Mutex::default(),
            paths: Mutex::default(),
        }))
    }

    /// How many sockets of each kind are open, those that are being handed over included. Empty: nothing has leaked.
    pub fn open(&self) -> BTreeMap<&'static str, usize> {
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn count(&self, what: &'static str) -> Counted {
        let mut open = self.0.open.lock().unwrap_or_else(PoisonError::into_inner);
        *open.entry(what).or_default() += 1;
        drop(open);
        Counted { kernel: self.clone(), what }
    }

    pub(super) fn buffer(&self) -> usize {
        self.0.buffer
    }

    pub(super) fn process(&self, uid: u32) -> Process {
        let pid = self.0.pids.fetch_add(1, Ordering::Relaxed);
        Process { credentials: PeerCredentials { pid, uid, network: None }, killed: Arc::default() }
    }

    /// The number of a new network namespace.
    pub(super) fn namespace(&self) -> NamespaceCookie {
        NamespaceCookie(self.0.namespaces.fetch_add(1, Ordering::Relaxed))
    }

    /// From now on it does not say of which namespace a socket is, as before Linux 5.14.
    pub(crate) fn age(&self) {
        self.0.silent.store(true, Ordering::Relaxed);
    }

    pub(super) fn says_namespaces(&self) -> bool {
        !self.0.silent.load(Ordering::Relaxed)
    }

    fn paths(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Weak<Waiting>>> {
        self.0.paths.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who listens at a path.
    pub(super) fn listening_at(&self, path: &Path) -> Option<Arc<Waiting>> {
        self.paths().get(path).and_then(Weak::upgrade)
    }

    pub(super) fn listen_at(&self, path: &Path, listener: &Arc<Waiting>) {
        self.paths().insert(path.to_owned(), Arc::downgrade(listener));
    }
}

/// A process. Clones are the same one.
#[derive(Clone)]
pub(crate) struct Process {
    pub(super) credentials: PeerCredentials,
    killed: Arc<AtomicBool>,
}

impl Process {
    /// From now on its destructors do nothing: the kernel closes what it held.
    pub(crate) fn kill(&self) {
        self.killed.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_killed(&self) -> bool {
        self.killed.load(Ordering::Relaxed)
    }
}

/// Counts a socket while it is open.
pub(super) struct Counted {
    kernel: Kernel,
    what: &'static str,
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut open = self.kernel.0.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(n) = open.get_mut(self.what) {
            *n -= 1;
            if *n == 0 {
                open.remove(self.what);
            }
        }
    }
}
