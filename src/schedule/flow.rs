//! [`Flow`]: whose call it is, and of which class.

use super::key_hash;
use crate::rate::ByExtension;
use http::Request;
use std::{
    fmt,
    hash::{Hash, Hasher},
    sync::Arc,
};

/// A part of the name of a flow: a text or a number, for example a tenant's name or id.
///
/// Keys appear in [`Schedule::flows`](super::Schedule::flows) and in errors, so use no secrets, such as API keys.
#[derive(Clone, PartialEq, Eq)]
pub struct FlowKey {
    /// The hash of the key, made once: a schedule looks for the key in several maps for each call.
    hash: u64,
    key: Key,
}

#[derive(Clone, PartialEq, Eq, Hash)]
enum Key {
    Number(u64),
    Text(Arc<str>),
}

/// Whose call it is, and of which class: what a [`Schedule`](super::Schedule) has to know about a call.
///
/// A flow is named by one key for each level of the schedule, the outermost first. Calls with equal keys are calls of the
/// same flow. Missing keys count as the empty text, and keys beyond the last level are ignored, so a call that names no
/// flow belongs to the flow of all such calls.
///
/// An executor, and a queue that uses [`Flow::of`], find it in the extensions of the http request, where
/// [`Call::flow`](crate::Call::flow) and [`Call::class`](crate::Call::class) put it.
///
/// ```
/// use tower_outbound::schedule::Flow;
///
/// let mut request = http::Request::new("");
/// request.extensions_mut().insert(Flow::from(["gpt-5", "acme"]).class("batch"));
/// assert_eq!(Flow::of(&request).keys().len(), 2);
/// ```
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Flow {
    /// Shared, so that a flow is cloned for each of its calls without an allocation.
    keys: Arc<[FlowKey]>,
    class: Option<Arc<str>>,
}

/// Says whose call an http request is, for an executor with a schedule: see
/// [`ExecutorBuilder::schedule_by`](crate::ExecutorBuilder::schedule_by).
///
/// Every `Fn(&Request<B>) -> Flow` implements this trait. What the request itself names, as by
/// [`Call::flow`](crate::Call::flow) and [`Call::class`](crate::Call::class), goes before what the function returns: its
/// keys before the function's keys, and its class before the function's class. If it names both, the function is not
/// called. By default an executor uses [`ByExtension`], that is, [`Flow::of`].
pub trait RequestFlow<B> {
    /// Returns the flow and the class of the call with this request.
    fn flow(&self, req: &Request<B>) -> Flow;
}

// === impl FlowKey ===

impl From<Key> for FlowKey {
    fn from(key: Key) -> Self {
        let hash = key_hash::hash_of(&key);
        Self { hash, key }
    }
}

impl From<u64> for FlowKey {
    fn from(key: u64) -> Self {
        Key::Number(key).into()
    }
}

impl From<&str> for FlowKey {
    fn from(key: &str) -> Self {
        Key::Text(key.into()).into()
    }
}

impl From<String> for FlowKey {
    fn from(key: String) -> Self {
        Key::Text(key.into()).into()
    }
}

impl From<Arc<str>> for FlowKey {
    fn from(key: Arc<str>) -> Self {
        Key::Text(key).into()
    }
}

impl Hash for FlowKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

impl fmt::Display for FlowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.key {
            Key::Number(key) => key.fmt(f),
            Key::Text(key) => key.fmt(f),
        }
    }
}

impl fmt::Debug for FlowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.key {
            Key::Number(key) => key.fmt(f),
            Key::Text(key) => key.fmt(f),
        }
    }
}

// === impl Flow ===

impl Flow {
    /// Creates a flow from its keys, the outermost first.
    pub fn new<K: Into<FlowKey>>(keys: impl IntoIterator<Item = K>) -> Self {
        Self {
            keys: keys.into_iter().map(Into::into).collect(),
            class: None,
        }
    }

    /// Sets the class of the call. Default: the first class of the schedule. A class that the schedule does not know counts
    /// as its last one.
    #[must_use]
    pub fn class(mut self, class: impl Into<Arc<str>>) -> Self {
        self.class = Some(class.into());
        self
    }

    /// Returns the flow in the extensions of an http request, or the flow of all calls that name none.
    #[must_use]
    pub fn of<B>(request: &Request<B>) -> Self {
        request.extensions().get().cloned().unwrap_or_default()
    }

    /// Returns the keys, the outermost first.
    #[must_use]
    pub fn keys(&self) -> &[FlowKey] {
        &self.keys
    }

    /// Returns the keys as they are shared by the clones of the flow.
    pub(super) const fn shared_keys(&self) -> &Arc<[FlowKey]> {
        &self.keys
    }

    /// Returns the class of the call, if it was set.
    #[must_use]
    pub fn class_name(&self) -> Option<&str> {
        self.class.as_deref()
    }

    /// Replaces the keys, and keeps the class.
    pub(crate) fn with_keys(self, keys: Self) -> Self {
        Self {
            class: keys.class.or(self.class),
            keys: keys.keys,
        }
    }
}

// === impl RequestFlow ===

impl<B> RequestFlow<B> for ByExtension {
    fn flow(&self, req: &Request<B>) -> Flow {
        Flow::of(req)
    }
}

impl<B, F: Fn(&Request<B>) -> Flow> RequestFlow<B> for F {
    fn flow(&self, req: &Request<B>) -> Flow {
        let named = Flow::of(req);
        if !named.keys.is_empty() && named.class.is_some() {
            return named;
        }
        let found = self(req);
        Flow {
            keys: if named.keys.is_empty() { found.keys } else { named.keys },
            class: named.class.or(found.class),
        }
    }
}

impl From<&str> for Flow {
    fn from(key: &str) -> Self {
        Self::new([key])
    }
}

impl From<String> for Flow {
    fn from(key: String) -> Self {
        Self::new([key])
    }
}

impl From<u64> for Flow {
    fn from(key: u64) -> Self {
        Self::new([key])
    }
}

impl<K: Into<FlowKey>, const N: usize> From<[K; N]> for Flow {
    fn from(keys: [K; N]) -> Self {
        Self::new(keys)
    }
}

impl<K: Into<FlowKey>> From<Vec<K>> for Flow {
    fn from(keys: Vec<K>) -> Self {
        Self::new(keys)
    }
}

impl fmt::Debug for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flow")
            .field("keys", &self.keys)
            .field("class", &self.class)
            .finish()
    }
}
