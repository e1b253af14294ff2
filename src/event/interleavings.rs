//! Loom tests of an event: the threads that write it and the threads that wait for its changes run in every order in
//! which they can interleave.

use super::{
    details::ResponseDetails,
    events::Events,
    handle::{Stage, Writer},
    state::Outcome,
    status::RequestStatus,
};
use crate::sync::model;
use loom::{future::block_on, thread};

fn open(events: &Events) -> Writer {
    events.open(|_| (), Stage::Queued, false).0
}

#[test]
fn an_event_that_several_writers_end_ends_once() {
    model(3, || {
        let events = Events::new();
        let writer = open(&events);
        let event = writer.handle();
        let ends = [Outcome::Response(ResponseDetails::default()), Outcome::Cancelled].map(|outcome| {
            let other = writer.at(Stage::Processing);
            thread::spawn(move || other.finish(outcome))
        });
        drop(writer);
        for end in ends {
            end.join().unwrap();
        }
        let totals = events.totals();
        assert_eq!((totals.opened, totals.ended()), (1, 1));
        assert_eq!(totals.completed == 1, event.status() == RequestStatus::Completed);
        assert_eq!(totals.cancelled == 1, event.status() == RequestStatus::Cancelled);
    });
}

#[test]
fn dropping_the_last_writer_cancels_an_event_without_an_outcome() {
    model(3, || {
        let events = Events::new();
        let writer = open(&events);
        let event = writer.handle();
        let others = [Stage::Processing, Stage::Calling].map(|stage| {
            let other = writer.at(stage);
            thread::spawn(move || drop(other))
        });
        drop(writer);
        for other in others {
            other.join().unwrap();
        }
        assert_eq!(event.status(), RequestStatus::Cancelled);
        assert_eq!(events.totals().cancelled, 1);
    });
}

#[test]
fn every_watcher_sees_the_end() {
    model(3, || {
        let events = Events::new();
        let writer = open(&events);
        let watchers = [(); 2].map(|()| {
            let event = writer.handle();
            thread::spawn(move || block_on(event.finished()).status)
        });
        writer.mark(RequestStatus::Queued);
        drop(writer);
        for watcher in watchers {
            assert_eq!(watcher.join().unwrap(), RequestStatus::Cancelled);
        }
    });
}

#[test]
fn an_observer_sees_an_event_opened_before_it_has_ended_and_ended_once() {
    use super::{change::CallEnd, handle::EventHandle, observer::Observer};
    use loom::sync::{Arc, Mutex};

    struct Seen(Arc<Mutex<Vec<&'static str>>>);
    impl Observer for Seen {
        fn call_opened(&self, _: &EventHandle) {
            self.0.lock().unwrap().push("opened");
        }
        fn call_ended(&self, call: &EventHandle, end: &CallEnd) {
            assert_eq!(call.status(), end.status);
            self.0.lock().unwrap().push("ended");
        }
    }
    model(3, || {
        let events = Events::new();
        let seen = Arc::new(Mutex::new(Vec::new()));
        events.observe(Seen(seen.clone()));
        let writer = open(&events);
        let ends = [Outcome::Response(ResponseDetails::default()), Outcome::Cancelled].map(|outcome| {
            let other = writer.at(Stage::Processing);
            thread::spawn(move || other.finish(outcome))
        });
        drop(writer);
        for end in ends {
            end.join().unwrap();
        }
        assert_eq!(*seen.lock().unwrap(), ["opened", "ended"]);
    });
}
