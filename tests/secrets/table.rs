//! Puts a secret into every place of a call (header, URL parameter, error text, …), and ends calls in every way,
//! through two real clients. Then searches everything that the crate shows for every secret in every encoding.
//!
//! These are not searched, because the crate promises nothing about them: segments of a path, ids of calls, bodies that
//! are not recorded, what the clients themselves send to tracing, and the client's own error that `into_inner` returns.

use crate::tracing_output::TracingOutput;
use axum::{Router, extract::Request as Received, response::IntoResponse};
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use std::{
    collections::BTreeMap,
    error::Error as StdError,
    fmt::Debug,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{net::TcpListener, sync::Notify};
use tower::{BoxError, Service, ServiceExt, service_fn, util::BoxCloneSyncService};
use tower_outbound::{
    Call, Executor, RequestStatus, Shutdown,
    event::{self, Http, Value},
};
use tracing_subscriber::layer::SubscriberExt;

type Client = BoxCloneSyncService<Request<Bytes>, Response<Bytes>, BoxError>;

// === Secrets ===

/// Secrets that are put into calls: a different one for every place (such as a header or a URL parameter), so that a
/// leak identifies its place. Each place also gets a harmless word that has to be shown, which proves that the search
/// works.
#[derive(Clone, Default)]
pub(crate) struct Secrets(Arc<Mutex<BTreeMap<&'static str, usize>>>);

impl Secrets {
    fn number(&self, place: &'static str) -> usize {
        let mut places = self.0.lock().unwrap();
        let next = places.len();
        *places.entry(place).or_insert(next)
    }

    /// Returns the secret for this place of a call. It has characters that URLs encode.
    pub(crate) fn of(&self, place: &'static str) -> String {
        secret(self.number(place))
    }

    /// Returns the secret for this place of a call, percent-encoded for a URL.
    pub(crate) fn in_url(&self, place: &'static str) -> String {
        encoded(&self.of(place))
    }

    /// Returns the harmless word for this place of a call, which has to be shown.
    pub(crate) fn word(&self, place: &'static str) -> String {
        word(self.number(place))
    }

    fn all(&self) -> Vec<(&'static str, usize)> {
        self.0
            .lock()
            .unwrap()
            .iter()
            .map(|(place, number)| (*place, *number))
            .collect()
    }

    /// Searches the outlets (the texts that the crate shows, by name) for all secrets. Returns a message for each
    /// secret that is shown in whole or in part.
    pub(crate) fn leaks(&self, outlets: &BTreeMap<String, String>) -> Vec<String> {
        let mut leaks = Vec::new();
        for (place, number) in self.all() {
            for (outlet, text) in outlets {
                for form in forms(&secret(number)) {
                    if let Some(at) = text.find(&form) {
                        let before = text[..at].rsplit('\n').next().unwrap_or_default();
                        leaks.push(format!("{place} is shown by {outlet} as {form}: {before}{form}"));
                    }
                }
            }
        }
        leaks
    }

    /// Returns the places of a call whose harmless word appears in none of the outlets.
    pub(crate) fn missing(&self, outlets: &BTreeMap<String, String>) -> Vec<&'static str> {
        let places = self.all().into_iter();
        let is_missing = |number| !outlets.values().any(|text| text.contains(&word(number)));
        places
            .filter(|(_, number)| is_missing(*number))
            .map(|(place, _)| place)
            .collect()
    }
}

fn secret(number: usize) -> String {
    format!("S{number:02}t+Qz/9w=Xy~B{number:02}")
}

fn word(number: usize) -> String {
    format!("harmless{number:02}word")
}

/// Returns parts of the secret in each encoding. The search looks for parts, so that it also finds a secret that is cut
/// off.
fn forms(secret: &str) -> Vec<String> {
    let mut forms = vec![
        secret[..8].to_owned(),
        secret[8..].to_owned(),
        encoded(secret)[..8].to_owned(),
        encoded(secret)[..8].to_lowercase(),
        encoded(&encoded(secret))[..9].to_owned(),
        base64(secret)[..8].to_owned(),
        base64(&format!("user:{secret}"))[..12].to_owned(),
    ];
    forms.dedup();
    forms
}

pub(crate) fn encoded(text: &str) -> String {
    let letter = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(letter).collect()
}

pub(crate) fn base64(text: &str) -> String {
    let letters = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut encoded = String::new();
    for three in text.as_bytes().chunks(3) {
        let bits = three.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - three.len()));
        for index in 0..4 {
            let letter = char::from(letters[(bits >> (18 - 6 * index) & 63) as usize]);
            encoded.push(if index <= three.len() { letter } else { '=' });
        }
    }
    encoded
}

