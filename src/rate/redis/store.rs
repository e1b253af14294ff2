//! [`Store`]: the Redis or Valkey server that holds the buckets. The only file that knows the client library.

use super::wire::{StoreReply, StoreRequest};
use crate::error::InvalidConfig;
use ::redis::{
    Client, Cmd, ErrorKind, IntoConnectionInfo, Pipeline, ProtocolVersion, PushInfo, PushKind, RedisError, RedisFuture,
    Script, ScriptInvocation, ServerErrorKind, Value,
    aio::{ConnectionLike, ConnectionManager, ConnectionManagerConfig},
    io::tcp::TcpSettings,
};
use std::{borrow::Cow, fmt, sync::Arc, time::Duration};

pub(super) const SCRIPT: &str = include_str!("reserve.lua");

/// The layout of what is stored. Another one gets other keys.
const VERSION: &str = "v1";

/// Is told of each pause that some member has begun.
pub(super) type OnPause = Arc<dyn Fn(Duration) + Send + Sync>;

/// A quota's place on a server.
pub(super) struct Store {
    origin: Origin,
    connection: Option<Box<dyn ConnectionLike + Send + Sync>>,
    script: Script,
    state: String,
    pauses: String,
    on_pause: OnPause,
    timeout: Duration,
}

/// Where connections come from.
#[derive(Clone)]
pub(super) enum Origin {
    Url(Box<Client>),
    Given(Arc<dyn Fn() -> Box<dyn ConnectionLike + Send + Sync> + Send + Sync>),
}

/// Why the store did not answer. Says nothing of where it is, or of passwords.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StoreError {
    pub(super) problem: Cow<'static, str>,
    /// Another connection may do better.
    reconnect: bool,
}

/// So that a connection of any type is one.
struct Connection<'a>(&'a mut (dyn ConnectionLike + Send + Sync));

impl Origin {
    pub(super) fn url(url: &str) -> Result<Self, InvalidConfig> {
        // What the library says may contain the URL, and that a password.
        let problem = |error: &RedisError| InvalidConfig::new("url", format!("is no Redis URL: {}", error.category()));
        let info = url.into_connection_info().map_err(|error| problem(&error))?;
        // Pauses are told by pushes, which came with the third protocol; so a connection that is cut is noticed at once.
        let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
        let info = info
            .set_tcp_settings(TcpSettings::default().set_nodelay(true))
            .set_redis_settings(settings);
        Client::open(info)
            .map(|client| Self::Url(Box::new(client)))
            .map_err(|error| problem(&error))
    }
}

impl Store {
    pub(super) fn new(origin: Origin, prefix: &str, quota: &str, timeout: Duration, on_pause: OnPause) -> Self {
        // In braces, so that a cluster keeps them together.
        let key = format!("{{{prefix}:{quota}}}:{VERSION}");
        Self {
            origin,
            connection: None,
            script: Script::new(SCRIPT),
            pauses: format!("{key}:pauses"),
            state: key,
            on_pause,
            timeout,
        }
    }

