//! [`Link`]: the connection to one server, which all limiters of a runtime share that name this server.

use super::{channels::Channels, endpoint::Endpoint, problem::StoreError, script::SCRIPT};
use crate::error::StoreProblem;
use ::redis::{
    PushInfo, PushKind,
    aio::{ConnectionLike, MultiplexedConnection},
    cmd,
};
use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    runtime::{self, Handle},
    sync::watch,
    task::AbortHandle,
    time::{Instant, sleep, timeout},
};

/// How long a connection may take to be made and to load the script: enough for eight round trips to a server that is a
/// second away.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// After this time without a connection a second one is begun, and renewed in this interval, while the first goes on. A
/// server that is back after it was frozen or cut off is found by the second one, a server that is far by the first.
const RENEWAL: Duration = Duration::from_secs(1);

/// The links of this process, each with the runtime that its connection belongs to. A link is dropped with the last
/// limiter that uses it, and closes its connection.
static LINKS: Mutex<Vec<(runtime::Id, Weak<Link>)>> = Mutex::new(Vec::new());
/// The number of connections that were begun, from which each one gets a number of its own.
static GENERATIONS: AtomicU64 = AtomicU64::new(0);

pub(super) struct Link {
    endpoint: Endpoint,
    state: Mutex<LinkState>,
    channels: Arc<Channels>,
}

#[derive(Default)]
struct LinkState {
    established: Option<Established>,
    /// When the last reply arrived over the connection.
    replied_at: Option<Instant>,
    /// The task that makes a connection. It goes on when the requests that wait for it time out, so that what it has
    /// achieved is not begun anew.
    attempt: Option<Attempt>,
}

/// A connection on which the server has the script.
#[derive(Clone)]
pub(super) struct Established {
    pub(super) connection: MultiplexedConnection,
    /// Distinguishes this connection from all others of this process.
    pub(super) generation: u64,
    /// How long the round trip took by which the script was loaded.
    pub(super) round_trip: Duration,
}

/// Ends its task when it is dropped.
struct Attempt {
    outcome: watch::Receiver<Option<Result<Established, StoreError>>>,
    task: AbortHandle,
}

/// A request that was sent over a link. If it is dropped without a reply, because the reply did not come in time, and
/// nothing else has arrived either since it was sent, then the link gets a new connection.
pub(super) struct LinkRequest<'a> {
    link: &'a Link,
    generation: u64,
    sent_at: Instant,
    is_answered: bool,
}

// === impl Link ===

impl Link {
    /// Returns the link to `endpoint` of the current runtime, or makes one. It connects with its first request.
    ///
    /// # Panics
    ///
    /// Panics outside a Tokio runtime.
    pub(super) fn shared(endpoint: &Endpoint) -> Arc<Self> {
        let runtime = Handle::current().id();
        let mut links = LINKS.lock().unwrap_or_else(PoisonError::into_inner);
        links.retain(|(_, link)| link.strong_count() > 0);
        let of_runtime = links.iter().filter(|(of, _)| *of == runtime);
        let mut of_runtime = of_runtime.filter_map(|(_, link)| link.upgrade());
        if let Some(link) = of_runtime.find(|link| link.endpoint == *endpoint) {
            return link;
        }
        drop(of_runtime);
        let link = Arc::new(Self {
            endpoint: endpoint.clone(),
            state: Mutex::default(),
            channels: Arc::default(),
        });
        links.push((runtime, Arc::downgrade(&link)));
        link
    }

    pub(super) const fn channels(&self) -> &Arc<Channels> {
        &self.channels
    }

    /// Returns the connection if it is made.
    pub(super) fn established(&self) -> Option<Established> {
        self.lock().established.clone()
    }

