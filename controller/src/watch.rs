//! What the API tells of one kind of object, kept as far as it is read.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::future::ready;
use std::time::Duration;

use futures::{Stream, StreamExt};
use kube::api::ListParams;
use kube::runtime::WatchStreamExt;
use kube::runtime::reflector::{ObjectRef, Store, store, store::Writer};
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, DefaultBackoff, Event, watcher};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;

use crate::error;

/// Objects in a page of a list.
const PAGE: u32 = 500;

/// An object of the API that can be kept.
pub(crate) trait Object:
    Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + PartialEq + Send + Sync + 'static
{
}

impl<K> Object for K where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + PartialEq + Send + Sync + 'static
{
}

/// A copy of the API's objects of one kind, each trimmed to what is read of it.
#[derive(Debug)]
pub(crate) struct Mirror<K: Object> {
    store: Store<K>,
    writer: Writer<K>,
    trim: fn(&mut K) -> bool,
}

impl<K: Object> Mirror<K> {
    /// `trim` drops what is not read of an object; false drops the object.
    pub(crate) fn new(trim: fn(&mut K) -> bool) -> Self {
        let (store, writer) = store();
        Self { store, writer, trim }
    }

    /// What is kept.
    pub(crate) fn store(&self) -> Store<K> {
        self.store.clone()
    }

    /// Takes in an event. Returns the objects of which something that is read differs now, also those that are gone:
    /// the API tells of no deletion that came to pass while the watch was cut for long.
    pub(crate) fn handle(&mut self, event: Event<K>) -> Vec<ObjectRef<K>> {
        match event {
            Event::Apply(mut object) => {
                let event =
                    if (self.trim)(&mut object) { Event::Apply(object) } else { Event::Delete(object) };
                self.one(event)
            }
            Event::Delete(object) => self.one(Event::Delete(object)),
            Event::InitApply(mut object) => {
                if (self.trim)(&mut object) {
                    self.writer.apply_watcher_event(&Event::InitApply(object));
                }
                Vec::new()
            }
            Event::Init => {
                self.writer.apply_watcher_event(&Event::Init);
                Vec::new()
            }
            Event::InitDone => self.all(),
        }
    }

    fn one(&mut self, event: Event<K>) -> Vec<ObjectRef<K>> {
        let (Event::Apply(object) | Event::Delete(object)) = &event else { return Vec::new() };
        let key = ObjectRef::from_obj(object);
        let before = self.store.get(&key);
        self.writer.apply_watcher_event(&event);
        let after = self.store.get(&key);
        if same(before.as_deref(), after.as_deref()) { Vec::new() } else { vec![key] }
    }

    fn all(&mut self) -> Vec<ObjectRef<K>> {
        let by_name = |store: &Store<K>| -> BTreeMap<_, _> {
            let named = |object: std::sync::Arc<K>| {
                let key = ObjectRef::from_obj(&*object);
                ((key.namespace.clone(), key.name.clone()), (key, object))
            };
            store.state().into_iter().map(named).collect()
        };
        let mut before = by_name(&self.store);
        self.writer.apply_watcher_event(&Event::InitDone);
        let mut changed = Vec::new();
        for (name, (key, object)) in by_name(&self.store) {
            let before = before.remove(&name);
            if !same(before.as_ref().map(|(_, object)| &**object), Some(&object)) {
                changed.push(key);
            }
        }
        changed.extend(before.into_values().map(|(key, _)| key));
        changed
    }
}

/// Every change of an object has another version, also where nothing that is read changed.
fn same<K: Object>(before: Option<&K>, after: Option<&K>) -> bool {
    let (Some(before), Some(after)) = (before, after) else { return before.is_none() && after.is_none() };
    let mut after = after.clone();
    after.meta_mut().resource_version = before.meta().resource_version.clone();
    *before == after
}

/// kube's own pauses, 0.8 s growing to 30 s, which start anew only after 2 minutes without an error. By themselves they
/// do so at every event, and a list that fails begins with one, [`Event::Init`]: they would never grow.
#[derive(Default)]
struct Patience(DefaultBackoff);

impl Iterator for Patience {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        self.0.next()
    }
}

impl Backoff for Patience {
    fn reset(&mut self) {}
}

/// Follows all objects of `api`: a list, then a watch, again and again, with growing pauses while the API does not
/// answer. Yields what [`Mirror::handle`] says, where that is something. What goes wrong is logged once, with the API's
/// address `server`, until the API answers again.
pub(crate) fn follow<K: Object>(
    api: Api<K>,
    fields: Option<&str>,
    mut mirror: Mirror<K>,
    server: &str,
) -> impl Stream<Item = Vec<ObjectRef<K>>> + Send + use<K> {
    let config = watcher::Config { field_selector: fields.map(str::to_owned), ..watcher::Config::default() };
    let mut trouble: Option<String> = None;
    let server = server.to_owned();
    watcher(api, config).backoff(Patience::default()).filter_map(move |event| {
        ready(match event {
            Ok(event) => {
                if !matches!(event, Event::Init) && trouble.take().is_some() {
                    tracing::info!("watching {} again", K::plural(&()));
                }
                Some(mirror.handle(event)).filter(|changed| !changed.is_empty())
            }
            Err(error) => {
                let text = error::of_watch(&error);
                if text.is_some() && text != trouble {
                    let text = text.as_deref().unwrap_or_default();
                    tracing::warn!("cannot watch {} at {server}; retrying: {text}", K::plural(&()));
                }
                trouble = text.or(trouble.take());
                None
            }
        })
    })
}

/// Reads all objects of `api` into a new mirror's store, in pages.
///
/// # Errors
/// The first of a call.
pub(crate) async fn list<K: Object>(
    api: Api<K>,
    fields: Option<&str>,
    mut mirror: Mirror<K>,
) -> Result<Store<K>, kube::Error> {
    let mut params =
        ListParams { field_selector: fields.map(str::to_owned), limit: Some(PAGE), ..ListParams::default() };
    mirror.handle(Event::Init);
    loop {
        let page = api.list(&params).await?;
        for object in page.items {
            mirror.handle(Event::InitApply(object));
        }
        params.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
        if params.continue_token.is_none() {
            mirror.handle(Event::InitDone);
            return Ok(mirror.store);
        }
    }
}
