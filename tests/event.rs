//! What `EventLayer` records in the event of a call, tested through the public interface of the crate.

mod support;

use http::{Request, Response, StatusCode};
use std::{collections::BTreeMap, error::Error, fmt, time::Duration};
use support::{ms, pass, settle};
use tokio::time::sleep;
use tokio_test::{assert_pending, assert_ready, assert_ready_ok, task};
use tower::{BoxError, Layer, Service, ServiceBuilder, ServiceExt, retry::Policy, service_fn};
use tower_outbound::{
    ApiTokens, EventLayer, Limits, NetworkRequestEvent, QueueLayer, Rate, RateLimitLayer, RateLimiter, RequestId,
    RequestStatus,
    event::{self, Describe, Events, Http, Metadata, Nothing, Payload, RequestDetails, ResponseDetails, Value},
};

fn get(url: &str) -> Request<()> {
    Request::get(url).body(()).unwrap()
}

/// Waits for the first event that the subscription reports, and returns its record after the call has ended.
async fn first_record(events: &mut event::Subscription) -> NetworkRequestEvent {
    events.recv().await.unwrap().unwrap().event.finished().await
}

#[tokio::test(start_paused = true)]
async fn each_of_the_three_layers_records_a_whole_call() {
    for layer in [EventLayer::queued(), EventLayer::processing(), EventLayer::calling()] {
        let events = Events::new();
        let mut updates = events.subscribe();
        let client = service_fn(async |_: Request<()>| {
            sleep(ms(70)).await;
            Ok::<_, BoxError>(Response::builder().status(201).header("x-a", "b").body(()).unwrap())
        });
        let mut service = ServiceBuilder::new().layer(layer.report_to(&events)).service(client);
        let request = Request::post("http://localhost:8080/path?page=2")
            .header("accept", "*/*")
            .body(())
            .unwrap();
        service.ready().await.unwrap().call(request).await.unwrap();

        let event = first_record(&mut updates).await;
        assert_eq!(event.status, RequestStatus::Completed);
        assert_eq!(event.method.as_deref(), Some("POST"));
        assert_eq!(event.endpoint_url.as_deref(), Some("http://localhost:8080/path?page=2"));
        assert_eq!(event.headers["accept"], "*/*");
        assert_eq!(event.response_status_code, Some(201));
        assert_eq!(event.response_headers["x-a"], "b");
        assert_eq!((event.payload.clone(), event.response_body.clone()), (None, None));
        assert_eq!(event.time_total(), Some(ms(70)));
        assert_eq!(event.error_type, None);
        assert_eq!((events.totals().opened, events.totals().completed), (1, 1));
    }
}

#[tokio::test(start_paused = true)]
async fn a_panic_is_a_failure_wherever_its_event_was_opened() {
    for layer in [EventLayer::processing(), EventLayer::calling()] {
        let events = Events::new();
        let mut updates = events.subscribe();
        let client = service_fn(async |_: Request<()>| -> Result<Response<()>, BoxError> {
            sleep(ms(70)).await;
            panic!("it fell over")
        });
        // The queue catches the panic, and drops the call's future when the thread no longer panics. The event must
        // nevertheless end as failed, not as cancelled.
        let queue = ServiceBuilder::new()
            .layer(QueueLayer::new(1).unwrap())
            .layer(layer.report_to(&events))
            .service(client);
        queue.oneshot(get("http://localhost/")).await.unwrap_err();
        let event = first_record(&mut updates).await;
        assert_eq!(event.status, RequestStatus::Failed);
        assert_eq!(event.error_type.as_deref(), Some("Panicked"));
        assert_eq!(event.error_message.as_deref(), Some("the call panicked: it fell over"));
    }
}

#[tokio::test(start_paused = true)]
async fn extensions_of_an_http_request_set_its_tokens_id_metadata_and_payload() {
    let events = Events::new();
    let mut updates = events.subscribe();
    let client = service_fn(async |_: Request<()>| Ok::<_, BoxError>(Response::new(())));
    let service = EventLayer::calling().report_to(&events).layer(client);
    let request = Request::get("http://localhost/")
        .extension(ApiTokens(12))
        .extension(RequestId::from("my-own"))
        .extension(Metadata([("task".to_owned(), Value::from(7))].into()))
        .extension(Payload(Value::from("the body")))
        .body(())
        .unwrap();
    service.oneshot(request).await.unwrap();
    let event = first_record(&mut updates).await;
    assert_eq!(event.request_id.to_string(), "my-own");
    assert_eq!(event.api_tokens, 12);
    assert_eq!(event.metadata["task"], Value::from(7));
    assert_eq!(event.payload, Some(Value::from("the body")));
}

