//! Loom tests of claims: every order in which threads can claim permits, confirm and drop the claims, wait for permits
//! and revoke claims, with up to three preemptions.

use super::{Acquire, Semaphore};
use crate::sync::model;
use loom::{
    future::block_on,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};
use std::{
    future::poll_fn,
    sync::Arc,
    task::{Context, Waker},
};

impl Semaphore {
    /// Does what the wait queue does 5 ms after it has found claims that block an acquirer. Time does not pass under loom.
    pub(crate) fn revoke_claims(&self) {
        self.inner.queue.update(|permits, _| {
            permits.state.claims.age();
            permits.revoke_old_claims();
        });
    }
}

/// Claims a permit as a call does, and takes it as the call's future does when it is polled.
fn call(semaphore: &Semaphore, in_use: &AtomicUsize) {
    let claimed = semaphore.acquire().claim().map(|mut claim| claim.confirm());
    let permit = match claimed {
        Ok(Ok(permit)) => permit,
        Ok(Err(acquire)) | Err(acquire) => {
            let mut acquire = Some(acquire);
            block_on(poll_fn(|cx| Acquire::poll_acquire(&mut acquire, cx))).unwrap()
        }
    };
    assert_eq!(in_use.fetch_add(1, Ordering::Relaxed), 0);
    in_use.fetch_sub(1, Ordering::Relaxed);
    drop(permit);
}

#[test]
fn no_more_permits_are_held_than_there_are_while_claims_are_confirmed_and_revoked() {
    model(3, || {
        let semaphore = Semaphore::new(1);
        let in_use = Arc::new(AtomicUsize::new(0));
        let calls = [(); 2].map(|()| {
            let (semaphore, in_use) = (semaphore.clone(), in_use.clone());
            thread::spawn(move || call(&semaphore, &in_use))
        });
        semaphore.revoke_claims();
        for call in calls {
            call.join().unwrap();
        }
        assert_eq!(semaphore.held(), 0);
    });
}

#[test]
fn a_dropped_claim_gives_its_permit_back_once_whether_or_not_it_was_revoked() {
    model(3, || {
        let semaphore = Semaphore::new(1);
        let in_use = Arc::new(AtomicUsize::new(0));
        let dropped = thread::spawn({
            let semaphore = semaphore.clone();
            move || drop(semaphore.acquire().claim())
        });
        let calls = thread::spawn({
            let (semaphore, in_use) = (semaphore.clone(), in_use.clone());
            move || call(&semaphore, &in_use)
        });
        semaphore.revoke_claims();
        dropped.join().unwrap();
        calls.join().unwrap();
        assert_eq!(semaphore.held(), 0);
        assert!(!semaphore.state().claims.has_old() && !semaphore.state().claims.age());
    });
}

#[test]
fn an_acquirer_that_waits_behind_a_claim_finds_it() {
    model(3, || {
        let semaphore = Semaphore::new(1);
        let claims = thread::spawn({
            let semaphore = semaphore.clone();
            move || semaphore.acquire().claim()
        });
        let waits = thread::spawn({
            let semaphore = semaphore.clone();
            move || {
                let mut acquire = semaphore.acquire();
                let is_ready = acquire.poll_ready(&mut Context::from_waker(Waker::noop())).is_ready();
                (acquire, is_ready)
            }
        });
        let (claim, (acquire, is_ready)) = (claims.join().unwrap(), waits.join().unwrap());
        // Unless the acquirer has found a permit, the queue knows that it has to look at the claim again.
        assert!(claim.is_ok());
        assert_eq!(semaphore.state().claims.has_old(), !is_ready);
        drop((claim, acquire));
        assert_eq!(semaphore.held(), 0);
    });
}

#[test]
fn a_permit_that_is_made_a_claim_is_confirmed_or_revoked_and_given_back_once() {
    model(3, || {
        let semaphore = Semaphore::new(1);
        let in_use = Arc::new(AtomicUsize::new(0));
        let permit = Acquire::try_acquire(&mut semaphore.acquire()).unwrap().unwrap();
        let claims = thread::spawn({
            let in_use = in_use.clone();
            move || {
                let permit = match permit.into_claim() {
                    Ok(mut claim) => claim.confirm().ok(),
                    Err(permit) => Some(permit),
                };
                if let Some(permit) = permit {
                    assert_eq!(in_use.fetch_add(1, Ordering::Relaxed), 0);
                    in_use.fetch_sub(1, Ordering::Relaxed);
                    drop(permit);
                }
            }
        });
        let calls = thread::spawn({
            let (semaphore, in_use) = (semaphore.clone(), in_use.clone());
            move || call(&semaphore, &in_use)
        });
        semaphore.revoke_claims();
        claims.join().unwrap();
        calls.join().unwrap();
        assert_eq!(semaphore.held(), 0);
    });
}
