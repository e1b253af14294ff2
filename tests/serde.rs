//! Tests of events and configurations as JSON.

mod support;

use http::{Request, Response};
use support::ms;
use tower::{BoxError, service_fn};
use tower_outbound::{
    Call, Executor, NetworkRequestEvent, Rate, RequestId, RequestStatus, event::Value, executor::Config,
};

#[tokio::test(start_paused = true)]
async fn an_event_is_written_as_json_and_read_back_unchanged() {
    let client = service_fn(async |_: Request<()>| {
        tokio::time::sleep(ms(5)).await;
        tower_outbound::event::current().unwrap().log("noted");
        Ok::<_, BoxError>(
            Response::builder()
                .header("x-many", "1")
                .header("x-many", "2")
                .header("x-one", "1")
                .body(())
                .unwrap(),
        )
    });
    let executor = Executor::builder().build(client).unwrap();
    executor.start().unwrap();
    let request = Request::get("http://localhost/")
        .header("authorization", "Bearer s3")
        .body(())
        .unwrap();
    let call = Call::from(request)
        .request_id("mine")
        .tokens(5)
        .metadata("task", 7)
        .payload(vec![1, 2]);
    let event = executor.submit(call).await.unwrap().event().finished().await;

    let json = serde_json::to_value(&event).unwrap();
    assert_eq!(json["request_id"], "mine");
    assert_eq!(json["status"], "COMPLETED");
    assert_eq!(json["api_tokens"], 5);
    assert_eq!(json["metadata"]["task"], 7);
    assert_eq!(json["payload"], serde_json::json!([1, 2]));
    assert_eq!(json["headers"]["authorization"], "[redacted]");
    assert_eq!(json["response_headers"]["x-many"], serde_json::json!(["1", "2"]));
    assert_eq!(json["response_headers"]["x-one"], "1");
    assert_eq!(json["logs"][0]["message"], "noted");
    assert!(json["created_at"].as_str().unwrap().ends_with('Z'));
    assert!(json["error_type"].is_null());

    let back: NetworkRequestEvent = serde_json::from_value(json).unwrap();
    assert_eq!(back, event);
    assert_eq!(back.time_calling(), Some(ms(5)));
}

#[tokio::test(start_paused = true)]
async fn waits_are_written_with_the_name_of_their_cause_and_in_seconds() {
    let client = service_fn(async |_: Request<()>| Ok::<_, BoxError>(Response::new(())));
    let executor = Executor::builder()
        .requests(Rate::per_second(4).burst(1))
        .build(client)
        .unwrap();
    executor.start().unwrap();
    executor.submit(Request::new(())).await.unwrap().await.unwrap();
    let event = executor
        .submit(Request::new(()))
        .await
        .unwrap()
        .event()
        .finished()
        .await;
    let json = serde_json::to_value(&event).unwrap();
    assert_eq!(
        json["waits"],
        serde_json::json!([{ "cause": "budget:requests", "seconds": 0.25 }])
    );
    let back: NetworkRequestEvent = serde_json::from_value(json.clone()).unwrap();
    assert_eq!(back, event);
    // A record of an earlier version has none.
    let mut older = json;
    older.as_object_mut().unwrap().remove("waits");
    let back: NetworkRequestEvent = serde_json::from_value(older).unwrap();
    assert_eq!(back.waits, []);
}

#[test]
fn statuses_and_ids_are_written_as_texts() {
    for status in RequestStatus::ALL {
        assert_eq!(serde_json::to_value(status).unwrap(), status.as_str());
        assert_eq!(
            serde_json::from_value::<RequestStatus>(status.as_str().into()).unwrap(),
            status
        );
    }
    for id in [
        RequestId::random(),
        RequestId::from("own"),
        RequestId::from("67e55044-10b1-426f-9247-bb680e5fe0c8"),
        RequestId::from("A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"),
    ] {
        let json = serde_json::to_value(&id).unwrap();
        assert_eq!(json, id.to_string());
        assert_eq!(serde_json::from_value::<RequestId>(json).unwrap(), id);
    }
}

#[test]
fn a_value_is_written_as_the_json_it_was_read_from() {
    let text = r#"{"a":[1,-2,1.5,18446744073709551615,true,null,"x\"\\\n"],"b":{}}"#;
    let value: Value = serde_json::from_str(text).unwrap();
    assert_eq!(serde_json::to_string(&value).unwrap(), text);
    assert_eq!(value.to_string(), text);
}