#[derive(Debug)]
struct Outer(std::io::Error);

impl fmt::Display for Outer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("could not send to http://u:p@h/?token=s3")
    }
}

impl Error for Outer {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&self.0)
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_is_recorded_with_its_type_message_and_sources() {
    let events = Events::new();
    let mut updates = events.subscribe();
    let client = service_fn(async |_: Request<()>| Err::<Response<()>, _>(Outer(std::io::Error::other("refused"))));
    // The two outer event layers get a boxed error. The event layer around the client gets the client's own error type,
    // and can record its name.
    let service = ServiceBuilder::new()
        .layer(EventLayer::queued().report_to(&events))
        .layer(EventLayer::processing())
        .layer(EventLayer::calling())
        .service(client);
    service.oneshot(get("http://h/")).await.unwrap_err();
    let event = first_record(&mut updates).await;
    assert_eq!(event.status, RequestStatus::Failed);
    assert!(
        event.error_type.as_deref().unwrap().ends_with("::Outer"),
        "{:?}",
        event.error_type
    );
    assert_eq!(
        event.error_message.as_deref(),
        Some("could not send to http://h/?token=[redacted]")
    );
    assert_eq!(event.error_details.as_deref(), Some("refused"));
    assert_eq!(event.response_status_code, None);
    assert_eq!(event.attempts[0].error_message, event.error_message);
}

#[tokio::test(start_paused = true)]
async fn the_stages_of_one_call_write_one_event_whose_status_only_moves_forward() {
    let events = Events::new();
    let mut updates = events.subscribe();
    let client = service_fn(async |_: Request<()>| {
        sleep(ms(30)).await;
        Ok::<_, BoxError>(Response::new(()))
    });
    let mut service = ServiceBuilder::new()
        .layer(EventLayer::queued().report_to(&events))
        .layer(QueueLayer::new(10).unwrap())
        .layer(EventLayer::processing())
        .map_future(|call| async {
            sleep(ms(20)).await;
            call.await
        })
        .layer(EventLayer::calling())
        .service(client);
    // The call is in the queue for 10 ms: the worker task of the queue runs only when the test awaits, and `advance`
    // moves the clock before that.
    let call = service.ready().await.unwrap().call(get("http://h/"));
    tokio::time::advance(ms(10)).await;
    call.await.unwrap();

    let mut seen = Vec::new();
    loop {
        let update = updates.recv().await.unwrap().unwrap();
        seen.push(update.status);
        if update.status.is_terminal() {
            break;
        }
    }
    use RequestStatus::{Calling, Completed, Pending, Processing, Queued};
    assert_eq!(seen, [Pending, Queued, Processing, Calling, Completed]);
    assert_eq!(events.totals().opened, 1);
}

#[tokio::test(start_paused = true)]
async fn the_duration_of_each_stage_is_exact() {
    let events = Events::new();
    let mut updates = events.subscribe();
    let client = service_fn(async |_: Request<()>| {
        sleep(ms(30)).await;
        Ok::<_, BoxError>(Response::new(()))
    });
    let rate = Rate::per_second(50).burst(1).initial(0);
    let limiter = RateLimiter::new(Limits::new().requests(rate)).unwrap();
    let mut service = ServiceBuilder::new()
        .layer(EventLayer::queued().report_to(&events))
        .layer(QueueLayer::new(10).unwrap())
        .layer(tower_outbound::ConcurrencyLimitLayer::new(1).unwrap())
        .layer(EventLayer::processing())
        .layer(RateLimitLayer::new(limiter))
        .layer(EventLayer::calling())
        .service(client);
    let first = service.ready().await.unwrap().call(get("http://h/"));
    let second = service.ready().await.unwrap().call(get("http://h/"));
    let (first_event, second_event) = (first.event().clone(), second.event().clone());
    first.await.unwrap();
    second.await.unwrap();
    for (event, in_queue, waiting) in [(first_event, ms(0), ms(20)), (second_event, ms(50), ms(0))] {
        let event = event.finished().await;
        assert_eq!(event.time_pending(), Some(ms(0)));
        assert_eq!(event.time_in_queue(), Some(in_queue));
        assert_eq!(event.time_waiting(), Some(waiting));
        assert_eq!(event.time_calling(), Some(ms(30)));
        assert_eq!(event.time_total(), Some(in_queue + waiting + ms(30)));
        assert_eq!(
            event.completed_at.unwrap().duration_since(event.created_at).ok(),
            event.time_total()
        );
    }
    drop(updates.recv().await);
}