    /// Returns the connection, or waits until it is made.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the connection is made all the same, for the next request.
    pub(super) async fn connection(self: &Arc<Self>) -> Result<Established, StoreError> {
        let mut outcome = {
            let mut state = self.lock();
            if let Some(established) = &state.established {
                return Ok(established.clone());
            }
            // A task that has ended without an outcome has panicked.
            if state.attempt.as_ref().is_none_or(|attempt| attempt.task.is_finished()) {
                state.attempt = Some(Attempt::begin(self));
            }
            let attempt = state.attempt.as_ref().expect("the attempt was begun above");
            attempt.outcome.clone()
        };
        match outcome.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(outcome)) => outcome.clone(),
            Ok(None) | Err(_) => Err(StoreError::new(StoreProblem::Client)),
        }
    }

    pub(super) fn begin_request(&self, established: &Established) -> LinkRequest<'_> {
        LinkRequest {
            link: self,
            generation: established.generation,
            sent_at: Instant::now(),
            is_answered: false,
        }
    }

    /// Drops the connection of this generation, if it is still in use, so that the next request makes a new one.
    fn discard(&self, generation: u64) {
        let discarded = self
            .lock()
            .established
            .take_if(|established| established.generation == generation);
        drop(discarded);
    }

    fn on_push(&self, generation: u64, push: &PushInfo) {
        match push.kind {
            PushKind::Message => self.channels.on_message(&push.data),
            // The client library reports the end of a connection in this way.
            PushKind::Disconnection => self.discard(generation),
            _ => {}
        }
    }

    fn lock(&self) -> MutexGuard<'_, LinkState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Attempt ===

impl Attempt {
    fn begin(link: &Arc<Link>) -> Self {
        let (sender, outcome) = watch::channel(None);
        let (weak, endpoint) = (Arc::downgrade(link), link.endpoint.clone());
        let task = tokio::spawn(async move {
            let outcome = establish(&weak, &endpoint).await;
            let Some(link) = weak.upgrade() else { return };
            {
                let mut state = link.lock();
                state.established = outcome.as_ref().ok().cloned();
                state.replied_at = None;
            }
            sender.send_replace(Some(outcome));
            // This drops the attempt that owns the task, so it comes last.
            let ended = link.lock().attempt.take();
            drop(ended);
        });
        Self {
            outcome,
            task: task.abort_handle(),
        }
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Makes a connection by two attempts at a time: see [`RENEWAL`].
async fn establish(link: &Weak<Link>, endpoint: &Endpoint) -> Result<Established, StoreError> {
    let first = async {
        let late = StoreError::new(StoreProblem::ConnectTimeout);
        timeout(CONNECT_TIMEOUT, handshake(link, endpoint))
            .await
            .unwrap_or(Err(late))
    };
    let renewed = async {
        sleep(RENEWAL).await;
        loop {
            if let Ok(outcome) = timeout(RENEWAL, handshake(link, endpoint)).await {
                return outcome;
            }
        }
    };
    tokio::select! {
        outcome = first => outcome,
        outcome = renewed => outcome,
    }
}

/// Connects, and loads the script into the server.
async fn handshake(link: &Weak<Link>, endpoint: &Endpoint) -> Result<Established, StoreError> {
    let generation = GENERATIONS.fetch_add(1, Ordering::Relaxed) + 1;
    let weak = link.clone();
    let on_push = move |push: PushInfo| {
        if let Some(link) = weak.upgrade() {
            link.on_push(generation, &push);
        }
    };
    let mut connection = endpoint.connect(on_push).await?;
    let sent_at = Instant::now();
    let mut load = cmd("SCRIPT");
    load.arg("LOAD").arg(&*SCRIPT);
    if let Err(error) = connection.req_packed_command(&load).await {
        let error = StoreError::from(error);
        // The server may have the script although this user may not load it. If it has not, the first request fails.
        if error.reconnect {
            return Err(error);
        }
    }
    Ok(Established {
        connection,
        generation,
        round_trip: sent_at.elapsed(),
    })
}

// === impl LinkRequest ===

impl LinkRequest<'_> {
    /// Records that a reply has arrived that is not the last one.
    pub(super) fn on_progress(&self) {
        self.link.lock().replied_at = Some(Instant::now());
    }

    /// Records that a reply has arrived, or an error.
    pub(super) fn end<T>(mut self, result: &Result<T, StoreError>) {
        self.is_answered = true;
        if result.as_ref().err().is_some_and(|error| error.reconnect) {
            self.link.discard(self.generation);
        } else {
            self.link.lock().replied_at = Some(Instant::now());
        }
    }
}

impl Drop for LinkRequest<'_> {
    fn drop(&mut self) {
        if !self.is_answered && self.link.lock().replied_at.is_none_or(|at| at < self.sent_at) {
            self.link.discard(self.generation);
        }
    }
}
