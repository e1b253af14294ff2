//! [`Endpoint`]: where the store is, and how to connect to it: a URL, the sentinels that know the address, and TLS.

use super::problem::{ResolveFailed, StoreError, is_out_of_descriptors};
#[cfg(feature = "redis-tls")]
use super::tls::{self, TlsSettings};
use crate::error::{InvalidConfig, StoreProblem};
use ::redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, ProtocolVersion, PushInfo,
    RedisError, RedisFuture, Value,
    aio::{ConnectionLike, MultiplexedConnection},
    cmd,
    io::{AsyncDNSResolver, tcp::TcpSettings},
};
use std::{convert::Infallible, fmt, io, net::SocketAddr, time::Duration};
use tokio::{net::lookup_host, time::timeout};

/// How long one sentinel may take to connect and to reply, before the next one is asked.
const SENTINEL_TIMEOUT: Duration = Duration::from_secs(1);

/// A server and all that is needed to connect to it. Two endpoints are equal if one connection serves both.
#[derive(Clone)]
pub(super) struct Endpoint {
    settings: EndpointSettings,
    client: Client,
    sentinels: Vec<Client>,
}

/// What the user has set. `Debug` shows no URL, because URLs contain passwords.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct EndpointSettings {
    pub(super) url: String,
    /// The URLs of the sentinels. If there are any, the host of `url` is the name of the primary that they watch.
    pub(super) sentinels: Vec<String>,
    #[cfg(feature = "redis-tls")]
    pub(super) tls: TlsSettings,
}

/// Resolves names by the operating system, and marks the errors of this step.
struct Resolver;

impl EndpointSettings {
    pub(super) const fn new() -> Self {
        Self {
            url: String::new(),
            sentinels: Vec::new(),
            #[cfg(feature = "redis-tls")]
            tls: TlsSettings::new(),
        }
    }
}

impl fmt::Debug for EndpointSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("EndpointSettings");
        shown.field("sentinels", &self.sentinels.len());
        #[cfg(feature = "redis-tls")]
        shown.field("tls", &self.tls);
        shown.finish_non_exhaustive()
    }
}

impl Endpoint {
    /// Checks the settings, without connecting.
    pub(super) fn new(settings: EndpointSettings) -> Result<Self, InvalidConfig> {
        #[cfg(feature = "redis-tls")]
        settings.tls.check()?;
        let client = client("url", &settings.url, &settings)?;
        if !settings.sentinels.is_empty() && matches!(client.get_connection_info().addr(), ConnectionAddr::Unix(_)) {
            return Err(InvalidConfig::new(
                "url",
                "must have the name of the primary as its host, because sentinels were set",
            ));
        }
        let sentinels = settings.sentinels.iter().map(|url| client_of_sentinel(url, &settings));
        Ok(Self {
            sentinels: sentinels.collect::<Result<_, _>>()?,
            client,
            settings,
        })
    }

    /// Makes a connection. `on_push` receives what the server sends by itself, and the end of the connection.
    pub(super) async fn connect(
        &self,
        on_push: impl Fn(PushInfo) + Send + Sync + 'static,
    ) -> Result<MultiplexedConnection, StoreError> {
        #[cfg(feature = "redis-tls")]
        tls::install_provider();
        let config = config().set_push_sender(move |push| {
            on_push(push);
            Ok::<_, Infallible>(())
        });
        let client = if self.sentinels.is_empty() {
            self.client.clone()
        } else {
            self.client_of_primary().await?
        };
        Ok(client.get_multiplexed_async_connection_with_config(&config).await?)
    }

    /// Asks the sentinels for the address of the primary, one after the other, until one knows it.
    async fn client_of_primary(&self) -> Result<Client, StoreError> {
        let info = self.client.get_connection_info();
        let (ConnectionAddr::Tcp(name, _) | ConnectionAddr::TcpTls { host: name, .. }) = info.addr() else {
            return Err(StoreError::new(StoreProblem::UnknownPrimary));
        };
        let mut problem = StoreProblem::NoSentinel;
        for sentinel in &self.sentinels {
            match timeout(SENTINEL_TIMEOUT, ask(sentinel, name)).await {
                Ok(Ok(Some((host, port)))) => {
                    let addr = match info.addr().clone() {
                        ConnectionAddr::TcpTls {
                            insecure, tls_params, ..
                        } => ConnectionAddr::TcpTls {
                            host,
                            port,
                            insecure,
                            tls_params,
                        },
                        _ => ConnectionAddr::Tcp(host, port),
                    };
                    return Ok(Client::open(info.clone().set_addr(addr))?);
                }
                Ok(Ok(None)) => problem = StoreProblem::UnknownPrimary,
                // A sentinel that is down is not the problem if another one replies.
                Ok(Err(error)) if problem == StoreProblem::NoSentinel => {
                    let error = StoreError::from(error).problem;
                    if matches!(
                        error,
                        StoreProblem::Authentication | StoreProblem::Permission | StoreProblem::Tls(_)
                    ) {
                        problem = error;
                    }
                }
                Ok(Err(_)) | Err(_) => {}
            }
        }
        Err(StoreError::new(problem))
    }
}

