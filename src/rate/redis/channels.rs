//! [`Channels`]: which limiters listen to which publish/subscribe channels of one connection.

use super::{
    link::{Established, Link},
    problem::StoreError,
};
use crate::rate::pause::Pauses;
use ::redis::Value;
use std::{
    collections::HashMap,
    str,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{runtime::Handle, sync, time::timeout};

/// How long to wait for the server's reply to `UNSUBSCRIBE`. Without it, the server sends a few messages for nothing.
const UNSUBSCRIBE_TIMEOUT: Duration = Duration::from_secs(5);

/// Called when the server announces that a member has changed a pause, with the number of microseconds until the pause
/// of each source ends.
pub(super) type OnPause = Arc<dyn Fn(Pauses<i64>) + Send + Sync>;

/// For each channel its listeners. Several limiters of one process may share a quota, and so a channel.
#[derive(Default)]
pub(super) struct Channels {
    by_name: Mutex<HashMap<Arc<str>, Channel>>,
    ids: AtomicU64,
}

#[derive(Default)]
struct Channel {
    listeners: Vec<(u64, OnPause)>,
    subscribed_on: SubscribedOn,
}

/// The generation of the connection on which the server has confirmed the subscription. It is locked while a command
/// about the channel is in flight, so that a subscription cannot overtake the end of an earlier one.
type SubscribedOn = Arc<sync::Mutex<Option<u64>>>;

/// One limiter that listens to a channel, until it is dropped.
pub(super) struct Subscription {
    link: Arc<Link>,
    channel: Arc<str>,
    id: u64,
    /// The generation of the connection on which the channel was last found to be subscribed; 0 before that.
    seen_on: AtomicU64,
}

// === impl Channels ===

impl Channels {
    /// Calls the listeners of the channel that a message names. Other messages are ignored.
    pub(super) fn on_message(&self, message: &[Value]) {
        let [Value::BulkString(channel), Value::BulkString(announced)] = message else {
            return;
        };
        let (Ok(channel), Some(pauses)) = (str::from_utf8(channel), read_pauses(announced)) else {
            return;
        };
        let listeners: Vec<OnPause> = match self.lock().get(channel) {
            Some(channel) => channel.listeners.iter().map(|(_, listener)| listener.clone()).collect(),
            None => Vec::new(),
        };
        for listener in listeners {
            listener(pauses);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Arc<str>, Channel>> {
        self.by_name.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the subscription of a channel that has no listeners any more.
    async fn unsubscribe(&self, channel: &str, subscribed_on: &SubscribedOn, established: Established) {
        let mut generation = subscribed_on.lock().await;
        let is_unused = |channels: &HashMap<Arc<str>, Channel>| {
            channels
                .get(channel)
                .is_some_and(|channel| channel.listeners.is_empty())
        };
        if *generation == Some(established.generation) && is_unused(&self.lock()) {
            *generation = None;
            let mut connection = established.connection;
            let _ = timeout(UNSUBSCRIBE_TIMEOUT, connection.unsubscribe(channel)).await;
        }
        let mut channels = self.lock();
        if is_unused(&channels) {
            channels.remove(channel);
        }
    }
}

/// Reads an announcement of the server: the microseconds until the user's and the provider's pause ends. Returns `None`
/// if it is not valid.
fn read_pauses(announced: &[u8]) -> Option<Pauses<i64>> {
    let (user, provider) = str::from_utf8(announced).ok()?.split_once(' ')?;
    Some(Pauses::new(user.parse().ok()?, provider.parse().ok()?))
}

// === impl Subscription ===

impl Subscription {
    pub(super) fn new(link: Arc<Link>, channel: &str, on_pause: OnPause) -> Self {
        let (channels, channel) = (link.channels().clone(), Arc::<str>::from(channel));
        let id = channels.ids.fetch_add(1, Ordering::Relaxed);
        let listener = (id, on_pause);
        channels
            .lock()
            .entry(channel.clone())
            .or_default()
            .listeners
            .push(listener);
        Self {
            link,
            channel,
            id,
            seen_on: AtomicU64::new(0),
        }
    }

    pub(super) const fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// Whether the connection is another one than that of the last subscription.
    pub(super) fn is_new(&self, established: &Established) -> bool {
        self.seen_on.load(Ordering::Relaxed) != established.generation
    }

    /// Subscribes to the channel, unless this connection is already subscribed to it.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the next call subscribes again, which changes nothing on the server.
    pub(super) async fn confirm(&self, established: &Established) -> Result<(), StoreError> {
        let subscribed_on = match self.link.channels().lock().get(&self.channel) {
            Some(channel) => channel.subscribed_on.clone(),
            None => unreachable!("a channel with a listener is not removed"),
        };
        let mut generation = subscribed_on.lock().await;
        if *generation != Some(established.generation) {
            *generation = None;
            established.connection.clone().subscribe(&*self.channel).await?;
            *generation = Some(established.generation);
        }
        self.seen_on.store(established.generation, Ordering::Relaxed);
        Ok(())
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let channels = self.link.channels().clone();
        let unused = {
            let mut by_name = channels.lock();
            let Some(channel) = by_name.get_mut(&self.channel) else {
                return;
            };
            channel.listeners.retain(|(id, _)| *id != self.id);
            channel.listeners.is_empty().then(|| channel.subscribed_on.clone())
        };
        let Some(subscribed_on) = unused else { return };
        // With the last limiter the connection is closed, and outside a runtime nothing can be sent: then the server's
        // messages are ignored until the connection is closed.
        let (Some(established), Ok(runtime)) = (self.link.established(), Handle::try_current()) else {
            return;
        };
        if Arc::strong_count(&self.link) > 1 {
            let channel = self.channel.clone();
            runtime.spawn(async move { channels.unsubscribe(&channel, &subscribed_on, established).await });
        }
    }
}