#[test]
fn a_config_has_a_default_for_each_field_and_rejects_unknown_fields() {
    let config: Config = serde_json::from_str("{}").unwrap();
    assert_eq!(config, Config::default());
    assert_eq!(
        serde_json::from_str::<Config>(&serde_json::to_string(&config).unwrap()).unwrap(),
        config
    );

    let config: Config = serde_json::from_str(
        r#"{ "queue_capacity": 500, "concurrency_limit": 5, "requests_rate": 10.0, "requests_period_secs": 1.0,
             "tokens_rate": 10000.0, "tokens_period_secs": 60.0, "workers": 3 }"#,
    )
    .unwrap();
    let executor = config.into_builder().unwrap().build_for_closures::<()>().unwrap();
    let available = executor.monitor().limiter().available();
    assert_eq!((available.requests, available.tokens), (Some(10), Some(10_000)));
    assert_eq!(executor.monitor().concurrency().get(), 5);

    let error = serde_json::from_str::<Config>(r#"{ "request_rate": 1 }"#).unwrap_err();
    assert!(error.to_string().contains("unknown field `request_rate`"));
    for bad in [
        r#"{ "queue_capacity": -1 }"#,
        r#"{ "workers": 1.5 }"#,
        r#"{ "requests_rate": "fast" }"#,
    ] {
        serde_json::from_str::<Config>(bad).unwrap_err();
    }
}

#[test]
fn a_config_has_rates_of_budgets_by_name() {
    let text = r#"{ "requests_rate": 50, "requests_period_secs": 60, "budgets": {
        "requests": [{ "rate": 40, "period_secs": 86400 }],
        "input_tokens": [{ "rate": 30000 }], "output_tokens": [{ "rate": 8000, "burst": 4000 }],
        "images": [{ "rate": 5, "period_secs": 1 }, { "rate": 3, "period_secs": 3600 }] } }"#;
    let config: Config = serde_json::from_str(text).unwrap();
    let written = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<Config>(&written).unwrap(), config);
    let executor = config.into_builder().unwrap().build_for_closures::<()>().unwrap();
    let available = executor.monitor().available();
    assert_eq!((available.requests, available.tokens), (Some(40), None));
    assert_eq!(
        (available.input_tokens, available.output_tokens),
        (Some(30_000), Some(4_000))
    );
    assert_eq!(available.of("images"), Some(3));
}

#[test]
fn a_budget_of_a_config_that_is_wrong_is_an_error_that_names_it() {
    for (budgets, field) in [
        (r#"{ "Images": [{ "rate": 1 }] }"#, "budgets.Images"),
        (r#"{ "": [{ "rate": 1 }] }"#, "budgets."),
        // Other spellings of built-in budgets would be budgets that no call takes anything of.
        (r#"{ "input-tokens": [{ "rate": 1 }] }"#, "budgets.input-tokens"),
        (r#"{ "inputTokens": [] }"#, "budgets.inputTokens"),
        (r#"{ "request": [{ "rate": 1 }] }"#, "budgets.request"),
        (r#"{ "images": [{ "rate": 0 }] }"#, "budgets.images.rate"),
        (
            r#"{ "images": [{ "rate": 1, "period_secs": -1 }] }"#,
            "budgets.images.period_secs",
        ),
        (
            r#"{ "images": [{ "rate": 1, "period_secs": 0 }] }"#,
            "budgets.images.period_secs",
        ),
        (
            r#"{ "output_tokens": [{ "rate": 1, "burst": 0.5 }] }"#,
            "budgets.output_tokens.burst",
        ),
        (
            r#"{ "a": [{ "rate": 1 }], "b": [{ "rate": 1 }], "c": [{ "rate": 1 }], "d": [{ "rate": 1 }], "e": [{ "rate": 1 }] }"#,
            "budgets",
        ),
    ] {
        let config: Config = serde_json::from_str(&format!(r#"{{ "budgets": {budgets} }}"#)).unwrap();
        let error = config.into_builder().unwrap_err();
        assert_eq!(error.field(), field, "{error}");
    }
    for (budgets, named) in [
        (r#"{ "images": [{ "rat": 1 }] }"#, "unknown field `rat`"),
        (r#"{ "images": [{ "period_secs": 1 }] }"#, "missing field `rate`"),
    ] {
        let error = serde_json::from_str::<Config>(&format!(r#"{{ "budgets": {budgets} }}"#)).unwrap_err();
        assert!(error.to_string().contains(named), "{error}");
    }
}

#[test]
fn a_config_without_rates_can_be_used_with_a_shared_limiter() {
    let limiter = tower_outbound::RateLimiter::new(tower_outbound::Limits::new()).unwrap();
    let config: Config = serde_json::from_str(r#"{ "workers": 2 }"#).unwrap();
    let builder = config.into_builder().unwrap().limiter(limiter.clone());
    builder.build_for_closures::<()>().unwrap();
    let config: Config = serde_json::from_str(r#"{ "tokens_rate": 5 }"#).unwrap();
    let builder = config.into_builder().unwrap().limiter(limiter);
    assert_eq!(builder.build_for_closures::<()>().unwrap_err().field(), "limiter");
}
