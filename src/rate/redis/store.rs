//! [`Store`]: the Redis or Valkey server that holds the buckets. No other file uses the client library, but for the
//! types that [`Builder::connection`](super::Builder::connection) accepts.

use super::{
    driver::{Backend, ReplyFuture},
    script::{SCRIPT, VERSION},
    wire::{ReplyNumbers, StoreError, StoreReply, StoreRequest},
};
use crate::error::InvalidConfig;
use ::redis::{
    Client, Cmd, ErrorKind, IntoConnectionInfo, Pipeline, ProtocolVersion, PushInfo, PushKind, RedisError, RedisFuture,
    Script, ScriptInvocation, ServerErrorKind, Value,
    aio::{ConnectionLike, ConnectionManager, ConnectionManagerConfig},
    io::tcp::TcpSettings,
};
use std::{borrow::Cow, convert::Infallible, fmt, str, sync::Arc, time::Duration};

/// Called with the length of each pause that a member has begun.
pub(super) type OnPause = Arc<dyn Fn(Duration) + Send + Sync>;

/// One quota on one server.
pub(super) struct Store {
    origin: Origin,
    /// `None` before the first request and after a failure that needs another connection.
    connection: Option<Box<dyn ConnectionLike + Send + Sync>>,
    script: Script,
    /// The key of the stored state.
    state_key: String,
    /// The channel where pauses are announced.
    pause_channel: String,
    on_pause: OnPause,
    timeout: Duration,
}

/// Where connections come from.
#[derive(Clone)]
pub(super) enum Origin {
    Url(Box<Client>),
    /// A function that clones a connection of the user.
    Given(Arc<dyn Fn() -> Box<dyn ConnectionLike + Send + Sync> + Send + Sync>),
}

/// Makes a connection of any type usable where the client library wants a `Sized` one.
struct Connection<'a>(&'a mut (dyn ConnectionLike + Send + Sync));

// === impl Origin ===

impl Origin {
    pub(super) fn url(url: &str) -> Result<Self, InvalidConfig> {
        // Only the category: the library's text may contain the URL, and with it a password.
        let invalid = |error: &RedisError| {
            InvalidConfig::new(
                "url",
                format!("must be a Redis URL, such as redis://localhost: {}", error.category()),
            )
        };
        let info = url.into_connection_info().map_err(|error| invalid(&error))?;
        // RESP3, because pauses are announced by pushes on the same connection. It also reports a connection that was
        // cut at once, where RESP2 reports it with the next command.
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
        // A cluster places a key by what is in its braces.
        let state_key = format!("{{{prefix}:{quota}}}:{VERSION}");
        Self {
            origin,
            connection: None,
            script: Script::new(&SCRIPT),
            pause_channel: format!("{state_key}:pauses"),
            state_key,
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
        // First without the limits, if the store may already have them.
        for with_limits in [false, true] {
            if !with_limits && !request.can_omit_limits() {
                continue;
            }
            let call = invocation(&self.script, request, with_limits, &self.state_key, &self.pause_channel);
            reply = call.invoke_async(&mut Connection(&mut *connection)).await?;
            if !needs_limits(&reply) {
                break;
            }
        }
        read(reply).ok_or_else(|| StoreError::new("the reply is not valid"))
    }

    async fn connect(&self) -> Result<Box<dyn ConnectionLike + Send + Sync>, StoreError> {
        let client = match &self.origin {
            Origin::Given(connection) => return Ok(connection()),
            Origin::Url(client) => Client::clone(client),
        };
        let on_pause = self.on_pause.clone();
        let on_push = move |push: PushInfo| {
            if push.kind == PushKind::Message {
                if let Some(Value::BulkString(micros)) = push.data.last() {
                    let micros = str::from_utf8(micros).ok().and_then(|text| text.parse().ok());
                    on_pause(Duration::from_micros(micros.unwrap_or(0)));
                }
            }
            Ok::<_, Infallible>(())
        };
        let config = ConnectionManagerConfig::new()
            .set_connection_timeout(Some(Duration::from_secs(1)))
            .set_response_timeout(Some(self.timeout))
            // The circuit breaker decides when to try again.
            .set_number_of_retries(1)
            .set_min_delay(Duration::from_millis(20))
            .set_max_delay(Duration::from_secs(1))
            .set_push_sender(on_push)
            .set_automatic_resubscription();
        let mut manager = ConnectionManager::new_lazy_with_config(client, config)?;
        manager.subscribe(&self.pause_channel).await?;
        Ok(Box::new(manager))
    }
}

impl Backend for Store {
    /// One round trip; one more if the server does not have the script, or not the limits.
    ///
    /// # Cancel safety
    ///
    /// Drops the connection. The server may have served the request.
    fn call<'a>(&'a mut self, request: &'a StoreRequest) -> ReplyFuture<'a> {
        Box::pin(self.round_trip(request))
    }
}

/// The call of the script for `request`.
pub(super) fn invocation<'a>(
    script: &'a Script,
    request: &StoreRequest,
    with_limits: bool,
    state_key: &str,
    pause_channel: &str,
) -> ScriptInvocation<'a> {
    let mut call = script.prepare_invoke();
    call.key(state_key);
    call.arg(request.packed(with_limits))
        .arg(&request.member)
        .arg(pause_channel);
    if with_limits {
        call.arg(request.limits_text());
    }
    call
}

/// Whether the script asks for the same request with the limits.
pub(super) fn needs_limits(reply: &Value) -> bool {
    matches!(reply, Value::Array(values) if values.is_empty())
}

/// Reads what the script returned: the numbers, the delays, and the limits if the member does not have them.
pub(super) fn read(reply: Value) -> Option<StoreReply> {
    let Value::Array(values) = reply else { return None };
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
    if !is_complete {
        return None;
    }
    let reserved = usize::try_from(numbers.reserved).ok()?;
    let delays = (0..reserved).map(|_| number()).collect::<Option<_>>()?;
    let config = match values.next() {
        Some(Value::BulkString(text)) => Some(String::from_utf8(text).ok()?),
        None => None,
        Some(_) => return None,
    };
    StoreReply::new(&numbers, delays, config)
}

// === impl StoreError ===

impl From<RedisError> for StoreError {
    fn from(error: RedisError) -> Self {
        let problem: Cow<'static, str> = match error.kind() {
            _ if error.is_timeout() => "no reply within the timeout".into(),
            _ if error.is_connection_refusal() => "connection refused".into(),
            ErrorKind::Io => "connection lost".into(),
            // Only the code, such as OOM or READONLY: the rest of the text comes from the server.
            _ => match error.code() {
                Some(code) => format!("the server replied {code}").into(),
                None => error.category().to_owned().into(),
            },
        };
        Self {
            problem,
            // The server does not reply, has become a replica, or no longer accepts the credentials.
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