    /// One round trip; one more if the server does not know the script, or the limits.
    ///
    /// # Cancel safety
    ///
    /// Dropped, it drops the connection: what was said on it may yet be answered, or never.
    pub(super) async fn call(&mut self, ask: &StoreRequest) -> Result<StoreReply, StoreError> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.connect().await?,
        };
        let result = self.converse(&mut *connection, ask).await;
        if result.as_ref().err().is_none_or(|error| !error.reconnect) {
            self.connection = Some(connection);
        }
        result
    }

    async fn converse(
        &self,
        connection: &mut (dyn ConnectionLike + Send + Sync),
        ask: &StoreRequest,
    ) -> Result<StoreReply, StoreError> {
        let mut answer = Value::Nil;
        // In brief, if that will do.
        for is_brief in [true, false] {
            if is_brief && !ask.is_brief() {
                continue;
            }
            let call = invocation(&self.script, ask, is_brief, &self.state, &self.pauses);
            answer = call.invoke_async(&mut Connection(&mut *connection)).await?;
            if !wants_more(&answer) {
                break;
            }
        }
        read(answer).ok_or_else(|| StoreError::new("its answer makes no sense"))
    }

    async fn connect(&self) -> Result<Box<dyn ConnectionLike + Send + Sync>, StoreError> {
        let client = match &self.origin {
            Origin::Given(connection) => return Ok(connection()),
            Origin::Url(client) => Client::clone(client),
        };
        let on_pause = self.on_pause.clone();
        let pushed = move |push: PushInfo| {
            if push.kind == PushKind::Message {
                if let Some(Value::BulkString(micros)) = push.data.last() {
                    let micros = std::str::from_utf8(micros).ok().and_then(|text| text.parse().ok());
                    on_pause(Duration::from_micros(micros.unwrap_or(0)));
                }
            }
            Ok::<_, std::convert::Infallible>(())
        };
        let config = ConnectionManagerConfig::new()
            .set_connection_timeout(Some(Duration::from_secs(1)))
            .set_response_timeout(Some(self.timeout))
            // We try again, at our own pace.
            .set_number_of_retries(1)
            .set_min_delay(Duration::from_millis(20))
            .set_max_delay(Duration::from_secs(1))
            .set_push_sender(pushed)
            .set_automatic_resubscription();
        let mut manager = ConnectionManager::new_lazy_with_config(client, config)?;
        manager.subscribe(&self.pauses).await?;
        Ok(Box::new(manager))
    }
}

/// The call of the script that says this.
pub(super) fn invocation<'a>(
    script: &'a Script,
    ask: &StoreRequest,
    is_brief: bool,
    state: &str,
    pauses: &str,
) -> ScriptInvocation<'a> {
    let mut call = script.prepare_invoke();
    call.key(state);
    call.arg(ask.packed(is_brief)).arg(&ask.member).arg(pauses);
    if !is_brief {
        call.arg(ask.text());
    }
    call
}

/// It was too brief.
pub(super) fn wants_more(answer: &Value) -> bool {
    matches!(answer, Value::Array(values) if values.is_empty())
}

pub(super) fn read(answer: Value) -> Option<StoreReply> {
    const HEAD: usize = 13;
    let Value::Array(values) = answer else { return None };
    let number = |value: &Value| match value {
        Value::Int(number) => Some(*number),
        _ => None,
    };
    let head = values.get(..HEAD)?.iter().map(number).collect::<Option<Vec<_>>>()?;
    let goes = usize::try_from(head[12]).ok()?;
    let rest = values.get(HEAD..)?;
    let config = match rest.get(goes) {
        Some(Value::BulkString(text)) => Some(String::from_utf8(text.clone()).ok()?),
        None => None,
        Some(_) => return None,
    };
    Some(StoreReply {
        seq: head[0],
        birth: head[1],
        stamp: head[2],
        pause: head[3],
        members: u64::try_from(head[4]).ok()?,
        known: head[5] == 1,
        kept: head[6],
        lead: head[7],
        left: [u64::try_from(head[8]).ok(), u64::try_from(head[9]).ok()],
        again: head[10],
        now: head[11],
        goes: rest.get(..goes)?.iter().map(number).collect::<Option<_>>()?,
        config,
    })
}

impl fmt::Debug for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Url(_) => "Url",
            Self::Given(_) => "Given",
        })
    }
}

// === impl StoreError ===

impl StoreError {
    pub(super) fn new(problem: impl Into<Cow<'static, str>>) -> Self {
        Self {
            problem: problem.into(),
            reconnect: false,
        }
    }
}

impl From<RedisError> for StoreError {
    fn from(error: RedisError) -> Self {
        let problem: Cow<'static, str> = match error.kind() {
            _ if error.is_timeout() => "it did not answer in time".into(),
            _ if error.is_connection_refusal() => "it refused the connection".into(),
            ErrorKind::Io => "the connection broke".into(),
            // Such as OOM or READONLY. Only the code: the rest is the server's own words.
            _ => match error.code() {
                Some(code) => format!("it answered {code}").into(),
                None => error.category().to_owned().into(),
            },
        };
        Self {
            problem,
            // It is silent; or not what it was: a replica now, or it does not let us in any more.
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