// === Places ===

/// A URL with a secret and a harmless word in every part that can hold them.
fn url(secrets: &Secrets, server: &str, path: &str) -> String {
    let s = |place| secrets.in_url(place);
    let w = |place| secrets.word(place);
    let nested = encoded(&format!(
        "https://user:{}@h/?sig=1",
        s("user info of a URL in a parameter")
    ));
    format!(
        "http://user:{}@{server}{path}?{}&key={}&{}&api_key={}&{}&X-Amz-Signature={}&{}&ToKeN={}&{}&api%5Fkey={}&{}\
         &%2561pi%255Fkey={}&{}&a=1;token={}&{}&next={nested}&{}&next={}&{}&data={}&{}",
        s("user info"),
        w("user info"),
        s("parameter"),
        w("parameter"),
        s("parameter with a border"),
        w("parameter with a border"),
        s("parameter of a signed URL"),
        w("parameter of a signed URL"),
        s("parameter in odd case"),
        w("parameter in odd case"),
        s("encoded parameter"),
        w("encoded parameter"),
        s("parameter encoded twice"),
        w("parameter encoded twice"),
        s("parameter after a semicolon"),
        w("parameter after a semicolon"),
        w("user info of a URL in a parameter"),
        encoded(&format!("/cb?token={}", s("parameter of a URL in a parameter"))),
        w("parameter of a URL in a parameter"),
        encoded(&format!(r#"{{"token":"{}"}}"#, secrets.of("JSON in a parameter"))),
        w("JSON in a parameter"),
    )
}

fn header_places(secrets: &Secrets, mut request: http::request::Builder) -> http::request::Builder {
    let basic = base64(&format!("user:{}", secrets.of("authorization: Basic")));
    let s = |place| secrets.of(place);
    for (name, value) in [
        ("authorization", format!("Basic {basic}")),
        ("Authorization", format!("bEARER {}", s("authorization: bEARER"))),
        ("proxy-authorization", format!("Bearer {}", s("proxy-authorization"))),
        ("X-Api-Key", s("x-api-key")),
        ("api-key", s("api-key")),
        ("apikey", s("apikey")),
        ("x-goog-api-key", s("x-goog-api-key")),
        ("ocp-apim-subscription-key", s("ocp-apim-subscription-key")),
        ("cookie", format!("a={}; b=1", s("cookie"))),
        ("x-amz-security-token", s("x-amz-security-token")),
        ("x-own", s("header named by the caller")),
        (
            "referer",
            format!(
                "https://user:{}@h/?sig={}",
                secrets.in_url("referer"),
                secrets.in_url("referer")
            ),
        ),
        ("x-note", format!("sent Bearer {}", s("header with a scheme in it"))),
        ("x-logfmt", format!("a=1 token=\"{}\"", s("header with a quoted field"))),
    ] {
        request = request.header(name, value);
    }
    for place in [
        "authorization: Basic",
        "authorization: bEARER",
        "proxy-authorization",
        "x-api-key",
        "api-key",
        "apikey",
        "x-goog-api-key",
        "ocp-apim-subscription-key",
        "cookie",
        "x-amz-security-token",
        "header named by the caller",
        "referer",
        "header with a scheme in it",
        "header with a quoted field",
        "header marked as sensitive",
    ] {
        request = request.header("x-words", secrets.word(place));
    }
    let mut marked = HeaderValue::try_from(s("header marked as sensitive")).unwrap();
    marked.set_sensitive(true);
    request.header("x-harmless", marked)
}

/// A call with a secret and a harmless word in every place.
pub(crate) fn call(secrets: &Secrets, server: &str, path: &str) -> Call<Bytes> {
    let s = |place| Value::from(secrets.of(place));
    let w = |place| Value::from(secrets.word(place));
    let request = header_places(secrets, Request::post(url(secrets, server, path)));
    Call::from(
        request
            .body(Bytes::from(secrets.of("body that is not recorded")))
            .unwrap(),
    )
    .payload(Value::from([
        ("api_key", s("field of the payload")),
        ("passwords", Value::from(vec![secrets.of("list in the payload")])),
        (
            "inner",
            Value::from([("client_secret", Value::from([("a", s("object in the payload"))]))]),
        ),
        (
            "json",
            format!(r#"{{\"token\":\"{}\"}}"#, secrets.of("JSON in JSON in the payload")).into(),
        ),
        (
            "words",
            Value::from(vec![
                w("field of the payload"),
                w("list in the payload"),
                w("object in the payload"),
                w("JSON in JSON in the payload"),
                w("body that is not recorded"),
            ]),
        ),
    ]))
    .metadata("password", s("metadata"))
    .metadata(
        "callback",
        format!(
            "https://user:{}@h/#access_token={}",
            secrets.in_url("URL in metadata"),
            secrets.in_url("URL in metadata")
        ),
    )
    .metadata(format!("https://user:{}@h/", secrets.in_url("name in metadata")), 1)
    .metadata(
        "words",
        Value::from(vec![w("metadata"), w("URL in metadata"), w("name in metadata")]),
    )
}

/// Returns the response of the test server with this status, with secrets in its headers and its body.
fn response(secrets: &Secrets, status: StatusCode) -> Response<String> {
    let at = |place| secrets.in_url(place);
    let builder = Response::builder().status(status);
    let builder = builder
        .header("set-cookie", format!("session={}; path=/", secrets.of("set-cookie")))
        .header("x-auth-token", secrets.of("header of the response"))
        // No server listens on port 1, so a client that follows the redirect fails to connect.
        .header(
            "location",
            format!(
                "http://user:{}@127.0.0.1:1/{}?token={}#access_token={}",
                at("user info of a location"),
                secrets.word("user info of a location"),
                at("parameter of a location"),
                at("fragment of a location")
            ),
        )
        .header(
            "link",
            format!("<https://user:{}@h/?sig={}>; rel=\"next\"", at("link"), at("link")),
        )
        .header(
            "x-json",
            format!(
                r#"{{"url":"https://user:{}@h/","api_key":["{}"]}}"#,
                at("URL in a header with JSON"),
                secrets.of("list in a header with JSON")
            ),
        );
    let places = [
        "set-cookie",
        "header of the response",
        "parameter of a location",
        "fragment of a location",
        "link",
        "URL in a header with JSON",
        "list in a header with JSON",
        "body of the response",
    ];
    let builder = places
        .into_iter()
        .fold(builder, |builder, place| builder.header("x-words", secrets.word(place)));
    builder
        .body(format!(
            r#"{{"access_token": "{}"}}"#,
            secrets.of("body of the response")
        ))
        .unwrap()
}

/// An error that shows its secret field in its `Debug` output, and whose source is the true cause.
#[derive(Debug)]
struct Revealing {
    text: String,
    #[allow(dead_code, reason = "its `Debug` output shows the field")]
    api_key: String,
    cause: BoxError,
}

impl std::fmt::Display for Revealing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl StdError for Revealing {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&*self.cause)
    }
}

fn revealing(secrets: &Secrets, url: &http::Uri, cause: BoxError) -> BoxError {
    let note = std::io::Error::other(format!(
        "Bearer  {} {}",
        secrets.of("source of an error"),
        secrets.word("source of an error")
    ));
    let cause = anyhow::Error::from_boxed(cause)
        .context(note)
        .context(format!("calling {url}"));
    Box::new(Revealing {
        text: format!(
            "could not send to ({url}): authorization=Bearer {}, {}, {}",
            secrets.of("text of an error"),
            secrets.word("text of an error"),
            secrets.word("field of an error")
        ),
        api_key: secrets.of("field of an error"),
        cause: cause.into(),
    })
}

// === Clients ===

async fn server(secrets: Secrets, reached: Arc<Notify>) -> String {
    let respond = move |request: Received| {
        let (secrets, reached) = (secrets.clone(), reached.clone());
        async move {
            // The server receives the request with its secrets: they are redacted only in what the crate shows.
            assert_eq!(request.headers()["x-api-key"], secrets.of("x-api-key"));
            assert!(request.uri().query().unwrap().contains(&secrets.in_url("parameter")));
            match request.uri().path() {
                "/hang" => {
                    reached.notify_one();
                    std::future::pending().await
                }
                path => response(&secrets, path[1..].parse().unwrap()).into_response(),
            }
        }
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, Router::new().fallback(respond)).await });
    address.to_string()
}

