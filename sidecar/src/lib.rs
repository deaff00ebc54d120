//! The sidecar: DNS, addresses and sockets of one pod.
