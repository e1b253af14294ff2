//! An event against its transition table: any stack of layers, any story of attempts, ended at any moment.
//!
//! The table is the model: which statuses a call goes through, and when, follows from the layers that are there, from
//! what each attempt comes to, and from the moment at which the caller gives up.

mod support;

use futures_util::FutureExt;
use proptest::{collection::vec, option, prelude::*};
use std::{
    panic::{self, AssertUnwindSafe},
    sync::Arc,
    time::Duration,
};
use support::model::{Outcome, check};
use tokio::time::{Instant, advance, sleep};
use tower::{BoxError, Layer, Service, ServiceExt, service_fn, util::BoxCloneService};
use tower_outbound::{
    EventLayer, NetworkRequestEvent, QueueLayer, RequestStatus,
    event::{self, Events, Nothing, Subscription},
};

const MEANT: &str = "a panic that is meant";
const MS: Duration = Duration::from_millis(1);
/// Whoever hangs is given up by then.
const PATIENCE: u32 = 24;

type Calls = BoxCloneService<(), (), BoxError>;

#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Response,
    Error,
    Panic,
    Never,
}

/// One time on the wire.
#[derive(Clone, Debug)]
struct Attempt {
    takes: u32,
    end: End,
    /// What the client does to the event meanwhile.
    notes: bool,
}

#[derive(Clone, Debug)]
struct Story {
    is_queued: bool,
    has_queue: bool,
    is_processing: bool,
    is_calling: bool,
    attempts: Vec<Attempt>,
    /// The caller drops the call half a millisecond after this one.
    given_up: Option<u32>,
}

fn story() -> impl Strategy<Value = Story> {
    let end =
        prop_oneof![3 => Just(End::Error), 2 => Just(End::Response), 1 => Just(End::Panic), 1 => Just(End::Never)];
    let attempt = (0..6_u32, end, any::<bool>()).prop_map(|(takes, end, notes)| Attempt { takes, end, notes });
    let layers = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>())
        .prop_filter("somebody has to open an event", |(queued, _, processing, calling)| {
            *queued || *processing || *calling
        });
    (layers, vec(attempt, 0..5), option::of(0..20_u32)).prop_map(
        |((is_queued, has_queue, is_processing, is_calling), attempts, given_up)| Story {
            is_queued,
            has_queue,
            is_processing,
            is_calling,
            attempts,
            given_up,
        },
    )
}

// === The model ===

/// What the record must say, with times in milliseconds since the call was made.
#[derive(Debug, PartialEq)]
struct Told {
    statuses: Vec<RequestStatus>,
    ended_at: Duration,
    attempts: Vec<(Duration, Duration, Option<&'static str>)>,
    notes: usize,
}

impl Story {
    fn told(&self) -> Told {
        let given_up = self.given_up.unwrap_or(PATIENCE) * MS + MS / 2;
        let mut at = Duration::ZERO;
        let mut outcome = Some(RequestStatus::Failed);
        let mut attempts = Vec::new();
        let mut notes = 0;
        for attempt in &self.attempts {
            let ends = at + attempt.takes * MS;
            notes += usize::from(attempt.notes);
            if attempt.end == End::Never || ends > given_up {
                attempts.push((at, given_up, Some("Cancelled")));
                outcome = None;
                break;
            }
            attempts.push(match attempt.end {
                End::Response => (at, ends, None),
                End::Error => (at, ends, Some("an error")),
                End::Panic | End::Never => (at, ends, Some("Panicked")),
            });
            at = ends;
            match attempt.end {
                End::Response => outcome = Some(RequestStatus::Completed),
                End::Error => continue,
                End::Panic | End::Never => {}
            }
            break;
        }
        // Without an event below that layer, nobody opens one before the first attempt.
        let opens = [
            (self.is_queued, RequestStatus::Pending),
            (self.is_queued && self.has_queue, RequestStatus::Queued),
            (self.is_processing, RequestStatus::Processing),
            (self.is_calling && !attempts.is_empty(), RequestStatus::Calling),
        ];
        let mut statuses: Vec<_> = opens
            .into_iter()
            .filter_map(|(is, status)| is.then_some(status))
            .collect();
        if !self.is_queued && !statuses.is_empty() {
            statuses.insert(0, RequestStatus::Pending);
        }
        statuses.push(outcome.unwrap_or(RequestStatus::Cancelled));
        Told {
            statuses,
            ended_at: if outcome.is_some() { at } else { given_up },
            attempts: if self.is_calling { attempts } else { Vec::new() },
            notes,
        }
    }