/// A client of reqwest, which follows redirects.
#[cfg(feature = "reqwest")]
fn reqwest_client() -> Client {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let service = service_fn(move |request: Request<Bytes>| {
        let client = client.clone();
        async move {
            let is_late = request.headers().contains_key("x-late");
            let mut request = reqwest::Request::try_from(request)?;
            if is_late {
                *request.timeout_mut() = Some(Duration::from_millis(50));
            }
            let response = client.execute(request).await?;
            let (status, headers) = (response.status(), response.headers().clone());
            let mut whole = Response::new(response.bytes().await?);
            (*whole.status_mut(), *whole.headers_mut()) = (status, headers);
            Ok::<_, BoxError>(whole)
        }
    });
    BoxCloneSyncService::new(service)
}

/// A client of hyper-util, which does not follow redirects.
fn hyper_client() -> Client {
    use hyper_util::{client::legacy::Client, rt::TokioExecutor};
    let client = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
    let service = service_fn(move |request: Request<Bytes>| {
        let mut client = client.clone();
        async move {
            let timeout = if request.headers().contains_key("x-late") {
                50
            } else {
                600_000
            };
            let response = client.call(request.map(Full::new));
            let response = tokio::time::timeout(Duration::from_millis(timeout), response).await??;
            let (parts, body) = response.into_parts();
            Ok::<_, BoxError>(Response::from_parts(parts, body.collect().await?.to_bytes()))
        }
    });
    BoxCloneSyncService::new(service)
}

