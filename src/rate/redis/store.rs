//! [`Store`]: one quota on a Redis or Valkey server: runs the script, and reads its replies.

use super::{
    channels::{OnPause, Subscription},
    driver::{Backend, ReplyFuture},
    endpoint::Endpoint,
    link::{Link, LinkRequest},
    problem::StoreError,
    round_trips::RoundTrips,
    script::{FIRST_KEY, SCRIPT, STATE_KEY, VERSION},
    wire::{REFUSED_NUMBERS, RefusedCost, ReplyNumbers, StoreReply, StoreRequest},
};
use crate::error::StoreProblem;
use ::redis::{Cmd, Pipeline, RedisFuture, Script, ScriptInvocation, Value, aio::ConnectionLike};
use std::{fmt, sync::Arc};
use tokio::time::Instant;

/// One quota on one server, and the connection to that server.
pub(super) struct Store {
    connection: StoreConnection,
    script: Script,
    /// The key under which the server stores the state of the quota.
    state_key: String,
    /// The key under which the first release with shared limits kept the state.
    first_key: String,
    /// The publish/subscribe channel on which the script announces pauses to all members.
    pause_channel: String,
    round_trips: Arc<RoundTrips>,
}

enum StoreConnection {
    /// A connection that this process shares, on which the announcements of pauses arrive.
    Shared(Subscription),
    Given(GiveConnection),
}

/// Where the connections to the server come from.
#[derive(Clone)]
pub(super) enum Origin {
    Endpoint(Box<Endpoint>),
    Given(GiveConnection),
}

/// Clones the connection that the user has passed to the builder.
pub(super) type GiveConnection = Arc<dyn Fn() -> GivenConnection + Send + Sync>;

pub(super) type GivenConnection = Box<dyn ConnectionLike + Send + Sync>;

/// Wraps a `dyn ConnectionLike`, because some functions of the client library accept only `Sized` connections.
struct Connection(GivenConnection);

// === impl Store ===

impl Store {
    /// Creates the store of a quota. It connects with its first request.
    ///
    /// # Panics
    ///
    /// Panics outside a Tokio runtime.
    pub(super) fn new(
        origin: &Origin,
        prefix: &str,
        quota: &str,
        on_pause: OnPause,
        round_trips: Arc<RoundTrips>,
    ) -> Self {
        // A Redis cluster chooses the node of a key by the part in braces. All keys of a quota have the same part in
        // braces, so they are on one node.
        let key = |part| format!("{{{prefix}:{quota}}}:{part}");
        let state_key = key(STATE_KEY);
        let pause_channel = format!("{state_key}:pauses");
        let connection = match origin {
            Origin::Endpoint(endpoint) => {
                let link = Link::shared(endpoint);
                StoreConnection::Shared(Subscription::new(link, &pause_channel, on_pause))
            }
            Origin::Given(give) => StoreConnection::Given(give.clone()),
        };
        Self {
            connection,
            script: Script::new(&SCRIPT),
            state_key,
            first_key: key(FIRST_KEY),
            pause_channel,
            round_trips,
        }
    }

    async fn round_trip(&self, request: &StoreRequest) -> Result<StoreReply, StoreError> {
        let subscription = match &self.connection {
            StoreConnection::Shared(subscription) => subscription,
            StoreConnection::Given(give) => {
                let on_progress = || self.round_trips.on_progress(Instant::now());
                return self.run_script(&mut Connection(give()), request, on_progress).await;
            }
        };
        let link = subscription.link();
        let mut established = link.connection().await?;
        let in_flight = link.begin_request(&established);
        let result = async {
            if subscription.is_new(&established) {
                // This comes first: it sets the timeout of this request.
                self.round_trips.on_connected(established.round_trip, Instant::now());
                subscription.confirm(&established).await?;
                self.on_progress(&in_flight);
            }
            let on_progress = || self.on_progress(&in_flight);
            self.run_script(&mut established.connection, request, on_progress).await
        };
        let result = result.await;
        in_flight.end(&result);
        result
    }

    fn on_progress(&self, request: &LinkRequest<'_>) {
        request.on_progress();
        self.round_trips.on_progress(Instant::now());
    }

    async fn run_script(
        &self,
        connection: &mut impl ConnectionLike,
        request: &StoreRequest,
        on_progress: impl Fn(),
    ) -> Result<StoreReply, StoreError> {
        let mut reply = Value::Nil;
        // If the server is likely to have the same version of the limits, the request is first sent without them, which
        // is shorter. If the script then asks for the limits, the request is sent again with them.
        for with_limits in [false, true] {
            if !with_limits && !request.can_omit_limits() {
                continue;
            }
            let call = invocation(
                &self.script,
                request,
                with_limits,
                [&self.state_key, &self.first_key],
                &self.pause_channel,
            );
            reply = call.invoke_async(connection).await?;
            if !needs_limits(&reply) {
                break;
            }
            on_progress();
        }
        read(reply, request)
    }
}

