//! Every order in which those who write an event and those who watch it can meet.

use super::{
    describe::ResponseDetails, events::Events, handle::Writer, record::RequestStatus, scope::Stage, state::Outcome,
};
use crate::sync::model;
use loom::{future::block_on, thread};

fn open(events: &Events) -> Writer {
    Writer::open(|_| (), Some(events.clone()), Stage::Queued).0
}

#[test]
fn an_event_ends_once_however_many_end_it() {
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
            end.attach().unwrap();
        }
        let totals = events.totals();
        assert_eq!((totals.opened, totals.ended()), (1, 1));
        assert_eq!(totals.completed == 1, event.status() == RequestStatus::Completed);
        assert_eq!(totals.cancelled == 1, event.status() == RequestStatus::Cancelled);
    });
}

#[test]
fn the_last_writer_to_go_cancels_what_has_no_outcome() {
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
            other.attach().unwrap();
        }
        assert_eq!(event.status(), RequestStatus::Cancelled);
        assert_eq!(events.totals().cancelled, 1);
    });
}

#[test]
fn whoever_watches_sees_the_end() {
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
            assert_eq!(watcher.attach().unwrap(), RequestStatus::Cancelled);
        }
    });
}
