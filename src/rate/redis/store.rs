//! [`Store`]: the connection to the Redis or Valkey server that holds the buckets. No other file uses the client
//! library, except for the connection types that
//! [`Builder::connection`](super::Builder::connection) accepts.

#[cfg(feature = "redis-tls")]
use super::tls;
use super::{
    driver::{Backend, ReplyFuture},
    script::{FIRST_KEY, SCRIPT, STATE_KEY, VERSION},
    wire::{ReplyNumbers, StoreError, StoreReply, StoreRequest},
};
use crate::{error::InvalidConfig, rate::pause::Pauses};
use ::redis::{
    Client, Cmd, ErrorKind, IntoConnectionInfo, Pipeline, ProtocolVersion, PushInfo, PushKind, RedisError, RedisFuture,
    Script, ScriptInvocation, ServerErrorKind, Value,
    aio::{ConnectionLike, ConnectionManager, ConnectionManagerConfig},
    io::tcp::TcpSettings,
};
use std::{borrow::Cow, convert::Infallible, fmt, str, sync::Arc, time::Duration};

/// Called when the server announces that a member has changed a pause, with the number of microseconds until the pause
/// of each source ends.
pub(super) type OnPause = Arc<dyn Fn(Pauses<i64>) + Send + Sync>;

/// One quota on one server, and the connection to that server.
pub(super) struct Store {
    origin: Origin,
    /// The connection to the server; `None` before the first request and after a failure that needs another connection.
    connection: Option<Box<dyn ConnectionLike + Send + Sync>>,
    script: Script,
    /// The key under which the server stores the state of the quota.
    state_key: String,
    /// The key under which the first release with shared limits kept the state.
    first_key: String,
    /// The publish/subscribe channel on which the script announces pauses to all members.
    pause_channel: String,
    on_pause: OnPause,
    timeout: Duration,
}

/// Where the connections to the server come from.
#[derive(Clone)]
pub(super) enum Origin {
    Url(Box<Client>),
    /// A function that clones the connection which the user has passed to the builder.
    Given(Arc<dyn Fn() -> Box<dyn ConnectionLike + Send + Sync> + Send + Sync>),
}

/// Wraps a `dyn ConnectionLike`, because some functions of the client library accept only `Sized` connections.
struct Connection<'a>(&'a mut (dyn ConnectionLike + Send + Sync));

// === impl Origin ===

impl Origin {
    pub(super) fn url(url: &str) -> Result<Self, InvalidConfig> {
        // The error names only the category of the client library's error, whose text may contain the URL, and with it
        // a password.
        let invalid = |error: &RedisError| {
            InvalidConfig::new(
                "url",
                format!("must be a Redis URL, such as redis://localhost: {}", error.category()),
            )
        };
        let info = url.into_connection_info().map_err(|error| invalid(&error))?;
        // The protocol is RESP3, because pauses arrive as pushes on the same connection. Also, with RESP3 the client
        // library reports at once that a connection is lost; with RESP2 only the next command would find out.
        let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
        let info = info
            .set_tcp_settings(TcpSettings::default().set_nodelay(true))
            .set_redis_settings(settings);
        Client::open(info)
            .map(|client| Self::Url(Box::new(client)))
            .map_err(|error| invalid(&error))
    }
}

impl fmt::Debug for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Url(_) => "Url",
            Self::Given(_) => "Given",
        })
    }
}

// === impl Store ===

impl Store {
    pub(super) fn new(origin: Origin, prefix: &str, quota: &str, timeout: Duration, on_pause: OnPause) -> Self {
        // A Redis cluster chooses the node of a key by the part in braces. All keys of a quota have the same part in
        // braces, so they are on one node.
        let key = |part| format!("{{{prefix}:{quota}}}:{part}");
        let state_key = key(STATE_KEY);
        Self {
            origin,
            connection: None,
            script: Script::new(&SCRIPT),
            pause_channel: format!("{state_key}:pauses"),
            state_key,
            first_key: key(FIRST_KEY),
            on_pause,
            timeout,
        }
    }