impl Backend for Store {
    /// Makes one round trip, and another one if the server does not have the script, or does not have the limits.
    ///
    /// # Cancel safety
    ///
    /// The server may have served the request although the returned future is dropped. If nothing has arrived over the
    /// connection since the request was sent, the connection is not used any more.
    fn call<'a>(&'a self, request: &'a StoreRequest) -> ReplyFuture<'a> {
        Box::pin(self.round_trip(request))
    }

    fn timeout_problem(&self) -> StoreProblem {
        match &self.connection {
            StoreConnection::Shared(subscription) if subscription.link().established().is_none() => {
                StoreProblem::ConnectTimeout
            }
            _ => StoreProblem::Timeout,
        }
    }
}

impl fmt::Debug for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Endpoint(_) => "Endpoint",
            Self::Given(_) => "Given",
        })
    }
}

/// Builds the command that runs the script on the server with `request` as its arguments.
pub(super) fn invocation<'a>(
    script: &'a Script,
    request: &StoreRequest,
    with_limits: bool,
    keys: [&str; 2],
    pause_channel: &str,
) -> ScriptInvocation<'a> {
    let mut call = script.prepare_invoke();
    for key in keys {
        call.key(key);
    }
    call.arg(request.packed(with_limits))
        .arg(&request.member)
        .arg(pause_channel)
        .arg(request.config.names());
    if with_limits {
        call.arg(request.limits_text());
    }
    call
}

/// Whether the reply is empty. By an empty reply the script asks the member to send the same request again, with the
/// limits.
pub(super) fn needs_limits(reply: &Value) -> bool {
    matches!(reply, Value::Array(values) if values.is_empty())
}

/// Reads the reply of the script to `request`.
pub(super) fn read(reply: Value, request: &StoreRequest) -> Result<StoreReply, StoreError> {
    match reply {
        Value::Array(values) => match values[..] {
            [Value::Int(version)] => Err(StoreError::other_version(version)),
            _ => read_numbers(values, request).ok_or_else(|| StoreError::new(StoreProblem::InvalidReply)),
        },
        _ => Err(StoreError::new(StoreProblem::InvalidReply)),
    }
}

/// Reads the numbers of a reply, what remains of each budget, the delays of the reservations, the refused costs, what is
/// left of rates that refuse calls or count by the calendar, and the limits if the member has another version of them. Returns `None` if the reply is not valid.
fn read_numbers(values: Vec<Value>, request: &StoreRequest) -> Option<StoreReply> {
    let mut values = values.into_iter();
    let mut number = || match values.next() {
        Some(Value::Int(number)) => Some(number),
        _ => None,
    };
    let mut numbers = ReplyNumbers::default();
    let mut is_complete = true;
    numbers.for_each(|field| match number() {
        Some(number) => *field = number,
        None => is_complete = false,
    });
    if !is_complete || numbers.version != VERSION {
        return None;
    }
    let budgets = request.config.budgets().iter();
    let remaining: Vec<_> = budgets.map(|_| number()).collect::<Option<_>>()?;
    let reserved = usize::try_from(numbers.reserved).ok()?;
    let delays = (0..reserved).map(|_| number()).collect::<Option<_>>()?;
    let (mut extra, mut config) = (Vec::new(), None);
    for value in values {
        match value {
            Value::Int(number) if config.is_none() => extra.push(number),
            Value::BulkString(text) if config.is_none() => config = Some(String::from_utf8(text).ok()?),
            _ => return None,
        }
    }
    let (refused, left) = match extra.split_first() {
        Some((refused, extra)) => extra.split_at_checked(REFUSED_NUMBERS * usize::try_from(*refused).ok()?)?,
        None => Default::default(),
    };
    let refused = refused.chunks_exact(REFUSED_NUMBERS);
    let refused = refused.map(|numbers| RefusedCost::new(request, numbers));
    let refused = refused.collect::<Option<_>>()?;
    let left = left.iter().map(|left| u64::try_from(*left).ok());
    let left = left.collect::<Option<_>>()?;
    StoreReply::new(request, &numbers, &remaining, delays, refused, left, config)
}

// === impl Connection ===

impl ConnectionLike for Connection {
    fn req_packed_command<'a>(&'a mut self, cmd: &'a Cmd) -> RedisFuture<'a, Value> {
        self.0.req_packed_command(cmd)
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        cmd: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        self.0.req_packed_commands(cmd, offset, count)
    }

    fn get_db(&self) -> i64 {
        self.0.get_db()
    }
}