/// A client that reveals its secrets: in the notes and metadata that it adds to events, in its errors, and in its
/// panics.
fn revealing_client(client: Client, secrets: Secrets) -> Client {
    let service = service_fn(move |request: Request<Bytes>| {
        let (client, secrets) = (client.clone(), secrets.clone());
        async move {
            let url = request.uri().clone();
            let event = event::current().unwrap();
            event.log(format!(
                "calling {url} with x-api-key=\"{}\" {}",
                secrets.of("log"),
                secrets.word("log")
            ));
            event.set_metadata("private_key", secrets.of("metadata on the way"));
            event.set_metadata("url", format!("{url}#{}", secrets.word("metadata on the way")));
            assert!(
                !request.headers().contains_key("x-panic"),
                "{}: {url} with token={}",
                secrets.word("panic"),
                secrets.of("panic")
            );
            let result = client.oneshot(request).await;
            result.map_err(|error| revealing(&secrets, &url, error))
        }
    });
    BoxCloneSyncService::new(service)
}

// === The table ===

/// Returns both the compact and the pretty `Debug` output.
fn debugs(value: &impl Debug) -> String {
    format!("{value:?}\n{value:#?}")
}

async fn run(name: &str, client: Client, outlets: &mut BTreeMap<String, String>, secrets: &Secrets) {
    let reached = Arc::new(Notify::new());
    let server = server(secrets.clone(), reached.clone()).await;
    let describe = Http::default()
        .redact("x-own".parse().unwrap())
        .fail_on(|status| status.is_server_error())
        .response_body(|body: &Bytes| String::from_utf8_lossy(body).into_owned().into());
    let executor = Executor::builder()
        .describe(describe)
        .build(revealing_client(client, secrets.clone()))
        .unwrap();
    executor.start().unwrap();
    let mut updates = executor.monitor().subscribe();
    let follows = name == "reqwest";

    use RequestStatus::{Cancelled, Completed, Failed};
    for (end, path, header, status) in [
        ("success", "/200", "x-none", Completed),
        ("a client's error", "/404", "x-none", Completed),
        ("a server's error", "/503", "x-none", Failed),
        ("a redirect", "/302", "x-none", if follows { Failed } else { Completed }),
        ("no connection", "/200", "x-none", Failed),
        ("a timeout", "/hang", "x-late", Failed),
        ("a panic", "/200", "x-panic", Failed),
        ("a cancel", "/hang", "x-none", Cancelled),
    ] {
        let mut collect = |outlet: &str, text: String| {
            outlets
                .entry(format!("{outlet}, {name}, {end}"))
                .or_default()
                .push_str(&text);
        };
        let server = if end == "no connection" { "127.0.0.1:1" } else { &server };
        let handle = executor
            .submit(call(secrets, server, path).header(header, "1"))
            .await
            .unwrap();
        collect("a handle", debugs(&handle));
        collect("an open event", debugs(&handle.event().snapshot()));
        if end == "a cancel" {
            reached.notified().await;
            handle.cancel();
        }
        let event = handle.event().clone();
        match handle.await {
            Ok(response) => assert_eq!(response.status().as_str(), &path[1..], "{end}"),
            Err(error) => {
                collect("an error's Display", format!("{error}\n{error:#}"));
                collect("an error's Debug", debugs(&error));
                let mut source = StdError::source(&error);
                while let Some(cause) = source {
                    collect("an error's sources", format!("{cause}\n{}", debugs(&cause)));
                    source = cause.source();
                }
                let error = anyhow::Error::from(error).context("around it");
                collect(
                    "an error inside anyhow's",
                    format!("{error}\n{error:#}\n{}", debugs(&error)),
                );
            }
        }
        assert_eq!(event.finished().await.status, status, "{end}");
        let record = event.finished().await;
        collect("an event's handle", debugs(&event));
        collect("an event", debugs(&record));
        #[cfg(feature = "serde")]
        collect("an event as JSON", serde_json::to_string_pretty(&record).unwrap());
        while let Some(update) = updates.recv().await {
            let update = update.unwrap();
            collect("an update", debugs(&update));
            collect("an update's event", debugs(&update.event.snapshot()));
            if update.status.is_terminal() {
                break;
            }
        }
    }
    let shown = format!(
        "{} {} {}",
        debugs(&executor),
        debugs(&executor.monitor()),
        debugs(&updates)
    );
    let report = executor.stop(Shutdown::Graceful).await;
    outlets.insert(format!("an executor and its report, {name}"), shown + &debugs(&report));
}