    async fn round_trip(&mut self, request: &StoreRequest) -> Result<StoreReply, StoreError> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.connect().await?,
        };
        let result = self.converse(&mut *connection, request).await;
        if result.as_ref().err().is_none_or(|error| !error.reconnect) {
            self.connection = Some(connection);
        }
        result
    }

    async fn converse(
        &self,
        connection: &mut (dyn ConnectionLike + Send + Sync),
        request: &StoreRequest,
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
            reply = call.invoke_async(&mut Connection(&mut *connection)).await?;
            if !needs_limits(&reply) {
                break;
            }
        }
        read(reply, request)
    }

    async fn connect(&self) -> Result<Box<dyn ConnectionLike + Send + Sync>, StoreError> {
        let client = match &self.origin {
            Origin::Given(connection) => return Ok(connection()),
            Origin::Url(client) => Client::clone(client),
        };
        let on_pause = self.on_pause.clone();
        let on_push = move |push: PushInfo| {
            if push.kind == PushKind::Message {
                if let Some(Value::BulkString(announced)) = push.data.last() {
                    if let Some(pauses) = read_pauses(announced) {
                        on_pause(pauses);
                    }
                }
            }
            Ok::<_, Infallible>(())
        };
        let config = ConnectionManagerConfig::new()
            .set_connection_timeout(Some(Duration::from_secs(1)))
            .set_response_timeout(Some(self.timeout))
            // The client library retries a failed connection only once, because the circuit breaker decides when to try
            // again.
            .set_number_of_retries(1)
            .set_min_delay(Duration::from_millis(20))
            .set_max_delay(Duration::from_secs(1))
            .set_push_sender(on_push)
            .set_automatic_resubscription();
        #[cfg(feature = "redis-tls")]
        tls::install_provider();
        let mut manager = ConnectionManager::new_lazy_with_config(client, config)?;
        manager.subscribe(&self.pause_channel).await?;
        Ok(Box::new(manager))
    }
}

impl Backend for Store {
    /// Makes one round trip, and another one if the server does not have the script, or does not have the limits.
    ///
    /// # Cancel safety
    ///
    /// Dropping the returned future drops the connection. The server may have served the request all the same.
    fn call<'a>(&'a mut self, request: &'a StoreRequest) -> ReplyFuture<'a> {
        Box::pin(self.round_trip(request))
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

/// Reads an announcement of the server: the microseconds until the user's and the provider's pause ends. Returns `None`
/// if it is not valid.
fn read_pauses(announced: &[u8]) -> Option<Pauses<i64>> {
    let (user, provider) = str::from_utf8(announced).ok()?.split_once(' ')?;
    Some(Pauses::new(user.parse().ok()?, provider.parse().ok()?))
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
            _ => read_numbers(values, request).ok_or_else(|| StoreError::new("the reply is not valid")),
        },
        _ => Err(StoreError::new("the reply is not valid")),
    }
}

/// Reads the numbers of a reply, what remains of each budget, the delays of the reservations, and the limits if the
/// member has another version of them. Returns `None` if the reply is not valid.
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
    let config = match values.next() {
        Some(Value::BulkString(text)) => Some(String::from_utf8(text).ok()?),
        None => None,
        Some(_) => return None,
    };
    StoreReply::new(request, &numbers, &remaining, delays, config)
}

// === impl StoreError ===

impl From<RedisError> for StoreError {
    fn from(error: RedisError) -> Self {
        let problem: Cow<'static, str> = match error.kind() {
            _ if error.is_timeout() => "no reply within the timeout".into(),
            _ if error.is_connection_refusal() => "connection refused".into(),
            ErrorKind::Io => "connection lost".into(),
            // The problem names only the code of the server's error, such as OOM or READONLY, because the rest of the
            // text may contain anything.
            _ => match error.code() {
                Some(code) => format!("the server replied {code}").into(),
                None => error.category().to_owned().into(),
            },
        };
        Self {
            is_other_version: false,
            problem,
            // After these errors the connection is dropped, and the next request makes a new one: the server does not
            // reply, has become a replica or no longer accepts the credentials, or the client library reports an error
            // of its own.
            reconnect: error.is_timeout()
                || matches!(
                    error.kind(),
                    ErrorKind::Server(ServerErrorKind::ReadOnly | ServerErrorKind::MasterDown)
                        | ErrorKind::AuthenticationFailed
                        | ErrorKind::Client
                ),
        }
    }
}

// === impl Connection ===

impl ConnectionLike for Connection<'_> {
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
