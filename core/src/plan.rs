//! What the controller writes: the exports of a pod, from the Services that select it.