#[tokio::test(start_paused = true)]
async fn the_outcome_is_recorded_even_if_the_caller_never_polls() {
    let client = service_fn(async |_: Request<()>| Ok::<_, BoxError>(Response::new(())));
    let mut service = ServiceBuilder::new()
        .layer(EventLayer::queued())
        .layer(QueueLayer::new(10).unwrap())
        .layer(EventLayer::processing())
        .service(client);
    let call = service.ready().await.unwrap().call(get("http://h/"));
    assert_eq!(call.event().finished().await.status, RequestStatus::Completed);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_call_ends_as_cancelled_in_the_queue_and_on_the_wire() {
    let client = service_fn(async |_: Request<()>| {
        sleep(ms(1_000)).await;
        Ok::<_, BoxError>(Response::new(()))
    });
    let mut service = ServiceBuilder::new()
        .layer(EventLayer::queued())
        .layer(QueueLayer::new(10).unwrap())
        .layer(tower_outbound::ConcurrencyLimitLayer::new(1).unwrap())
        .layer(EventLayer::processing())
        .layer(EventLayer::calling())
        .service(client);
    let calling = service.ready().await.unwrap().call(get("http://h/"));
    let queued = service.ready().await.unwrap().call(get("http://h/"));
    pass(ms(100)).await;
    let events = [calling.event().clone(), queued.event().clone()];
    assert_eq!(
        events.each_ref().map(event::EventHandle::status),
        [RequestStatus::Calling, RequestStatus::Queued]
    );
    drop(queued);
    assert_eq!(events[1].status(), RequestStatus::Cancelled);
    drop(calling);
    settle().await;
    let event = events[0].snapshot();
    assert_eq!(event.status, RequestStatus::Cancelled);
    assert_eq!(event.time_total(), Some(ms(100)));
    assert_eq!(event.attempts[0].ended_at, event.completed_at);
}

#[tokio::test(start_paused = true)]
async fn a_detached_call_keeps_its_event() {
    let client = service_fn(async |_: Request<()>| {
        sleep(ms(10)).await;
        Ok::<_, BoxError>(Response::new(()))
    });
    let mut service = ServiceBuilder::new()
        .layer(EventLayer::queued())
        .layer(QueueLayer::new(10).unwrap())
        .layer(EventLayer::processing())
        .service(client);
    let call = service.ready().await.unwrap().call(get("http://h/"));
    let event = call.event().clone();
    call.into_inner().detach();
    assert_eq!(event.finished().await.status, RequestStatus::Completed);
}

#[tokio::test(start_paused = true)]
async fn a_panic_ends_the_event_as_failed_with_and_without_a_queue() {
    let panics = || service_fn(async |_: Request<()>| -> Result<Response<()>, BoxError> { panic!("at the disco") });
    let events = Events::new();
    let mut updates = events.subscribe();
    let unqueued = EventLayer::calling().report_to(&events).layer(panics());
    tokio::spawn(unqueued.oneshot(get("http://h/"))).await.unwrap_err();
    let event = first_record(&mut updates).await;
    assert_eq!(
        (event.status, event.error_type.as_deref()),
        (RequestStatus::Failed, Some("Panicked"))
    );

    let mut queued = ServiceBuilder::new()
        .layer(EventLayer::queued())
        .layer(QueueLayer::new(10).unwrap())
        .layer(EventLayer::processing())
        .layer(EventLayer::calling())
        .service(panics());
    let call = queued.ready().await.unwrap().call(get("http://h/"));
    let event = call.event().finished().await;
    assert_eq!(
        (event.status, event.error_type.as_deref()),
        (RequestStatus::Failed, Some("Panicked"))
    );
    assert_eq!(event.error_message.as_deref(), Some("the call panicked: at the disco"));
    call.await.unwrap_err();
}

#[derive(Clone)]
struct Twice(u8);

impl Policy<Request<()>, Response<()>, BoxError> for Twice {
    type Future = std::future::Ready<()>;

    fn retry(&mut self, _: &mut Request<()>, result: &mut Result<Response<()>, BoxError>) -> Option<Self::Future> {
        let again = self.0 > 0
            && result
                .as_ref()
                .is_ok_and(|response| response.status().is_server_error());
        self.0 = self.0.saturating_sub(1);
        again.then(|| std::future::ready(()))
    }

    fn clone_request(&mut self, request: &Request<()>) -> Option<Request<()>> {
        Some(request.clone())
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_is_retried_is_one_event_with_several_attempts() {
    let mut statuses = [503, 500, 200].into_iter();
    let client = service_fn(move |_: Request<()>| {
        let status = statuses.next().unwrap();
        async move {
            sleep(ms(10)).await;
            Ok::<_, BoxError>(Response::builder().status(status).body(()).unwrap())
        }
    });
    let events = Events::new();
    let mut updates = events.subscribe();
    let client = tower::buffer::Buffer::new(client, 10);
    let service = ServiceBuilder::new()
        .layer(EventLayer::processing().report_to(&events))
        .retry(Twice(2))
        .layer(EventLayer::calling())
        .service(client);
    service.oneshot(get("http://h/")).await.unwrap();
    let event = first_record(&mut updates).await;
    assert_eq!(event.status, RequestStatus::Completed);
    assert_eq!(event.response_status_code, Some(200));
    let codes: Vec<_> = event
        .attempts
        .iter()
        .map(|attempt| attempt.status_code.unwrap())
        .collect();
    assert_eq!(codes, [503, 500, 200]);
    assert_eq!(event.call_started_at, Some(event.attempts[0].started_at));
    assert_eq!(event.time_calling(), Some(ms(30)));
    assert_eq!(events.totals().opened, 1);
}

#[tokio::test(start_paused = true)]
async fn a_call_made_inside_a_call_has_its_own_event() {
    let events = Events::new();
    let layer = || {
        ServiceBuilder::new()
            .layer(EventLayer::processing().report_to(&events))
            .layer(EventLayer::calling().report_to(&events))
    };
    let inner = layer().service(service_fn(async |_: Request<()>| Ok::<_, BoxError>(Response::new(()))));
    let outer = layer().service(service_fn(move |request: Request<()>| inner.clone().oneshot(request)));
    outer.oneshot(get("http://h/")).await.unwrap();
    assert_eq!((events.totals().opened, events.totals().completed), (2, 2));
}

#[tokio::test(start_paused = true)]
async fn a_classifier_may_make_a_response_a_failure() {
    let events = Events::new();
    let mut updates = events.subscribe();
    let client = service_fn(async |_: Request<()>| {
        Ok::<_, BoxError>(Response::builder().status(StatusCode::BAD_GATEWAY).body(()).unwrap())
    });
    let layer = EventLayer::calling().describe(Http::default().fail_on(|status| status.is_server_error()));
    layer
        .report_to(&events)
        .layer(client)
        .oneshot(get("http://h/"))
        .await
        .unwrap();
    let event = first_record(&mut updates).await;
    assert_eq!(event.status, RequestStatus::Failed);
    assert_eq!(event.response_status_code, Some(502));
    assert_eq!(event.error_type.as_deref(), Some("HttpStatus"));
    assert_eq!(event.error_message.as_deref(), Some("502 Bad Gateway"));
}

#[tokio::test(start_paused = true)]
async fn requests_of_any_type_can_be_recorded() {
    #[derive(Clone)]
    struct Words;
    impl Describe<&'static str, usize> for Words {
        fn request(&self, words: &&'static str, details: &mut RequestDetails) {
            details.request_id("words").payload(*words).api_tokens(3);
        }
        fn response(&self, count: &usize, details: &mut ResponseDetails) {
            details.body(*count);
        }
    }
    let events = Events::new();
    let mut updates = events.subscribe();
    let count = || service_fn(async |words: &'static str| Ok::<_, BoxError>(words.split(' ').count()));
    EventLayer::queued()
        .describe(Words)
        .report_to(&events)
        .layer(count())
        .oneshot("a b c")
        .await
        .unwrap();
    let event = first_record(&mut updates).await;
    assert_eq!(
        (event.payload, event.response_body),
        (Some(Value::from("a b c")), Some(Value::from(3)))
    );
    assert_eq!((event.request_id.to_string().as_str(), event.api_tokens), ("words", 3));
    EventLayer::queued()
        .describe(Nothing)
        .layer(count())
        .oneshot("a b c")
        .await
        .unwrap();
}

#[tokio::test(start_paused = true)]
async fn notes_can_be_added_in_the_call_and_in_a_task_that_it_spawns() {
    let events = Events::new();
    let mut updates = events.subscribe();
    let client = service_fn(async |_: Request<()>| {
        event::current().unwrap().log("in the call, to https://u:p@h/");
        let carried = event::current().unwrap();
        tokio::spawn(carried.instrument(async {
            sleep(ms(1)).await;
            event::current().unwrap().log("in a task");
        }))
        .await?;
        Ok::<_, BoxError>(Response::new(()))
    });
    assert!(event::current().is_none());
    EventLayer::calling()
        .report_to(&events)
        .layer(client)
        .oneshot(get("http://h/"))
        .await
        .unwrap();
    assert!(event::current().is_none());
    let logs: Vec<_> = first_record(&mut updates)
        .await
        .logs
        .into_iter()
        .map(|entry| entry.message)
        .collect();
    assert_eq!(logs, ["in the call, to https://h/", "in a task"]);
}

#[tokio::test(start_paused = true)]
async fn a_handle_waits_for_every_change_and_for_the_end() {
    let client = service_fn(async |_: Request<()>| {
        sleep(ms(10)).await;
        Ok::<_, BoxError>(Response::new(()))
    });
    let mut service = ServiceBuilder::new()
        .layer(EventLayer::queued())
        .layer(QueueLayer::new(10).unwrap())
        .layer(EventLayer::calling())
        .service(client);
    let call = service.ready().await.unwrap().call(get("http://h/"));
    let mut event = call.event().clone();
    assert_eq!(event.changed().await, RequestStatus::Queued);
    assert_eq!(event.changed().await, RequestStatus::Calling);
    let watcher = tokio::spawn({
        let event = event.clone();
        async move { event.finished().await.status }
    });
    settle().await;
    assert!(!watcher.is_finished());
    call.await.unwrap();
    assert_eq!(event.changed().await, RequestStatus::Completed);
    assert_eq!(
        event.changed().await,
        RequestStatus::Completed,
        "an event that has ended is returned at once"
    );
    assert_eq!(watcher.await.unwrap(), RequestStatus::Completed);
}

#[tokio::test(start_paused = true)]
async fn what_a_handle_adds_to_the_record_wakes_watchers_and_is_redacted() {
    let client = service_fn(async |_: Request<()>| {
        sleep(ms(10)).await;
        // The response has a header, so the layer records more of the response than its status code. It must not
        // overwrite the body that the handle has set.
        Ok::<_, BoxError>(Response::builder().header("x-a", "b").body(()).unwrap())
    });
    let mut service = EventLayer::calling().layer(client);
    let call = service.call(get("http://h/"));
    let handle = call.event();
    let mut call = task::spawn(call);
    assert_pending!(call.poll());

    let mut watching = handle.clone();
    assert_eq!(watching.changed().await, RequestStatus::Calling);
    let mut change = task::spawn(watching.changed());
    assert_pending!(change.poll());
    handle.set_metadata("task", 7);
    assert!(change.is_woken());
    assert_eq!(assert_ready!(change.poll()), RequestStatus::Calling);
    handle.set_metadata("api_key", "s3cret");
    let body = [
        ("text", Value::from("see http://u:s3cret@h/")),
        ("token", Value::from("s3cret")),
    ];
    handle.set_response_body(body);

    pass(ms(10)).await;
    assert_ready_ok!(call.poll());
    handle.set_metadata("late", true);
    let event = handle.snapshot();
    assert_eq!(event.metadata["task"], Value::from(7));
    assert_eq!(event.metadata["late"], Value::from(true));
    assert_eq!(event.response_headers["x-a"], "b");
    let body = event.response_body.as_ref().unwrap();
    assert_eq!(body.get("text").and_then(Value::as_str), Some("see http://h/"));
    assert!(!format!("{event:?}").contains("s3cret"));
}

#[tokio::test(start_paused = true)]
async fn an_event_is_carried_to_another_thread_and_a_call_made_there_has_its_own_event() {
    let events = Events::default();
    let mut updates = events.subscribe();
    let layer = EventLayer::calling().report_to(&events);
    let inner = layer.layer(service_fn(async |_: Request<()>| Ok::<_, BoxError>(Response::new(()))));
    let client = service_fn(move |_: Request<()>| {
        let inner = inner.clone();
        async move {
            let event = event::current().unwrap();
            let id = event.request_id();
            let carried = std::thread::spawn(move || {
                assert!(event::current().is_none());
                let (seen, call) = event.in_scope(|| {
                    (
                        event::current().unwrap().request_id(),
                        inner.clone().call(get("http://in/")),
                    )
                });
                assert!(event::current().is_none());
                assert_ne!(call.event().request_id(), seen);
                seen
            });
            assert_eq!(carried.join().unwrap(), id);
            Ok::<_, BoxError>(Response::new(()))
        }
    });
    layer.layer(client).oneshot(get("http://out/")).await.unwrap();
    let outer = first_record(&mut updates).await;
    assert_eq!(outer.status, RequestStatus::Completed);
    assert_eq!(outer.endpoint_url.as_deref(), Some("http://out/"));
    // The inner call was dropped without being polled, so one of the two events is cancelled.
    let totals = events.totals();
    assert_eq!((totals.opened, totals.completed, totals.cancelled), (2, 1, 1));
}

#[test]
fn a_value_converts_from_rust_types_and_is_read_back() {
    assert_eq!(Value::from(u32::MAX), Value::Integer(4_294_967_295));
    assert_eq!(Value::from(i64::MIN).as_i64(), Some(i64::MIN));
    assert_eq!(Value::from(u64::MAX).as_i64(), None);
    assert_eq!(Value::from(i64::MAX as u64), Value::Integer(i64::MAX));
    assert_eq!(Value::from(true).to_string(), "true");
    assert_eq!(Value::from(0.5).to_string(), "0.5");
    assert_eq!(Value::from(f64::NAN).to_string(), "null");
    assert_eq!(Value::from(None::<&str>), Value::Null);
    assert_eq!(Value::from(Some("text")).as_str(), Some("text"));
    assert_eq!(Value::from(7).as_str(), None);
    let fields = Value::from(BTreeMap::from([("a".to_owned(), Value::from(vec![1.5]))]));
    assert_eq!(fields.to_string(), r#"{"a":[1.5]}"#);
    assert_eq!(fields.get("b"), None);
    assert_eq!(
        fields.get("a").and_then(|list| list.get("a")),
        None,
        "a list has no fields"
    );
}

#[tokio::test(start_paused = true)]
async fn a_subscriber_that_does_not_read_misses_updates_and_learns_how_many() {
    let events = Events::new();
    let mut updates = events.subscribe();
    let client = service_fn(async |_: Request<()>| Ok::<_, BoxError>(Response::new(())));
    let service = EventLayer::calling().report_to(&events).layer(client);
    for _ in 0..2_000 {
        service.clone().oneshot(get("http://h/")).await.unwrap();
    }
    let lagged = updates.recv().await.unwrap().unwrap_err();
    assert_eq!(lagged.missed(), 2_000 * 3 - 4_096);
    assert_eq!(
        lagged.to_string(),
        "the subscriber was too slow and has missed 1904 updates"
    );
    updates.recv().await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_log_is_bounded() {
    let client = service_fn(async |_: Request<()>| {
        for number in 0..5_000 {
            event::current().unwrap().log(format!("{number}"));
        }
        Ok::<_, BoxError>(Response::new(()))
    });
    let events = Events::new();
    let mut updates = events.subscribe();
    EventLayer::calling()
        .report_to(&events)
        .layer(client)
        .oneshot(get("http://h/"))
        .await
        .unwrap();
    let logs = first_record(&mut updates).await.logs;
    assert_eq!(logs.len(), 1_000);
    assert_eq!(logs.last().unwrap().message, "4001 more");
}

#[tokio::test(start_paused = true)]
async fn times_of_one_event_are_monotonic_and_in_utc() {
    let before = std::time::SystemTime::now() - Duration::from_secs(120);
    let client = service_fn(async |_: Request<()>| Ok::<_, BoxError>(Response::new(())));
    let events = Events::new();
    let mut updates = events.subscribe();
    EventLayer::calling()
        .report_to(&events)
        .layer(client)
        .oneshot(get("http://h/"))
        .await
        .unwrap();
    let event = first_record(&mut updates).await;
    assert!(event.created_at > before && event.created_at < before + Duration::from_secs(240));
    assert!(event.created_at <= event.call_started_at.unwrap());
    assert!(event.call_started_at <= event.completed_at);
    assert_eq!(event.updated_at, event.completed_at.unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_subscription_ends_when_everything_that_reports_is_dropped() {
    let events = Events::new();
    let mut updates = events.subscribe();
    let client = service_fn(async |_: Request<()>| Ok::<_, BoxError>(Response::new(())));
    let service = EventLayer::calling().report_to(&events).layer(client);
    drop(events);
    service.oneshot(get("http://h/")).await.unwrap();
    let mut seen = 0;
    while let Some(update) = updates.recv().await {
        update.unwrap();
        seen += 1;
    }
    assert_eq!(seen, 3);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_times_out_fails_and_records_how_long_it_waited() {
    let events = Events::new();
    let mut updates = events.subscribe();
    let client = service_fn(async |_: Request<()>| std::future::pending::<Result<Response<()>, BoxError>>().await);
    let limiter = RateLimiter::new(Limits::new().requests(Rate::per_second(20).burst(1).initial(0))).unwrap();
    let service = ServiceBuilder::new()
        .layer(EventLayer::processing().report_to(&events))
        .timeout(ms(70))
        .layer(RateLimitLayer::new(limiter))
        .layer(EventLayer::calling())
        .service(client);
    let calls = [
        tokio::spawn(service.clone().oneshot(get("http://h/"))),
        tokio::spawn(service.oneshot(get("http://h/"))),
    ];
    let first = updates.recv().await.unwrap().unwrap().event.finished().await;
    assert_eq!(
        (first.status, first.error_type.as_deref()),
        (RequestStatus::Failed, Some("Elapsed"))
    );
    assert_eq!(
        (first.time_waiting(), first.time_calling()),
        (Some(ms(50)), Some(ms(20)))
    );
    assert_eq!(first.attempts[0].error_type.as_deref(), Some("Cancelled"));
    for call in calls {
        call.await.unwrap().unwrap_err();
    }
    // The second call waited for the rate limit until its timeout, so it had no attempt.
    let mut last = None;
    drop(events);
    while let Some(update) = updates.recv().await {
        last = Some(update.unwrap().event.snapshot());
    }
    let second = last.unwrap();
    assert_eq!((second.time_waiting(), second.time_calling()), (Some(ms(70)), None));
}

#[tokio::test(start_paused = true)]
async fn a_count_of_tokens_is_not_redacted() {
    let client = service_fn(async |_: Request<()>| Ok::<_, BoxError>(Response::new(())));
    let events = Events::new();
    let mut updates = events.subscribe();
    let usage = Value::from([
        ("token_count", 12.into()),
        ("token", Value::from("s3")),
        ("sig", Value::from(3)),
    ]);
    let request = Request::get("/").extension(Payload(usage)).body(()).unwrap();
    EventLayer::calling()
        .report_to(&events)
        .layer(client)
        .oneshot(request)
        .await
        .unwrap();
    assert_eq!(
        first_record(&mut updates).await.payload.unwrap().to_string(),
        r#"{"sig":3,"token":"[redacted]","token_count":12}"#
    );
}