    /// Whether each attempt is a call of its own, as there is no layer above that it could belong to.
    fn is_one_call(&self) -> bool {
        self.is_queued || self.is_processing
    }
}

// === What is tested ===

fn stack(story: &Story, events: &Events) -> Calls {
    let layer = |layer: EventLayer| layer.report_to(events).describe(Nothing);
    let wire = service_fn(async |attempt: Attempt| {
        if attempt.notes {
            let event = event::current().expect("there is a layer above");
            event.log("noted");
            event.in_scope(|| assert_eq!(event::current().unwrap().request_id(), event.request_id()));
            event.set_metadata("noted", true);
        }
        if attempt.takes > 0 {
            sleep(attempt.takes * MS).await;
        }
        match attempt.end {
            End::Response => Ok(()),
            End::Error => Err(BoxError::from("an error")),
            End::Panic => panic!("{MEANT}"),
            End::Never => std::future::pending().await,
        }
    });
    let wire: BoxCloneService<Attempt, (), BoxError> = if story.is_calling {
        layer(EventLayer::calling())
            .layer(wire)
            .map_err(BoxError::from)
            .boxed_clone()
    } else {
        wire.boxed_clone()
    };
    let attempts = Arc::new(story.attempts.clone());
    let retries = service_fn(move |(): ()| {
        let (attempts, mut wire) = (attempts.clone(), wire.clone());
        async move {
            let mut last = Err("no attempt was made".into());
            for attempt in attempts.iter() {
                last = wire.call(attempt.clone()).await;
                if last.is_ok() {
                    break;
                }
            }
            last
        }
    });
    let mut stack = retries.boxed_clone();
    if story.is_processing {
        stack = layer(EventLayer::processing())
            .layer(stack)
            .map_err(BoxError::from)
            .boxed_clone();
    }
    if story.has_queue {
        stack = QueueLayer::new(2)
            .unwrap()
            .layer(stack)
            .map_err(BoxError::from)
            .boxed_clone();
    }
    if story.is_queued {
        stack = layer(EventLayer::queued())
            .layer(stack)
            .map_err(BoxError::from)
            .boxed_clone();
    }
    stack
}

async fn go_through(story: Story) -> Outcome {
    let events = Events::new();
    let mut updates = events.subscribe();
    let mut stack = stack(&story, &events);
    let told = story.told();

    stack.ready().await.unwrap();
    let call = AssertUnwindSafe(stack.call(())).catch_unwind();
    let watched = tokio::spawn(watch(events.subscribe()));
    let task = tokio::spawn(call);
    let given_up = story.given_up.unwrap_or(PATIENCE) * MS + MS / 2;
    tokio::task::yield_now().await;
    // By hand: the clock's own steps are of a millisecond.
    let begun = Instant::now();
    while !task.is_finished() && begun.elapsed() < given_up {
        advance(MS / 2).await;
        for _ in 0..8 {
            tokio::task::yield_now().await;
        }
    }
    task.abort();
    let _ = task.await;
    for _ in 0..8 {
        tokio::task::yield_now().await;
    }
    drop((stack, events));

    let seen = watched.await.unwrap();
    let mut statuses = Vec::new();
    let mut last = None;
    while let Some(update) = updates.recv().await {
        let update = update.expect("nobody lags");
        statuses.push(update.status);
        last = Some(update.event.snapshot());
    }
    let event = last.expect("an event was opened");
    prop_assert_eq!(&statuses, &told.statuses);
    prop_assert!(statuses.is_sorted(), "only forward: {statuses:?}");
    prop_assert_eq!(statuses.iter().filter(|status| status.is_terminal()).count(), 1);
    prop_assert!(is_part(&seen, &statuses), "{seen:?} of {statuses:?}");
    prop_assert_eq!(seen.last(), statuses.last());
    compare(&event, &told)
}

/// What somebody sees who awaits one change after the other.
async fn watch(mut updates: Subscription) -> Vec<RequestStatus> {
    let Some(Ok(first)) = updates.recv().await else {
        return Vec::new();
    };
    drop(updates);
    let mut event = first.event;
    let mut seen = Vec::new();
    loop {
        let status = event.changed().await;
        if seen.last() != Some(&status) {
            seen.push(status);
        }
        if status.is_terminal() {
            return seen;
        }
    }
}

fn is_part(part: &[RequestStatus], all: &[RequestStatus]) -> bool {
    let mut all = all.iter();
    part.iter().all(|status| all.any(|other| other == status))
}

fn compare(event: &NetworkRequestEvent, told: &Told) -> Outcome {
    let since = |at: std::time::SystemTime| at.duration_since(event.created_at).expect("time goes forward");
    prop_assert_eq!(Some(&event.status), told.statuses.last());
    let ended_at = event.completed_at.map(since);
    prop_assert_eq!(ended_at, Some(told.ended_at));
    let times = [
        event.queued_at,
        event.processing_started_at,
        event.call_started_at,
        event.completed_at,
    ];
    let times: Vec<_> = times.into_iter().flatten().collect();
    prop_assert!(times.is_sorted(), "{event:?}");
    for (status, at) in [
        (RequestStatus::Queued, event.queued_at),
        (RequestStatus::Processing, event.processing_started_at),
        (RequestStatus::Calling, event.call_started_at),
    ] {
        prop_assert_eq!(told.statuses.contains(&status), at.is_some(), "{:?}", status);
    }
    let attempts: Vec<_> = event
        .attempts
        .iter()
        .map(|attempt| (since(attempt.started_at), attempt.ended_at.map(since)))
        .collect();
    let expected: Vec<_> = told
        .attempts
        .iter()
        .map(|(start, end, _)| (*start, Some(*end)))
        .collect();
    prop_assert_eq!(attempts, expected);
    for (attempt, (_, _, error)) in event.attempts.iter().zip(&told.attempts) {
        match error {
            // An error in a box has no type, but a text.
            Some("an error") => prop_assert_eq!(attempt.error_message.as_deref(), Some("an error")),
            kind => prop_assert_eq!(attempt.error_type.as_deref(), *kind),
        }
    }
    prop_assert_eq!(event.logs.len(), told.notes);
    prop_assert_eq!(event.metadata.contains_key("noted"), told.notes > 0);
    prop_assert_eq!(event.error_message.is_some(), event.status == RequestStatus::Failed);
    Ok(())
}

#[test]
fn an_event_goes_through_its_statuses_in_order_and_ends_once_as_the_table_says() {
    let usual = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if info.payload_as_str() != Some(MEANT) {
            usual(info);
        }
    }));
    check(
        file!(),
        &story().prop_filter("each attempt would be a call of its own", Story::is_one_call),
        go_through,
    );
}