#[tokio::test]
async fn no_outlet_shows_a_secret_of_any_place() {
    let tracing_output = TracingOutput::default();
    let _guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(tracing_output.clone()));
    let secrets = Secrets::default();
    let mut outlets = BTreeMap::new();
    #[cfg(feature = "reqwest")]
    run("reqwest", reqwest_client(), &mut outlets, &secrets).await;
    run("hyper", hyper_client(), &mut outlets, &secrets).await;
    outlets.insert("tracing".to_owned(), tracing_output.text());

    let leaks = secrets.leaks(&outlets);
    assert!(leaks.is_empty(), "{} leaks: {leaks:#?}", leaks.len());
    // The search works: it finds the harmless word of every place, and no outlet is empty.
    assert_eq!(secrets.missing(&outlets), Vec::<&str>::new());
    assert!(outlets["tracing"].contains("span outbound_call"));
    assert!(outlets.values().all(|text| !text.is_empty()));
    let as_json = if cfg!(feature = "serde") { 8 } else { 0 };
    // reqwest follows the redirect and fails, so the errors of that call are additional outlets.
    let of_reqwest = if cfg!(feature = "reqwest") { 67 + as_json } else { 0 };
    assert_eq!(
        (secrets.all().len(), outlets.len()),
        (49, 1 + 63 + as_json + of_reqwest),
        "the table has another size"
    );
}

#[test]
fn the_search_finds_a_secret_in_every_encoding() {
    let secrets = Secrets::default();
    let secret = secrets.of("a place");
    for form in [
        secret.clone(),
        secret[..8].to_owned(),
        secret[8..].to_owned(),
        encoded(&secret),
        encoded(&secret).to_lowercase(),
        encoded(&encoded(&secret)),
        base64(&secret),
        base64(&format!("user:{secret}")),
    ] {
        let outlets = BTreeMap::from([("an outlet".to_owned(), format!("here: {form}"))]);
        assert!(!secrets.leaks(&outlets).is_empty(), "{form}");
    }
    assert_eq!(
        (base64("user:pass"), base64("a"), base64("ab")),
        ("dXNlcjpwYXNz".into(), "YQ==".into(), "YWI=".into())
    );
}