impl PartialEq for Endpoint {
    fn eq(&self, other: &Self) -> bool {
        self.settings == other.settings
    }
}

/// Asks a sentinel for the address of the primary `name`. Returns `None` if the sentinel does not know the name.
async fn ask(sentinel: &Client, name: &str) -> Result<Option<(String, u16)>, RedisError> {
    let mut connection = sentinel.get_multiplexed_async_connection_with_config(&config()).await?;
    let mut command = cmd("SENTINEL");
    command.arg("GET-MASTER-ADDR-BY-NAME").arg(name);
    let reply = connection.req_packed_command(&command).await?.extract_error()?;
    let Value::Array(parts) = reply else { return Ok(None) };
    let [Value::BulkString(host), Value::BulkString(port)] = &*parts else {
        return Ok(None);
    };
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok();
    Ok(text(host).zip(text(port).and_then(|port| port.parse().ok())))
}

/// Returns a configuration without timeouts: the code that waits for a connection or a reply has its own.
fn config() -> AsyncConnectionConfig {
    AsyncConnectionConfig::new()
        .set_connection_timeout(None)
        .set_response_timeout(None)
        .set_dns_resolver(Resolver)
}

fn client_of_sentinel(url: &str, settings: &EndpointSettings) -> Result<Client, InvalidConfig> {
    client("sentinels", url, settings)
}

fn client(field: &'static str, url: &str, settings: &EndpointSettings) -> Result<Client, InvalidConfig> {
    // The error names only the category of the client library's error, whose text may contain the URL, and with it a
    // password.
    let invalid = |error: &RedisError| {
        InvalidConfig::new(
            field,
            format!("must be a Redis URL, such as redis://localhost: {}", error.category()),
        )
    };
    if !cfg!(feature = "redis-tls") && ["rediss://", "valkeys://"].iter().any(|scheme| url.starts_with(scheme)) {
        return Err(InvalidConfig::new(
            field,
            "asks for TLS, which needs the feature `redis-tls`",
        ));
    }
    let info = url.into_connection_info().map_err(|error| invalid(&error))?;
    // The protocol is RESP3, because pauses arrive as pushes on the same connection. Also, with RESP3 the client library
    // reports at once that a connection is lost; with RESP2 only the next command would find out.
    let redis = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
    let info = info
        .set_tcp_settings(TcpSettings::default().set_nodelay(true))
        .set_redis_settings(redis);
    open(field, info, settings)?.map_err(|error| invalid(&error))
}

#[cfg(feature = "redis-tls")]
fn open(
    field: &'static str,
    info: ConnectionInfo,
    settings: &EndpointSettings,
) -> Result<Result<Client, RedisError>, InvalidConfig> {
    if settings.tls.is_default() {
        return Ok(Client::open(info));
    }
    if matches!(info.addr(), ConnectionAddr::TcpTls { .. }) {
        return Ok(settings.tls.client(info));
    }
    if field == "url" {
        return Err(InvalidConfig::new(
            field,
            "must begin with rediss://, because TLS certificates were set",
        ));
    }
    // Sentinels may be reached without TLS although the server is not.
    Ok(Client::open(info))
}

#[cfg(not(feature = "redis-tls"))]
fn open(
    _: &'static str,
    info: ConnectionInfo,
    _: &EndpointSettings,
) -> Result<Result<Client, RedisError>, InvalidConfig> {
    Ok(Client::open(info))
}

// === impl Resolver ===

impl AsyncDNSResolver for Resolver {
    fn resolve<'a, 'b: 'a>(
        &'a self,
        host: &'b str,
        port: u16,
    ) -> RedisFuture<'a, Box<dyn Iterator<Item = SocketAddr> + Send + 'a>> {
        Box::pin(async move {
            match lookup_host((host, port)).await {
                Ok(addresses) => {
                    let addresses: Vec<_> = addresses.collect();
                    if addresses.is_empty() {
                        return Err(io::Error::other(ResolveFailed).into());
                    }
                    Ok(Box::new(addresses.into_iter()) as Box<dyn Iterator<Item = SocketAddr> + Send>)
                }
                Err(error) if is_out_of_descriptors(&error) => Err(error.into()),
                Err(_) => Err(io::Error::other(ResolveFailed).into()),
            }
        })
    }
}
