//! What is read of a manifest, with the place of every annotation; the rest is Kubernetes' own matter.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_yaml::Spanned;

use super::is_ours;

/// A document, an item of a List, or a template inside of one.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Object {
    pub(super) kind: Option<String>,
    pub(super) metadata: Option<Metadata>,
    pub(super) spec: Option<Spec>,
    /// Of a List.
    pub(super) items: Option<Documents>,
}

impl Object {
    /// Whether there is nothing in it to check. Most of a cluster's objects are so, and are not kept.
    fn is_bare(&self) -> bool {
        let of = |template: &Option<Box<Object>>| template.as_ref().is_none_or(|template| template.is_bare());
        self.metadata.as_ref().is_none_or(|metadata| {
            metadata.annotations.as_ref().is_none_or(|annotations| annotations.0.is_empty())
        }) && self.spec.as_ref().is_none_or(|spec| of(&spec.template) && of(&spec.job_template))
            && self.items.as_ref().is_none_or(|items| items.0.is_empty())
    }
}

/// Documents or the items of a List, those without anything to check left out.
#[derive(Debug, Default)]
pub(super) struct Documents(pub(super) Vec<Object>);

impl Extend<Option<Object>> for Documents {
    fn extend<I: IntoIterator<Item = Option<Object>>>(&mut self, documents: I) {
        self.0.extend(documents.into_iter().flatten().filter(|object| !object.is_bare()));
    }
}

impl<'de> Deserialize<'de> for Documents {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Items;
        impl<'de> Visitor<'de> for Items {
            type Value = Documents;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("items")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Documents, A::Error> {
                let mut items = Documents::default();
                while let Some(object) = list.next_element::<Option<Object>>()? {
                    items.extend([object]);
                }
                Ok(items)
            }
        }
        deserializer.deserialize_seq(Items)
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Metadata {
    pub(super) name: Option<String>,
    pub(super) namespace: Option<String>,
    pub(super) annotations: Option<Annotations>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Spec {
    /// Of a Deployment and its like.
    pub(super) template: Option<Box<Object>>,
    /// Of a CronJob.
    pub(super) job_template: Option<Box<Object>>,
}

/// Our keys, those that were meant to be ours, and their values, in the order of the text.
#[derive(Debug)]
pub(super) struct Annotations(pub(super) Vec<(Spanned<String>, Spanned<Value>)>);

/// The value of an annotation: Kubernetes takes texts only.
#[derive(Debug)]
pub(super) enum Value {
    /// Nothing, which counts as no annotation.
    Empty,
    Text(String),
    /// A number or a boolean, for want of quotes.
    Bare,
    /// Further YAML, for want of a `|`.
    Tree,
}

impl<'de> Deserialize<'de> for Annotations {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Annotations;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("annotations")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Annotations, A::Error> {
                let mut pairs = Vec::new();
                while let Some(key) = map.next_key::<Spanned<String>>()? {
                    if is_ours(&key.value) {
                        pairs.push((key, map.next_value()?));
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                Ok(Annotations(pairs))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AnyValue;
        impl<'de> Visitor<'de> for AnyValue {
            type Value = Value;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }
            fn visit_unit<E>(self) -> Result<Value, E> {
                Ok(Value::Empty)
            }
            fn visit_bool<E>(self, _: bool) -> Result<Value, E> {
                Ok(Value::Bare)
            }
            fn visit_u64<E>(self, _: u64) -> Result<Value, E> {
                Ok(Value::Bare)
            }
            fn visit_i64<E>(self, _: i64) -> Result<Value, E> {
                Ok(Value::Bare)
            }
            fn visit_f64<E>(self, _: f64) -> Result<Value, E> {
                Ok(Value::Bare)
            }
            fn visit_str<E>(self, text: &str) -> Result<Value, E> {
                Ok(Value::Text(text.to_owned()))
            }
            fn visit_string<E>(self, text: String) -> Result<Value, E> {
                Ok(Value::Text(text))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Value::Tree)
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Value::Tree)
            }
        }
        deserializer.deserialize_any(AnyValue)
    }
}
